#!/usr/bin/env bash
# One node of a job in a cloud or in Kubernetes: the stages of a recipe folder, in order, on all nodes together. SkyPilot and
# Kubeflow start it on each node with the same words. Which node this is it learns from their variables:
#
#   SkyPilot               SKYPILOT_NODE_RANK, SKYPILOT_NODE_IPS, SKYPILOT_NUM_NODES, SKYPILOT_NUM_GPUS_PER_NODE
#   Kubeflow Trainer       PET_NODE_RANK, PET_NNODES, PET_NPROC_PER_NODE, PET_MASTER_ADDR, PET_MASTER_PORT
#   Training Operator v1   RANK, PET_NNODES, PET_NPROC_PER_NODE, MASTER_ADDR, MASTER_PORT   (WORLD_SIZE before 1.7)
#
# and what to do from yours:
#
#   RECIPES         a folder of recipes (configs/quickstart)
#   STAGES          some of its stages, "sft dpo"; default: all that it has
#   LAUNCH          one of launch/*.yaml; default: single.yaml for one process, ddp.yaml for more
#   PROCS_PER_NODE  default: one a GPU, or one where there is none
#   RLHF_STORE      a folder that outlives the machine: runs/, models/ and the cache go there
#   RLHF_PREFLIGHT  no: several nodes don't test network and disks before training
#
# What is complete is skipped and what was interrupted resumes, so starting it again is always right. Exit code 85: it was
# asked to stop, has saved, and resumes when started again. Start it through docker/entrypoint.sh, which takes the signals.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/../.."
root=$PWD
# shellcheck source-path=SCRIPTDIR source=../common.sh
source launch/common.sh

say() { echo "[node $rank of $nodes] $*"; }
die() { echo "node.sh: $*" >&2; exit 2; }

main() {
  [ -z "${PREFLIGHT:-}" ] || [ "$PREFLIGHT" = "${RLHF_PREFLIGHT:-}" ] ||
    die "RLHF_PREFLIGHT is read in place of PREFLIGHT; set that, and unset PREFLIGHT"
  find_place
  find_python
  command -v "$python" > /dev/null || die "no $python; run launch/cloud/setup.sh on each node"
  rlhf=("$python" -m rlhf)
  plan_processes
  use_store
  choose_stages
  local number=0 before='' stage
  for stage in "${stages[@]}"; do   # all, before anything trains
    [ "$stage" != evaluate ] || with=()
    "${rlhf[@]}" "$stage" "$(recipe "$stage")" --check "${with[@]}" > /dev/null
  done
  for stage in "${stages[@]}"; do
    number=$((number + 1))
    [ -z "$before" ] || wait_for "$before"
    run_stage "$stage" $((port + 2 * number))
    before=$stage
  done
  [ "$rank" != 0 ] || "${rlhf[@]}" report "$recipes"
}

find_place() {
  rank=0 nodes=1 head=127.0.0.1 port=29500 procs=''
  if [ -n "${SKYPILOT_NODE_RANK:-}" ]; then
    rank=$SKYPILOT_NODE_RANK nodes=${SKYPILOT_NUM_NODES:-1} procs=${SKYPILOT_NUM_GPUS_PER_NODE:-}
    head=$(head -n 1 <<< "${SKYPILOT_NODE_IPS:-$head}")
  elif [ -n "${PET_NNODES:-}${MASTER_ADDR:-}" ]; then
    rank=${PET_NODE_RANK:-${RANK:-0}} nodes=${PET_NNODES:-${WORLD_SIZE:-1}} procs=${PET_NPROC_PER_NODE:-}
    head=${PET_MASTER_ADDR:-${MASTER_ADDR:-$head}} port=${PET_MASTER_PORT:-${MASTER_PORT:-$port}}
  fi
  [[ $nodes =~ ^[1-9][0-9]*$ ]] || die "$nodes nodes: an elastic job (1:4) is not supported; give the number of nodes"
  procs=${PROCS_PER_NODE:-$procs}
  # They are for the launcher. Left behind, each `rlhf` here would take itself for process RANK of WORLD_SIZE.
  unset RANK WORLD_SIZE MASTER_ADDR MASTER_PORT
  unset PET_NNODES PET_NODE_RANK PET_NPROC_PER_NODE PET_MASTER_ADDR PET_MASTER_PORT
}

