#!/usr/bin/env bash
# Everything that a GPU must prove, in steps of under ten minutes each:
#   bash tools/gpu_round.sh                      the next step that is not done
#   bash tools/gpu_round.sh STEP ...             these steps, done or not
#   bash tools/gpu_round.sh --all                every step that is not done, one after the other
#   bash tools/gpu_round.sh --list               the steps and how they stand
#   --out FOLDER    for all that it writes (default: $GPU_ROUND_OUT, else runs/gpu_round)
#   --wheels FOLDER what tools/gpu_wheels.sh collected (default: $GPU_ROUND_WHEELS, else OUT/wheels)
#   --dry-run       the smallest that a CPU can do of each step, in OUT/dry-run; shows that the round works, no more
# Needs a plain CUDA image: Python 3.12 (or $PYTHON) with pip, torch 2.11, triton 3.6; no network. Libraries that are missing
# are installed into $GPU_ROUND_SITE (default: OUT/site) and nowhere else. A step that fails may be run again: what is done
# stays done. The last step writes OUT/results/GPU/DATE.json and DATE.md, and OUT/round.tar.gz with the logs; in a git checkout
# it also puts the two into benchmarks/results/GPU, and attention's rows into its measured.json, where they are committed. $GPU_ROUND_COMMIT is the commit that the results
# name (default: the checkout's; unknown in a copy without .git), $GPU_ROUND_LIMIT the seconds that a step may take (570).
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
STEPS=(
    install tests-norms tests-attention tests-attention-features tests-rest cache
    bench-norms bench-adam bench-pointwise bench-loss bench-experts
    bench-attention-64 bench-attention-64-causal bench-attention-128 bench-attention-128-causal bench-attention-rest parity step collect
)
LIMIT=${GPU_ROUND_LIMIT:-570} # seconds of a step
PYTHON=${PYTHON:-python3}
out=${GPU_ROUND_OUT:-$ROOT/runs/gpu_round} wheels=${GPU_ROUND_WHEELS:-} dry="" list="" all=""

say() { printf '\n== %s\n' "$*"; }

fail() {
    printf '\nerror: %s\n' "$1" >&2
    shift
    [ $# -eq 0 ] || printf '  %s\n' "$@" >&2
    exit 1
}

wrong() { (fail "$@") || exit 2; } # of arguments

wanted=()
while [ $# -gt 0 ]; do
    case $1 in
    --out | --wheels)
        [ $# -gt 1 ] || wrong "$1 wants a folder"
        [ "$1" = --out ] && out=$2 || wheels=$2
        shift
        ;;
    --dry-run) dry=1 ;;
    --list) list=1 ;;
    --all) all=1 ;;
    -h | --help) sed -n '2,15s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit 0 ;;
    -*) wrong "unknown option $1" "bash tools/gpu_round.sh --help lists them" ;;
    *)
        [[ " ${STEPS[*]} " == *" $1 "* ]] || wrong "no step is called $1" "there are: ${STEPS[*]}"
        wanted+=("$1")
        ;;
    esac
    shift
done
again="bash tools/gpu_round.sh --out $out${dry:+ --dry-run}"
[ -z "$dry" ] || out=$out/dry-run # what a CPU says must not stand beside what a GPU said
states=$out/steps.txt # lines "STEP STATE", the last of a step counts

state_of() {
    local state=""
    [ ! -e "$states" ] || state=$(sed -n "s/^$1 //p" "$states" | tail -n 1)
    echo "${state:-not run}"
}

if [ -n "$list" ]; then # before any folder is made
    for name in "${STEPS[@]}"; do printf '%-26s %s\n' "$name" "$(state_of "$name")"; done
    exit 0
fi

mkdir -p "$out/logs" "$out/work"
out=$(cd "$out" && pwd)
states=$out/steps.txt
wheels=${wheels:-$out/wheels}
site=${GPU_ROUND_SITE:-$out/site}
touch "$states"
export PYTHONUNBUFFERED=1 PYTHONNOUSERSITE=1

is_checkout() {
    local prefix
    prefix=$(git -C "$ROOT" rev-parse --show-prefix 2>/dev/null) && [ -z "$prefix" ]
}

