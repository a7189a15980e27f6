#!/usr/bin/env bash
# SDAR, Qwen2.5-7B-Instruct, WebShop, 2 GPUs.
#   bash recipes/webshop/run_qwen2.5-7b_sdar.sh [verl overrides ...]
set -euo pipefail

exec python -m verl.trainer.main_ppo --config-name sdar_webshop model=qwen2.5-7b \
  trainer.experiment_name=qwen2.5-7b_sdar "$@"
