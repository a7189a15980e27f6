"""What several commands ask of their arguments."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from sdar_verl.errors import ConfigError


def check_above_zero(arguments: argparse.Namespace, *names: str) -> None:
    """Numbers that are given are finite and above 0. ConfigError names the first that is not."""
    for name in names:
        value = getattr(arguments, name)
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"--{name.replace('_', '-')} {value:g}: must be above 0")


def given_path(text: str) -> Path:
    """``type=`` of an argument that is a path. A blank one, from a variable that is not set, would be this folder."""
    if not text.strip():
        raise argparse.ArgumentTypeError("a path is needed, and this is empty")
    return Path(text)
