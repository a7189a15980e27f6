#!/usr/bin/env bash
# GRPO, SDAR, and SDAR with a placebo for its skills, three seeds each, on ALFWorld; then the comparison.
#   bash recipes/controls/run_alfworld.sh OUT [verl overrides ...]
set -euo pipefail

out="$1"
shift
sdar-verl sweep --config-name sdar_alfworld --methods "${METHODS:-grpo,sdar,sdar+shuffled}" --seeds "${SEEDS:-0,1,2}" \
  --out "$out" "$@"
exec sdar-verl compare "$out"/*-[0-9]* --baseline grpo --out "$out/comparison"
