#!/usr/bin/env bash
# The whole CPU test suite, in the environment that tools/quickstart.sh uses too. Arguments go to pytest:
#   bash tools/test.sh                          everything (GPU and SLURM tests say why they are skipped)
#   bash tools/test.sh -m "not slow" -x         the quick ones, stop at the first failure
#   bash tools/test.sh tests/data -k indexed    one room, one subject
set -euo pipefail
# shellcheck source=tools/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

use_environment dev
cd "$ROOT"
exec "$PYTHON" -m pytest "$@"
