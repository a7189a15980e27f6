"""Looks, in a process of its own, at what verl knows after ``import verl``: did the plugin load and register?

verl drops an exception of a plugin at debug level, so a run without the plugin starts as if nothing were wrong.
Run as ``python -m sdar_verl.doctor.probe``; the last line of its output is JSON.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from typing import Any

from sdar_verl.quiet import be_quiet

TIMEOUT_S = 300


def probe() -> dict[str, Any]:
    """Names that are registered with verl in this process, and whether the plugin was loaded by verl itself."""
    import verl  # noqa: F401

    # Before anything of ours imports it: only verl's own loading counts.
    found: dict[str, Any] = {"plugin": "sdar_verl.plugin" in sys.modules}
    from verl.experimental.agent_loop import agent_loop
    from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY
    from verl.trainer.ppo.v1 import trainer_base

    found["trainer_modes"] = sorted(trainer_base.TRAINER_REGISTRY)
    found["estimators"] = sorted(str(name) for name in ADV_ESTIMATOR_REGISTRY)
    found["agent_loops"] = sorted(agent_loop._agent_loop_registry)
    return found


def probe_fresh_process() -> dict[str, Any]:
    """:func:`probe` in a new Python process, as verl's driver is one; ``error`` when it fails."""
    command = [sys.executable, "-m", "sdar_verl.doctor.probe"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return {"error": f"import verl took longer than {TIMEOUT_S} s"}
    lines = done.stdout.strip().splitlines()
    try:
        return json.loads(lines[-1])
    except (IndexError, ValueError):
        return {"error": (done.stderr.strip().splitlines() or ["no output"])[-1]}


def probe_ray_worker() -> dict[str, Any]:
    """:func:`probe` in a worker of a Ray cluster: the running one when there is one, else a small one of its own."""
    try:
        import ray

        be_quiet()
        started = not ray.is_initialized()
        if started:
            ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        try:
            return ray.get(ray.remote(num_cpus=1)(probe).remote(), timeout=TIMEOUT_S)
        finally:
            if started:
                ray.shutdown()
    except Exception as error:  # Ray raises what the worker raises, wrapped
        return {"error": f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[-1]}"}


if __name__ == "__main__":
    print(json.dumps(probe()))
