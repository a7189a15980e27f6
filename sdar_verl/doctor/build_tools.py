"""What an installation needs of the system: ALFWorld's engines have no wheels on the package index, pip compiles them.

``scripts/make_env.sh`` runs this file by its path before anything is installed, so it imports the standard library
alone. ``sdar-verl doctor`` asks the same functions.
"""

from __future__ import annotations

import configparser
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

BUILDING_EXTRAS = {"alfworld", "local"}
"""Extras of setup.cfg that bring packages without wheels: fast-downward-textworld (C++) and jericho (C)."""

_FOR = "to compile ALFWorld's engines"
# The variable and the name under which their builds look for a compiler, what it is tried on, Debian's package.
_COMPILERS = (
    ("CC", "gcc", "c", "#include <stdio.h>", "gcc libc6-dev"),
    ("CXX", "g++", "c++", "#include <vector>", "g++"),
)


@dataclass(frozen=True)
class Missing:
    """Something the system lacks, in words, and the Debian packages that bring it (empty: the words say the remedy)."""

    text: str
    packages: str


def missing_build_tools(path: str | None = None) -> list[Missing]:
    """What lacks of the compilers and make. cmake comes as a wheel, and ``python`` is the environment's own.

    Args:
        path: where to look, like ``PATH``; None: this process's.
    """
    found = []
    for variable, name, language, program, packages in _COMPILERS:
        set_to = os.environ.get(variable, "")
        words = shlex.split(set_to) or [name]
        shown = name
        if set_to:
            shown, packages = f"{variable}={set_to} (unset it, or name a compiler that works)", ""
        command = shutil.which(words[0], path=path)
        if command is None:
            found.append(Missing(f"{shown} {_FOR}: not on PATH", packages))
            continue
        words = [command, *words[1:], "-x", language, "-fsyntax-only", "-"]
        tried = subprocess.run(words, input=f"{program}\n", capture_output=True, text=True, check=False)
        if tried.returncode:
            said = (tried.stderr.strip() or f"exit status {tried.returncode}").splitlines()[0]
            found.append(Missing(f"{shown} {_FOR}: does not work ({said})", packages))
    if shutil.which("make", path=path) is None:
        found.append(Missing(f"make {_FOR}: not on PATH", "make"))
    return found


def missing_python(path: str | None = None) -> list[Missing]:
    """The engines' builds call ``python`` by that name; ``scripts/make_env.sh`` puts the environment's on PATH."""
    if shutil.which("python", path=path):
        return []
    return [Missing(f"python {_FOR}: not on PATH (activate the environment)", "")]


def missing_modules() -> list[Missing]:
    """What this Python lacks to make a virtual environment; Debian keeps that in a package of its own."""
    if all(importlib.util.find_spec(name) for name in ("ensurepip", "venv")):
        return []
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    return [Missing(f"modules ensurepip and venv of {sys.executable} to make an environment", f"python{version}-venv")]


def remedy(missing: Sequence[Missing]) -> str:
    """The one command that mends all of it on Debian and Ubuntu; empty where packages are not what is missing."""
    packages = list(dict.fromkeys(package for item in missing for package in item.packages.split()))
    if "g++" in packages:  # which brings C's compiler and headers
        packages = [package for package in packages if package not in ("gcc", "libc6-dev")]
    if not packages:
        return ""
    command = f"{'' if os.geteuid() == 0 else 'sudo '}apt-get install -y {' '.join(packages)}"
    return command if shutil.which("apt-get") else f"{command} (elsewhere: the packages with the same tools)"


def main(extras: str, setup: str) -> int:
    """Say what is missing for an environment with these extras, with the remedy; exit status 1 when something is.

    Args:
        extras: names with commas between them.
        setup: path of the ``setup.cfg`` that knows them; pip only warns of one that it does not know, at the end.
    """
    config = configparser.ConfigParser()
    config.read(setup, encoding="utf-8")
    known, asked = {*config["options.extras_require"]}, set(extras.split(","))
    if unknown := sorted(asked - known):
        print(f"EXTRAS={extras}: no extra {unknown[0]!r}; known: {', '.join(sorted(known))}", file=sys.stderr)
        return 1
    missing = missing_modules()
    if BUILDING_EXTRAS & asked:
        missing += missing_build_tools()
    for item in missing:
        print(f"missing: {item.text}", file=sys.stderr)
    if remedy(missing):
        print(f"mend it: {remedy(missing)}", file=sys.stderr)
    return int(bool(missing))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
