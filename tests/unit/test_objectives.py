"""Objectives: expected gradients by exact expectation over a small vocabulary, values, overflow, bad input."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sdar_verl.algorithm.divergence_rows import Anchor, TargetLogProbs
from sdar_verl.algorithm.loss import distillation_terms
from sdar_verl.algorithm.objectives import (
    _OBJECTIVES,
    check_objective_options,
    get_objective,
    register_objective,
    returns_to_go,
)

VOCAB = 7
RELEASED = json.loads((Path(__file__).parents[1] / "data" / "released_family.json").read_text())["beta_opsd"]


def logits(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Student, teacher and sampling policy, (VOCAB,) each, float64."""
    student, teacher, old = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return student.requires_grad_(), teacher, old


def expected_gradient(
    student: torch.Tensor, teacher: torch.Tensor, old: torch.Tensor, **options: object
) -> torch.Tensor:
    """E_{y ~ softmax(old)}[grad of l(y) in the student's logits], exactly: one row per token of the vocabulary."""
    columns = [values.log_softmax(-1).unsqueeze(-1) for values in (student, teacher, old)]
    terms = distillation_terms(
        columns[0], columns[1], torch.ones(VOCAB, 1), gate="none", old_log_probs=columns[2], **options
    )
    expectation = (old.softmax(-1).detach() * terms.loss.squeeze(-1)).sum()
    return torch.autograd.grad(expectation, student)[0]


def reverse_kl(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    log_probs = student.log_softmax(-1)
    return (log_probs.exp() * (log_probs - teacher.log_softmax(-1))).sum()


@pytest.mark.parametrize("objective", ["k1", "k3"])
def test_k1_and_k3_with_importance_ratio_have_the_gradient_of_the_reverse_kl_off_policy(objective: str) -> None:
    student, teacher, old = logits()
    (kl,) = torch.autograd.grad(reverse_kl(student, teacher), student)
    assert kl.abs().max() > 0.01
    torch.testing.assert_close(expected_gradient(student, teacher, old, objective=objective), kl)


def test_k2_has_the_gradient_of_the_reverse_kl_on_policy_only() -> None:
    student, teacher, old = logits()
    (kl,) = torch.autograd.grad(reverse_kl(student, teacher), student)
    torch.testing.assert_close(expected_gradient(student, teacher, student.detach(), objective="k2"), kl)
    assert (expected_gradient(student, teacher, old, objective="k2") - kl).abs().max() > 0.01


def test_k3_without_importance_ratio_has_the_gradient_of_the_forward_kl() -> None:
    student, teacher, _ = logits()
    target = teacher.log_softmax(-1)
    (kl,) = torch.autograd.grad((target.exp() * (target - student.log_softmax(-1))).sum(), student)
    options = {"objective": "k3", "objective_options": {"importance": False}}
    torch.testing.assert_close(expected_gradient(student, teacher, student.detach(), **options), kl)


@pytest.mark.parametrize("objective", ["sampled", "k1", "k2", "k3"])
def test_a_student_that_is_its_teacher_has_nothing_to_learn_on_average(objective: str) -> None:
    student, _, _ = logits()
    gradient = expected_gradient(student, student.detach(), student.detach(), objective=objective)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient))


def test_returns_to_go_are_those_of_a_loop() -> None:
    generator = torch.Generator().manual_seed(5)
    values = torch.randn(3, 23, generator=generator, dtype=torch.float64)
    mask = torch.rand(3, 23, generator=generator) > 0.4
    mask[2] = False
    for discount in (0.0, 0.9, 1.0):
        expected = torch.zeros_like(values)
        for row in range(3):
            later = 0.0
            for place in reversed(mask[row].nonzero().flatten().tolist()):
                later = values[row, place].item() + discount * later
                expected[row, place] = later
        for block in (1, 4, 23, 128):
            torch.testing.assert_close(returns_to_go(values, mask, discount, block), expected)


def test_k1_with_undiscounted_returns_has_the_gradient_of_the_kl_between_rows() -> None:
    """Rows of two tokens, the second one's distributions depending on the first; every row is weighed by its
    probability."""
    size, generator = 4, torch.Generator().manual_seed(1)
    first, second = (
        torch.randn(2, *shape, generator=generator, dtype=torch.float64) for shape in ((size,), (size, size))
    )
    ours = [first[0].clone().requires_grad_(), second[0].clone().requires_grad_()]
    rows = torch.cartesian_prod(torch.arange(size), torch.arange(size))

    def log_probs(one: torch.Tensor, two: torch.Tensor) -> torch.Tensor:
        return torch.stack([one.log_softmax(-1)[rows[:, 0]], two.log_softmax(-1)[rows[:, 0], rows[:, 1]]], dim=-1)

    student, teacher = log_probs(*ours), log_probs(first[1], second[1])
    probability = student.sum(-1).exp()
    expected = torch.autograd.grad((probability * (student - teacher).sum(-1)).sum(), ours, retain_graph=True)
    options = {"gate": "none", "objective": "k1", "old_log_probs": student.detach()}
    for discount, same in ((1.0, True), (0.0, False)):
        terms = distillation_terms(
            student, teacher, torch.ones(len(rows), 2), objective_options={"discount": discount}, **options
        )
        loss = (probability.detach() * terms.loss.sum(-1)).sum()
        got = torch.autograd.grad(loss, ours, retain_graph=True)
        assert torch.allclose(got[0], expected[0]) is same
        torch.testing.assert_close(got[1], expected[1])  # nothing comes after the last token


