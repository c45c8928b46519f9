# shellcheck shell=bash disable=SC2154  # `root` is the script's that sources it
# What the Slurm scripts share, beside what they share with the others.

# shellcheck source-path=SCRIPTDIR source=../launch/common.sh
source "$root/launch/common.sh"

read_site() {   # slurm/site.env -> the environment, of sbatch and of all nodes; and python
  local env=${RLHF_SITE_ENV:-$root/slurm/site.env}
  if [ -f "$env" ]; then
    set +u; set -a   # modules are not written for `set -u`
    # shellcheck disable=SC1090
    source "$env"
    set +a; set -u
  fi
  export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
  find_python
}

gpus_here() {   # how many GPUs of this node the job has been given, in whichever way it asked
  local list=${SLURM_STEP_GPUS:-${SLURM_JOB_GPUS:-}}
  if [ -n "${SLURM_GPUS_ON_NODE:-}" ]; then
    echo "$SLURM_GPUS_ON_NODE"
  elif [ -n "$list" ]; then
    awk -F, '{print NF}' <<< "$list"
  else
    echo 0
  fi
}
