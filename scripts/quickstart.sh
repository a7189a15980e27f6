#!/usr/bin/env bash
# The quick start: SDAR on real ALFWorld games with a small policy, on a CPU, through verl's own main_ppo.
#   bash scripts/quickstart.sh [verl overrides ...]      e.g. sdar.loss.coef=0 trainer.total_training_steps=10
# SDAR_VENV names the virtual environment (default .venv), SDAR_OUT the output folder (default outputs/quickstart).
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
started="$(date +%s)"
venv="${SDAR_VENV:-.venv}"
out="${SDAR_OUT:-outputs/quickstart}"
mkdir -p "$out"
out="$(cd "$out" && pwd)"

echo "== 1/4 environment"
bash scripts/make_env.sh "$venv" local
venv="$(cd "$venv" && pwd)"
source scripts/cpu_env.sh

echo "== 2/4 games, each proven solvable by the engine's planner"
"$venv/bin/sdar-verl" prepare alfworld --generate --out "$out/data" --seed 0

echo "== 3/4 training (full log: $out/train.log)"
# Under `sdar-verl guard` another start goes on from the last checkpoint; else the quick start begins anew.
[ -n "${SDAR_GUARD:-}" ] || rm -rf "$out/checkpoints" "$out/metrics.jsonl"
training="$(date +%s)"
status=0
VERL_FILE_LOGGER_PATH="$out/metrics.jsonl" "$venv/bin/python" -m verl.trainer.main_ppo \
  --config-name sdar_quickstart \
  data.train_files="'$out/data/train.parquet'" \
  data.val_files="'$out/data/test.parquet'" \
  trainer.default_local_dir="'$out/checkpoints'" \
  hydra.run.dir="'$out/hydra'" \
  "$@" 2>&1 | tee "$out/train.log" | sed -un 's/.*\(sdar \(step\|validation\) .*\)/\1/p' || status=$?
if [ "$status" -ne 0 ]; then
  echo "training stopped with status $status; the end of $out/train.log:" >&2
  tail -n 25 "$out/train.log" >&2
  exit "$status"
fi
trained="$(date +%s)"

echo "== 4/4 summary and report"
"$venv/bin/python" -m sdar_verl.local.summary "$out" \
  --seconds-train "$((trained - training))" --started "$started"
"$venv/bin/sdar-verl" report "$out"
