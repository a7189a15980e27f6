#!/usr/bin/env bash
# GRPO on GSM8K with verl's own data, reward and agent loop, and the worked solution in the teacher's prompt.
#   bash recipes/gsm8k/run.sh [verl overrides ...]
# DATA names the folder of train.parquet and test.parquet (default ~/data/gsm8k), MODEL one of hydra_configs/model.
set -euo pipefail

data="${DATA:-$HOME/data/gsm8k}"
model="${MODEL:-qwen2.5-3b}"
exec python -m verl.trainer.main_ppo --config-name sdar_ppo +hardware=8gpu +model="$model" \
  data.train_files="'$data/train.parquet'" \
  data.val_files="'$data/test.parquet'" \
  data.train_batch_size=128 \
  data.max_prompt_length=512 \
  data.max_response_length=1024 \
  algorithm.adv_estimator=grpo \
  actor_rollout_ref.rollout.n=8 \
  actor_rollout_ref.actor.ppo_mini_batch_size=64 \
  actor_rollout_ref.actor.optim.lr=1e-6 \
  trainer.project_name=sdar_gsm8k \
  trainer.experiment_name="$model-"'${sdar.method}' \
  trainer.total_training_steps=150 \
  trainer.save_freq=25 \
  trainer.test_freq=10 \
  sdar.context.sources=[column] \
  +sdar.context.options.column.path=extra_info.answer \
  "$@"
