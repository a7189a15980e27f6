"""Counts what a run's trainer process reads from verl's queue and writes to it; loaded by VERL_USE_EXTERNAL_MODULES.

Each ``kv_batch_get`` and ``kv_batch_put`` becomes a line of ``$SDAR_QUEUE_LOG``: the step, whose call it was (the
innermost frame of a file of this package or of verl), rows, bytes and seconds. Tags and keys are not counted.
"""

from __future__ import annotations

import json
import os
import pickle
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import wrapt

_PACKAGE, _VERL = f"{os.sep}sdar_verl{os.sep}", f"{os.sep}verl{os.sep}"


def _bytes(fields: Any) -> int:
    total = 0
    for name in fields.keys() if fields is not None else ():
        value = fields.get(name)
        if isinstance(value, torch.Tensor):
            held = value.values() if value.is_nested else value
            total += held.numel() * held.element_size()
        else:
            total += len(pickle.dumps(list(value)))
    return total


def _caller() -> str:
    frame = sys._getframe(2)
    while frame is not None:
        file = frame.f_code.co_filename
        if _PACKAGE in file:
            return "ours"
        if _VERL in file and "transferqueue" not in file:
            return "verl's"
        frame = frame.f_back
    return "?"


def _counted(call: Callable[..., Any], kind: str) -> Callable[..., Any]:
    def counted(*args: Any, **kwargs: Any) -> Any:
        from verl.utils.skip import SkipManager

        started = time.perf_counter()
        answer = call(*args, **kwargs)
        written = kwargs.get("fields") if kind == "put" else answer
        asked = kwargs.get("select_fields") or (written.keys() if written is not None else ())
        line = {
            "step": getattr(SkipManager, "_step", None),
            "kind": kind,
            "whose": _caller(),
            "rows": len(kwargs.get("keys", ())),
            "bytes": _bytes(written),
            "seconds": time.perf_counter() - started,
            "fields": sorted(asked),
        }
        with open(os.environ["SDAR_QUEUE_LOG"], "a") as stream:
            stream.write(json.dumps(line) + "\n")
        return answer

    return counted


def _count(_: Any) -> None:
    import transfer_queue as tq

    tq.kv_batch_get, tq.kv_batch_put = _counted(tq.kv_batch_get, "get"), _counted(tq.kv_batch_put, "put")


if os.environ.get("SDAR_QUEUE_LOG"):
    # The trainer's process alone loads verl's trainers.
    wrapt.register_post_import_hook(_count, "verl.trainer.ppo.v1.trainer_base")
