"""What the episode viewer shows: an index of all episodes, and each episode packed on its own.

A page with two hundred episodes must open at once, so an episode's text is compressed (gzip, base64) and unpacked by
the browser when it is opened.
"""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Iterable, Sequence
from typing import Any

from sdar_verl.report.checked import finite

Turn = dict[str, Any]


def viewer_data(episodes: Iterable[Sequence[Turn]]) -> dict[str, Any]:
    """Index and packed bodies of ``episodes`` (each its turns, see :mod:`sdar_verl.report.trace`)."""
    index, bodies = [], []
    for turns in episodes:
        index.append(summary(turns))
        bodies.append(pack(body(turns)))
    return {"index": index, "bodies": bodies}


def summary(turns: Sequence[Turn]) -> dict[str, Any]:
    """One line of the list."""
    first = turns[0]
    gaps = [gap for turn in turns for gap in turn["gap"] or [] if finite(gap) is not None]
    return {
        "id": first["episode"],
        "step": first["step"],
        "group": first["group"],
        "session": int(first["episode"].rsplit("_", 1)[1]),
        "type": first["task_type"] or "",
        "task": first["task"] or "",
        "task_id": first["task_id"],
        "success": bool(first["success"]),
        "reward": finite(first["episode_reward"]),
        "turns": len(turns),
        "invalid": sum(bool(turn["unparsed"] or turn["inadmissible"]) for turn in turns),
        "gap": _rounded(sum(gaps) / len(gaps)) if gaps else None,
        "skills": first["skills"] or [],
    }


def body(turns: Sequence[Turn]) -> dict[str, Any]:
    """Everything else: per turn its texts and the columns of its tokens. A text said again is kept once."""
    texts: dict[str, int] = {}

    def once(text: str | None) -> int | None:
        return None if text is None else texts.setdefault(text, len(texts))

    listed = [
        {
            "turn": turn["turn"],
            "prompt": once(turn["prompt"]),
            "context": once(turn["context"]) if turn["context"] else None,
            "observation": once(turn["observation"]),
            "action": turn["action"],
            "result": once(turn["result"]),
            "reward": _rounded(turn["reward"]),
            "unparsed": turn["unparsed"],
            "inadmissible": turn["inadmissible"],
            "truncated": turn["truncated"],
            "endorsement": endorsement(turn),
            "tokens": [token or "" for token in turn["tokens"] or []],
            "ids": turn["token_ids"] or [],
            "student": _column(turn["student_log_prob"]),
            "teacher": _column(turn["teacher_log_prob"]),
            "gap": _column(turn["gap"]),
            "gate": _column(turn["gate"]),
            "entropy": _column(turn["entropy"]),
            "advantage": _column(turn["advantage"]),
        }
        for turn in turns
    ]
    return {"turns": listed, "texts": list(texts)}


def endorsement(turn: Turn) -> float | None:
    """Sum of the turn's gaps, nats: log of how much likelier the teacher finds the whole answer; None without one."""
    gaps = [gap for gap in turn["gap"] or [] if finite(gap) is not None]
    return _rounded(sum(gaps)) if gaps else None


def pack(value: Any) -> str:
    """JSON, gzip, base64; the same bytes for the same value."""
    return base64.b64encode(gzip.compress(json.dumps(value).encode(), mtime=0)).decode()


def _column(values: Sequence[float | None] | None) -> list[float | None] | None:
    return None if values is None else [_rounded(value) for value in values]


def _rounded(value: float | None) -> float | None:
    return None if finite(value) is None else float(f"{value:.4g}")
