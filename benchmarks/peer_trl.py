"""TRL's SDPO trainer and ours side by side on a CPU: seconds of a step by phase, memory, success after the same steps.

    python -m venv TRL; TRL/bin/pip install torch trl datasets
    python -m benchmarks.peer_trl --trl TRL/bin/python [--seeds 0,1,2] [--steps 20] [--data DIR]

Both train the policy of recipes/gsm8k/small.py on the same problems: 8 prompts x 8 answers a step, one update, AdamW
with the same constants, and nothing but the reverse KL over the whole vocabulary to the current weights with the
worked solution behind the question (the very same teacher prompts). Between them verl's own GRPO on the same problems,
without our trainer: what of ours is verl's. One thread of the CPU for each process of any. Seed by seed in turn, TRL
first in one and last in the next. TRL is one process; verl is driver, trainer, rollout server, agent loop, queue,
reward.

Memory is the largest sum of proportional set sizes over a run's processes, twice a second. The first two steps are left
out of the seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq

from benchmarks.common import machine, table
from tests.support.verl_run import Run, start_main_ppo

HERE = Path(__file__).parent
PROMPTS, GROUP, RESPONSE, RATE = 8, 8, 24, 2e-4
WARM_UP = 2
PHASES = {
    "rollout": ("rollout", ("gen",)),
    "teacher": ("teacher", ("teacher",)),
    "student's log-probs": (None, ("old_log_prob",)),
    "update": ("update", ("update_actor",)),
    "the whole step": ("step", ("step",)),
}


def peak_memory(process: subprocess.Popen[Any], limit_s: float) -> float:
    """Bytes, at most, of ``process`` and all below it; waits for its end.

    Raises:
        TimeoutError: it does not end in time; it is killed.
    """
    largest, deadline = 0.0, time.monotonic() + limit_s
    root = psutil.Process(process.pid)
    while process.poll() is None:
        total = 0.0
        for one in [root, *_children(root)]:
            try:
                total += one.memory_full_info().pss
            except psutil.Error:
                continue
        largest = max(largest, total)
        if time.monotonic() > deadline:
            process.kill()
            raise TimeoutError(f"no end after {limit_s} s")
        time.sleep(0.5)
    return largest


def _children(root: psutil.Process) -> list[psutil.Process]:
    try:
        return root.children(recursive=True)
    except psutil.Error:
        return []


def rows_of(file: Path) -> list[dict[str, Any]]:
    """Rows as TRL wants them."""
    return [
        {
            "prompt": row["prompt"],
            "truth": row["reward_model"]["ground_truth"],
            "privileged_context": row["extra_info"]["answer"],
        }
        for row in pq.read_table(file).to_pylist()
    ]


def trl(python: str, data: Path, folder: Path, steps: int, seed: int) -> dict[str, Any]:
    """One run of TRL's."""
    folder.mkdir(parents=True)
    settings = {
        "model": str(data / "policy"), "train": rows_of(data / "train.parquet"), "test": rows_of(data / "test.parquet"),
        "prompts": PROMPTS, "group": GROUP, "response": RESPONSE, "lr": RATE, "steps": steps, "seed": seed,
        "out": str(folder),
    }  # fmt: skip
    (folder / "settings.json").write_text(json.dumps(settings))
    words = [python, str(HERE / "peer_trl_run.py"), str(folder / "settings.json"), str(folder / "result.json")]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with (folder / "log.txt").open("w") as log:
        memory = peak_memory(subprocess.Popen(words, env=env, stdout=log, stderr=subprocess.STDOUT), 3600)
    if not (folder / "result.json").is_file():
        raise RuntimeError(f"TRL's run failed:\n{(folder / 'log.txt').read_text()[-3000:]}")
    found = json.loads((folder / "result.json").read_text())
    for step in found["steps"]:
        step["update"] = step["step"] - step.get("rollout", 0.0) - step.get("teacher", 0.0)
    return found | {"memory": memory}


