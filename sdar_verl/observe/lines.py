"""One line per step that a person can read; the trackers get everything."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_COLUMNS = (
    ("success", "sdar/success", "{:.3f}"),
    ("reward", "critic/score/mean", "{:.3f}"),
    ("turns", "sdar/turns", "{:.1f}"),
    ("invalid", "sdar/invalid_share", "{:.3f}"),
    ("gate", "sdar/gate_mean", "{:.3f}"),
    ("gap", "sdar/gap_mean", "{:+.3f}"),
    ("lambda", "sdar/lambda", "{:g}"),
    ("seconds", "timing_s/step", "{:.1f}"),
)


def step_line(step: int, total: int, metrics: Mapping[str, Any]) -> str:
    """Success, reward, gate, gap and time of a training step; what a run does not have is left out."""
    parts = [f"{name} {form.format(metrics[key])}" for name, key, form in _COLUMNS if key in metrics]
    return f"sdar step {step}/{total}  " + "  ".join(parts)


def validation_line(step: int, metrics: Mapping[str, Any]) -> str:
    """Success of every validation arm."""
    suffix = "/success"
    arms = {
        key.removeprefix("sdar-val/").removesuffix(suffix): value
        for key, value in metrics.items()
        if key.startswith("sdar-val/") and key.endswith(suffix)
    }
    return f"sdar validation at step {step}  " + "  ".join(f"{arm} {value:.3f}" for arm, value in arms.items())
