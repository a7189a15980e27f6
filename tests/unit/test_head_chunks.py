"""Functions of the logits in chunks: the plain result, in a fraction of its memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sdar_verl.algorithm.divergence_rows import Anchor, FullDivergence, TopKDivergence
from sdar_verl.algorithm.divergences import DIVERGENCES, full_columns, on_support, top_k_columns, top_k_ids
from sdar_verl.algorithm.head_chunks import RowFunction, chunk_logits, map_logits
from tests.support.allocations import Allocations

KINDS = sorted(DIVERGENCES)
TEMPERATURE = 0.7


Plain = Callable[[torch.Tensor], torch.Tensor]


class Case:
    """Hidden states and heads of student and teacher."""

    def __init__(
        self, tokens: int, hidden: int, vocabulary: int, dtype: torch.dtype = torch.float64, bias: bool = True
    ):
        generator = torch.Generator().manual_seed(0)
        draw = partial(torch.randn, generator=generator, dtype=torch.float64)
        self.hidden = draw(tokens, hidden).to(dtype).requires_grad_()
        self.weight = (draw(vocabulary, hidden) / hidden**0.5).to(dtype).requires_grad_()
        self.bias = draw(vocabulary).to(dtype).requires_grad_() if bias else None
        self.teacher_hidden = draw(tokens, hidden).to(dtype)
        self.teacher_weight = (draw(vocabulary, hidden) / hidden**0.5).to(dtype)
        self.upstream = torch.rand(tokens, generator=generator).float()

    def leaves(self) -> list[torch.Tensor]:
        return [leaf for leaf in (self.hidden, self.weight, self.bias) if leaf is not None]

    def full(self, kind: str) -> tuple[Plain, RowFunction]:
        """The divergence of all tokens at once by autograd, and in rows."""

        def teacher(rows: slice) -> torch.Tensor:
            return chunk_logits(self.teacher_hidden[rows], self.teacher_weight, None, TEMPERATURE)

        return lambda z: full_columns(kind, z, teacher(slice(None))), FullDivergence(kind, teacher)

    def top_k(self, kind: str, k: int, tail: str = "bucket") -> tuple[Plain, RowFunction]:
        """The same over k tokens."""
        with torch.no_grad():
            ids = top_k_ids(chunk_logits(self.hidden, self.weight, self.bias, TEMPERATURE), k)
            teacher = on_support(chunk_logits(self.teacher_hidden, self.teacher_weight, None, TEMPERATURE), ids)
        return lambda z: top_k_columns(kind, z, ids, teacher, tail), TopKDivergence(kind, ids, teacher, tail)

    def naive(self, function: Plain) -> torch.Tensor:
        return function(chunk_logits(self.hidden, self.weight, self.bias, TEMPERATURE))

    def chunked(self, function: RowFunction, chunk: int) -> torch.Tensor:
        return map_logits(self.hidden, self.weight, function, bias=self.bias, temperature=TEMPERATURE, chunk=chunk)

    def gradients(self, columns: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad((columns[:, 0] * self.upstream).sum(), self.leaves())


@pytest.mark.parametrize("chunk", [1, 3, 11, 100])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("support", ["full", "bucket", "renormalise", "all"])
def test_chunks_give_the_plain_values_and_gradients(kind: str, support: str, chunk: int) -> None:
    case = Case(tokens=11, hidden=6, vocabulary=13)
    tail = "renormalise" if support == "renormalise" else "bucket"
    plainly, in_rows = case.full(kind) if support == "full" else case.top_k(kind, 13 if support == "all" else 4, tail)
    plain, chunked = case.naive(plainly), case.chunked(in_rows, chunk)
    torch.testing.assert_close(chunked, plain)
    for got, expected in zip(case.gradients(chunked), case.gradients(plain), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def anchored(case: Case, kind: str, support: str, reference: float, student: float) -> tuple[Plain, RowFunction]:
    """A divergence to pi_T^(1-a-b) pi_ref^a sg[pi_theta]^b: written out over all tokens, and in rows."""
    draw = torch.Generator().manual_seed(9)
    hidden = torch.randn(case.teacher_hidden.shape, generator=draw, dtype=torch.float64).to(case.teacher_hidden)

    def ref(rows: slice) -> torch.Tensor:
        return chunk_logits(hidden[rows], case.teacher_weight, None, TEMPERATURE)

    def target(teacher: torch.Tensor, other: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        product = teacher.log_softmax(-1).exp() ** (1 - reference - student)
        product = product * other.log_softmax(-1).exp() ** reference * own.detach().log_softmax(-1).exp() ** student
        return (product / product.sum(-1, keepdim=True)).log()

    def lookup(rows: slice) -> torch.Tensor:
        return chunk_logits(case.teacher_hidden[rows], case.teacher_weight, None, TEMPERATURE)

    if support == "full":
        function = FullDivergence(kind, lookup, Anchor(reference, student, ref if reference else None))
        return lambda z: full_columns(kind, z, target(lookup(slice(None)), ref(slice(None)), z)), function
    teacher = lookup(slice(None))
    with torch.no_grad():
        ids = top_k_ids(chunk_logits(case.hidden, case.weight, case.bias, TEMPERATURE), 4)
        there, other = on_support(teacher, ids), on_support(ref(slice(None)), ids)
    tail = "renormalise" if support == "renormalise" else "bucket"
    anchor = Anchor(reference, student, (lambda rows: other[rows].clone()) if reference else None)
    function = TopKDivergence(kind, ids, there, tail, anchor)
    # The support's k + 1 events are a small vocabulary: their log-probs are logits as good as any.
    return lambda z: top_k_columns(kind, z, ids, target(there, other, on_support(z, ids)), tail), function


@pytest.mark.parametrize(("reference", "student"), [(0.1, 0.0), (0.0, 0.3), (0.095, 0.05)])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("support", ["full", "bucket", "renormalise"])
def test_an_anchored_target_is_the_normalised_product(
    kind: str, support: str, reference: float, student: float
) -> None:
    case = Case(tokens=11, hidden=6, vocabulary=13)
    plainly, in_rows = anchored(case, kind, support, reference, student)
    plain, chunked = case.naive(plainly), case.chunked(in_rows, 3)
    torch.testing.assert_close(chunked, plain)
    for got, expected in zip(case.gradients(chunked), case.gradients(plain), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_forward_kl_to_an_anchored_target_is_sr_opsds_step_and_reverse_kl_to_the_student_a_shorter_one() -> None:
    """SR-OPSD: the gradient on the logits is pi_theta - p, p ~ (pi_T^.9 pi_start^.1)^rho pi_theta^(1 - rho)."""
    generator, rho = torch.Generator().manual_seed(3), 0.95
    student, teacher, start = (torch.randn(4, 7, generator=generator).double() for _ in range(3))
    log_p, log_t, log_s = (logits.log_softmax(-1) for logits in (student, teacher, start))
    target = (rho * (0.9 * log_t + 0.1 * log_s) + (1 - rho) * log_p).softmax(-1)
    anchor = Anchor(0.1 * rho, 1 - rho, lambda rows: start[rows].clone())
    one = FullDivergence("forward_kl", lambda rows: teacher[rows].clone(), anchor)
    slope = one.slope(student.clone(), slice(0, 4), torch.ones(4))
    torch.testing.assert_close(slope, log_p.exp() - target)
    drawn, plain = (
        FullDivergence("reverse_kl", lambda rows: teacher[rows].clone(), by).slope(
            student.clone(), slice(0, 4), torch.ones(4)
        )
        for by in (Anchor(0.0, 0.3), None)
    )
    torch.testing.assert_close(drawn, 0.7 * plain)


def test_only_what_needs_a_gradient_gets_one() -> None:
    case = Case(tokens=5, hidden=4, vocabulary=7, bias=False)
    case.weight.requires_grad_(False)  # an adapter is trained, the head is not
    plainly, in_rows = case.full("reverse_kl")
    columns = case.chunked(in_rows, 2)
    (got,) = torch.autograd.grad(columns[:, 0].sum(), [case.hidden])
    (expected,) = torch.autograd.grad(case.naive(plainly)[:, 0].sum(), [case.hidden])
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_half_precision_weights_sum_their_gradient_in_float32() -> None:
    """2,000 tokens one by one: a running sum in bfloat16 would be off by far more than one rounding of the result."""
    case = Case(tokens=2000, hidden=4, vocabulary=5, dtype=torch.bfloat16, bias=False)
    plainly, in_rows = case.full("forward_kl")
    (got,) = torch.autograd.grad(case.chunked(in_rows, 1)[:, 0].sum(), [case.weight])
    (expected,) = torch.autograd.grad(case.naive(plainly)[:, 0].sum(), [case.weight])
    assert got.dtype == torch.bfloat16
    scale = expected.float().abs().max()
    assert (got.float() - expected.float()).abs().max() <= 0.02 * scale


def peak(case: Case, run) -> Allocations:
    with Allocations() as counted:
        case.gradients(run())
    return counted


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("support", ["full", "top_k", "anchored"])
def test_no_temporary_grows_with_tokens_times_vocabulary(kind: str, support: str) -> None:
    """Counted over every tensor that forward and backward make: four times the tokens, the same temporaries."""
    hidden, vocabulary, chunk = 8, 4096, 8
    peaks = []
    for tokens in (64, 256):
        case = Case(tokens, hidden, vocabulary, dtype=torch.float32, bias=False)
        plainly, in_rows = case.top_k(kind, 16) if support == "top_k" else case.full(kind)
        if support == "anchored":
            plainly, in_rows = anchored(case, kind, "full", 0.1, 0.2)
        chunked = peak(case, lambda case=case, in_rows=in_rows: case.chunked(in_rows, chunk))
        naive = peak(case, lambda case=case, plainly=plainly: case.naive(plainly))
        assert naive.largest == tokens * vocabulary  # the counter sees what it should
        assert naive.peak >= 4 * 4 * tokens * vocabulary
        assert chunked.largest == chunk * vocabulary  # a chunk of logits; the head's gradient has as many elements
        peaks.append(chunked.peak)
        if tokens == 256:
            assert chunked.peak < 0.1 * naive.peak
    extra = peaks[1] - peaks[0]
    assert extra <= 4 * (256 - 64) * (hidden + 32)  # what grows is per token, and small


def test_bad_arguments_are_named() -> None:
    case = Case(tokens=3, hidden=4, vocabulary=5)
    with pytest.raises(ValueError, match="chunk is 0"):
        case.chunked(case.full("jsd")[1], 0)
    with pytest.raises(ValueError, match="at least one token"):
        map_logits(torch.zeros(0, 4), torch.zeros(5, 4), case.full("jsd")[1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [0, 3, 5])
def test_tokens_that_neither_can_give_change_nothing_in_rows_either(kind: str, k: int) -> None:
    """Padding of the vocabulary: -infinity in both; with k = 5 nothing but padding is outside the support."""
    draw = torch.Generator().manual_seed(3)
    student, teacher = (2 * torch.randn(4, 5, generator=draw) for _ in range(2))
    pad = torch.full((4, 2), -math.inf)
    results = []
    for z, t in ((student, teacher), (torch.cat([student, pad], -1), torch.cat([teacher, pad], -1))):
        ids = top_k_ids(z, k) if k else None
        rows: RowFunction
        if ids is None:
            rows = FullDivergence(kind, lambda rows, t=t: t[rows].clone())
        else:
            rows = TopKDivergence(kind, ids, on_support(t, ids), "bucket")
        everything = slice(0, 4)
        results.append((rows.columns(z.clone(), everything), rows.slope(z.clone(), everything, torch.ones(4))))
    (columns, slope), (wide_columns, wide_slope) = results
    torch.testing.assert_close(wide_columns, columns)
    torch.testing.assert_close(wide_slope[:, :5], slope)
    assert not wide_slope[:, 5:].any()


def test_a_token_that_only_the_student_can_give_is_infinitely_far() -> None:
    student, teacher = torch.zeros(1, 3), torch.tensor([[0.0, 0.0, -math.inf]])
    assert (
        FullDivergence("reverse_kl", lambda rows: teacher[rows].clone()).columns(student, slice(0, 1))[0, 0] == math.inf
    )
    student = torch.zeros(1, 3)
    value = FullDivergence("forward_kl", lambda rows: teacher[rows].clone()).columns(student, slice(0, 1))[0, 0]
    assert value.item() == pytest.approx(math.log(1.5))


@settings(deadline=None, max_examples=60)
@given(
    student=st.lists(st.floats(-1e4, 1e4, width=32), min_size=5, max_size=5),
    teacher=st.lists(st.floats(-1e4, 1e4, width=32), min_size=5, max_size=5),
    kind=st.sampled_from(KINDS),
    k=st.integers(0, 5),
)
def test_extreme_logits_give_the_plain_values_in_rows(student, teacher, kind, k) -> None:  # type: ignore[no-untyped-def]
    z, t = torch.tensor([student], requires_grad=True), torch.tensor([teacher])
    if k:
        ids = top_k_ids(z.detach(), k)
        plain = top_k_columns(kind, z, ids, on_support(t, ids), "bucket")
        rows: RowFunction = TopKDivergence(kind, ids, on_support(t, ids), "bucket")
    else:
        plain = full_columns(kind, z, t)
        rows = FullDivergence(kind, lambda rows: t[rows].clone())
    (slope,) = torch.autograd.grad(plain[:, 0].sum(), z)
    one = slice(0, 1)
    torch.testing.assert_close(rows.columns(z.detach().clone(), one), plain.detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(rows.slope(z.detach().clone(), one, torch.ones(1)), slope, rtol=1e-3, atol=1e-2)
