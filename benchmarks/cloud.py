"""What a mirror costs a step, and how soon after a notice a whole checkpoint is in the bucket.

    python -m benchmarks.cloud [--steps 66] [--block 6] [--out outputs/benchmarks/cloud]

One run of the quick start's recipe in a small form (toy environment), through verl's main_ppo, that saves every third
step and mirrors to an S3 server over HTTP on this machine. Blocks of steps with the mirror and without take turns (a
trainer mode of its own switches it), so that other jobs slow both down alike; the time of verl's own save is taken off.
When the steps are done, in a block with the mirror, the run is asked to stop; the time until its ledger says that it
has ended, after the last manifest, counts.
"""

from __future__ import annotations

import argparse
import os
import shutil
import time
from pathlib import Path

import numpy as np

MODULE = "benchmarks.cloud_mode"


def main() -> int:
    """Command line; prints the figures."""
    from sdar_verl.cloud import ledger, stop
    from sdar_verl.cloud.mirror import Mirror
    from sdar_verl.cloud.store import Store
    from sdar_verl.report.layout import METRICS_FILE, RECORD, read_lines
    from tests.support.killing import LiveRun
    from tests.support.s3 import BUCKET, s3_server

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=66)
    parser.add_argument("--block", type=int, default=6)
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmarks/cloud"))
    arguments = parser.parse_args()
    shutil.rmtree(arguments.out, ignore_errors=True)
    folder = arguments.out.resolve()
    with s3_server() as server:
        os.environ.update(server.env)
        place = f"s3://{BUCKET}/run"
        env = {**server.env, "VERL_USE_EXTERNAL_MODULES": f"sdar_verl.plugin,{MODULE}"}
        env["SDAR_BENCH_BLOCK"] = str(arguments.block)
        words = ("trainer.save_freq=3", f"sdar.cloud.mirror={place}")
        run = LiveRun(folder, *words, steps=2000, mode="sdar_cloud_bench", env=env)
        try:
            run.wait_for(lambda: f"sdar step {arguments.steps}/" in run.output, timeout_s=540)
            store = Store(folder / "checkpoints")
            asked = time.monotonic()
            stop.ask([store], stop.Wish("notice", ledger.newest(store)))
            while (line := ledger.read(store)[-1]).ended is None and run.process.poll() is None:
                time.sleep(0.05)
            notice = time.monotonic() - asked
            run.end(120)
        finally:
            run.kill_all()
        manifest = Mirror(place).store.read_json(f"global_step_{line.step}/manifest.json") or {"files": {}}
        size = sum(int(facts["size"]) for facts in manifest["files"].values())
    lines = read_lines(folder / "checkpoints" / RECORD / METRICS_FILE)
    times: dict[bool, list[float]] = {True: [], False: []}
    for line in lines:
        step, data = line["step"], line["data"]
        if step > arguments.block and "timing_s/step" in data:
            mirrored = bool(step // arguments.block % 2)
            times[mirrored].append(data["timing_s/step"] - data.get("timing_s/save_checkpoint", 0.0))
    with_it, without = (float(np.median(times[kind])) for kind in (True, False))
    print(f"step with a mirror {with_it:.3f} s, without {without:.3f} s: ratio {with_it / without:.3f}")
    print(f"steps: {len(times[True])} with, {len(times[False])} without")
    print(f"from the notice to a whole checkpoint of {size / 1e6:.1f} MB: {notice:.1f} s, a step {with_it:.1f} s of it")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
