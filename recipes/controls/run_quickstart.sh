#!/usr/bin/env bash
# GRPO, SDAR, and SDAR with a placebo for its skills, three seeds each, in the quick start's recipe; then the comparison.
#   bash recipes/controls/run_quickstart.sh OUT [verl overrides ...]
# Needs the environment and the panels of scripts/quickstart.sh (SDAR_VENV and SDAR_OUT as there).
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/../.."
out="$1"
shift
data="$(cd "${SDAR_OUT:-outputs/quickstart}/data" && pwd)"
bin="$(cd "${SDAR_VENV:-.venv}/bin" && pwd)"
source scripts/cpu_env.sh
"$bin/sdar-verl" sweep --config-name sdar_quickstart --methods "${METHODS:-grpo,sdar_frozen,sdar_frozen+shuffled}" \
  --seeds "${SEEDS:-0,1,2}" --out "$out" \
  data.train_files="'$data/train.parquet'" data.val_files="'$data/test.parquet'" trainer.test_freq=10 "$@"
exec "$bin/sdar-verl" compare "$out"/*-[0-9]* --baseline grpo --out "$out/comparison"
