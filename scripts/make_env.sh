#!/usr/bin/env bash
# Makes (or reuses) a virtual environment and installs sdar_verl from this checkout into it.
#   bash scripts/make_env.sh VENV_DIR EXTRAS        e.g. bash scripts/make_env.sh .venv local,test
# PYTHON picks the interpreter (3.10 to 3.12), SDAR_VERL another version of verl than constraints-cpu.txt names.
# A finished installation is recognised and takes no time. Nothing but PATH=/usr/bin:/bin is needed: no python, pip or
# activated environment, and no home folder that can be written.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
if [ $# -ne 2 ]; then
  echo "make_env.sh takes VENV_DIR and EXTRAS, such as .venv local,test, with commas alone between them; not: $*" >&2
  exit 2
fi
venv="$1"
extras="$2"
stamp="$venv/.sdar_verl_installed"
verl="${SDAR_VERL:-}"
wanted="$(cat "$root/setup.cfg" "$root/scripts/constraints-cpu.txt" | cksum) $root $extras${verl:+ verl==$verl}"

if [ -x "$venv/bin/python" ] && [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
  exit 0
fi

# Whether interpreter $1 is of a version that setup.cfg allows, and can do $2.
fits() { "$1" -c "import sys; $2; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))" 2> /dev/null; }

find_python() {
  local candidate needs
  if [ -n "${PYTHON:-}" ]; then
    fits "$PYTHON" pass && echo "$PYTHON" && return
    echo "PYTHON=$PYTHON is not Python 3.10 to 3.12; name one that is, or leave PYTHON unset" >&2
    return 1
  fi
  for needs in "import ensurepip, venv" pass; do
    for candidate in python3.11 python3.12 python3.10 python3 python; do
      fits "$candidate" "$needs" && echo "$candidate" && return
    done
  done
  if command -v python3 > /dev/null; then
    echo "missing: Python 3.10 to 3.12; python3 here is $(python3 -V 2>&1)" >&2
    echo "mend it: name another by PYTHON=/path/to/python, e.g. one that uv, pyenv or conda installs" >&2
  else
    echo "missing: Python 3.10 to 3.12" >&2
    echo "mend it: apt-get install -y python3 python3-venv g++ make" >&2
  fi
  return 1
}

python="$(find_python)"
"$python" "$root/sdar_verl/doctor/build_tools.py" "$extras" "$root/setup.cfg"

# A folder of somebody's is left alone; an environment whose interpreter has gone, or that was never finished, is not.
if ! fits "$venv/bin/python" "import pip"; then
  if [ -n "$(ls -A "$venv" 2> /dev/null)" ] && [ ! -f "$venv/pyvenv.cfg" ]; then
    echo "$venv holds files and is no virtual environment; name another folder (SDAR_VENV)" >&2
    exit 1
  fi
  "$python" -m venv --clear "$venv"
fi
venv="$(cd "$venv" && pwd)"
stamp="$venv/.sdar_verl_installed"
# The engines' builds call `python` and `cmake` by name.
export PATH="$venv/bin:$PATH"
constraints="$venv/constraints.txt"
cp "$root/scripts/constraints-cpu.txt" "$constraints"
[ -z "$verl" ] || sed -i "s/^verl==.*/verl==$verl/" "$constraints"
pip=("$venv/bin/python" -m pip --disable-pip-version-check)
# pip keeps what it downloads and compiles in the home folder, for the next environment.
source "$root/scripts/home.sh"

# Says what is installed and how long it took; $1 in words, then pip's arguments.
install() {
  local what="$1" began="$SECONDS"
  shift
  echo "installing $what ..."
  if ! "${pip[@]}" install --quiet -c "$constraints" "$@"; then
    echo "installing $what failed, see above; run this again when it is mended" >&2
    exit 1
  fi
  echo "  $((SECONDS - began)) s"
}

# torch first and by its own: asked for by another package, pip may take a build with gigabytes of CUDA.
install torch torch
cuda="$("$venv/bin/python" -c 'import torch; print(torch.version.cuda or "")' 2> /dev/null)"
if [ -n "$cuda" ] && ! command -v nvidia-smi > /dev/null; then
  echo "note: this torch is a build for CUDA $cuda and there is no GPU here: it works, but takes gigabytes. A CPU build" \
    "is smaller: see https://pytorch.org/get-started/locally, install it into $venv and run this again" >&2
fi
install "verl and what it needs" -e "$root"
case ",$extras," in
  *,local,* | *,alfworld,*) note=" (ALFWorld's engines are compiled here, unless pip's cache has them: minutes)" ;;
esac
install "$extras${note:-}" -e "$root[$extras]"
echo "$wanted" > "$stamp"
