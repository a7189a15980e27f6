#!/usr/bin/env bash
# A run on a Ray cluster that exists, through `ray job submit`; started again while it asks for it (status 75).
#   RAY_API_SERVER_ADDRESS=http://127.0.0.1:8265 PRICE=55.04 BUDGET=800 bash recipes/cloud/ray_job.sh \
#     --config-name sdar_alfworld model=qwen2.5-7b sdar.cloud.mirror=s3://BUCKET/run [verl overrides ...]
# Nodes see this package; paths are absolute. GUARD holds further options of sdar-verl guard, ENV_VARS a JSON object of
# environment variables for all processes of the run.
# Start the cluster's head with RAY_JOB_STOP_WAIT_TIME_S=100: `ray job stop` kills after 3 s otherwise.
set -euo pipefail

guard=(sdar-verl guard)
[ -z "${PRICE:-}" ] || guard+=(--price "$PRICE")
[ -z "${BUDGET:-}" ] || guard+=(--budget "$BUDGET")
read -r -a more <<< "${GUARD:-}"
[ "${#more[@]}" -eq 0 ] || guard+=("${more[@]}")
log="$(mktemp)"
trap 'rm -f "$log"' EXIT

for attempt in $(seq 1 "${ATTEMPTS:-20}"); do
  echo "== attempt $attempt"
  if ray job submit --runtime-env-json "{\"env_vars\": ${ENV_VARS:-{\}}}" -- \
    "${guard[@]}" -- python -m verl.trainer.main_ppo "$@" 2>&1 | tee "$log"; then
    exit 0
  fi
  # `ray job submit` ends with 1 whatever the job's own status was; it says that in words.
  grep -q "exit code 75" "$log" || exit 1
done
echo "gave up after ${ATTEMPTS:-20} attempts" >&2
exit 75
