"""What differs between versions of verl, in one place."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata
from typing import Any

from packaging.version import Version

from sdar_verl.errors import ConfigError

VERL_RANGE = (Version("0.9.0"), Version("0.10"))


def check_verl_version(installed: str | None = None) -> None:
    """Raise :class:`ConfigError` unless verl is in the range this package is written for."""
    version = installed or metadata.version("verl")
    low, high = VERL_RANGE
    if not low <= Version(version) < high:
        raise ConfigError(
            f'verl {version} is installed, sdar_verl needs >={low},<{high}: pip install "verl>={low},<{high}"'
        )


EXPECTED = "expected_acc_counts"
"""Argument of verl's ``_val_metrics_update``."""


def validation_counts(told: Mapping[str, Any]) -> Mapping[tuple[str, str], int] | None:
    """How many rollouts of each task a validation asked for, ``(data source, uid) -> rollouts``.

    Args:
        told: the keyword arguments of verl's ``_val_metrics_update``.

    Returns:
        None from verl 0.9.0, which does not tell.
    """
    return told.get(EXPECTED)
