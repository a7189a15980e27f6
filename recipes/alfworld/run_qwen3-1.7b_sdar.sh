#!/usr/bin/env bash
# SDAR, Qwen3-1.7B with thinking off, ALFWorld, 8 GPUs.
#   bash recipes/alfworld/run_qwen3-1.7b_sdar.sh [verl overrides ...]
set -euo pipefail

exec python -m verl.trainer.main_ppo --config-name sdar_alfworld model=qwen3-1.7b \
  trainer.experiment_name=qwen3-1.7b_sdar "$@"
