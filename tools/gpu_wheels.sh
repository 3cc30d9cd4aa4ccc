#!/usr/bin/env bash
# The libraries that megalm and its benchmarks need beside torch and triton, as wheels for a machine without a network:
#   bash tools/gpu_wheels.sh FOLDER      for Python 3.12 on x86-64 Linux, under 64 MB in all
# tools/gpu_round.sh installs from FOLDER what the machine lacks. Without dependencies: each is named here, in the version
# that fits the others. DeepSpeed and antlr are sources on the index: they are built here, DeepSpeed without its kernels.
# Makes or uses the environment that tools/env.sh describes. exit 2: wrong arguments, and nothing was made.
set -euo pipefail
# shellcheck source=tools/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

wrong() { (fail "$1" "usage: bash tools/gpu_wheels.sh FOLDER") || exit 2; }

for argument in "$@"; do
    case $argument in
    -h | --help) sed -n '2,6s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit 0 ;;
    -*) wrong "unknown option $argument" ;;
    esac
done
[ $# -eq 1 ] || wrong "one folder is wanted, not $#"
[ -n "$1" ] || wrong "the name of the folder is empty"
[ ! -e "$1" ] || [ -d "$1" ] || wrong "$1 is no folder"
old=$(compgen -G "$1/*.whl" || true)
[ -z "$old" ] || fail "$1 already holds wheels, and two versions of one would stop the install" "use an empty folder"

use_environment run
LIMIT_MB=64
WHEELS=(
    "hydra-core>=1.3.2,<1.4" "omegaconf>=2.3,<2.4" pyyaml tqdm                              # megalm
    hjson "pydantic==2.12.5" "pydantic-core==2.41.5" annotated-types typing-inspection      # deepspeed
    typing-extensions einops msgpack ninja psutil py-cpuinfo packaging
    tokenizers safetensors "numpy>=2,<2.4"
    liger-kernel                                                                            # a peer of the benchmarks
    pytest pytest-timeout pluggy iniconfig pygments hypothesis sortedcontainers setuptools  # tests, and to install megalm
    matplotlib contourpy cycler fonttools kiwisolver pillow pyparsing python-dateutil six   # pictures
)
SOURCES=("deepspeed>=0.19.8,<0.20" "antlr4-python3-runtime==4.9.3")
platforms=()
for version in 2_28 2_27 2_26 2_24 2_17 2_12 2_5; do platforms+=(--platform "manylinux_${version}_x86_64"); done
platforms+=(--platform manylinux2014_x86_64 --platform manylinux2010_x86_64 --platform manylinux1_x86_64)

mkdir -p "$1"
folder=$(cd "$1" && pwd)

say "collecting ${#WHEELS[@]} wheels for Python 3.12"
"$PYTHON" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --python-version 3.12 \
    --implementation cp --abi cp312 --abi abi3 --abi none "${platforms[@]}" --dest "$folder" "${WHEELS[@]}" ||
    fail "pip download failed" "what is missing is named above"

say "building ${#SOURCES[@]} wheels from sources"
DS_BUILD_OPS=0 "$PYTHON" -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation \
    --wheel-dir "$folder" "${SOURCES[@]}" || fail "pip wheel failed" "what went wrong is said above"
bound=$(compgen -G "$folder/deepspeed-*.whl")
[[ $bound == *-none-any.whl ]] || fail "$bound is bound to this machine" "its kernels were built: unset DS_BUILD_*"

megabytes=$(($(du -scB1 "$folder"/*.whl | tail -n 1 | cut -f 1) / 1000000))
say "$(find "$folder" -name '*.whl' | wc -l) wheels, $megabytes MB, in $folder"
[ "$megabytes" -lt "$LIMIT_MB" ] || fail "$megabytes MB are more than $LIMIT_MB MB"
