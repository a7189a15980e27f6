#!/usr/bin/env bash
# SDAR, Qwen2.5-7B-Instruct, WebShop, 4 GPUs: on 2 of 80 GB it does not fit (sdar-verl plan).
#   bash recipes/webshop/run_qwen2.5-7b_sdar.sh [verl overrides ...]
set -euo pipefail

exec python -m verl.trainer.main_ppo --config-name sdar_webshop model=qwen2.5-7b hardware=4gpu \
  trainer.experiment_name=qwen2.5-7b_sdar "$@"
