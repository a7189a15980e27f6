"""A teacher that hands over: schedules of what was measured, a pass that ends, RetireOPD's two commands; real Ray."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.toy_run import SAME, SMALL, train

pytestmark = [pytest.mark.integration, pytest.mark.slow]

OFF = ["sdar.loss.coef_schedule.stop_step=2", "trainer.save_freq=1"]


@pytest.mark.parametrize(
    "options",
    [
        ["method=sdar_frozen"],
        ["method=revkl_frozen"],  # the requests at the head end, too
        ["method=sdar", "sdar.teacher.source=actor_fresh"],
        # Every row has the server's columns, asked or not.
        ["method=sdar", "sdar.teacher.placement=rollout_server"],
        ["method=rlcsd"],  # so do late contexts and the passes over them
    ],
)
def test_a_lambda_of_zero_for_good_ends_the_pass_and_leaves_grpo(options: list[str], tmp_path: Path) -> None:
    run = train(tmp_path / "whole", *options, *OFF, base=SMALL, steps=3)
    first, second, third = (run.metrics[step] for step in (1, 2, 3))
    assert "sdar/gap_mean" in first and ("timing_s/teacher" in first)
    for later in (second, third):
        assert later["sdar/lambda"] == 0.0
        assert not {"timing_s/teacher", "sdar/gap_mean", "sdar/loss", "sdar/gate_mean", "sdar/advantage_change"} & {
            *later
        }
        assert not [name for name in later if name.startswith("actor/sdar")]
        kl = later.get("actor/kl_loss", 0.0) * 0.001
        assert later["actor/loss"] == pytest.approx(later["actor/pg_loss"] + kl, rel=1e-3, abs=1e-5)
    assert "lambda is 0 for good from step 2 on" in run.output
    checkpoint = run.folder / "checkpoints" / "global_step_2"
    resumed = train(
        tmp_path / "resumed",
        *options,
        *OFF,
        "trainer.resume_mode=resume_path",
        f"trainer.resume_from_path={checkpoint}",
        base=SMALL,
        steps=3,
    )
    for name in ("actor/loss", "actor/grad_norm", "sdar/success"):
        assert resumed.metrics[3][name] == pytest.approx(third[name], **SAME), name


def test_lambda_falls_and_the_policy_gradient_rises_with_the_measured_gap(tmp_path: Path) -> None:
    """TIDE's rule over two steps: whatever the gap does, both weights are what the logged sizes say, also after a
    resume."""
    rule = "{window: 2, momentum: 0.0, slow: 100.0, pace: 0.25}"
    options = [
        *("method=sdar_frozen", "sdar.loss.coef_schedule.name=hand_off", f"+sdar.loss.coef_schedule.options={rule}"),
        *("sdar.loss.rl_schedule.name=hand_off", f"+sdar.loss.rl_schedule.options={rule[:-1]}, rising: true}}"),
    ]
    run = train(tmp_path / "whole", *options, base=SMALL, steps=4)
    sizes = run.column("sdar/gap_size")
    handed = 0.0
    for step in range(1, 5):
        metrics = run.metrics[step]
        assert metrics["sdar/lambda"] == pytest.approx(0.1 + 0.9 * (1 - handed))
        assert metrics["sdar/rl_weight"] == pytest.approx(0.1 + 0.9 * handed)
        if step > 1 and sizes[step] < sizes[step - 1]:
            handed += 0.25
    checkpoint = run.folder / "checkpoints" / "global_step_2"
    resume = ["trainer.resume_mode=resume_path", f"trainer.resume_from_path={checkpoint}"]
    resumed = train(tmp_path / "resumed", *options, *resume, base=SMALL, steps=4)
    for step in (3, 4):
        for name in ("sdar/lambda", "sdar/rl_weight", "sdar/gap_size", "actor/grad_norm"):
            assert resumed.metrics[step][name] == pytest.approx(run.metrics[step][name], **SAME), (step, name)


MIXED = (
    *("method=sdar_frozen", "sdar.context.sources=[skills,sibling]", "sdar.context.teachers.weights=[3,1]"),
    "sdar.teacher.on_long_prompt=mask",
)


@pytest.mark.parametrize("options", [("method=tide",), MIXED], ids=["tide", "mixed teachers"])
def test_advantages_of_anchors_and_mixed_teachers_go_on_after_a_resume(
    options: tuple[str, ...], tmp_path: Path
) -> None:
    run = train(tmp_path / "whole", *options, "trainer.save_freq=1", base=SMALL, steps=3)
    checkpoint = run.folder / "checkpoints" / "global_step_2"
    resume = ["trainer.resume_mode=resume_path", f"trainer.resume_from_path={checkpoint}"]
    resumed = train(tmp_path / "resumed", *options, *resume, base=SMALL, steps=3)
    compared = [name for name in run.metrics[3] if name.startswith(("sdar/teachers/", "sdar/gap_", "sdar/lambda"))]
    for name in (*compared, "actor/grad_norm", "sdar/success"):
        assert resumed.metrics[3][name] == pytest.approx(run.metrics[3][name], **SAME), name
    assert ("sdar/teachers/skills/share" in compared) == (options == MIXED)


def test_retire_opd_is_taught_by_a_policy_that_was_trained_with_skills(tmp_path: Path) -> None:
    """Its two commands; the teacher that the second loads is the one that the first has written."""
    saved = "actor_rollout_ref.actor.checkpoint.save_contents=[model,optimizer,extra,hf_model]"
    first = train(tmp_path / "teacher", "method=skill_grpo", saved, base=SMALL, steps=2)
    path = first.folder / "checkpoints" / "global_step_2" / "actor" / "huggingface"
    run = train(
        tmp_path / "student",
        "method=retire_opd",
        f"sdar.teacher.path={path}",
        # Near at once: the gap alone decides.
        "sdar.loss.coef_schedule.options.teacher_success=0.01",
        "sdar.loss.coef_schedule.options.every=1",
        "trainer.save_freq=-1",
        base=SMALL,
        steps=4,
    )
    metrics = run.metrics
    assert metrics[1]["sdar/lambda"] == 0.01 and metrics[1]["sdar/loss"] != 0
    retired = False
    for step in range(1, 5):
        assert (metrics[step]["sdar/lambda"] == 0.0) == retired
        assert ("timing_s/teacher" in metrics[step]) != retired
        if step > 1 and not retired:
            retired = metrics[step]["sdar/gap_mean"] <= metrics[step - 1]["sdar/gap_mean"] and bool(
                metrics[step]["sdar/success"] + metrics[step - 1]["sdar/success"] >= 2 * 0.9 * 0.01
            )
