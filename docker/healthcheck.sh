#!/usr/bin/env bash
# Whether training advances, for HEALTHCHECK and Kubernetes' livenessProbe: exit code 0 healthy, 1 not; one line says why.
#
#   RLHF_HEALTH_MINUTES   a run has to log within so many minutes (30)
#   RLHF_HEALTH_DIRS      where runs are ("/rlhf/runs /rlhf/models", each with what is below)
#
# A run that logs rarely (logging_steps) or loads for long needs more minutes. The reference's cache counts as progress too.
set -euo pipefail

# shellcheck source-path=SCRIPTDIR source=../launch/common.sh
source "$(dirname "$(realpath "$0")")/../launch/common.sh"

minutes=${RLHF_HEALTH_MINUTES:-30}
read -ra folders <<< "${RLHF_HEALTH_DIRS:-/rlhf/runs /rlhf/models}"

if ! is_running "${training_stages[@]}"; then
  echo "healthy: nothing is training here"
  exit 0
fi
recent() { find "$@" -mmin "-$minutes" -print -quit 2> /dev/null | grep .; }
if file=$(recent "${folders[@]}" -name metrics.jsonl || recent "${RLHF_CACHE:-$HOME/.cache/rlhf}/reference" -type f); then
  echo "healthy: $file was written within $minutes minutes"
elif recent "${TMPDIR:-/tmp}/rlhf-started" > /dev/null; then
  echo "healthy: it began less than $minutes minutes ago"
else
  echo "unhealthy: no metrics.jsonl below ${folders[*]} was written within $minutes minutes (RLHF_HEALTH_MINUTES, RLHF_HEALTH_DIRS)"
  exit 1
fi
