#!/usr/bin/env bash
# Sets up an environment and runs the tests.
#   bash scripts/test.sh            everything but the slow ones
#   bash scripts/test.sh --all      the slow ones too
#   bash scripts/test.sh --vllm     those that run real vLLM on the CPU, in an environment of their own
#   bash scripts/test.sh ARGS ...   further arguments go to pytest
# SDAR_VENV names the virtual environment (default .venv in the checkout), SDAR_VLLM_VENV that of --vllm (.venv-vllm),
# SDAR_TEST_WORKERS how many files are tested at the same time (default 2; a run through verl keeps about one core busy
# and takes 5 GB of memory; those of --vllm run one by one).
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ "${1:-}" = "--vllm" ]; then
  shift
  venv="${SDAR_VLLM_VENV:-.venv-vllm}"
  if ! bash scripts/make_vllm_env.sh "$venv"; then
    echo "SKIPPED tests/vllm: vLLM's CPU build could not be installed into $venv, see above"
    exit 0
  fi
  source scripts/cpu_env.sh
  exec "$venv/bin/python" -m pytest -m vllm tests/vllm "$@"
fi

venv="${SDAR_VENV:-.venv}"
bash scripts/make_env.sh "$venv" "${SDAR_EXTRAS:-local,search,webshop,test}"
selection=(-m "not slow and not vllm")
if [ "${1:-}" = "--all" ]; then
  selection=(-m "not vllm")
  shift
fi
source scripts/cpu_env.sh
# A run starts seven processes: they compile this package once, not each for itself.
unset PYTHONDONTWRITEBYTECODE
# A file stays in one process, which shares its runs among its tests; the long ones come first.
workers=(-n "${SDAR_TEST_WORKERS:-2}" --dist loadscope --no-loadscope-reorder)
"$venv/bin/python" -m pytest "${workers[@]}" "${selection[@]}" "$@"
