"""Golden losses: short runs through verl's main_ppo on the CPU, whose every number a change of the code must keep.

    python scripts/golden.py                    run all cases that repeat themselves and compare them with tests/golden
    python scripts/golden.py sdar ema           these cases
    python scripts/golden.py --write ...        write their numbers instead (a change that is meant to move them)
    python scripts/golden.py --folder DIR ...   another place than tests/golden: before and after on one machine
    python scripts/golden.py --list

Two steps each, of four tasks with four rollouts. On one machine equal means bit for bit; other processors add in
another order, and --tolerance says how far apart numbers may be. A run that fails or differs is an exit status of 1,
and says which metric of which step was what and is what.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.support.toy_run import LOUD, SMALL, train  # noqa: E402

FOLDER = ROOT / "tests" / "golden"
STEPS = 2

SEPARATE = [
    # A step's episodes in one update, and none before their step: which are ready first differs from run to run.
    "trainer.v1.separate_async.parameter_sync_step=1",
    "trainer.v1.separate_async.num_warmup_batches=0",
    "actor_rollout_ref.rollout.nnodes=1",
    "actor_rollout_ref.rollout.n_gpus_per_node=1",
]
FSDP1 = [
    *("actor_rollout_ref.actor.strategy=fsdp", "actor_rollout_ref.ref.strategy=fsdp"),
    "actor_rollout_ref.actor.checkpoint.save_contents=[model,optimizer,extra]",
]
WHOLE = [
    *("sdar.rollout.rows=trajectory", "sdar.rollout.turn_length=16", "data.max_response_length=192"),
    *("sdar.prompt.history_length=0", "sdar.update.mini_batch_rows=16", "sdar.teacher.max_prompt_length=320"),
]
LORA = ["actor_rollout_ref.model.lora_rank=4", "actor_rollout_ref.model.lora.merge=True"]
SERVERS = ["actor_rollout_ref.rollout.calculate_log_probs=True"]
PACKED = ["actor_rollout_ref.model.use_remove_padding=True"]

METHODS = (
    *("adrs", "agent_opsd", "grpo", "grpo_opsd", "opsd", "revkl_frozen", "rlsd", "sdar", "sdar_frozen", "sdpo"),
    *("icsd", "rlcsd", "sipo", "retire_opd", "ocsd", "sr_opsd", "beta_opsd", "tide"),
)
# Contexts that nobody writes, in place of those of the preset.
SIBLINGS = ["sdar.context.sources=[sibling,failed_sibling]"]
FEEDBACK = ["sdar.context.sources=[feedback]", "~sdar.context.options.hint"]
NEXT_AND_FEEDBACK = ["sdar.context.sources=[next_observation,feedback]"]
# The small policy writes no JSON.
LESSON_IN_WORDS = ["+sdar.context.options.lesson.form=text"]
CASES: dict[str, list[str]] = {
    **{name: [f"method={name}"] for name in (*METHODS, "skill_grpo", "skill_sd")},
    **{f"{name}-released": [f"method={name}", "variant=released"] for name in ("sdar", "opsd", "grpo_opsd", "rlsd")},
    "grsd": ["method=grsd", *SIBLINGS],
    "opid": ["method=opid", *FEEDBACK],
    "ahead": ["method=ahead", *NEXT_AND_FEEDBACK],
    "hero": ["method=hero", *NEXT_AND_FEEDBACK, "~sdar.context.options.hint"],
    "grsd-written": ["method=grsd"],
    "seed": ["method=seed", *LESSON_IN_WORDS],
    "skill_prompt": ["method=skill_prompt", "trainer.val_before_train=True"],
    "validation": ["trainer.val_before_train=True", "trainer.test_freq=2"],
    **{f"source-{name}": [f"sdar.teacher.source={name}"] for name in ("actor_fresh", "reference", "ema", "snapshot")},
    "source-actor": ["sdar.teacher.source=actor", *LOUD],
    "source-lora_base": ["sdar.teacher.source=lora_base", *LORA],
    "placement-pool": ["method=sdar_frozen", "sdar.teacher.placement=pool", "sdar.teacher.pool_gpus_per_node=1"],
    "placement-rollout_server": ["sdar.teacher.source=actor", "sdar.teacher.placement=rollout_server"],
    "rows-trajectory": WHOLE,
    "forward_kl-top_k": ["sdar.loss.objective=forward_kl", "sdar.loss.support=top_k", "sdar.loss.top_k=8"],
    "jsd-top_k": ["sdar.loss.objective=jsd", "sdar.loss.support=top_k", "sdar.loss.top_k=8", *PACKED],
    "jsd-actor_fresh": ["sdar.loss.objective=jsd", "sdar.teacher.source=actor_fresh"],
    "entropy-gate": ["sdar.loss.gate=soft_or", "+sdar.loss.gate_options.norm=batch_minmax"],
    "statistics": ["sdar.loss.centre=batch", "sdar.loss.granularity=trajectory", "sdar.loss.divide_by=trajectory"],
    "measured": [
        *("sdar.loss.measure_every=1", "sdar.loss.coef_schedule.name=grad_share"),
        "+sdar.loss.coef_schedule.options.share=0.1",
    ],
    "packed": PACKED,
    "fsdp1": FSDP1,
    "fsdp1-revkl_frozen": ["method=revkl_frozen", *FSDP1],
    "sibling": ["sdar.context.sources=[sibling]"],
    "shuffled": ["sdar.context.control=shuffled"],
    "ucb": ["sdar.skills.retrieval=[ucb]"],
    "bypass": ["algorithm.rollout_correction.bypass_mode=True", "actor_rollout_ref.rollout.calculate_log_probs=True"],
    "correction": [
        "algorithm.rollout_correction.rollout_is=token",
        "actor_rollout_ref.rollout.calculate_log_probs=True",
    ],
    "grpo-estimator": ["algorithm.adv_estimator=grpo", "sdar.advantage.invalid_action_penalty=0"],
    "kl-in-reward": ["algorithm.use_kl_in_reward=True"],
    "colocate_async": ["trainer.v1.trainer_mode=sdar_colocate_async"],
    "separate_async": ["trainer.v1.trainer_mode=sdar_separate_async", *SEPARATE],
}

NOT_REPEATABLE = {
    "source-lora_base": "the adapter's start is drawn without a seed",
    "colocate_async": "which episodes are ready first decides which update they are in",
}
"""Cases that are run by name only: two runs of the same code differ."""

_LEFT_OUT = ("timing", "perf/", "actor/perf", "critic/perf", "sdar/teacher_wait", "rollout_corr/", "training/rollout_")
"""Seconds, bytes, and the rollout server's log-probs, whose last digits depend on who shared a batch there."""


