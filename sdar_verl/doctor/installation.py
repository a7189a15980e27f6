"""Checks that need no config: Python, versions, the plugin in verl's processes, devices, environments, skill banks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from sdar_verl.compat import VERL_RANGE
from sdar_verl.doctor.build_tools import BUILDING_EXTRAS, remedy
from sdar_verl.doctor.findings import Finding
from sdar_verl.doctor.machine import Machine
from sdar_verl.envs.registry import packages_of_extras

PYTHONS = ((3, 10), (3, 12))
_REINSTALL = "pip install --force-reinstall sdar-verl, into the Python that starts verl"
# Package -> range; the lower ends are those of setup.cfg.
_REQUIRED = {"TransferQueue": ">=0.1.10", "transformers": "", "tensordict": "", "ray": ""}
_REGISTERED = {
    "trainer_modes": ("trainer mode", "sdar"),
    "estimators": ("advantage estimator", "sdar"),
    "agent_loops": ("agent loop", "sdar_agent"),
}


def check_installation(machine: Machine) -> list[Finding]:
    """Every finding about ``machine``, in the order in which things build on each other."""
    checks = (_python, _verl, _required, _plugin, _torch, _gpu_stack, _environments, _banks)
    return [finding for check in checks for finding in check(machine)]


def _python(machine: Machine) -> Iterator[Finding]:
    version = ".".join(map(str, machine.python))
    low, high = (".".join(map(str, end)) for end in PYTHONS)
    if PYTHONS[0] <= machine.python <= PYTHONS[1]:
        yield Finding("ok", "python", version)
    else:
        yield Finding("fail", "python", f"{version} is not supported", f"use Python {low} to {high}")


def _verl(machine: Machine) -> Iterator[Finding]:
    version, (low, high) = machine.versions.get("verl"), VERL_RANGE
    remedy = f'pip install "verl>={low},<{high}"'
    if version is None:
        yield Finding("fail", "verl", "not installed", remedy)
    elif low <= Version(version) < high:
        yield Finding("ok", "verl", version)
    else:
        yield Finding("fail", "verl", f"{version} is installed, this package needs >={low},<{high}", remedy)


def _required(machine: Machine) -> Iterator[Finding]:
    for package, own in _REQUIRED.items():
        wanted = machine.pins.get(package) or own
        version = machine.versions.get(package)
        remedy = f'pip install "{package}{wanted}"'
        if version is None:
            yield Finding("fail", package, "not installed", remedy)
        elif wanted and not SpecifierSet(wanted).contains(version, prereleases=True):
            yield Finding("fail", package, f"{version} is installed, verl asks for {wanted}", remedy)
        else:
            yield Finding("ok", package, version)


def _plugin(machine: Machine) -> Iterator[Finding]:
    yield from _known(machine.fresh, "plugin", "a fresh process")
    if machine.worker is None:
        yield Finding("warn", "plugin in Ray", "not looked at", "leave --no-ray out to ask a Ray worker")
    else:
        yield from _known(machine.worker, "plugin in Ray", "a Ray worker")


def _known(found: Mapping[str, Any], check: str, where: str) -> Iterator[Finding]:
    if "error" in found:
        yield Finding("fail", check, f"verl cannot be imported in {where}: {found['error']}", _REINSTALL)
        return
    if not found.get("plugin"):
        yield Finding(
            "fail",
            check,
            f"verl does not load sdar_verl in {where}, and would train without it",
            f"unset VERL_USE_EXTERNAL_PLUGINS when it is set, or {_REINSTALL}",
        )
        return
    missing = [f"{what} {name}" for key, (what, name) in _REGISTERED.items() if name not in found.get(key, ())]
    if missing:
        yield Finding("fail", check, f"loaded in {where}, but verl does not know {', '.join(missing)}", _REINSTALL)
    else:
        names = ", ".join(f"{what} {name}" for what, name in _REGISTERED.values())
        yield Finding("ok", check, f"loaded in {where}: {names}")


def _torch(machine: Machine) -> Iterator[Finding]:
    version = machine.versions.get("torch")
    if version is None:
        yield Finding("fail", "torch", "not installed", "pip install torch, in the build for this machine")
        return
    build = f"CUDA {machine.cuda_build}" if machine.cuda_build else "CPU"
    text = f"{version} ({build} build), {machine.gpus} GPUs"
    if machine.cuda_build and not machine.gpus and machine.gpu_files:
        yield Finding(
            "fail",
            "torch",
            f"{text}: there are NVIDIA devices, but torch cannot use them",
            "compare the driver with torch's CUDA version (nvidia-smi), and look at CUDA_VISIBLE_DEVICES",
        )
    elif machine.cuda_build and not machine.gpus:
        yield Finding(
            "warn",
            "torch",
            f"{text}: a CUDA build on a machine without a GPU",
            "to train here, install torch's CPU build, which is smaller; on a cluster, ask on a node with GPUs",
        )
    elif not machine.cuda_build and machine.gpu_files:
        yield Finding(
            "fail", "torch", f"{text}: a CPU build on a machine with NVIDIA devices", "install torch's CUDA build"
        )
    else:
        yield Finding("ok", "torch", text)


def _gpu_stack(machine: Machine) -> Iterator[Finding]:
    if not (machine.gpus or machine.gpu_files):
        yield Finding("ok", "GPU packages", "no GPU here: vllm and flash-attn are not needed (hardware=cpu)")
        return
    for package, extra in (("vllm", "vllm"), ("flash-attn", "flash-attn"), ("torch", "vllm")):
        version, pin = machine.versions.get(package), machine.pins.get(package)
        # flash-attn's build reads the torch that is installed.
        remedy = f'pip install {"--no-build-isolation " * (extra == "flash-attn")}"sdar-verl[{extra}]"'
        if version is None:
            yield Finding("warn", package, "not installed; the recipes for GPUs use it", remedy)
        elif pin and not SpecifierSet(pin).contains(Version(version).public, prereleases=True):
            yield Finding("warn", package, f"{version} is installed, verl is tested with {pin}", remedy)
        else:
            yield Finding("ok", package, f"{version}, as verl asks for" if pin else version)


def _environments(machine: Machine) -> Iterator[Finding]:
    for extra, packages in packages_of_extras().items():
        missing = [package for package in packages if machine.versions.get(package) is None]
        if missing:
            text, install = f"needs {', '.join(missing)}, not installed here", f'pip install "sdar-verl[{extra}]"'
            if extra in BUILDING_EXTRAS and (tools := machine.missing_tools):
                text += "".join(f"\nmissing: {tool.text}" for tool in tools)
                install = " && ".join(filter(None, (remedy(tools), install)))
            yield Finding("warn", f"env {extra}", text, f"if you need it: {install}")
        else:
            yield Finding("ok", f"env {extra}", ", ".join(f"{name} {machine.versions[name]}" for name in packages))


def _banks(machine: Machine) -> Iterator[Finding]:
    from sdar_verl.skills.bank import SkillBank, SkillBankError, bank_names

    sound = []
    for name in bank_names():
        try:
            sound.append(f"{name} ({len(SkillBank.load(name))})")
        except SkillBankError as error:
            yield Finding("fail", "skill banks", str(error), _REINSTALL)
    if sound:
        yield Finding("ok", "skill banks", ", ".join(sound))
    else:
        yield Finding("fail", "skill banks", "no shipped bank: the installation is incomplete", _REINSTALL)
