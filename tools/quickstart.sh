#!/usr/bin/env bash
# From a clone to a trained language model: installs megalm, prepares a corpus, trains on two processes, writes text.
#   bash tools/quickstart.sh [FOLDER]     FOLDER gets data/ and runs/ (default: the checkout)
# No account and no data set needed: the corpus is the Python standard library's own sources. Run again, it does only
# what is missing.
set -euo pipefail
# shellcheck source=tools/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

DATA=data/stdlib # what `megalm prepare` writes and the recipe reads by default
RUN=runs/quickstart
SUMMARY=""

# phase NAME COMMAND...: shows the command, runs it, and notes its seconds.
phase() {
    local name=$1 begin=$SECONDS
    shift
    say "$name:  $*"
    "$@" || fail "the quick start stopped at '$name'" "$* exited with $?" "mend what it says above and run this again"
    note "$name" $((SECONDS - begin)) "$*"
}

# note NAME SECONDS TEXT: a line of the summary.
note() { SUMMARY+=$(printf '   %-10s %4d s   %s' "$@")$'\n'; }

main() {
    local folder begin=$SECONDS
    folder=${1:-$ROOT}
    use_environment run
    note install $((SECONDS - begin)) "into $PREFIX"
    mkdir -p "$folder"
    cd "$folder"
    folder=$PWD
    phase prepare megalm prepare
    phase pretrain megalm pretrain experiment=quickstart "train.run_dir=$RUN"
    phase generate megalm generate "generate.checkpoint=$RUN" "generate.prompt=def read" generate.max_tokens=120

    local enter="cd $folder"
    [ ! -f "$PREFIX/bin/activate" ] || enter="source $PREFIX/bin/activate; $enter"

    say "done in $((SECONDS - begin)) s"
    printf '%s' "$SUMMARY"
    cat <<TEXT

   A small LLaMA was trained by two processes that share every layer (parallel.tensor_parallel=2) and keep the optimizer's
   state in parts (parallel.zero=1); one process then wrote the text above from the checkpoint the two have saved.

   corpus       $folder/$DATA
   run          $folder/$RUN
     metrics    $folder/$RUN/metrics.jsonl
     weights    $folder/$RUN/checkpoints
     config     $folder/$RUN/config.yaml

   Next:
     $enter
     megalm generate generate.checkpoint=$RUN generate.prompt="class Reader:" generate.temperature=0.6
     megalm pretrain experiment=quickstart train.run_dir=runs/two parallel=pp2     the same model as a pipeline
     megalm pretrain experiment=quickstart train.run_dir=$RUN train.steps=1000     train on, along a longer cosine
     megalm parity 'parity.layouts=[tp2,pp2]'                                      prove that layouts agree
     megalm prepare prepare.source=FOLDER prepare.output=data/mine                 your own text
     megalm pretrain --help                                                        every setting
TEXT
}

main "$@"
