"""A good context against bad ones: the gap, who has a pair, and what is pushed by it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sdar_verl.algorithm.loss import distillation_terms
from sdar_verl.algorithm.mixture import mixture_log_probs
from sdar_verl.algorithm.signals import SignalRows, get_signal
from sdar_verl.config.loss import LossConfig
from sdar_verl.errors import NonFiniteError
from sdar_verl.fields import CONTRAST, TEACHER_LOG_PROBS, TEACHER_MASK, contrast_pass, log_probs_of
from sdar_verl.finite import check_teacher
from sdar_verl.method import Method, Strengths
from sdar_verl.rollout.rows import RowInfo
from sdar_verl.table import StepTable
from tests.support.table import make_table, stored

RELEASED = json.loads((Path(__file__).parents[1] / "data" / "released_family.json").read_text())["cases"]
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


def tensor(values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def first(passes: int, texts: torch.Tensor) -> torch.Tensor:
    """(passes, rows) True for as many passes as a row has texts."""
    return torch.arange(passes).unsqueeze(-1) < texts


def test_the_mixture_is_the_log_of_the_mean_probability_of_a_rows_texts() -> None:
    probabilities = tensor([[[0.5, 0.2], [0.1, 0.9], [0.3, 0.3]], [[0.1, 0.4], [0.7, 0.1], [0.3, 0.3]]])
    found = mixture_log_probs(probabilities.log(), first(2, torch.tensor([2, 1, 0])))
    torch.testing.assert_close(found, tensor([[math.log(0.3), math.log(0.3)], [math.log(0.1), math.log(0.9)], [0, 0]]))


def test_what_lies_behind_a_rows_texts_is_not_read() -> None:
    log_probs = torch.stack([tensor([[-1.0, -2.0]]), torch.full((1, 2), float("nan"), dtype=torch.float64)])
    assert mixture_log_probs(log_probs, first(2, torch.tensor([1]))).tolist() == [[-1.0, -2.0]]


@pytest.mark.parametrize("case", RELEASED)
def test_rlcsds_loss_and_gradient_are_the_released_functions(case: dict[str, Any]) -> None:
    """Our advantages through PPO's token mean against its sum of two means, off-policy and with K texts per row."""
    mask, old = tensor(case["mask"]), tensor(case["old"])
    base, student = tensor(case["advantages"]), tensor(case["student"]).requires_grad_()
    gap = tensor(case["good"]) - mixture_log_probs(
        tensor(case["bad"]), first(len(case["bad"]), torch.tensor(case["texts"]))
    )
    shaped = get_signal("advantage_nudge")(
        rows_of(base, mask.bool(), gap * mask), strength=0.5, shape="tanh", scale=0.02, least=0.02, means="two"
    )
    ratio = (student - old).exp()
    loss = -torch.min(ratio * shaped, ratio.clamp(0.8, 1.2) * shaped)
    loss = (loss * mask).sum() / mask.sum()
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss.item() == pytest.approx(case["rlcsd"]["loss"], rel=1e-9)
    torch.testing.assert_close(gradient, tensor(case["rlcsd"]["gradient"]), **CLOSE)


@pytest.mark.parametrize("case", RELEASED)
def test_sipos_advantages_are_the_released_functions(case: dict[str, Any]) -> None:
    base, mask = tensor(case["sipo"]["base"]), tensor(case["mask"])
    gap = (tensor(case["good"]) - tensor(case["bad"][0])) * mask
    options = {"shape": "clip", "scale": 0.2, "flat": "nudge"}
    shaped = get_signal("advantage_nudge")(rows_of(base, mask.bool(), gap), strength=0.15, **options)
    torch.testing.assert_close(shaped * mask, tensor(case["sipo"]["advantages"]) * mask, **CLOSE)
    assert (base == 0).all(dim=-1).any() and not torch.equal(shaped, base)


@pytest.mark.parametrize("case", RELEASED)
def test_opids_advantages_are_the_released_functions(case: dict[str, Any]) -> None:
    base, mask = tensor(case["advantages"]), tensor(case["mask"])
    taught = mask.bool() & tensor(case["opid"]["taught"]).bool().unsqueeze(-1)
    rows = replace(rows_of(base, mask.bool(), (tensor(case["teacher"]) - tensor(case["old"])) * taught), mask=taught)
    shaped = get_signal("advantage_shaping")(rows, strength=0.001, weight="gap")
    torch.testing.assert_close(shaped * mask, tensor(case["opid"]["advantages"]) * mask, **CLOSE)