def verls(data: Path, folder: Path, steps: int, seed: int, *, sdar: bool) -> dict[str, Any]:
    """One run of verl's ``main_ppo``: ours, or with GRPO and nothing of ours but the CPU's engine and server."""
    words = [
        *("+hardware=cpu", f"data.train_files={data}/train.parquet", f"data.val_files={data}/test.parquet"),
        *(f"data.train_batch_size={PROMPTS}", "data.max_prompt_length=128", f"data.max_response_length={RESPONSE}"),
        *(f"data.seed={seed}", "algorithm.adv_estimator=grpo"),
        *(f"actor_rollout_ref.model.path={data}/policy", f"actor_rollout_ref.rollout.n={GROUP}"),
        *(f"actor_rollout_ref.actor.ppo_mini_batch_size={PROMPTS}", f"actor_rollout_ref.actor.optim.lr={RATE}"),
        *("actor_rollout_ref.actor.optim.weight_decay=0.0", "actor_rollout_ref.rollout.val_kwargs.temperature=1.0"),
        *("actor_rollout_ref.rollout.val_kwargs.do_sample=True", "trainer.logger=[console,file]"),
        *(f"trainer.total_training_steps={steps}", f"trainer.test_freq={steps}", "trainer.save_freq=-1"),
    ]
    if sdar:
        words += [
            *(f"sdar.rollout.seed={seed}", "sdar.rollout.poll_interval_s=0.02"),
            *("sdar.loss.objective=reverse_kl", "sdar.loss.support=full", "sdar.loss.gate=none", "sdar.loss.coef=1.0"),
            *("sdar.loss.policy_gradient=False", "sdar.teacher.source=actor", "sdar.teacher.max_prompt_length=192"),
            *("sdar.context.sources=[column]", "+sdar.context.options.column.path=extra_info.answer"),
        ]
        process = start_main_ppo(folder, words, config="sdar_ppo")
    else:
        quick = {"VERL_USE_EXTERNAL_MODULES": "sdar_verl.plugin,benchmarks.quick_poll"}
        process = start_main_ppo(folder, words, config="ppo_trainer", **quick)
    memory = peak_memory(process, 3600)
    run = Run(folder, (folder / "log.txt").read_text(), process.returncode)
    if run.returncode:
        raise RuntimeError(f"verl's run failed:\n{run.output[-3000:]}")
    seconds = [
        {key.removeprefix("timing_s/"): value for key, value in data.items() if key.startswith("timing_s/")}
        for step, data in sorted(run.metrics.items())
        if step > 0
    ]
    rates = run.column("val-core/openai/gsm8k/acc/mean@1")
    return {"steps": seconds, "before": rates[0], "after": rates[steps], "memory": memory}


def phase(runs: Sequence[Mapping[str, Any]], names: Sequence[str]) -> float:
    """Median over the runs' steps, seconds; steps that validate are left out."""
    found = [
        sum(step.get(name, 0.0) for name in names)
        for run in runs
        for step in run["steps"][WARM_UP:]
        if "testing" not in step
    ]
    return statistics.median(found)


def _beside(trls: float, verls: float, ours: float, digits: int) -> list[str]:
    """What is nothing is a dash."""
    shown = [f"{value:.{digits}f}" if value else "-" for value in (trls, verls, ours)]
    return [*shown, f"{ours / trls:.1f}" if trls else "-"]


def main() -> int:
    """Command line; prints Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl", metavar="PYTHON", help="of an environment with TRL")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--data", type=Path, help="of recipes/gsm8k/small.py; made when not given")
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmarks/peer_trl"))
    arguments = parser.parse_args()
    probe = [arguments.trl or "python", "-c", "import trl.experimental.sdpo as m, trl; print(trl.__version__)"]
    found = subprocess.run(probe, capture_output=True, text=True) if shutil.which(probe[0]) else None
    if found is None or found.returncode:
        print(f"skipped: {probe[0]} has no TRL with an SDPO trainer (--trl PYTHON; pip install torch trl datasets)")
        return 0
    out = arguments.out.resolve()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    data = (arguments.data or out / "data").resolve()
    if not (data / "policy").is_dir():
        subprocess.run([sys.executable, str(HERE.parent / "recipes/gsm8k/small.py"), "--out", str(data)], check=True)
    runs: dict[str, list[dict[str, Any]]] = {"trl": [], "verl": [], "ours": []}
    for number, seed in enumerate(map(int, arguments.seeds.split(","))):
        sides: dict[str, Callable[[], dict[str, Any]]] = {
            "trl": lambda s=seed: trl(arguments.trl, data, out / f"trl-{s}", arguments.steps, s),  # type: ignore[misc]
            "verl": lambda s=seed: verls(data, out / f"verl-{s}", arguments.steps, s, sdar=False),  # type: ignore[misc]
            "ours": lambda s=seed: verls(data, out / f"ours-{s}", arguments.steps, s, sdar=True),  # type: ignore[misc]
        }
        for name in list(sides) if number % 2 == 0 else reversed(list(sides)):
            runs[name].append(sides[name]())
            (out / "runs.json").write_text(json.dumps(runs))
    print(f"TRL {found.stdout.strip()}; {machine('verl', 'torch', 'transformers')}\n")
    lines = []
    for title, (theirs, own) in PHASES.items():
        seconds = {name: phase(runs[name], own) for name in ("verl", "ours")}
        trls = phase(runs["trl"], [theirs]) if theirs else 0.0
        lines.append((title, *_beside(trls, seconds["verl"], seconds["ours"], 3)))
    memory = [max(run["memory"] for run in side) / 1e6 for side in runs.values()]
    lines.append(("memory, MB", *_beside(*memory, 0)))
    for when in ("before", "after"):
        rates = [", ".join(f"{run[when]:.3f}" for run in side) for side in runs.values()]
        lines.append((f"success {when}", *rates, ""))
    print(table(["seconds of a step, median", "TRL, SDPO", "verl, GRPO", "ours, SDPO", "ours to TRL's"], lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
