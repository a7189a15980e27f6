"""Short runs of a recipe that is not ours: verl's own config, data, reward function and loops, with the two flags."""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.support.tiny_model import make_tiny_model
from tests.support.verl_run import Run, run_main_ppo

NAMES = ("Ann", "Ben", "Cleo", "Dan")
THINGS = ("pens", "cards", "nuts", "coins")


def word_problems(count: int, seed: int = 0, agent: str | None = None) -> list[dict[str, Any]]:
    """Rows in the schema that verl's own preprocessing of GSM8K writes; the numbers are small."""
    rng, rows = random.Random(seed), []
    for index in range(count):
        name, thing, have, more = rng.choice(NAMES), rng.choice(THINGS), rng.randint(1, 5), rng.randint(1, 4)
        question = f"{name} has {have} {thing} and gets {more} more. How many {thing} has {name} now?"
        solution = f"{name} has {have} + {more} = {have + more} {thing}.\n#### {have + more}"
        row = {
            "data_source": "openai/gsm8k",
            "prompt": [{"role": "user", "content": question}],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": str(have + more)},
            "extra_info": {"split": "train", "index": index, "answer": solution, "question": question},
        }
        rows.append({**row, "agent_name": agent} if agent else row)
    return rows


def write_data(folder: Path, rows: Sequence[dict[str, Any]], name: str = "train") -> Path:
    """As Parquet."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = folder / f"{name}.parquet"
    pq.write_table(pa.Table.from_pylist(list(rows)), path)
    return path


def recipe_arguments(
    folder: Path, *overrides: str, rows: Sequence[dict[str, Any]] | None = None, model: Path | None = None
) -> list[str]:
    """Flags of a small GRPO script of verl's on a CPU; its files lie in ``folder``, the model too if none is given."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = word_problems(16) if rows is None else rows
    data = write_data(folder, rows)
    model = model or make_tiny_model(folder / "model", vocab=300, scale=2.0)
    return [
        *("+hardware=cpu", f"data.train_files={data}", f"data.val_files={data}", "data.val_max_samples=4"),
        *("data.train_batch_size=4", "data.max_prompt_length=256", "data.max_response_length=16"),
        *("algorithm.adv_estimator=grpo", f"actor_rollout_ref.model.path={model}", "actor_rollout_ref.rollout.n=4"),
        *("actor_rollout_ref.actor.ppo_mini_batch_size=4", "actor_rollout_ref.actor.optim.lr=1e-4"),
        *("trainer.total_training_steps=2", "trainer.test_freq=-1", "trainer.save_freq=-1"),
        *("trainer.val_before_train=False", "trainer.logger=[console,file]", "sdar.teacher.max_prompt_length=512"),
        *overrides,
    ]


def train_recipe(
    folder: Path,
    *overrides: str,
    rows: Sequence[dict[str, Any]] | None = None,
    model: Path | None = None,
    **kwargs: Any,
) -> Run:
    """Two steps with ``--config-name sdar_ppo`` and these flags."""
    arguments = recipe_arguments(folder, *overrides, rows=rows, model=model)
    return run_main_ppo(folder, arguments, config="sdar_ppo", **kwargs)


def command_of(script: Path, folder: Path, *extra: str) -> list[str]:
    """Arguments that ``script`` gives to Python, from a stand-in for it that prints them."""
    stand_in = folder / "python"
    stand_in.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@"\n')
    stand_in.chmod(0o755)
    env = {**os.environ, "PATH": os.pathsep.join([str(folder), os.environ["PATH"]])}
    run = subprocess.run(["bash", str(script), *extra], env=env, capture_output=True, text=True, check=True)
    return run.stdout.splitlines()
