#!/usr/bin/env bash
# The one command before a change is shown: lint, format, types, tests.
#   bash scripts/check.sh            as continuous integration tests it, and what it does not: ruff and mypy
#   bash scripts/check.sh ARGS ...   arguments go to scripts/test.sh (--all, a file, -k NAME)
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv="${SDAR_VENV:-.venv}"
bash scripts/make_env.sh "$venv" local,search,webshop,test,dev
"$venv/bin/python" -m ruff check .
"$venv/bin/python" -m ruff format --check .
"$venv/bin/python" -m mypy
SDAR_EXTRAS=local,search,webshop,test,dev bash scripts/test.sh "$@"