def rows_of(advantages: torch.Tensor, mask: torch.Tensor, gap: torch.Tensor, **changes: Any) -> SignalRows:
    nothing = torch.zeros_like(advantages)
    names = [str(row) for row in range(len(mask))]
    values = {"response_mask": mask, "mask": mask, "scores": nothing[:, 0], "turns": [0] * len(mask), **changes}
    return SignalRows(
        advantages=advantages,
        old_log_probs=nothing,
        teacher_log_probs=gap,
        gap=gap,
        gate=nothing,
        episode_ids=names,
        group_ids=names,
        **values,
    )


def test_dropped_rows_are_in_neither_mean() -> None:
    """Against the loss of the other rows alone, written out as two means."""
    generator = torch.Generator().manual_seed(1)
    response = torch.arange(5) < torch.tensor([5, 3, 4, 2]).unsqueeze(-1)
    paired = response & torch.tensor([1, 0, 1, 1]).bool().unsqueeze(-1)
    base = tensor([1.0, -2.0, -0.5, 0.7]).unsqueeze(-1) * response
    gap = 0.1 * torch.randn(4, 5, generator=generator).double() * paired
    options = {"strength": 0.5, "shape": "tanh", "scale": 0.05, "least": 0.2, "means": "two", "unpaired": "drop"}
    shaped = get_signal("advantage_nudge")(rows_of(base, paired, gap, response_mask=response), **options)
    assert not shaped[1].any()
    pushed, left = [], []
    for row in (0, 2, 3):
        for token in range(5):
            if not response[row, token]:
                continue
            advantage, push = base[row, token].item(), 0.5 * math.tanh(gap[row, token].item() / 0.05)
            if abs(push) <= 0.2:
                left.append(advantage)
            else:
                moved = advantage + push
                pushed.append(max(moved, 0.0) if advantage > 0 else min(moved, 0.0))
    assert pushed and left
    expected = sum(pushed) / len(pushed) + sum(left) / len(left)
    assert (shaped.sum() / response.sum()).item() == pytest.approx(expected, rel=1e-12)
    one = get_signal("advantage_nudge")(
        rows_of(base, paired, gap, response_mask=response), **{**options, "means": "one"}
    )
    assert (one.sum() / response.sum()).item() == pytest.approx((sum(pushed) + sum(left)) / 11, rel=1e-12)


def test_sipo_pushes_within_its_bound_never_past_zero_and_in_groups_that_all_failed() -> None:
    base, gap = tensor([[0.02, 0.02, -0.02, 0.5], [0.0, 0.0, 0.0, 0.0]]), tensor([[-0.3, 0.1, 0.9, -0.1]]).repeat(2, 1)
    on = torch.ones(2, 4, dtype=torch.bool)
    shaped = get_signal("advantage_nudge")(rows_of(base, on, gap), strength=0.15, flat="nudge")
    expected = [[0.0, 0.02 + 0.015, 0.0, 0.5 - 0.015], [-0.03, 0.015, 0.03, -0.015]]
    torch.testing.assert_close(shaped, tensor(expected))
    kept = get_signal("advantage_nudge")(rows_of(base, on, gap), strength=0.15)
    assert not kept[1].any() and torch.equal(kept[0], shaped[0])


def test_an_option_that_is_not_known_lists_the_known() -> None:
    on = torch.ones(1, 1, dtype=torch.bool)
    for options, text in (
        ({"shape": "sign"}, "shape='sign'; known: clip, tanh"),
        ({"scale": 0.0}, "scale=0.0; it must be above 0"),
        ({"least": -1.0}, "least=-1.0; it must be at least 0"),
    ):
        with pytest.raises(ValueError, match=f"advantage_nudge has {text}"):
            get_signal("advantage_nudge")(rows_of(torch.zeros(1, 1), on, torch.zeros(1, 1)), strength=0.1, **options)


LENGTHS = [3, 2, 4]


