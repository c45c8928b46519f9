#!/usr/bin/env bash
# Run the stages of a recipe folder in order: sft -> reward -> dpo -> evaluate -> report.
#
#   launch/pipeline.sh configs/quickstart                                      one process
#   launch/pipeline.sh configs/quickstart launch/ddp.yaml                      through accelerate
#   launch/pipeline.sh configs/quickstart launch/ddp.yaml --num_processes 4    more flags for accelerate launch
#   launch/pipeline.sh configs/quickstart --rounds 3                           then DPO again, on the policy's own answers
#
# A complete stage is skipped and an interrupted one resumes from its last checkpoint, so the same command again is
# always right. Every recipe is checked before the first stage trains. A stage that was asked to stop (Ctrl-C, SIGTERM,
# `touch RUN_DIR/stop`) saves, and ends this with code 85. PYTHON names the interpreter; the default is the active
# environment's, or else that of .venv beside this folder.
set -euo pipefail

root=$(dirname "$(dirname "$(realpath "$0")")")
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$root/launch/common.sh"

usage() { sed -n '2,12s/^# \{0,1\}//p' "$0"; exit 2; }
die() { echo "pipeline: $*" >&2; exit 2; }

main() {
  [ $# -ge 1 ] || usage
  recipes=${1%/}; shift
  [ -d "$recipes" ] || die "no recipe folder at $recipes; try configs/quickstart"
  find_python

  read_rounds "$@"
  set -- "${words[@]}"

  if [ $# -ge 1 ]; then
    need_launch_file "$1"
    launch=(--launch "$1")
    run=("$python" -m accelerate.commands.launch --config_file "$@" -m rlhf)
    export RLHF_EXIT_STOPPED=0   # the launcher would make a traceback of any other; the file below reports it
  else
    launch=()
    run=("$python" -m rlhf)
  fi

  find_stages "$recipes"
  for stage in "${stages[@]}"; do
    if [ "$stage" = evaluate ]; then launch=(); fi
    "$python" -m rlhf "$stage" "$recipes/$stage.yaml" --check "${launch[@]}"
  done
  rounds=("$python" -m rlhf rounds "$recipes" --num_rounds "$num_rounds")
  if [ "$num_rounds" -gt 0 ]; then "${rounds[@]}" --check; fi
  if [ -z "${RLHF_STOP_FILE:-}" ]; then   # whoever has set it has asked for a stop there, perhaps between two stages
    own=$(mktemp -d)
    trap 'rm -rf "$own"' EXIT
    export RLHF_STOP_FILE=$own/stop
  fi
  rm -f "$RLHF_STOP_FILE.done"
  for stage in "${stages[@]}"; do
    if [ -e "$RLHF_STOP_FILE" ]; then exit 85; fi
    "$python" -m rlhf "$stage" "$recipes/$stage.yaml" --check > /dev/null   # its inputs exist by now
    run_step "$stage" "$recipes/$stage.yaml"
  done
  if [ "$num_rounds" -gt 0 ]; then
    run_rounds
  elif [ -f "$recipes/rounds.yaml" ]; then
    echo "note: $recipes/rounds.yaml is for --rounds N, which runs DPO again on the policy's own answers"
  fi
  "$python" -m rlhf report "$recipes"
}

read_rounds() {   # -> num_rounds, 0 for none; words: the others
  num_rounds=0 words=()
  while [ $# -gt 0 ]; do
    case $1 in
      --rounds)
        [ $# -ge 2 ] || die "--rounds needs a number"
        num_rounds=$2; shift ;;
      --rounds=*) num_rounds=${1#*=} ;;
      *) words+=("$1"); shift; continue ;;
    esac
    check_rounds "$num_rounds"
    shift
  done
}

run_step() {   # WORDS: of rlhf
  code=0
  "${run[@]}" "$@" || code=$?
  if [ -e "$RLHF_STOP_FILE.done" ]; then exit 85; fi   # whatever a launcher that was signalled itself makes of it
  [ "$code" = 0 ] || exit "$code"
}

run_rounds() {   # each start runs the next step; they end by themselves
  local state before='' line
  while state=0; line=$("${rounds[@]}" --status) || state=$?; [ "$state" != 0 ]; do
    [ "$state" != 2 ] || exit 2
    [ "$line" != "$before" ] || die "the step was run and is not complete: $line"
    if [ -e "$RLHF_STOP_FILE" ]; then exit 85; fi
    before=$line
    run_step rounds "$recipes" --num_rounds "$num_rounds"
  done
  echo "$line"
}
main "$@"; exit   # read whole before it runs: editing the file during a run does no harm