def test_an_anchored_target_stands_in_for_the_teacher_in_the_objective_alone() -> None:
    student, teacher, target = (torch.full((1, 2), value) for value in (-1.0, -3.0, -1.5))
    mask = torch.tensor([[1, 0]])
    target[0, 1] = math.nan
    terms = distillation_terms(student, teacher, mask, objective="k2", target_log_probs=target)
    assert terms.gap[0, 0] == -2.0 and terms.gate[0, 0] == pytest.approx(1 / (1 + math.exp(10.0)))
    assert terms.loss[0].tolist() == pytest.approx([terms.gate[0, 0].item() * 0.5 * 0.25, 0.0])


def test_beta_opsds_target_and_return_are_its_released_codes() -> None:
    for case in RELEASED:
        x = {name: torch.tensor(case[name], dtype=torch.float64) for name in ("student_logits", "teacher_logits")}
        tokens, mask = torch.tensor(case["tokens"]).flatten(), torch.tensor(case["mask"])
        teacher = x["teacher_logits"].flatten(0, 1)
        rows = TargetLogProbs(
            tokens, lambda rows, teacher=teacher: teacher[rows].clone(), Anchor(0.0, 1.0 - case["weight"], None)
        )
        columns = rows.columns(x["student_logits"].flatten(0, 1).clone(), slice(0, len(tokens)))
        target = columns[:, 0].view_as(mask)
        torch.testing.assert_close(target, torch.tensor(case["target"], dtype=torch.float64))
        student = x["student_logits"].log_softmax(-1).flatten(0, 1).gather(-1, tokens[:, None]).view_as(target)
        loss = get_objective("k1")(student, target, old_log_probs=student, mask=mask.bool(), discount=0.99)
        torch.testing.assert_close(-loss, torch.tensor(case["return_to_go"], dtype=torch.float64))


def test_values_in_closed_form() -> None:
    student, teacher, old = (torch.tensor([[value]]) for value in (-1.0, -2.0, -1.5))
    ratio = math.exp(0.5)
    assert get_objective("sampled")(student, teacher).item() == pytest.approx(-1.0)
    assert get_objective("k1")(student, teacher, old_log_probs=old).item() == pytest.approx(ratio)
    assert get_objective("k2")(student, teacher).item() == pytest.approx(0.5)
    k3 = math.exp(-1.0) - 1.0 + 1.0
    assert get_objective("k3")(student, teacher, old_log_probs=old).item() == pytest.approx(ratio * k3)
    plain = get_objective("k3")(student, teacher, old_log_probs=old, importance=False)
    assert plain.item() == pytest.approx(k3)


@settings(deadline=None, max_examples=40)
@given(
    student=st.floats(-1e4, 0.0),
    teacher=st.floats(-1e4, 0.0),
    old=st.floats(-1e4, 0.0),
    objective=st.sampled_from(["sampled", "k1", "k2", "k3"]),
)
def test_extreme_log_probs_give_finite_losses_and_gradients(student, teacher, old, objective) -> None:  # type: ignore[no-untyped-def]
    column = torch.tensor([[student]], requires_grad=True)
    terms = distillation_terms(
        column, torch.tensor([[teacher]]), torch.ones(1, 1), objective=objective, old_log_probs=torch.tensor([[old]])
    )
    (gradient,) = torch.autograd.grad(terms.loss.sum(), column)
    assert torch.isfinite(terms.loss).all()
    assert torch.isfinite(gradient).all()


def test_an_objective_that_needs_the_sampling_policy_says_so() -> None:
    with pytest.raises(ValueError, match="objective 'k1' reads old_log_probs"):
        distillation_terms(-torch.ones(1, 1), -torch.ones(1, 1), torch.ones(1, 1), objective="k1")


def test_unknown_options_list_the_known_ones() -> None:
    with pytest.raises(ValueError, match="objective 'k3' has no option 'ratio'; known: importance"):
        check_objective_options("k3", {"ratio": True})
    with pytest.raises(ValueError, match="objective 'sampled' has no option 'importance'; known: none"):
        check_objective_options("sampled", {"importance": True})


def test_an_objective_is_tried_before_the_run() -> None:
    @register_objective("of_a_test")
    def of_a_test(student_log_probs, teacher_log_probs, *, power=2):
        return (student_log_probs - teacher_log_probs) ** power

    try:
        with pytest.raises(TypeError, match="old_log_probs"):  # it has no **_ for what it does not read
            check_objective_options("of_a_test", {})
    finally:
        del _OBJECTIVES._entries["of_a_test"]
