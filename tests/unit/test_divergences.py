"""Divergences over distributions, against brute force on small vocabularies."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sdar_verl.algorithm.divergences import (
    COLUMNS,
    DIVERGENCES,
    SUPPORT_OF,
    close_support,
    entropy,
    full_columns,
    on_support,
    top_k_columns,
    top_k_ids,
)

KINDS = sorted(DIVERGENCES)


def logits(*shape: int, seed: int = 0, scale: float = 2.0) -> torch.Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def probabilities(row: torch.Tensor) -> list[float]:
    weights = [math.exp(z) for z in row.tolist()]
    return [w / sum(weights) for w in weights]


def by_hand(kind: str, p: list[float], q: list[float]) -> float:
    """p the student's probabilities, q the teacher's."""

    def kl(a: list[float], b: list[float]) -> float:
        return sum(x * math.log(x / y) for x, y in zip(a, b, strict=True) if x > 0)

    m = [(x + y) / 2 for x, y in zip(p, q, strict=True)]
    return {"forward_kl": kl(q, p), "reverse_kl": kl(p, q), "jsd": (kl(p, m) + kl(q, m)) / 2}[kind]


def columns(result: torch.Tensor) -> dict[str, torch.Tensor]:
    return dict(zip(COLUMNS, result.unbind(-1), strict=True))


def supported(kind: str, student: torch.Tensor, teacher: torch.Tensor, k: int, tail: str) -> torch.Tensor:
    ids = top_k_ids(student if SUPPORT_OF[kind] == "student" else teacher, k)
    return top_k_columns(kind, student, ids, on_support(teacher, ids), tail)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_the_full_divergence_is_the_sum_over_the_vocabulary(kind: str) -> None:
    student, teacher = logits(4, 7, seed=1), logits(4, 7, seed=2)
    got = columns(full_columns(kind, student, teacher))
    for row in range(4):
        p, q = probabilities(student[row]), probabilities(teacher[row])
        assert got["divergence"][row].item() == pytest.approx(by_hand(kind, p, q), rel=1e-10)
        assert got["student_entropy"][row].item() == pytest.approx(-sum(x * math.log(x) for x in p), rel=1e-10)
        assert got["teacher_entropy"][row].item() == pytest.approx(-sum(x * math.log(x) for x in q), rel=1e-10)
    assert not got["student_tail"].any()
    assert not got["teacher_tail"].any()


@pytest.mark.parametrize("tail", ["bucket", "renormalise"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_top_k_divergence_is_the_sum_over_its_events(kind: str, tail: str) -> None:
    student, teacher, k = logits(4, 9, seed=3), logits(4, 9, seed=4), 3
    got = columns(supported(kind, student, teacher, k, tail))
    for row in range(4):
        p, q = probabilities(student[row]), probabilities(teacher[row])
        chooser = p if SUPPORT_OF[kind] == "student" else q
        ids = sorted(range(9), key=lambda v: -chooser[v])[:k]
        lost = [1 - sum(x[v] for v in ids) for x in (p, q)]
        if tail == "bucket":
            p, q = ([x[v] for v in ids] + [rest] for x, rest in zip((p, q), lost, strict=True))
        else:
            p, q = ([x[v] / (1 - rest) for v in ids] for x, rest in zip((p, q), lost, strict=True))
        assert got["divergence"][row].item() == pytest.approx(by_hand(kind, p, q), rel=1e-9)
        assert got["student_tail"][row].item() == pytest.approx(lost[0], rel=1e-9)
        assert got["teacher_tail"][row].item() == pytest.approx(lost[1], rel=1e-9)
        assert got["student_entropy"][row].item() == pytest.approx(-sum(x * math.log(x) for x in p), rel=1e-9)
        assert got["teacher_entropy"][row].item() == pytest.approx(-sum(x * math.log(x) for x in q), rel=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_matches_finite_differences_and_its_closed_form(kind: str) -> None:
    student, teacher = logits(3, 6, seed=5).requires_grad_(), logits(3, 6, seed=6)
    assert torch.autograd.gradcheck(lambda z: full_columns(kind, z, teacher)[:, 0], student)
    (got,) = torch.autograd.grad(full_columns(kind, student, teacher)[:, 0].sum(), student)
    p, q = student.detach().softmax(-1), teacher.softmax(-1)
    m = (p + q) / 2
    inner = {"reverse_kl": (p / q).log(), "jsd": (p / m).log() / 2, "forward_kl": None}[kind]
    expected = p - q if inner is None else p * (inner - (p * inner).sum(-1, keepdim=True))
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("tail", ["bucket", "renormalise"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_top_k_gradient_matches_finite_differences(kind: str, tail: str) -> None:
    student, teacher = logits(3, 8, seed=7).requires_grad_(), logits(3, 8, seed=8)
    ids = top_k_ids(student if SUPPORT_OF[kind] == "student" else teacher, 4)
    outside = on_support(teacher, ids)
    assert torch.autograd.gradcheck(lambda z: top_k_columns(kind, z, ids, outside, tail)[:, 0], student)  # type: ignore[arg-type]


@pytest.mark.parametrize("tail", ["bucket", "renormalise"])
@pytest.mark.parametrize("kind", KINDS)
def test_k_equal_to_the_vocabulary_is_the_full_divergence(kind: str, tail: str) -> None:
    student, teacher = logits(5, 6, seed=9).requires_grad_(), logits(5, 6, seed=10)
    values = [full_columns(kind, student, teacher)[:, 0], supported(kind, student, teacher, 6, tail)[:, 0]]
    torch.testing.assert_close(*values)
    slopes = [torch.autograd.grad(value.sum(), student)[0] for value in values]
    torch.testing.assert_close(*slopes)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_distributions_have_no_divergence_and_no_gradient(kind: str) -> None:
    student = logits(4, 8, seed=11).requires_grad_()
    for result in (
        full_columns(kind, student, student.detach()),
        supported(kind, student, student.detach(), 3, "bucket"),
    ):
        (slope,) = torch.autograd.grad(result[:, 0].sum(), student)
        assert result[:, 0].abs().max() < 1e-12
        assert slope.abs().max() < 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_a_bucket_never_exceeds_the_full_divergence_and_grows_with_k(kind: str) -> None:
    student, teacher = logits(20, 12, seed=12), logits(20, 12, seed=13)
    ids = (student if SUPPORT_OF[kind] == "student" else teacher).argsort(-1, descending=True)
    values = [
        top_k_columns(kind, student, ids[:, :k], on_support(teacher, ids[:, :k]), "bucket")[:, 0] for k in range(1, 13)
    ]
    for smaller, larger in pairwise(values):
        assert (smaller <= larger + 1e-12).all()
    torch.testing.assert_close(values[-1], full_columns(kind, student, teacher)[:, 0])


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_goes_to_the_student_alone(kind: str) -> None:
    student, teacher = logits(2, 5, seed=14).requires_grad_(), logits(2, 5, seed=15).requires_grad_()
    for result in (full_columns(kind, student, teacher), supported(kind, student, teacher, 2, "bucket")):
        grads = torch.autograd.grad(result[:, 0].sum(), (student, teacher), retain_graph=True, allow_unused=True)
        assert grads[0] is not None
        assert grads[1] is None
        slopes = torch.autograd.grad(result.sum(), student)[0]
        torch.testing.assert_close(slopes, grads[0])  # the other columns are numbers to watch


def test_jsd_is_symmetric_and_at_most_ln_2() -> None:
    one, other = logits(6, 8, seed=16, scale=30.0), logits(6, 8, seed=17, scale=30.0)
    there, back = (full_columns("jsd", a, b)[:, 0] for a, b in ((one, other), (other, one)))
    torch.testing.assert_close(there, back)
    assert (there <= math.log(2) + 1e-12).all()


def test_the_tail_keeps_its_digits_where_the_support_holds_nearly_everything() -> None:
    z = torch.tensor([[60.0, 0.0, 1.0, 2.0]], dtype=torch.float32)
    tail = on_support(z, torch.tensor([[0]]))[0, -1].item()
    exact = math.log(1 + math.e + math.e**2) - 60
    assert tail == pytest.approx(exact, rel=1e-6)  # 1 - p would be 0 here, and its logarithm -infinity


def test_a_vocabulary_padded_with_minus_infinity_changes_nothing() -> None:
    student, teacher = logits(3, 5, seed=18), logits(3, 5, seed=19)
    pad = torch.full((3, 2), -math.inf, dtype=torch.float64)
    for kind in KINDS:
        plain = student.clone().requires_grad_()
        wide = torch.cat([student, pad], -1).requires_grad_()
        for evaluate in (
            lambda kind, z, t: full_columns(kind, z, t),
            lambda kind, z, t: supported(kind, z, t, 3, "bucket"),
            lambda kind, z, t: supported(kind, z, t, 5, "bucket"),  # nothing but the padding is outside
        ):
            expected = evaluate(kind, plain, teacher)
            got = evaluate(kind, wide, torch.cat([teacher, pad], -1))
            torch.testing.assert_close(got, expected)
            slope = torch.autograd.grad(got[:, 0].sum(), wide)[0]
            torch.testing.assert_close(slope[:, :5], torch.autograd.grad(expected[:, 0].sum(), plain)[0])
            assert not slope[:, 5:].any()


@settings(deadline=None, max_examples=80)
@given(
    student=st.lists(st.floats(-1e4, 1e4, width=32), min_size=5, max_size=5),
    teacher=st.lists(st.floats(-1e4, 1e4, width=32), min_size=5, max_size=5),
    kind=st.sampled_from(KINDS),
    k=st.integers(1, 5),
    tail=st.sampled_from(["bucket", "renormalise"]),
)
def test_extreme_logits_stay_finite(student, teacher, kind, k, tail) -> None:  # type: ignore[no-untyped-def]
    z = torch.tensor([student], dtype=torch.float32, requires_grad=True)
    t = torch.tensor([teacher], dtype=torch.float32)
    for result in (full_columns(kind, z, t), supported(kind, z, t, k, tail)):
        (slope,) = torch.autograd.grad(result[:, 0].sum(), z, retain_graph=True)
        assert torch.isfinite(result).all()
        assert torch.isfinite(slope).all()
        scale = 1e-6 * max(1.0, z.abs().max().item(), t.abs().max().item())
        assert result[0, 0].item() >= -scale
        assert abs(slope.sum().item()) <= 1e-3 * max(1.0, slope.abs().max().item())  # a shift of all logits is nothing


def test_entropy_of_a_certain_and_of_a_uniform_distribution() -> None:
    certain = torch.tensor([0.0, -math.inf, -math.inf])
    uniform = torch.full((3,), -math.log(3))
    assert entropy(torch.stack([certain, uniform])).tolist() == pytest.approx([0.0, math.log(3)])


def test_more_than_the_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match=r"sdar.loss.top_k=7 is more than the vocabulary has \(6 tokens\)"):
        top_k_ids(logits(2, 6), 7)


def test_an_unknown_tail_lists_the_known() -> None:
    with pytest.raises(ValueError, match="known: bucket, renormalise"):
        close_support(torch.zeros(1, 3), "cut")  # type: ignore[arg-type]
