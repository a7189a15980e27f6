"""Functions of the logits in chunks: the plain result, in a fraction of its memory."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from sdar_verl.algorithm.divergences import DIVERGENCES, full_columns, on_support, top_k_columns, top_k_ids
from sdar_verl.algorithm.head_chunks import chunk_logits, map_logits
from tests.support.allocations import Allocations

KINDS = sorted(DIVERGENCES)
TEMPERATURE = 0.7


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

    def full(self, kind: str):
        return lambda z, rows: full_columns(
            kind, z, chunk_logits(self.teacher_hidden[rows], self.teacher_weight, None, TEMPERATURE)
        )

    def top_k(self, kind: str, k: int):
        with torch.no_grad():
            ids = top_k_ids(chunk_logits(self.hidden, self.weight, self.bias, TEMPERATURE), k)
            teacher = on_support(chunk_logits(self.teacher_hidden, self.teacher_weight, None, TEMPERATURE), ids)
        return lambda z, rows: top_k_columns(kind, z, ids[rows], teacher[rows], "bucket")

    def naive(self, function) -> torch.Tensor:
        everything = slice(0, len(self.hidden))
        return function(chunk_logits(self.hidden, self.weight, self.bias, TEMPERATURE), everything)

    def chunked(self, function, chunk: int) -> torch.Tensor:
        return map_logits(self.hidden, self.weight, function, bias=self.bias, temperature=TEMPERATURE, chunk=chunk)

    def gradients(self, columns: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad((columns[:, 0] * self.upstream).sum(), self.leaves())


@pytest.mark.parametrize("chunk", [1, 3, 11, 100])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("support", ["full", "top_k"])
def test_chunks_give_the_plain_values_and_gradients(kind: str, support: str, chunk: int) -> None:
    case = Case(tokens=11, hidden=6, vocabulary=13)
    function = case.full(kind) if support == "full" else case.top_k(kind, 4)
    plain, chunked = case.naive(function), case.chunked(function, chunk)
    torch.testing.assert_close(chunked, plain)
    for got, expected in zip(case.gradients(chunked), case.gradients(plain), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)


def test_only_what_needs_a_gradient_gets_one() -> None:
    case = Case(tokens=5, hidden=4, vocabulary=7, bias=False)
    case.weight.requires_grad_(False)  # an adapter is trained, the head is not
    columns = case.chunked(case.full("reverse_kl"), 2)
    (got,) = torch.autograd.grad(columns[:, 0].sum(), [case.hidden])
    (expected,) = torch.autograd.grad(case.naive(case.full("reverse_kl"))[:, 0].sum(), [case.hidden])
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)


def test_half_precision_weights_sum_their_gradient_in_float32() -> None:
    """2,000 tokens one by one: a running sum in bfloat16 would be off by far more than one rounding of the result."""
    case = Case(tokens=2000, hidden=4, vocabulary=5, dtype=torch.bfloat16, bias=False)
    function = case.full("forward_kl")
    (got,) = torch.autograd.grad(case.chunked(function, 1)[:, 0].sum(), [case.weight])
    (expected,) = torch.autograd.grad(case.naive(function)[:, 0].sum(), [case.weight])
    assert got.dtype == torch.bfloat16
    scale = expected.float().abs().max()
    assert (got.float() - expected.float()).abs().max() <= 0.02 * scale


def peak(case: Case, run) -> Allocations:
    with Allocations() as counted:
        case.gradients(run())
    return counted


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("support", ["full", "top_k"])
def test_no_temporary_grows_with_tokens_times_vocabulary(kind: str, support: str) -> None:
    """Counted over every tensor that forward and backward make: four times the tokens, the same temporaries."""
    hidden, vocabulary, chunk = 8, 4096, 8
    peaks = []
    for tokens in (64, 256):
        case = Case(tokens, hidden, vocabulary, dtype=torch.float32, bias=False)
        function = case.full(kind) if support == "full" else case.top_k(kind, 16)
        chunked = peak(case, lambda case=case, function=function: case.chunked(function, chunk))
        naive = peak(case, lambda case=case, function=function: case.naive(function))
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
        case.chunked(case.full("jsd"), 0)
    with pytest.raises(ValueError, match="at least one token"):
        map_logits(torch.zeros(0, 4), torch.zeros(5, 4), case.full("jsd"))