def table_of(**broken: float) -> StepTable:
    """Rows with two texts, with one, and without a teacher."""
    generator = torch.Generator().manual_seed(0)

    def column() -> list[torch.Tensor]:
        return [-torch.rand(length, generator=generator) for length in LENGTHS]

    columns = {
        "response_mask": [torch.ones(length, dtype=torch.long) for length in LENGTHS],
        "advantages": [torch.full((length,), value) for length, value in zip(LENGTHS, (1.0, -1.0, 0.5), strict=True)],
        "rm_scores": [torch.zeros(length) for length in LENGTHS],
        **{
            name: column()
            for name in ("old_log_probs", TEACHER_LOG_PROBS, *(log_probs_of(contrast_pass(text)) for text in range(2)))
        },
    }
    for name, value in broken.items():
        columns[name][0][1] = value
    ids = torch.ones(4, dtype=torch.int32).numpy()
    infos = [RowInfo(0, "pick", teacher_prompt_tokens=4, contrast_prompt_ids=texts) for texts in ((ids, ids), (ids,))]
    table = make_table(["a_0_0", "a_1_0", "a_2_0"], [*infos, RowInfo(0, "pick")], columns)
    table.read(list(columns))
    return table


def test_the_gap_is_taken_to_the_bad_contexts_and_travels_to_the_workers() -> None:
    table, settings = table_of(), LossConfig(centre="batch")
    judged = Method(settings).judge(table, *Strengths(settings).at(1))
    bad = [[table.columns[log_probs_of(contrast_pass(k))][row] for k in range(n)] for row, n in ((0, 2), (1, 1))]
    expected = [
        table.columns[TEACHER_LOG_PROBS][0] - (bad[0][0].exp() / 2 + bad[0][1].exp() / 2).log(),
        table.columns[TEACHER_LOG_PROBS][1] - bad[1][0],
    ]
    for row in (0, 1):
        inside = slice(LENGTHS[row])
        torch.testing.assert_close(judged.gap[row, inside], expected[row][inside])
    assert not judged.gap[2].any()
    # A worker, from the columns that it is sent, has the same gap: whatever the student's log-probs are by then.
    rows = {name: table.columns[name] for name in ("response_mask", "old_log_probs", TEACHER_LOG_PROBS)}
    rows |= judged.columns | {TEACHER_MASK: table.mask.long()}
    student = (table.columns["old_log_probs"] - 0.3).requires_grad_()
    terms = Method(settings).terms(student, rows, judged.values)
    torch.testing.assert_close(terms.gate, judged.gate)
    # What is trained is the objective of the student all the same, with its gradient.
    (gradient,) = torch.autograd.grad(terms.loss.sum(), student)
    torch.testing.assert_close(gradient, -judged.gate)
    assert set(judged.columns) >= {CONTRAST}


def test_without_a_bad_context_nothing_of_it_is_there() -> None:
    table = table_of()
    for info in table.infos:
        assert info is not None
        info.contrast_prompt_ids = ()
    assert table.contrast is None
    assert CONTRAST not in Method(LossConfig()).judge(table, 0.01, 5.0).columns


def test_a_broken_number_of_a_bad_context_is_the_teachers() -> None:
    with pytest.raises(NonFiniteError, match="the teacher's log-probs hold NaN or infinity in 1 of 3 rows: a_0_0"):
        check_teacher(table_of(**{log_probs_of(contrast_pass(1)): float("nan")}), "error")
    table = table_of(**{log_probs_of(contrast_pass(1)): float("nan")})
    assert check_teacher(table, "drop") == {"sdar/nonfinite_teacher_rows": 1}
    assert not table.mask[0].any() and table.mask[1].any()
    assert torch.stack([row.sum() for row in stored(table)[log_probs_of(contrast_pass(1))]]).isfinite().all()
    judged = Method(LossConfig()).judge(table, 0.01, 5.0)
    assert judged.gap is not None and judged.gap.isfinite().all()


def test_the_terms_do_not_take_a_gap_to_anything_else() -> None:
    student, teacher, bad = (tensor([[value]]) for value in (-1.0, -0.5, -0.2))
    terms = distillation_terms(student, teacher, torch.ones(1, 1), against=bad, beta=2.0)
    assert terms.gap.item() == pytest.approx(-0.3) and terms.gate.item() == pytest.approx(1 / (1 + math.exp(0.6)))
    assert terms.loss.item() == pytest.approx(terms.gate.item() * 0.5)
