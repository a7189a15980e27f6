#!/usr/bin/env bash
# Runs tests against a version of verl, in an environment of its own.
#   bash scripts/test_verl_version.sh 0.9.0                  unit tests, and the first runs through main_ppo
#   bash scripts/test_verl_version.sh 0.9.0 tests/unit ...   further arguments go to pytest, in place of that selection
#   bash scripts/test_verl_version.sh ../verl                a checkout of verl, as it lies there
# The environment is .venv-verl-VERSION (or -FOLDER) in the checkout, unless SDAR_VENV names another.
set -euo pipefail

if [ $# -lt 1 ]; then
  sed -n '2,6s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
  exit 2
fi
version="$1"
shift
checkout=""
if [ -d "$version" ]; then
  checkout="$(cd "$version" && pwd)"
  version="$(basename "$checkout")"
fi

cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv="${SDAR_VENV:-.venv-verl-$version}"
if [ -n "$checkout" ]; then
  bash scripts/make_env.sh "$venv" local,search,webshop,test
  # Its dependencies are those of the release that is there already; of verl itself nothing else must be left.
  "$venv/bin/python" -m pip install --quiet --no-deps --force-reinstall "$checkout"
else
  SDAR_VERL="$version" bash scripts/make_env.sh "$venv" local,search,webshop,test
  installed="$("$venv/bin/python" -c 'from importlib.metadata import version; print(version("verl"))')"
  if [ "$installed" != "$version" ]; then
    echo "$venv has verl $installed, not $version: remove the folder and run this again" >&2
    exit 1
  fi
fi
if [ $# -eq 0 ]; then
  set -- tests/unit tests/integration/test_training.py tests/integration/test_teacher_worker.py
fi
source scripts/cpu_env.sh
"$venv/bin/python" -m pytest "$@"
