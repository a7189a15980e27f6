#!/usr/bin/env bash
# GRPO, the baseline of run_qwen2.5-3b_sdar.sh: no distillation term and no teacher pass.
#   bash recipes/webshop/run_qwen2.5-3b_grpo.sh [verl overrides ...]
set -euo pipefail

exec python -m verl.trainer.main_ppo --config-name sdar_webshop model=qwen2.5-3b \
  method=grpo \
  trainer.experiment_name=qwen2.5-3b_grpo "$@"
