#!/usr/bin/env bash
# Submit the stages of a recipe folder, each after the one before: sft -> reward -> dpo -> evaluate.
#
#   slurm/pipeline.sh configs/X --launch launch/zero3.yaml --nodes 4 --gpus-per-node 8 --time 24:00:00
#
# --launch FILE, --procs-per-node N, --container IMAGE and --skip-preflight are train.sbatch's; --rounds N adds a job that runs
# DPO again, N rounds at most, on the policy's own answers; --dry-run prints what would be submitted; all other words go to
# sbatch. Every recipe is checked before anything is submitted. A complete stage is left
# out and an interrupted one resumes, so the same command again is always right; a stage that fails takes those after it
# out of the queue.
set -euo pipefail

# Links to this script are followed, and its folder keeps the path by which it was found: where /home/x is a link, what it
# leads to may differ from node to node.
script=$0
while [ -L "$script" ]; do
  target=$(readlink "$script")
  [[ $target == /* ]] || target=$(dirname "$script")/$target
  script=$target
done
root=$(cd "$(dirname "$script")/.." && pwd)
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$root/slurm/common.sh"

main() {
  [ $# -ge 1 ] && [[ $1 != -* ]] || { sed -n '2,10s/^# \{0,1\}//p' "$0" >&2; exit 2; }
  recipes=${1%/}; shift
  [ -d "$recipes" ] || die "no recipe folder at $recipes; try configs/quickstart"
  read_words "$@"
  read_site   # here too: SBATCH_ACCOUNT, SBATCH_PARTITION and their like are for sbatch
  export RLHF_ROOT=$root
  find_stages "$recipes"
  check_all
  submit_all
}

die() { echo "pipeline: $*" >&2; exit 2; }

read_words() {
  launch=() more=() options=() dry_run='' container=${RLHF_CONTAINER:-} num_rounds=0
  while [ $# -gt 0 ]; do
    case $1 in
      --launch | --procs-per-node | --container | --rounds)
        [ $# -ge 2 ] || die "$1 needs a value"
        case $1 in
          --rounds) num_rounds=$2; check_rounds "$2" ;;
          --launch) launch=(--launch "$2"); need_launch_file "$2" ;;
          --container) container=$2; more+=("$1" "$2") ;;
          *) more+=("$1" "$2") ;;
        esac
        shift ;;
      --skip-preflight) more+=("$1") ;;
      --dry-run) dry_run=yes ;;
      *) options+=("$1") ;;
    esac
    shift
  done
}

check_all() {   # launch files are looked at by the jobs: what they need is on the nodes, not here
  todo=()
  if ! "$python" -c 'import yaml' 2> /dev/null; then
    [ -n "${container:-${RLHF_CONTAINER:-}}" ] || die "$python has not the project's packages; run make setup, or give --container"
    echo "pipeline: the project is not installed here, so each job will check its recipe when it starts" >&2
    todo=("${stages[@]}")
    [ "$num_rounds" = 0 ] || todo+=(rounds)
    return
  fi
  for stage in "${stages[@]}"; do
    "$python" -m rlhf "$stage" "$recipes/$stage.yaml" --check > /dev/null
  done
  [ "$num_rounds" = 0 ] || "$python" -m rlhf rounds "$recipes" --num_rounds "$num_rounds" --check > /dev/null
  for stage in "${stages[@]}"; do
    local code=0 line
    line=$("$python" -m rlhf "$stage" "$recipes/$stage.yaml" --status) || code=$?
    if [ "$code" = 2 ]; then exit 2; fi
    if [ "$code" != 0 ] || [ ${#todo[@]} -gt 0 ]; then todo+=("$stage"); else echo "$line"; fi
  done
  [ "$num_rounds" != 0 ] || return 0
  code=0
  line=$("$python" -m rlhf rounds "$recipes" --num_rounds "$num_rounds" --status) || code=$?
  if [ "$code" = 2 ]; then exit 2; fi
  if [ "$code" != 0 ] || [ ${#todo[@]} -gt 0 ]; then todo+=(rounds); else echo "$line"; fi
}

submit_all() {
  local logs=${RLHF_LOGS:-logs} ids=() id='' before command after
  if [ ${#todo[@]} -eq 0 ]; then
    echo "All stages of $recipes are complete. Next: rlhf report $recipes"
    return
  fi
  [ -n "$dry_run" ] || mkdir -p "$logs"
  for stage in "${todo[@]}"; do
    # singleton: submitted twice, the second waits and finds the stage complete
    before=$id after=singleton${id:+,afterok:$id}
    command=(sbatch --parsable "--job-name=$stage-$(basename "$(realpath "$recipes")")" "--output=$logs/%x-%j.out"
      --kill-on-invalid-dep=yes "--dependency=$after" "${options[@]}" "$root/slurm/train.sbatch" "$stage")
    if [ "$stage" = rounds ]; then command+=("$recipes" --num_rounds "$num_rounds"); else command+=("$recipes/$stage.yaml"); fi
    [ "$stage" = evaluate ] || command+=("${launch[@]}")
    command+=("${more[@]}")
    if [ -n "$dry_run" ]; then
      id=JOB_OF_$stage
      printf '%q ' "${command[@]}"; echo
      continue
    fi
    id=$("${command[@]}") || { [ ${#ids[@]} -eq 0 ] || echo "pipeline: these are submitted already: ${ids[*]} (scancel takes them back)" >&2; exit 1; }
    id=${id%%;*}   # some clusters add their name
    ids+=("$id")
    echo "$stage: job $id${before:+ after $before}, log $logs/$stage-$(basename "$(realpath "$recipes")")-$id.out"
  done
  [ -z "$dry_run" ] || return 0
  echo "where they stand: squeue --jobs $(IFS=,; echo "${ids[*]}"); rlhf status $recipes"
  echo "to stop:          scancel ${ids[*]}      at the end: rlhf report $recipes"
}

main "$@"; exit
