#!/usr/bin/env bash
# SDAR, Qwen3-1.7B with thinking off, WebShop, 2 GPUs.
#   bash recipes/webshop/run_qwen3-1.7b_sdar.sh [verl overrides ...]
set -euo pipefail

exec python -m verl.trainer.main_ppo --config-name sdar_webshop model=qwen3-1.7b \
  trainer.experiment_name=qwen3-1.7b_sdar "$@"
