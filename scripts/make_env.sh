#!/usr/bin/env bash
# Makes (or reuses) a virtual environment and installs sdar_verl from this checkout into it.
#   bash scripts/make_env.sh VENV_DIR EXTRAS        e.g. bash scripts/make_env.sh .venv local,test
# PYTHON picks the interpreter (3.10 to 3.12), SDAR_VERL another version of verl than constraints-cpu.txt names.
# A finished installation is recognised and takes no time.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="$1"
extras="$2"
stamp="$venv/.sdar_verl_installed"
verl="${SDAR_VERL:-}"
wanted="$(cat "$root/setup.cfg" "$root/scripts/constraints-cpu.txt" | cksum) $root $extras${verl:+ verl==$verl}"

find_python() {
  local candidate
  for candidate in "${PYTHON:-}" python3.11 python3.12 python3.10 python3; do
    [ -n "$candidate" ] || continue
    if "$candidate" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 13))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "No Python 3.10 to 3.12 found; install one or set PYTHON=/path/to/python" >&2
  return 1
}

if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
  exit 0
fi

python="$(find_python)"
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
constraints="$venv/constraints.txt"
cp "$root/scripts/constraints-cpu.txt" "$constraints"
[ -z "$verl" ] || sed -i "s/^verl==.*/verl==$verl/" "$constraints"
pip=("$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c "$constraints")
echo "installing into $venv (a few minutes the first time) ..."
# torch first and by its own: asked for by another package, pip may take a build with gigabytes of CUDA.
"${pip[@]}" torch
cuda="$("$venv/bin/python" -c 'import torch; print(torch.version.cuda or "")' 2> /dev/null)"
if [ -n "$cuda" ] && ! command -v nvidia-smi > /dev/null; then
  echo "note: this torch is a build for CUDA $cuda and there is no GPU here: it works, but takes gigabytes. A CPU build" \
    "is smaller: see https://pytorch.org/get-started/locally, install it into $venv and run this again" >&2
fi
"${pip[@]}" -e "$root[$extras]"
echo "$wanted" > "$stamp"
