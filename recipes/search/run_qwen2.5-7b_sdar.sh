#!/usr/bin/env bash
# SDAR, Qwen2.5-7B-Instruct, Search-QA, 4 GPUs.
#   bash recipes/search/run_qwen2.5-7b_sdar.sh [verl overrides ...]
set -euo pipefail

exec python -m verl.trainer.main_ppo --config-name sdar_search model=qwen2.5-7b \
  trainer.experiment_name=qwen2.5-7b_sdar "$@"
