#!/usr/bin/env bash
# GRPO on word problems in GSM8K's schema on a CPU, with verl's own reward and agent loop, and the worked solution in the
# teacher's prompt. The first start makes problems and policy.
#   bash recipes/gsm8k/small.sh [verl overrides ...]         DATA names the folder (default outputs/gsm8k-small/data)
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
data="${DATA:-$PWD/outputs/gsm8k-small/data}"
[ -d "$data/policy" ] || python "$here/small.py" --out "$data"
exec python -m verl.trainer.main_ppo --config-name sdar_ppo +hardware=cpu \
  data.train_files="$data/train.parquet" \
  data.val_files="$data/test.parquet" \
  data.train_batch_size=8 \
  data.max_prompt_length=128 \
  data.max_response_length=24 \
  algorithm.adv_estimator=grpo \
  actor_rollout_ref.model.path="$data/policy" \
  actor_rollout_ref.rollout.n=8 \
  actor_rollout_ref.actor.ppo_mini_batch_size=8 \
  actor_rollout_ref.actor.optim.lr=2e-4 \
  trainer.project_name=sdar_gsm8k_small \
  trainer.experiment_name=small \
  trainer.default_local_dir="$PWD/outputs/gsm8k-small/checkpoints" \
  trainer.total_training_steps=20 \
  trainer.test_freq=5 \
  trainer.save_freq=-1 \
  sdar.rollout.poll_interval_s=0.1 \
  sdar.teacher.max_prompt_length=192 \
  sdar.context.sources=[column] \
  +sdar.context.options.column.path=extra_info.answer \
  sdar.validation.arms.student.temperature=1.0 \
  '+sdar.validation.arms.told={context: teacher, temperature: 1.0}' \
  "$@"
