#!/usr/bin/env bash
# small.sh with a calculator: verl's tool_agent, and a policy that may ask it for a sum. Arguments and variables as there;
# SDAR_OUT is outputs/gsm8k-small-tool by default.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export SDAR_OUT="$(realpath -m "${SDAR_OUT:-outputs/gsm8k-small-tool}")"
venv="${SDAR_VENV:-.venv}"
if [ -x "$venv/bin/python" ]; then PATH="$(cd "$venv/bin" && pwd):$PATH"; fi
[ -d "$SDAR_OUT/data/policy" ] || python recipes/gsm8k/small.py --tool --out "$SDAR_OUT/data"
exec bash recipes/gsm8k/small.sh \
  data.max_response_length=64 \
  actor_rollout_ref.rollout.agent.default_agent_loop=tool_agent \
  actor_rollout_ref.rollout.multi_turn.enable=True \
  actor_rollout_ref.rollout.multi_turn.function_tool_path="'$PWD/recipes/gsm8k/calculator.py'" \
  trainer.experiment_name=small-tool \
  "$@"
