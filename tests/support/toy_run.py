"""Short training runs through verl's main_ppo: a small policy, a toy environment, a few steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.support.toy_panel import write_toy_panels
from tests.support.verl_run import Run, run_main_ppo

SMALL = [
    "data.train_batch_size=4",
    "actor_rollout_ref.rollout.n=4",
    "actor_rollout_ref.actor.ppo_mini_batch_size=4",
    "sdar.env.max_steps=3",
    "sdar.env.processes=1",
    # All rows of a step in one update, so that the loss is taken at the weights the step began with.
    "sdar.update.mini_batch_rows=48",
    "trainer.val_before_train=False",
    "trainer.test_freq=-1",
    "trainer.save_freq=2",
]
# Every term of the loss large enough to be seen.
LOUD = ["sdar.loss.coef=0.5", "actor_rollout_ref.actor.kl_loss_coef=0.001"]
SHORT = [*SMALL, *LOUD]
# What two runs of the same arithmetic may differ by: the order of float32 sums.
SAME = {"rel": 2e-4, "abs": 2e-5}


def train(folder: Path, *overrides: str, **kwargs: Any) -> Run:
    """Run some steps of the quick start's recipe in the toy environment.

    Args:
        folder: for its files.
        *overrides: verl's and ours.
        **kwargs: of :func:`toy_arguments`, and of :func:`tests.support.verl_run.run_main_ppo`.
    """
    names = ("steps", "record", "mode", "base")
    arguments, env = toy_arguments(folder, *overrides, **{name: kwargs.pop(name) for name in names if name in kwargs})
    return run_main_ppo(folder, arguments, **env, **kwargs)


def toy_arguments(
    folder: Path,
    *overrides: str,
    steps: int = 4,
    record: bool = False,
    mode: str = "sdar",
    base: Sequence[str] = SHORT,
) -> tuple[list[str], dict[str, str]]:
    """Overrides and environment variables of such a run; its panels are written.

    Args:
        folder: for its files.
        *overrides: verl's and ours, after all others.
        steps: of training.
        record: also write what each update reads to ``step_<n>.pt`` (:mod:`tests.support.recording`).
        mode: the trainer's.
        base: overrides that make the run short; ``SMALL`` leaves the method as its preset has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    env = {}
    if record:
        env = {"VERL_USE_EXTERNAL_MODULES": "sdar_verl.plugin,tests.support.recording", "SDAR_RECORD": str(folder)}
        mode = f"{mode}_recording"
    panels = write_toy_panels(folder)
    return [*panels, *base, f"trainer.v1.trainer_mode={mode}", f"trainer.total_training_steps={steps}", *overrides], env
