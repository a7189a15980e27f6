"""What differs between versions of verl, in one place."""

from __future__ import annotations

from importlib import metadata

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
