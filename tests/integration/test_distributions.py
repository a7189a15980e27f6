"""Objectives over distributions through verl's own main_ppo on the CPU, against plain forward passes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sdar_verl.algorithm.divergences import COLUMNS, full_columns, on_support, top_k_columns, top_k_ids
from sdar_verl.local import start_policy
from tests.support.plain import plain_logits
from tests.support.toy_run import SAME, train
from tests.support.verl_run import Run

pytestmark = [pytest.mark.integration, pytest.mark.slow]

TEMPERATURE = 0.9
METRICS = {
    "divergence": "sdar/divergence",
    "student_entropy": "sdar/support_entropy/student",
    "teacher_entropy": "sdar/support_entropy/teacher",
    "student_tail": "sdar/tail_mass/student",
    "teacher_tail": "sdar/tail_mass/teacher",
}


def weights_after(run: Run, step: int) -> dict[str, torch.Tensor]:
    if step == 0:
        return {name: value.float() for name, value in load_file(Path(start_policy()) / "model.safetensors").items()}
    folder = run.folder / "checkpoints" / f"global_step_{step}" / "actor" / "huggingface"
    return load_file(folder / "model.safetensors")


def tokens(run: Run, step: int, teacher_step: int) -> dict[str, torch.Tensor]:
    """Logits of student and teacher, and gaps of the sampled tokens, at every distilled token of a step.

    The weights are those the step began with (one update per step), and for the teacher those of ``teacher_step``.
    """
    record: dict[str, Any] = torch.load(run.folder / f"step_{step}.pt", weights_only=False)
    real = [i for i, tag in enumerate(record["tags"]) if not tag.get("is_padding", False)]
    rows = {name: [values[i] for i in real] for name, values in record.items()}
    contexts = [torch.as_tensor(info.teacher_prompt_ids, dtype=torch.int64) for info in rows["infos"]]
    masks, responses = torch.cat(rows["response_mask"]).bool(), rows["responses"]
    logits = {
        "student": plain_logits(rows["prompts"], responses, start_policy(), weights_after(run, step - 1)),
        "reference": plain_logits(rows["prompts"], responses, start_policy(), weights_after(run, 0)),
        "teacher": plain_logits(contexts, responses, start_policy(), weights_after(run, teacher_step)),
    }
    out = {name: torch.cat(values)[masks] / TEMPERATURE for name, values in logits.items()}
    ids = torch.cat(responses)[masks][:, None]
    student, teacher = (out[name].log_softmax(-1).gather(1, ids)[:, 0] for name in ("student", "teacher"))
    return {**out, "gap": teacher - student}


CASES = {
    # A frozen teacher and the whole vocabulary: at step 2 its head is not the student's.
    "reverse_kl full": ("reverse_kl", 0, "gap", ["sdar.teacher.source=reference", "sdar.loss.chunk_tokens=32"]),
    "reverse_kl top_k": ("reverse_kl", 8, "none", ["sdar.teacher.source=actor", "sdar.loss.support=top_k"]),
    # The target is the current weights with the context, drawn to the start weights without it, and to the student.
    "anchored": (
        *("forward_kl", 0, "none"),
        ["sdar.teacher.source=actor", "sdar.loss.anchor.reference=0.3", "sdar.loss.anchor.student=0.2"],
    ),
    "forward_kl top_k": ("forward_kl", 8, "gap", ["sdar.teacher.source=actor_fresh", "sdar.loss.support=top_k"]),
}


def start(case: str, folder: Path, *more: str) -> Run:
    """Two steps of a case."""
    kind, k, gate, overrides = CASES[case]
    overrides = [*overrides, f"sdar.loss.objective={kind}", f"sdar.loss.gate={gate}", *more]
    overrides += [f"sdar.loss.top_k={k}"] if k else []
    overrides += [f"actor_rollout_ref.rollout.temperature={TEMPERATURE}", "trainer.save_freq=1"]
    return train(folder, *overrides, steps=2, record=True)


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> Run:
    return start("reverse_kl full", tmp_path_factory.mktemp("full"))


@pytest.mark.parametrize("case", CASES)
def test_two_steps_are_those_of_plain_passes(case: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    kind, k, gate, overrides = CASES[case]
    run = request.getfixturevalue("full") if case == "reverse_kl full" else start(case, tmp_path)
    for step in (1, 2):
        frozen = "sdar.teacher.source=reference" in overrides
        at = tokens(run, step, teacher_step=0 if frozen else step - 1)
        student, teacher = at["student"], at["teacher"]
        if k:
            ids = top_k_ids(student if kind == "reverse_kl" else teacher, k)
            columns = top_k_columns(kind, student, ids, on_support(teacher, ids), "bucket")
        else:
            if case == "anchored":
                parts = [at[name].log_softmax(-1) for name in ("teacher", "reference", "student")]
                teacher = sum(weight * part for weight, part in zip((0.5, 0.3, 0.2), parts, strict=True))
            columns = full_columns(kind, student, teacher)
        logged = run.metrics[step]
        for name, column in zip(COLUMNS, columns.double().unbind(1), strict=True):
            assert logged[METRICS[name]] == pytest.approx(column.mean().item(), rel=1e-3, abs=1e-6), name
        weight = torch.sigmoid(5.0 * at["gap"]) if gate == "gap" else torch.ones_like(at["gap"])
        expected = (weight * columns[:, 0]).mean().item()
        assert logged["sdar/loss"] == pytest.approx(expected, rel=1e-3, abs=1e-6)
        total = logged["actor/pg_loss"] + 0.5 * expected + 0.001 * logged["actor/kl_loss"]
        assert logged["actor/loss"] == pytest.approx(total, rel=1e-3, abs=1e-6)
        assert logged["sdar/divergence"] > 1e-3, "student and teacher do not differ: nothing was tested"
        assert "sdar/grad_share" not in logged


def test_two_ranks_equal_one(full: Run, tmp_path: Path) -> None:
    """Sharded weights, a head gathered on each rank, gradients averaged over ranks."""
    two = start("reverse_kl full", tmp_path, "trainer.n_gpus_per_node=2")
    for step in (1, 2):
        for name in ("actor/loss", "actor/grad_norm", "sdar/loss", *METRICS.values()):
            assert two.metrics[step][name] == pytest.approx(full.metrics[step][name], **SAME), (step, name)