plan_processes() {
  case $procs in
    '' | 0 | auto | gpu | cpu) procs=$("$python" -c 'import torch; print(max(1, torch.cuda.device_count()))') ;;
    *) [[ $procs =~ ^[1-9][0-9]*$ ]] || die "PROCS_PER_NODE takes a number, not '$procs'" ;;
  esac
  total=$((nodes * procs))
  launch=${LAUNCH:-launch/$([ "$total" = 1 ] && echo single || echo ddp).yaml}
  need_launch_file "$launch" "$total"
  with=(--launch "$launch")
  share_cores "$(nproc)" "$procs"
}

use_store() {   # links, so that the recipes' own paths (runs/..., models/...) lead there
  local name
  [ -n "${RLHF_STORE:-}" ] || return 0
  for name in runs models; do
    mkdir -p "$RLHF_STORE/$name"
    if [ -d "$name" ] && [ ! -L "$name" ]; then
      rmdir "$name" 2> /dev/null || die "$PWD/$name holds files; move them to $RLHF_STORE/$name, where runs go here"
    fi
    ln -sfn "$RLHF_STORE/$name" "$name"
  done
  export RLHF_CACHE=${RLHF_CACHE:-$RLHF_STORE/cache}
}

choose_stages() {
  recipes=${RECIPES:-configs/quickstart}
  local stage
  stages=()
  [ -d "$recipes" ] || die "no recipe folder at $recipes (RECIPES); try configs/quickstart"
  for stage in ${STAGES:-}; do
    is_stage "$stage" || die "'$stage' is no stage; STAGES takes $stage_names"
    [ -f "$(recipe "$stage")" ] || die "no $(recipe "$stage")"
    stages+=("$stage")
  done
  [ ${#stages[@]} -gt 0 ] || find_stages "$recipes"
}

recipe() { echo "$recipes/$1.yaml"; }

status() { "${rlhf[@]}" "$1" "$(recipe "$1")" --status; }

wait_for() {   # file systems show other nodes' files late
  for _ in $(seq 60); do
    ! status "$1" > /dev/null || return 0
    sleep 2
  done
  die "node 0 has finished $1, and here it is not: $(status "$1"). All nodes must see the same folder (RLHF_STORE)"
}

run_stage() {
  local stage=$1 on=$2 code=0 state=0
  status "$stage" || state=$?
  [ "$state" != 0 ] || return 0
  # From here on signals are for the training processes (they save) and for docker/entrypoint.sh (it asks them to). torch's
  # launcher would end them after 30 s; it keeps the traps that it inherits when told not to handle TERM.
  trap '' TERM INT USR1
  export PET_SIGNALS_TO_HANDLE=SIGHUP
  export RLHF_EXIT_STOPPED=0   # any other code is a traceback of accelerate's; the status below tells
  if [ "$nodes" -gt 1 ] && [ "${RLHF_PREFLIGHT:-yes}" != no ]; then
    on_all_nodes $((on + 1)) preflight "$(recipe "$stage")" --quick ||
      die "preflight has found errors; RLHF_PREFLIGHT=no leaves it out"
  fi
  on_all_nodes "$on" "$stage" "$(recipe "$stage")" || code=$?
  for _ in $(seq 30); do
    state=0
    status "$stage" > /dev/null || state=$?
    case $state in 0) return 0 ;; 85) break ;; *) [ "$code" = 0 ] || break ;; esac
    sleep 2   # the launcher has seen all processes end well, so this node's view of the folder is old
  done
  status "$stage" || true
  if [ "$state" = 85 ]; then say "stopped when asked to; it resumes when started again"; exit 85; fi
  [ "$code" != 0 ] || code=1
  exit "$code"
}

on_all_nodes() {   # PORT STAGE WORDS ...; each launch has its own port: a quick node must not meet the launch before
  local flags=(--config_file "$launch" --num_processes "$total")
  if [ "$nodes" -gt 1 ]; then
    wait_for_name
    flags+=(--num_machines "$nodes" --machine_rank "$rank" --main_process_ip "$head" --main_process_port "$1")
  fi
  shift
  say "$* on $nodes node(s) x $procs process(es), $launch"
  "$python" -m accelerate.commands.launch "${flags[@]}" -m rlhf "$@"
}

wait_for_name() {   # Kubernetes knows the first node's name when its Pod has an address
  for _ in $(seq 300); do
    ! getent hosts "$head" > /dev/null || return 0
    sleep 2
  done
  die "no address for $head, the first node, in 10 minutes"
}

main "$@"; exit   # read whole before it runs
