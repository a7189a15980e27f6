"""What tests must know of the version of verl that they run with (scripts/test_verl_version.sh)."""

from __future__ import annotations

from importlib.metadata import version

IS_VERL_090 = version("verl").startswith("0.9.0")