# The commit that is measured, with a + where files differ from it; the results of an earlier round are no difference.
commit_here() {
    local found=unknown changed
    if [ -n "${GPU_ROUND_COMMIT:-}" ]; then
        found=$GPU_ROUND_COMMIT
    elif is_checkout && found=$(git -C "$ROOT" rev-parse --verify --quiet HEAD || echo unknown); then
        changed=$(git -C "$ROOT" status --porcelain -- ':(top,exclude)benchmarks/results')
        found+=${changed:++}
    fi
    echo "$found"
}

# A command of a step: from a folder that holds no Python, so that only $site and the machine's own packages are seen.
limited() { (cd "$out/work" && PYTHONPATH=$site timeout --kill-after 10 "$LIMIT" "$@"); }

# Wheels of what this Python lacks, and megalm from this checkout.
step_install() {
    local source missing
    rm -rf "$site" && mkdir -p "$site"
    missing=$out/work/missing.txt
    "$PYTHON" - "$wheels" "$missing" <<'PYTHON'
import importlib.metadata, pathlib, sys

folder, answer = map(pathlib.Path, sys.argv[1:])
missing = []
for wheel in sorted(folder.glob("*.whl")):
    name, version = wheel.name.split("-")[:2]
    try:
        print(f"   {name}: {importlib.metadata.version(name)} is there")
    except importlib.metadata.PackageNotFoundError:
        print(f"   {name}: installing {version}")
        missing.append(str(wheel))
answer.write_text("".join(f"{line}\n" for line in missing))
if not list(folder.glob("*.whl")):
    print(f"   no wheels in {folder}: what this Python has must do")
PYTHON
    if [ -s "$missing" ]; then
        xargs -d '\n' "$PYTHON" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-compile \
            --no-cache-dir --target "$site" <"$missing"
    fi
    touch "$site/starting"
    source=$(mktemp -d) # a copy: setuptools leaves a build/ folder
    cp -r "$ROOT"/{pyproject.toml,README.md,LICENSE,megalm,launchers,conf,kernels} "$source"
    PYTHONPATH=$site "$PYTHON" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-build-isolation \
        --no-cache-dir --upgrade --target "$site" "$source"
    rm -rf "$source"
    limited "$PYTHON" - <<'PYTHON'
import importlib, pathlib, torch

for name in ("megalm.launchers.cli", "megalm_kernels.benchmarks", "deepspeed", "hydra", "triton"):
    module = importlib.import_module(name)
    print(f"   {name}: {pathlib.Path(module.__file__).parent}")
gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
print(f"   torch {torch.__version__}, CUDA {torch.version.cuda}, {gpu}")
PYTHON
    mv "$site/starting" "$site/installed" # as old as the copy, and only now that it works
}

# From the checkout, whose tests they are. name: of the step and of pytest's report; then files, folders, options.
device_tests() {
    local name=$1 options=(-p no:cacheprovider -q --rootdir "$ROOT" -c "$ROOT/pyproject.toml" "${@:2}")
    if [ -n "$dry" ]; then
        TRITON_INTERPRET=1 limited "$PYTHON" -m pytest "${options[@]}" -q --collect-only
        echo "running them needs a GPU"
        return
    fi
    rm -f "$out/$name.xml" # else that of an earlier run stands where this one is stopped
    limited "$PYTHON" -m pytest "${options[@]}" -m gpu --durations=5 --junitxml "$out/$name.xml"
}
SLOW=("$ROOT"/tests/kernels/device/test_{norms,cross_entropy,linear_cross_entropy}.py) # each file is in one of the four steps
ATTENTION=("$ROOT"/tests/kernels/device/test_attention{,_decode,_hopper}.py)
FEATURES=("$ROOT/tests/kernels/device/test_attention_features.py") # compiles as many kernels as those three
step_tests-norms() { device_tests tests-norms "${SLOW[@]}"; }
step_tests-attention() { device_tests tests-attention "${ATTENTION[@]}"; }
step_tests-attention-features() { device_tests tests-attention-features "${FEATURES[@]}"; }
step_tests-rest() {
    local others=("${SLOW[@]}" "${ATTENTION[@]}" "${FEATURES[@]}")
    device_tests tests-rest "$ROOT/tests/kernels/device" "${others[@]/#/--ignore=}"
}

