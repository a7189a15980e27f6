"""Names of a run's training prompts: they order its rows, and they seed its requests."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

SEED_NAMES = {"sglang": "sampling_seed"}
"""What a server calls a request's seed where it is not ``seed``."""

_UID = re.compile(r"s(\d{8})p\d{8}(r\d+)?")


class PromptUids:
    """Hands out names. They sort in the order in which prompts are submitted, and hold no underscore (verl's separator
    between a prompt and its rows)."""

    def __init__(self) -> None:
        self._step = -1
        self._count = 0
        self._drawn: Counter[str] = Counter()

    def name(self, step: int, tasks: Sequence[str]) -> list[str]:
        """Names of prompts that are submitted together.

        Args:
            step: of the trainer; an asynchronous one submits several times in a step.
            tasks: one text per prompt, the same for the same task. Where a step draws a task again, because the panel
                is small, its name says so.
        """
        if step != self._step:
            self._step, self._count, self._drawn = step, 0, Counter()
        names = []
        for task in tasks:
            again = f"r{self._drawn[task]}" if self._drawn[task] else ""
            names.append(f"s{step:08d}p{self._count:08d}{again}")
            self._drawn[task] += 1
            self._count += 1
        return names


def seed_part(uid: object, step: int | None) -> str:
    """What the requests of a prompt are seeded with, besides its task: when it was submitted.

    A prompt that a resume submits again keeps its name, so it stays apart from a new one of the same task.

    Args:
        uid: the prompt's name; of a validation prompt, verl's.
        step: of the trainer; it stands in where the name holds none.
    """
    match = _UID.fullmatch(str(uid))
    return f"{int(match[1])}{match[2] or ''}" if match else str(step)


def seeded(params: Mapping[str, Any], seed: int | None, server: str) -> dict[str, Any]:
    """Sampling parameters of a request with its seed, under the name that the server reads.

    Args:
        params: without one.
        seed: None leaves it to the server.
        server: ``actor_rollout_ref.rollout.name``.
    """
    return {**params, **({} if seed is None else {SEED_NAMES.get(server, "seed"): seed})}


def request_seed(seed: int | None, *parts: object) -> int | None:
    """A sampling seed from ``sdar.rollout.seed`` and what tells this request from others; None without."""
    if seed is None:
        return None
    text = "|".join(str(part) for part in (seed, *parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1
