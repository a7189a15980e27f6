"""Every method preset trains two steps through verl's main_ppo, differs from GRPO exactly where it should, and goes on
after its first step as if never stopped."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch

from sdar_verl.algorithm.anchors import anchored_returns
from tests.support.plain import padded
from tests.support.resumed import back_to_step_one, differing
from tests.support.toy_run import SMALL, train
from tests.support.verl_run import Run

pytestmark = [pytest.mark.integration, pytest.mark.slow]

AUXILIARY = (
    "opsd",
    "grpo_opsd",
    "skill_sd",
    "sdar",
    "sdar_frozen",
    "revkl_frozen",
    "sdpo",
    "icsd",
    "retire_opd",
    "sr_opsd",
    "beta_opsd",
)
ADVANTAGES = ("rlsd", "agent_opsd", "adrs", "rlcsd", "sipo", "grsd", "opid", "ahead", "ocsd")
# What these show where nobody writes; tests/integration/test_written.py has them written.
UNWRITTEN = {
    "opid": ("sdar.context.sources=[feedback]", "~sdar.context.options.hint"),
    "ahead": ("sdar.context.sources=[next_observation,feedback]",),
}
LEARNING = ("actor/loss", "actor/pg_loss", "actor/grad_norm")


def run(folder, method: str, *overrides: str) -> Run:
    recorded = method != "skill_prompt"
    saved = ("trainer.save_freq=1",) if recorded else ()
    return train(folder, f"method={method}", *saved, *overrides, base=SMALL, steps=2, record=recorded)


def goes_on(trained: Run, method: str, *overrides: str) -> None:
    """Killed after its first checkpoint, it makes the same second step, to the last bit."""
    second = trained.metrics[2]
    back_to_step_one(trained.folder)
    resumed = run(trained.folder, method, *overrides)
    assert set(resumed.metrics) == {2}
    assert differing(second, resumed.metrics[2]) == []


def step_one(run: Run) -> dict:
    return torch.load(run.folder / "step_1.pt", weights_only=False)


class Row(NamedTuple):
    """A row of the first step: its record, its advantages and GRPO's over the sampled tokens, and the teacher's gap."""

    info: Any
    group: str
    episode: str
    ours: torch.Tensor
    plain: torch.Tensor
    gap: torch.Tensor

    @property
    def changed(self) -> bool:
        return not torch.equal(self.ours, self.plain)


def rows_of(trained: Run, grpo: Run) -> list[Row]:
    one, other = step_one(trained), step_one(grpo)
    played = [[key for key, info in zip(run["keys"], run["infos"], strict=True) if info] for run in (one, other)]
    assert played[0] == played[1], "one seed: the episodes of the first step are the same"
    rows = []
    for index, (key, info) in enumerate(zip(one["keys"], one["infos"], strict=True)):
        if info is not None:
            sampled, (uid, session, _) = one["response_mask"][index].bool(), key.rsplit("_", 2)
            gap = one["sdar_teacher_log_probs"][index] - one["old_log_probs"][index]
            columns = (one["advantages"][index], other["advantages"][index], gap)
            rows.append(Row(info, uid, f"{uid}_{session}", *(column[sampled] for column in columns)))
    return rows


@pytest.fixture(scope="module")
def grpo(tmp_path_factory) -> Run:
    return run(tmp_path_factory.mktemp("grpo"), "grpo")


def test_grpo_has_no_teacher_and_makes_no_pass_for_one(grpo):
    metrics = grpo.metrics[2]
    assert "sdar/gate_mean" not in metrics
    assert "timing_s/teacher" not in metrics
    assert "timing_s/ref" not in metrics
    assert metrics["actor/grad_norm"] > 0


@pytest.mark.parametrize("method", AUXILIARY)
def test_an_auxiliary_loss_leaves_the_advantages_and_joins_the_loss(method, grpo, tmp_path):
    trained = run(tmp_path, method)
    first, second = trained.metrics[1], trained.metrics[2]
    # One seed: the first step's episodes are the same, whatever the method does with them.
    assert torch.equal(padded(step_one(trained)["advantages"]), padded(step_one(grpo)["advantages"]))
    assert first["sdar/loss"] != 0
    expected = first["sdar/lambda"] * first["sdar/loss"] + (
        0 if method in ("opsd", "sr_opsd", "beta_opsd") else first["actor/pg_loss"]
    )
    assert first["actor/loss"] == pytest.approx(expected, rel=1e-3, abs=1e-6)
    assert second["actor/grad_norm"] > 0
    assert second["actor/grad_norm"] != grpo.metrics[2]["actor/grad_norm"]
    assert ("timing_s/teacher" in first) and ("sdar/advantage_change" not in first)
    goes_on(trained, method)


def changes_are_the_methods(method: str, rows: list[Row]) -> None:
    """Which rows a signal touches, and how."""
    changed = [row for row in rows if row.changed]
    outcomes: dict[str, set[bool]] = {}
    for row in rows:
        outcomes.setdefault(row.group, set()).add(row.info.success)
    assert changed and (method == "rlcsd" or all(row.info.teacher_prompt_ids is not None for row in changed))
    if method == "rlsd":  # w lies in [1 - .2, 1 + .2] and lambda is .5: nothing moves by more than a tenth of itself
        assert all(((row.ours - row.plain).abs() <= 0.1 * row.plain.abs() + 1e-6).all() for row in changed)
    if method in ("agent_opsd", "grsd"):  # one factor for a turn
        for row in changed:
            factors = row.ours / row.plain
            assert (factors - factors[0]).abs().max() < 1e-4 and factors[0] > 0
    if method == "grsd":
        assert all(len(outcomes[row.group]) == 2 for row in changed)
    if method == "ocsd":
        for episode in {row.episode for row in rows}:
            turns = [row for row in rows if row.episode == episode]
            assert sum(row.changed for row in turns) <= math.ceil(0.2 * len(turns))
    if method == "ahead":
        assert not any(row.info.success for row in changed)
    if method == "opid":
        assert all(torch.allclose(row.ours, row.plain + 0.001 * row.gap, atol=1e-6) for row in changed)
    if method in ("rlcsd", "sipo"):
        pairs = [row for row in changed if row.info.contrast_prompt_ids]
        assert pairs and all((row.ours * row.plain >= 0).all() for row in pairs if row.plain.abs().max() > 0)
    if method == "rlcsd":  # rows without a pair leave the update
        assert all(row.ours.abs().max() == 0 for row in rows if not row.info.contrast_prompt_ids)
    if method == "sipo":
        assert len(pairs) == len(changed)
        assert all(((row.ours - row.plain).abs() <= 0.15 * 0.2 + 1e-6).all() for row in changed)


@pytest.mark.parametrize("method", ADVANTAGES)
def test_a_signal_of_the_advantages_changes_them_and_adds_no_loss(method, grpo, tmp_path):
    trained = run(tmp_path, method, *UNWRITTEN.get(method, ()))
    if method == "sipo":  # its own advantages have no standard deviation
        grpo = run(tmp_path / "grpo", "grpo", "algorithm.norm_adv_by_std_in_grpo=False")
    first = trained.metrics[1]
    ours, plain = (padded(step_one(one)["advantages"]) for one in (trained, grpo))
    mask = padded(step_one(grpo)["response_mask"]).bool()
    assert not torch.equal(ours, plain)
    assert first["sdar/advantage_change"] == pytest.approx((ours - plain)[mask].abs().mean().item(), rel=1e-3)
    assert first["actor/loss"] == pytest.approx(first["actor/pg_loss"], rel=1e-4, abs=1e-7)
    # The second step may hold no pair of a solved and a failed sibling, and RLCSD's rows without one leave the update.
    assert first["actor/grad_norm"] > 0 and set(trained.metrics) == {1, 2}
    changes_are_the_methods(method, rows_of(trained, grpo))
    goes_on(trained, method, *UNWRITTEN.get(method, ()))


def test_groups_that_all_failed_learn_from_a_right_context_and_their_own_failure(tmp_path):
    pair = ("sdar.context.sources=[skills]", "sdar.context.contrast.sources=[own_failure]")
    left_out = ("~sdar.context.options.sibling", "~sdar.context.contrast.options.failed_sibling")
    trained = run(tmp_path / "sipo", "sipo", *pair, *left_out)
    rows = rows_of(trained, run(tmp_path / "grpo", "grpo", "algorithm.norm_adv_by_std_in_grpo=False"))
    solved = {row.group for row in rows if row.info.success}
    lost = [row for row in rows if row.group not in solved]
    assert lost and any(row.changed for row in lost)
    assert not any(row.changed for row in rows if row.info.success), "a success has no failure of its own"


def test_tide_compares_turns_of_one_past_and_lets_the_teacher_lead(tmp_path):
    trained = run(tmp_path / "tide", "tide")
    anchored = ("sdar.advantage.group_stats=anchor", "algorithm.norm_adv_by_std_in_grpo=False")
    grpo = run(tmp_path / "grpo", "grpo", *anchored, "sdar.advantage.invalid_action_penalty=0")
    first, record = trained.metrics[1], step_one(grpo)
    played = [row for row, info in enumerate(record["infos"]) if info is not None]
    infos = [record["infos"][row] for row in played]
    names = [record["keys"][row].rsplit("_", 2) for row in played]
    returns = anchored_returns(
        torch.stack([record["rm_scores"][row].sum() for row in played]),
        [uid for uid, _, _ in names],
        [f"{uid}_{session}" for uid, session, _ in names],
        [info.turn for info in infos],
        [info.observation for info in infos],
        torch.tensor([not info.failed for info in infos]),
    )
    for row, value in zip(played, returns, strict=True):
        sampled = record["response_mask"][row].bool()
        torch.testing.assert_close(record["advantages"][row][sampled], value.expand(int(sampled.sum())).float())
    assert returns.abs().max() > 0
    # The teacher leads at first: lambda is 1 and beta .1, on the estimator's own advantages.
    assert first["sdar/lambda"] == pytest.approx(1.0) and first["sdar/rl_weight"] == pytest.approx(0.1)
    assert first["sdar/advantage_change"] > 0 and first["sdar/gap_size"] > 0
    assert first["actor/grad_norm"] > 0 and set(trained.metrics) == {1, 2}
    assert "sdar/loss" in first and "timing_s/ref" not in first


def test_skill_grpo_reads_the_skills_itself(grpo, tmp_path):
    trained = run(tmp_path, "skill_grpo", "trainer.test_freq=2")
    longer, plain = (
        torch.tensor(
            [
                len(prompt)
                for prompt, tag in zip(rows["prompts"], rows["tags"], strict=True)
                if not tag.get("is_padding")
            ]
        )
        for rows in (step_one(trained), step_one(grpo))
    )
    assert longer.float().mean() > plain.float().mean() + 5
    assert "sdar/gate_mean" not in trained.metrics[1]
    assert {"sdar-val/student/success", "sdar-val/with_skills/success"} <= set(trained.metrics[2])


def test_skill_prompting_evaluates_and_takes_no_step(tmp_path):
    evaluated = run(tmp_path, "skill_prompt", "trainer.val_before_train=True")
    assert set(evaluated.metrics) == {0}
    assert {"sdar-val/student/success", "sdar-val/with_skills/success"} <= set(evaluated.metrics[0])
    assert not (tmp_path / "checkpoints" / "global_step_1").exists()


@pytest.mark.parametrize("method", ["opsd", "grpo_opsd", "rlsd"])
def test_the_released_variant_trains_too(method, tmp_path):
    trained = run(tmp_path, method, "variant=released")
    assert trained.metrics[2]["actor/grad_norm"] > 0
    if method == "rlsd":
        lambdas = [trained.metrics[step]["sdar/lambda"] for step in (1, 2)]
        assert lambdas == pytest.approx([0.495, 0.49])
    else:
        assert trained.metrics[1]["sdar/gate_mean"] == 0.5
