#!/usr/bin/env bash
# GRPO on word problems in GSM8K's schema on a CPU, with verl's own reward and agent loop, and the worked solution in the
# teacher's prompt. The first start makes problems and policy. Needs the environment of scripts/quickstart.sh or test.sh
# (SDAR_VENV as there), or an activated one.
#   bash recipes/gsm8k/small.sh [verl overrides ...]         SDAR_OUT names the folder (default outputs/gsm8k-small)
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/../.."
out="$(realpath -m "${SDAR_OUT:-outputs/gsm8k-small}")"
venv="${SDAR_VENV:-.venv}"
if [ -x "$venv/bin/python" ]; then PATH="$(cd "$venv/bin" && pwd):$PATH"; fi
source scripts/cpu_env.sh
[ -d "$out/data/policy" ] || python recipes/gsm8k/small.py --out "$out/data"
exec python -m verl.trainer.main_ppo --config-name sdar_ppo +hardware=cpu \
  data.train_files="'$out/data/train.parquet'" \
  data.val_files="'$out/data/test.parquet'" \
  data.train_batch_size=8 \
  data.max_prompt_length=128 \
  data.max_response_length=24 \
  algorithm.adv_estimator=grpo \
  actor_rollout_ref.model.path="'$out/data/policy'" \
  actor_rollout_ref.rollout.n=8 \
  actor_rollout_ref.actor.ppo_mini_batch_size=8 \
  actor_rollout_ref.actor.optim.lr=2e-4 \
  trainer.project_name=sdar_gsm8k_small \
  trainer.experiment_name=small \
  trainer.default_local_dir="'$out/checkpoints'" \
  trainer.total_training_steps=20 \
  trainer.test_freq=5 \
  trainer.save_freq=-1 \
  sdar.rollout.poll_interval_s=0.1 \
  sdar.teacher.max_prompt_length=192 \
  sdar.context.sources=[column] \
  +sdar.context.options.column.path=extra_info.answer \
  actor_rollout_ref.rollout.val_kwargs.temperature=1.0 \
  '+sdar.validation.arms.told={context: teacher, temperature: 1.0}' \
  "$@"
