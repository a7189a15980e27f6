#!/usr/bin/env bash
# The README's table: the quick start's recipe with three seeds of SDAR and of GRPO, same budget, same test panel.
#   bash benchmarks/quickstart_seeds.sh OUT      needs the environment and the panels of scripts/quickstart.sh
# Prints the table; about 6 x the training part of the quick start.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
out="$(mkdir -p "$1" && cd "$1" && pwd)"
data="$(pwd)/outputs/quickstart/data"
python="$(pwd)/${SDAR_VENV:-.venv}/bin/python"
source scripts/cpu_env.sh

for seed in 0 1 2; do
  for method in sdar_frozen grpo; do
    run="$out/$method-$seed"
    [ -f "$run/finished" ] && continue
    mkdir -p "$run"
    VERL_FILE_LOGGER_PATH="$run/metrics.jsonl" "$python" -m verl.trainer.main_ppo --config-name sdar_quickstart \
      method="$method" \
      data.train_files="'$data/train.parquet'" data.val_files="'$data/test.parquet'" \
      trainer.default_local_dir="'$run/checkpoints'" hydra.run.dir="'$run/hydra'" \
      data.seed="$seed" sdar.rollout.seed="$seed" actor_rollout_ref.actor.data_loader_seed="$((42 + seed))" \
      > "$run/log.txt" 2>&1
    touch "$run/finished"
  done
done
"$python" benchmarks/quickstart_table.py --panel "$data/test.parquet" "$out"/*-[0-9]