def golden_metrics(run: Any) -> dict[str, dict[str, Any]]:
    """Step -> all metrics of a run but those of ``_LEFT_OUT``; what is not a number is text."""
    steps: dict[str, dict[str, Any]] = {}
    for step, data in sorted(run.metrics.items()):
        kept = {name: value for name, value in sorted(data.items()) if not name.startswith(_LEFT_OUT)}
        steps[str(step)] = {
            name: value if isinstance(value, (int, float)) and math.isfinite(value) else str(value)
            for name, value in kept.items()
        }
    return steps


def run_case(name: str, folder: Path) -> dict[str, dict[str, Any]]:
    """The numbers of one case, run in ``folder``."""
    overrides = CASES[name]
    mode = next((item.split("=")[1] for item in overrides if item.startswith("trainer.v1.trainer_mode=")), "sdar")
    run = train(folder, *overrides, "trainer.save_freq=-1", base=SMALL, steps=STEPS, mode=mode, timeout=900)
    return golden_metrics(run)


def differences(
    old: Mapping[str, Mapping[str, Any]], new: Mapping[str, Mapping[str, Any]], tolerance: float = 0.0
) -> Iterator[str]:
    """One line per number that is missing, new, or further from its golden value than ``tolerance`` times its size."""
    for step in sorted({*old, *new}, key=int):
        before, after = old.get(step, {}), new.get(step, {})
        for name in sorted({*before, *after}):
            if name not in after or name not in before:
                yield f"step {step}: {name} is {'gone' if name not in after else 'new'}"
                continue
            a, b = before[name], after[name]
            if a == b:
                continue
            numbers = isinstance(a, (int, float)) and isinstance(b, (int, float))
            if not numbers or abs(a - b) > tolerance * max(abs(a), abs(b), 1.0):
                yield f"step {step}: {name} was {a!r}, is {b!r}"


def golden_file(name: str, folder: Path = FOLDER) -> Path:
    """Where the numbers of a case are kept."""
    return folder / f"{name}.json"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help="by default all that repeat themselves")
    parser.add_argument("--write", action="store_true", help="write the numbers instead of comparing them")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the numbers lie")
    parser.add_argument("--list", action="store_true", help="name the cases")
    parser.add_argument("--tolerance", type=float, default=0.0, help="relative; 0 is bit for bit")
    options = parser.parse_args()
    if options.list:
        print("\n".join(f"{name}  ({NOT_REPEATABLE[name]})" if name in NOT_REPEATABLE else name for name in CASES))
        return 0
    unknown = [name for name in options.cases if name not in CASES]
    if unknown:
        parser.error(f"no such case: {', '.join(unknown)} (--list names them)")
    options.folder.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in options.cases or [name for name in CASES if name not in NOT_REPEATABLE]:
        try:
            with tempfile.TemporaryDirectory() as folder:
                numbers = run_case(name, Path(folder))
        except AssertionError as error:
            print(f"{name}: the run failed\n{error}", flush=True)
            failed.append(name)
            continue
        file = golden_file(name, options.folder)
        if not options.write and not file.is_file():
            print(f"{name}: {file} has no numbers yet; --write makes them", flush=True)
            failed.append(name)
            continue
        if options.write:
            file.write_text(json.dumps(numbers, indent=1) + "\n")
            print(f"{name}: written", flush=True)
            continue
        found = list(differences(json.loads(file.read_text()), numbers, options.tolerance))
        print(f"{name}: {'as it was' if not found else f'{len(found)} numbers differ'}", flush=True)
        for line in found[:12]:
            print(f"  {line}", flush=True)
        failed += [name] if found else []
    if failed:
        print(f"not as they were: {', '.join(failed)}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
