#!/usr/bin/env bash
# What the image starts first: rlhf-entrypoint COMMAND WORDS ... A stage will do as command: `dpo ...` is `rlhf dpo ...`.
#
# `docker stop` sends SIGTERM to this process alone. A training process saves and exits with 85 when it gets one, so `rlhf`
# takes this process's place. `accelerate launch` would end its training processes 30 s later, saved or not, and a shell
# script would just die; so they are asked in another way: by a file that the training processes look for (RLHF_STOP_FILE).
#
#   RLHF_EXIT_STOPPED   the container's exit code when a run has saved and stopped (85); with 0 a restart policy leaves it be
set -euo pipefail

# In the image this file is started through a link
# shellcheck source-path=SCRIPTDIR source=../launch/common.sh
source "$(dirname "$(realpath "$0")")/../launch/common.sh"

temporary=${TMPDIR:-/tmp}

main() {
  refuse_old_names " ${RLHF_RENAMED:-} ${RLHF_RENAMED_GPUS:-} "
  # the health check counts from here
  touch "$temporary/rlhf-started" ||
    { echo "rlhf: $temporary can't be written; with --read-only give --tmpfs $temporary" >&2; exit 2; }
  for folder in "$HOME" runs models; do warn_unless_writable "$folder"; done
  case ${1:-} in
    sft | reward | dpo | evaluate | chat | report | status | preflight | pairs | data | score | generate | label | rounds | merge | fetch | bundle | unbundle | -*) set -- rlhf "$@" ;;
  esac
  case "$*" in
    rlhf | rlhf\ * | python\ -m\ rlhf\ * | bash | sh) exec "$@" ;;
    *) watch_over "$@" ;;
  esac
}

refuse_old_names() {   # compose tells what the shell has set: the variables of its files had names without RLHF_ once
  local old wrong=''
  for old in PROCESSES NODE_0_GPUS NODE_1_GPUS TENSORBOARD_PORT STAGE GPU; do
    # of both names the new one holds, and the old one is somebody else's
    [[ $1 == *" $old="[^\ ]* && $1 != *" RLHF_$old="[^\ ]* ]] || continue
    case $old in
      STAGE | GPU) echo "rlhf: $old is set and not read; if it is meant for docker/compose*.yaml: RLHF_$old" >&2 ;;
      *) wrong=2; echo "rlhf: docker/compose*.yaml reads RLHF_$old in place of $old; set that, or unset $old" >&2 ;;
    esac
  done
  [ -z "$wrong" ] || exit "$wrong"
}

warn_unless_writable() {
  [ ! -d "$1" ] || [ -w "$1" ] || echo "rlhf: $(realpath "$1") can't be written by uid $(id -u). If it is a folder of yours: mkdir it before docker does, and add --user \"\$(id -u):\$(id -g)\"" >&2
}

watch_over() {
  local code=0 code_when_stopped=${RLHF_EXIT_STOPPED:-85}
  asked='' child=''
  export RLHF_STOP_FILE=${RLHF_STOP_FILE:-$temporary/rlhf-stop}
  rm -f "$RLHF_STOP_FILE" "$RLHF_STOP_FILE.done"   # of before a restart
  export PET_SIGNALS_TO_HANDLE=SIGHUP   # torch's launcher: leave the others to this script
  case $1 in
    accelerate | torchrun) export RLHF_EXIT_STOPPED=0 ;;   # they would make a traceback of any other
    *) unset RLHF_EXIT_STOPPED ;;                          # a script has to see that its stage isn't complete
  esac
  trap 'ask TERM' TERM
  trap 'ask USR1' USR1
  trap 'ask INT' INT
  "$@" <&0 &   # in the background a trap runs at once; bash makes it ignore SIGINT, which a terminal sends to all
  child=$!
  wait_for_exit "$child" || code=$?
  if [ -e "$RLHF_STOP_FILE.done" ]; then code=85; fi   # the training processes' own word for it
  [ "$code" != 85 ] || code=$code_when_stopped
  exit "$code"
}

ask() {   # the run to save, or, where none is, the command to end
  if is_running "${all_stages[@]}"; then
    [ -z "$asked" ] || [ "$1" != INT ] || { echo "rlhf: stopped at once" >&2; exit 130; }
    asked=$1
    echo "$1" > "$RLHF_STOP_FILE"
    echo "rlhf: got SIG$1: the run saves and stops after this step" >&2
  else
    kill -TERM "$child" 2> /dev/null || true
  fi
}

main "$@"
