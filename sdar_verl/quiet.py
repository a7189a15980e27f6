"""Usage statistics of the programs underneath stay off unless somebody asks for them: a run calls nobody by itself."""

from __future__ import annotations

import os

QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
"""Environment variable -> value that turns the statistics off. Ray's are on by default, also without its dashboard."""


def be_quiet() -> None:
    """Set what is not set, for this process and those it starts. Nodes that run already have settings of their own."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
