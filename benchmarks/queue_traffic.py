"""What passes the trainer's process on its way to and from verl's queue, this package's share against verl's own.

    python -m benchmarks.queue_traffic [--methods sdar_frozen revkl_frozen] [--steps 2] [OVERRIDES ...]

Steps of the quick start's recipe, in the toy environment: calls of ``kv_batch_get`` and ``kv_batch_put`` in the
trainer's process, the bytes of their columns, and the seconds they took, per step. What workers read and write is not
in it: it does not pass the trainer. Calls of the first step are left out, in which checks run once.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.common import machine, table
from tests.support.toy_run import SMALL, train

ROWS = [
    *[
        item
        for item in SMALL
        if not item.startswith(("sdar.update", "sdar.env.max_steps")) and "batch_size" not in item
    ],
    "data.train_batch_size=8",
    "actor_rollout_ref.actor.ppo_mini_batch_size=8",
    "sdar.env.max_steps=6",
    "sdar.update.mini_batch_rows=64",
    "trainer.save_freq=-1",
]


def measure(method: str, steps: int, overrides: list[str]) -> dict[str, dict[str, float]]:
    """Whose -> calls, bytes and seconds per step, and rows."""
    with TemporaryDirectory() as folder:
        log = Path(folder) / "queue.jsonl"
        env = {
            "SDAR_QUEUE_LOG": str(log),
            "VERL_USE_EXTERNAL_MODULES": "sdar_verl.plugin,benchmarks.counted_queue",
        }
        run = train(Path(folder), f"method={method}", *overrides, base=ROWS, steps=steps + 1, timeout=900, **env)
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        rows = run.metrics[steps + 1]["sdar/rows"]
    # A step begins with verl's writing the prompts' tags: a put without columns.
    starts = [i for i, line in enumerate(lines) if line["kind"] == "put" and not line["fields"]]
    counted = lines[starts[-steps] :]
    found: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for line in counted:
        if line["fields"]:
            for name, value in (("calls", 1), ("bytes", line["bytes"]), ("seconds", line["seconds"])):
                found[line["whose"]][name] += value / steps
    for whose in found:
        found[whose]["rows"] = rows
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=["sdar_frozen", "revkl_frozen"])
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    print(machine())
    lines = []
    for method in options.methods:
        found = measure(method, options.steps, options.overrides)
        ours, theirs = found["ours"], found["verl's"]
        lines.append(
            [
                method,
                f"{ours['rows']:.0f}",
                f"{ours['calls']:.1f} / {theirs['calls']:.1f} = {ours['calls'] / theirs['calls']:.2f}",
                f"{ours['bytes'] / 1e6:.2f} / {theirs['bytes'] / 1e6:.2f} MB = {ours['bytes'] / theirs['bytes']:.2f}",
                f"{ours['seconds']:.2f} / {theirs['seconds']:.2f} s",
            ]
        )
    print(table(["method", "rows", "calls, ours / verl's", "bytes", "seconds"], lines))


if __name__ == "__main__":
    main()
