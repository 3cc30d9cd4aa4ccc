#!/usr/bin/env bash
# The project as a user gets it: builds the wheel, installs it into an environment of its own, and runs it from an empty
# folder. The libraries are borrowed from the active environment, so that nothing is downloaded but the build backend.
set -euo pipefail
# shellcheck source=tools/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

use_environment run
# A module in the working directory must not stand in for the installed one, nor an inherited path.
export PYTHONSAFEPATH=1
unset PYTHONPATH

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/source" "$work/empty"

say "building the wheel"
# From a copy: setuptools leaves a build/ folder, and would ship what an old one still holds.
cp -r "$ROOT"/{pyproject.toml,README.md,LICENSE,megalm,launchers,conf,kernels} "$work/source"
"$PYTHON" -m pip wheel --quiet --no-deps --wheel-dir "$work" "$work/source"
ls "$work"/megalm-*.whl

say "installing it outside the checkout"
"$PYTHON" -m venv --without-pip "$work/env"
installed=$("$work/env/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
"$PYTHON" -m pip --python "$work/env/bin/python" install --quiet --no-deps --no-index "$work"/megalm-*.whl
# A .pth inside a borrowed folder is not read, so the checkout's own editable install stays unseen.
"$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' >"$installed/borrowed.pth"

say "running it from an empty folder"
cd "$work/empty"
megalm=$work/env/bin/megalm
"$megalm" --help
"$megalm" check pretrain
"$work/env/bin/python" - "$installed" "$ROOT/pyproject.toml" "$ROOT/conf" <<'PYTHON'
import importlib, pathlib, re, sys

installed, project, conf = map(pathlib.Path, sys.argv[1:])
listed = re.search(r"^packages = \[(.*?)\]", project.read_text(), re.DOTALL | re.MULTILINE)[1]
packages = re.findall(r'"(.+?)"', listed)
for package in packages:
    found = pathlib.Path(next(iter(importlib.import_module(package).__path__)))  # the plugins' has no __init__
    assert found.is_relative_to(installed), f"{package} comes from {found}, not from the wheel"
shipped = {file.relative_to(installed / "megalm/conf") for file in (installed / "megalm/conf").rglob("*.yaml")}
assert shipped == {file.relative_to(conf) for file in conf.rglob("*.yaml")}, "yaml files are missing from the wheel"
print(f"{len(packages)} packages and {len(shipped)} yaml files, all from the wheel")
PYTHON
[ -z "$(ls -A .)" ] || fail "the commands left files in an empty folder" "$(ls -A .)"
