# shellcheck shell=bash disable=SC2034,SC2154  # it sets and reads variables of the script that sources it
# What the scripts of launch/, slurm/ and docker/ share. It is sourced and only defines. The script has set `root`, the
# project's folder, where it calls a function that looks there, and has a function `die`.

training_stages=(sft reward dpo)
all_stages=("${training_stages[@]}" evaluate)   # in this order: each uses what those before it have made
printf -v stage_names '%s, ' "${all_stages[@]}"
stage_names=${stage_names%, }

is_stage() {
  local stage
  for stage in "${all_stages[@]}"; do [ "$stage" != "$1" ] || return 0; done
  return 1
}

find_stages() {   # FOLDER -> stages: those that it has recipes of
  local stage
  stages=()
  for stage in "${all_stages[@]}"; do [ ! -f "$1/$stage.yaml" ] || stages+=("$stage"); done
  [ ${#stages[@]} -gt 0 ] || die "$1 has none of ${stage_names//, /.yaml, }.yaml"
}

check_rounds() {   # NUMBER
  [[ $1 =~ ^[1-9][0-9]{0,2}$ ]] && [ "$1" -ge 2 ] || die "--rounds takes a number from 2 on, not '$1'; the first round is dpo.yaml itself"
}

# A process with one of these words in its command line. -q: with -l, one that ends meanwhile makes grep's exit code 2.
is_running() {
  grep -qzxE "$(IFS='|'; echo "$*")" /proc/[0-9]*/cmdline 2> /dev/null
}

find_python() {   # -> python: PYTHON, or the active environment's, or that of .venv in the project's folder
  python=${PYTHON:-python}
  if [ -z "${PYTHON:-}${VIRTUAL_ENV:-}" ] && [ -x "$root/.venv/bin/python" ]; then python=$root/.venv/bin/python; fi
}

need_launch_file() {   # FILE [PROCESSES]
  [ -f "$1" ] || die "no launch file at $1; launch/ has $(cd "$root/launch" && echo *.yaml)"
  if [ "${2:-1}" -gt 1 ] && grep -Eq "^distributed_type: *['\"]?NO\b" "$1"; then
    die "$1 is for one process, and this job has $2; use launch/ddp.yaml"
  fi
}

share_cores() { export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(($1 > $2 ? $1 / $2 : 1))}; }   # CORES PROCESSES

wait_for_exit() {   # PID -> its exit code. A signal that runs a trap ends bash's `wait`, but not the process
  local code=0
  wait "$1" || code=$?
  while kill -0 "$1" 2> /dev/null; do
    code=0
    wait "$1" || code=$?
  done
  return "$code"
}