step_cache() { limited "$PYTHON" "$ROOT/tools/gpu_cache.py" ${dry:+--dry-run} --json "$out/cache.json"; }

bench() {
    local name=$1 device=cuda
    shift
    [ -z "$dry" ] || device=cpu
    limited "$PYTHON" -m megalm_kernels.benchmarks "$@" --device $device --results "$out/bench-$name" --commit "$(commit_here)"
}
step_bench-norms() { bench norms rms_norm layer_norm; }
step_bench-adam() { bench adam fused_adam l2_norm; }
step_bench-pointwise() { bench pointwise rotary swiglu geglu bias_gelu; }
step_bench-loss() { bench loss cross_entropy linear_cross_entropy; }
step_bench-experts() { bench experts grouped_linear; }
# All lengths of one head dimension under one mask.
bench_attention() {
    local shapes="x $2\$"
    [ -z "$dry" ] || shapes="" # a CPU has another dimension
    bench "attention-$1" attention --shapes "$shapes"
}
step_bench-attention-64() { bench_attention 64 64; }
step_bench-attention-64-causal() { bench_attention 64-causal "64 causal"; }
step_bench-attention-128() { bench_attention 128 128; }
step_bench-attention-128-causal() { bench_attention 128-causal "128 causal"; }
step_bench-attention-rest() { bench attention-rest attention_packed decode_attention; }

step_parity() {
    local steps=20
    [ -z "$dry" ] || steps=8
    limited "$PYTHON" "$ROOT/tools/gpu_parity.py" ${dry:+--dry-run} --steps $steps --json "$out/parity.json"
}

step_step() {
    local steps=10
    [ -z "$dry" ] || steps=2
    limited "$PYTHON" "$ROOT/tools/bench_step.py" ${dry:+--dry-run} --steps $steps --json "$out/step.json"
}

step_collect() {
    local publish=()
    if [ -z "$dry" ] && is_checkout && [ -w "$ROOT" ]; then
        publish=(--publish "$ROOT/benchmarks/results" --table "$ROOT/kernels/megalm_kernels/attention/measured.json")
    elif [ -z "$dry" ]; then
        echo "$ROOT is no git checkout that can be written: the results stay in $out/results"
    fi
    limited "$PYTHON" "$ROOT/tools/gpu_report.py" "$out" --commit "$(commit_here)" "${publish[@]}"
    (cd "$out" && tar -czf round.tar.gz results logs steps.txt)
    echo "$out/round.tar.gz"
}

# Whether the libraries are here, and megalm as the checkout has it now: a fresh machine may have the results of an old one.
is_installed() {
    [ -e "$site/installed" ] || return 1
    [ -z "$(cd "$ROOT" && find pyproject.toml megalm launchers conf kernels -type f -newer "$site/installed" \
        -not -name '*.pyc' -print -quit)" ]
}

run_step() {
    local name=$1 begin=$SECONDS code=0
    say "$name${dry:+ (dry run)}"
    # In a process of its own with its own `set -e`, which bash switches off in a function that is tested with if or ||.
    set +e
    (set -e && "step_$name") 2>&1 | tee "$out/logs/$name.log"
    code=${PIPESTATUS[0]}
    set -e
    if [ "$code" -eq 0 ]; then
        echo "$name ok" >>"$states"
        printf '   ok, %d s\n' $((SECONDS - begin))
        return
    fi
    echo "$name failed" >>"$states"
    case $code in 124 | 137) fail "$name was stopped after $LIMIT s" "GPU_ROUND_LIMIT=SECONDS gives it more" ;; esac
    fail "$name failed (exit $code)" "its output: $out/logs/$name.log" "to run it again: $again $name"
}

if [ ${#wanted[@]} -eq 0 ]; then
    for name in "${STEPS[@]}"; do
        [ "$(state_of "$name")" != ok ] || continue
        wanted+=("$name")
        [ -n "$all" ] || break
    done
    [ ${#wanted[@]} -gt 0 ] || say "every step is done: $out/results"
fi
for name in "${wanted[@]}"; do
    [ "$name" = install ] || is_installed || run_step install
    run_step "$name"
done
