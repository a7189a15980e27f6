"""What several commands ask of their arguments."""

from __future__ import annotations

import argparse
import math

from sdar_verl.errors import ConfigError


def check_above_zero(arguments: argparse.Namespace, *names: str) -> None:
    """Numbers that are given are finite and above 0. ConfigError names the first that is not."""
    for name in names:
        value = getattr(arguments, name)
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"--{name.replace('_', '-')} {value:g}: must be above 0")
