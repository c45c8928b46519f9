#!/usr/bin/env bash
# What train.sbatch starts once on each node: accelerate's launcher for the processes of this node. Whatever differs from
# node to node (SLURM_NODEID, GPUs, the network interface) is looked up here, inside the task, where it is right.
#
#   node.sh LOG_PREFIX FIRST_HOST SECOND_HOST PORT PROCESSES LAUNCH_FILE NUM_WORDS [WORDS BEFORE THE COMMAND] PYTHON WORDS ...
set -euo pipefail

root=$(dirname "$(dirname "$(realpath "$0")")")
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$root/slurm/common.sh"

on_node() {
  local log=$1 first=$2 second=$3 port=$4 procs=$5 launch=$6 count=$7
  shift 7
  local inside=("${@:1:count}") python=${*:count+1:1}
  shift $((count + 1))
  local host=${SLURMD_NODENAME:-$(hostname)} rank=$SLURM_NODEID nodes=$SLURM_NNODES given
  log=$log-$host.log
  # tee and what it writes for must outlive signals: the run still saves then
  if [ "$rank" = 0 ]; then
    exec > >(trap '' TERM INT USR1; exec tee -a "$log") 2>&1
  else
    exec >> "$log" 2>&1
  fi
  given=$(gpus_here)
  if [ "$given" -gt 0 ] && [ "$given" -lt "$procs" ]; then
    echo "node.sh: $host has $given GPU(s) in this job, for $procs processes; ask for as many on each node (--gpus-per-node)"
    exit 2
  fi
  choose_interface "$([ "$rank" = 0 ] && echo "$second" || echo "$first")"
  share_cores "${SLURM_CPUS_PER_TASK:-${SLURM_CPUS_ON_NODE:-$(nproc)}}" "$procs"
  local flags=(--config_file "$launch" --num_processes $((nodes * procs)))
  if [ "$nodes" -gt 1 ]; then
    flags+=(--num_machines "$nodes" --machine_rank "$rank" --main_process_ip "$first" --main_process_port "$port")
  fi
  shield "${inside[@]}" "$python" -m accelerate.commands.launch "${flags[@]}" -m rlhf "$@"
}

choose_interface() {   # gloo and NCCL's bootstrap take the interface that leads to the other nodes, if nobody has chosen
  local address interface
  [ -n "$1" ] && command -v ip > /dev/null || return 0
  address=$(getent ahosts "$1" | awk 'NR == 1 {print $1}') || return 0
  interface=$(ip -o route get "${address:-127.0.0.1}" 2> /dev/null | sed -n 's/.* dev \([^ ]*\).*/\1/p') || return 0
  [ -n "$interface" ] && [ "$interface" != lo ] || return 0
  export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$interface} NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-=$interface}
}

# Slurm signals every process of a step. The training processes save and stop on TERM and USR1; the launcher would end them
# 30 s after a TERM and die of USR1, so it inherits that both are ignored, and is told not to handle TERM (torch's
# PET_SIGNALS_TO_HANDLE). USR1 from outside (scancel --signal=USR1) asks the job to go on later, as its time limit does.
shield() {
  export PET_SIGNALS_TO_HANDLE=SIGHUP
  export RLHF_EXIT_STOPPED=0   # train.sbatch asks for --status; any other code is a traceback of accelerate's
  trap ':' TERM
  trap 'echo "USR1 on $SLURM_NODEID" > "$RLHF_STOP_FILE"' USR1
  (trap '' TERM USR1 INT; exec "$@") &
  wait_for_exit $!
}

on_node "$@"; exit
