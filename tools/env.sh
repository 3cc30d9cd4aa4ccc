# shellcheck shell=bash
# Sourced by tools/quickstart.sh, tools/test.sh and .ci/run: `use_environment run` or `use_environment dev`.
#
# Takes the environment that is active (venv or conda), else makes .venv in the checkout, and installs megalm in it,
# editable. An installed torch is kept. Where there is none and no GPU either, torch 2.13.0 is installed before the
# rest: the CPU build, where pip is told of a place that has it (PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS). Nothing is
# installed twice: a stamp in the environment holds pyproject.toml's hash. Afterwards $PYTHON is the interpreter and
# `megalm` is on the PATH.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
CPU_TORCH=2.13.0
FILE_HASH='import hashlib, sys; print(hashlib.sha256(open(sys.argv[1], "rb").read()).hexdigest())'

say() { printf '\n== %s\n' "$*"; }

fail() {
    printf '\nerror: %s\n' "$1" >&2
    shift
    [ $# -eq 0 ] || printf '  %s\n' "$@" >&2
    exit 1
}

has_gpu() { compgen -G '/dev/nvidia[0-9]*' >/dev/null || nvidia-smi -L >/dev/null 2>&1; }

# The newest interpreter that megalm runs on, for a new environment.
find_python() {
    local name
    for name in "${PYTHON:-python3}" python3 python3.13 python3.12 python3.11 python3.10; do
        if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            command -v "$name"
            return
        fi
    done
    return 1
}

# Sets $PREFIX to the environment to use: the active one (conda's base is nobody's project), else .venv.
choose_prefix() {
    if [ -n "${VIRTUAL_ENV:-}" ] && [ -x "$VIRTUAL_ENV/bin/python" ]; then
        PREFIX=$VIRTUAL_ENV
    elif [ "${CONDA_DEFAULT_ENV:-base}" != base ] && [ -x "${CONDA_PREFIX:-}/bin/python" ]; then
        PREFIX=$CONDA_PREFIX
    else
        PREFIX=$ROOT/.venv
        [ -x "$PREFIX/bin/python" ] && "$PREFIX/bin/python" -m pip --version >/dev/null 2>&1 && return
        local base
        base=$(find_python) || fail "no Python 3.10 or newer found" "install one, or set PYTHON to its path"
        say "making $PREFIX with $("$base" --version)"
        "$base" -m venv --clear "$PREFIX" || fail "cannot make an environment in $PREFIX" \
            "on Debian and Ubuntu: apt install python3-venv" "or activate an environment of your own and run this again"
    fi
}

# pip with its output in a log; on failure the log's end and what to do.
quiet_pip() {
    local log=$PREFIX/megalm-install.log begin=$SECONDS
    if ! "$PYTHON" -m pip install --disable-pip-version-check --no-input "$@" >"$log" 2>&1 </dev/null; then
        tail -n 15 "$log" >&2
        fail "pip install $* failed; all of its output is in $log" \
            "no network or a proxy: check that 'pip download tqdm' works" \
            "a torch outside megalm's range: use a new environment, or upgrade that torch" \
            "then run this again; what is installed stays"
    fi
    printf '   %d s\n' $((SECONDS - begin))
}

# The version of an installed torch, or nothing; without importing it, which takes seconds.
torch_version() {
    "$PYTHON" -c 'from importlib.metadata import version; print(version("torch"))' 2>/dev/null || true
}

use_environment() {
    local wanted=$1 extras="" stamp key torch constraint
    [ "$wanted" = run ] || extras="[$wanted]"
    choose_prefix
    PYTHON=$PREFIX/bin/python
    export PYTHON VIRTUAL_ENV="$PREFIX" PATH="$PREFIX/bin:$PATH"
    key="$ROOT $("$PYTHON" -c "$FILE_HASH" "$ROOT/pyproject.toml")"
    for stamp in "$PREFIX/megalm-$wanted.stamp" "$PREFIX/megalm-dev.stamp"; do # dev holds all of run
        [ -x "$PREFIX/bin/megalm" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$key" ] && return
    done

    rm -f "$PREFIX"/megalm-*.stamp
    if [ -z "$(torch_version)" ] && ! has_gpu; then
        say "installing torch $CPU_TORCH (no GPU here) into $PREFIX"
        quiet_pip "torch==$CPU_TORCH"
    fi
    say "installing megalm$extras into $PREFIX (a few minutes the first time)"
    constraint=$(mktemp)
    torch=$(torch_version)
    [ -z "$torch" ] || echo "torch==$torch" >"$constraint"
    quiet_pip --constraint "$constraint" --editable "$ROOT$extras"
    rm -f "$constraint"
    echo "$key" >"$PREFIX/megalm-$wanted.stamp"
}
