"""What machines that are taken away without a word cost, against the planner's formula.

    python -m benchmarks.cloud_kills [--kills 10] [--every 6] [--out outputs/benchmarks/cloud_kills]

One run of the quick start's recipe in a small form (toy environment), through verl's main_ppo, that saves every
``--every`` steps and mirrors to an S3 server over HTTP on this machine. Each attempt is killed as a whole, and the
run's folder deleted, in the interval after its second checkpoint in the bucket: at a random moment of one of
``--kills`` equal parts of that interval, each part once. The next attempt fills an empty folder from the bucket.

What a kill loses is the time from the beginning of the save that counts to the kill; the formula
(:func:`sdar_verl.planner.cloud.saving`) says half an interval, a save and an upload, with the times of this run.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np


@dataclass
class Clock:
    """When a save of this attempt began, and when its manifest was in the bucket; step -> seconds."""

    began: dict[int, float] = field(default_factory=dict)
    counts: dict[int, float] = field(default_factory=dict)

    def look(self, checkpoints: Path, seen: list[tuple[str, str]], first: int) -> None:
        """Note what is new."""
        now = time.monotonic()
        for folder in checkpoints.glob("global_step_*"):
            step = int(folder.name.rsplit("_", 1)[1])
            if step > first:
                self.began.setdefault(step, now)
        for method, name in seen:
            if method == "PUT" and name.endswith("/manifest.json"):
                step = int(name.split("global_step_")[1].split("/")[0])
                if step in self.began:
                    self.counts.setdefault(step, now)
        seen.clear()


def main() -> int:
    """Command line; prints the figures."""
    from sdar_verl.cloud import ledger
    from sdar_verl.cloud.mirror import Mirror
    from sdar_verl.cloud.store import Store
    from sdar_verl.report.layout import METRICS_FILE, RECORD, read_lines
    from tests.support.killing import LiveRun
    from tests.support.s3 import BUCKET, s3_server

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--every", type=int, default=6)
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmarks/cloud_kills"))
    arguments = parser.parse_args()
    folder, chance = arguments.out.resolve(), random.Random(0)
    checkpoints = folder / "checkpoints"
    shutil.rmtree(folder, ignore_errors=True)
    lost: list[float] = []
    steps: list[float] = []
    saves: list[float] = []
    uploads: list[float] = []
    starts: list[float] = []
    with s3_server() as server:
        os.environ.update(server.env)
        store = Store(f"s3://{BUCKET}/run")
        words = (f"trainer.save_freq={arguments.every}", f"sdar.cloud.mirror={store.place}")
        for number, part in enumerate(chance.sample(range(arguments.kills), arguments.kills)):
            clock, came = Clock(), Mirror(store.place).newest()
            started = time.monotonic()
            run = LiveRun(folder, *words, steps=2000, env=server.env)
            try:
                run.wait_for(lambda run=run: "sdar step" in run.output)  # type: ignore[misc]
                starts.append(time.monotonic() - started)
                moment = float("inf")
                while time.monotonic() < moment:
                    assert run.process.poll() is None, run.output[-6000:]
                    clock.look(checkpoints, server.seen, came)
                    if len(clock.counts) >= 2 and moment == float("inf"):
                        before, last = list(clock.counts.values())[-2:]
                        moment = last + (part + chance.random()) / arguments.kills * (last - before)
                    time.sleep(0.02)
                killed = time.monotonic()
            finally:
                run.kill_all()
            counted = max(clock.counts)
            lost.append(killed - clock.began[counted])
            for line in read_lines(checkpoints / RECORD / METRICS_FILE):
                data = line["data"]
                if line["step"] > came + 1 and "timing_s/step" in data:  # the first step after a start is slower
                    save = data.get("timing_s/save_checkpoint", 0.0)
                    steps.append(data["timing_s/step"] - save)
                    saves.extend([save] if save else [])
            uploads.extend(clock.counts[step] - clock.began[step] for step in clock.counts)
            print(f"kill {number + 1}: {lost[-1]:.1f} s lost; came from step {came}, {counted} counts", flush=True)
            shutil.rmtree(checkpoints)
        found = ledger.total(ledger.read(store))
    step, save = float(np.median(steps)), float(np.median(saves))
    upload = max(float(np.median(uploads)) - save, 0.0)
    formula = arguments.every * step / 2 + save + upload
    print(f"step {step:.2f} s, save {save:.2f} s, upload {upload:.2f} s; a save every {arguments.every} steps")
    print(f"lost by a kill: {np.mean(lost):.2f} s; formula {formula:.2f} s: ratio {np.mean(lost) / formula:.3f}")
    print(f"from the start to the end of the first step: {np.median(starts):.0f} s")
    print(f"share of steps that were trained twice: {found.redone:.3f}, in {found.attempts} attempts")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
