"""The gated loss: gradients, masks, normalisation over the global batch, statistics, bad input."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from sdar_verl.algorithm.gates import _GATES, register_gate
from sdar_verl.algorithm.loss import distillation_terms
from sdar_verl.algorithm.objectives import _OBJECTIVES, get_objective, register_objective
from sdar_verl.algorithm.stats import finalize_stats, stats_sums
from sdar_verl.verl.scalar_loss import gated_distillation_loss
from tests.support.plain import add_stats

ROWS, LENGTH, VOCAB = 6, 5, 7
MODES = ["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean"]


class Batch:
    """A batch of log-probs with ragged responses and one empty row, float64."""

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.tokens = torch.randint(VOCAB, (ROWS, LENGTH, 1), generator=generator)
        self.logits = draw(ROWS, LENGTH, VOCAB).requires_grad_()
        self.teacher = draw(ROWS, LENGTH, VOCAB).log_softmax(-1).gather(-1, self.tokens).squeeze(-1)
        lengths = torch.tensor([5, 3, 1, 0, 4, 2])
        self.mask = (torch.arange(LENGTH) < lengths.unsqueeze(-1)).long()
        self.mask[0, 2] = 0  # an observation token inside a response

    def student(self, logits: torch.Tensor | None = None) -> torch.Tensor:
        logits = self.logits if logits is None else logits
        return logits.log_softmax(-1).gather(-1, self.tokens).squeeze(-1)

    def global_info(self) -> dict[str, int]:
        return {"batch_num_tokens": int(self.mask.sum()), "global_batch_size": ROWS, "loss_scale_factor": 11}


@pytest.fixture
def batch() -> Batch:
    return Batch()


def gradient(loss: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(loss, logits, retain_graph=True)[0]


def finite_difference(function: Callable[[torch.Tensor], torch.Tensor], at: torch.Tensor) -> torch.Tensor:
    """Central differences of a scalar function, entry by entry."""
    step, result = 1e-6, torch.zeros_like(at)
    for index in range(at.numel()):
        shift = torch.zeros_like(at)
        shift.view(-1)[index] = step
        result.view(-1)[index] = (function(at + shift) - function(at - shift)) / (2 * step)
    return result


# the loss and its gradient


def test_closed_form_of_the_papers_loss() -> None:
    student, teacher = torch.tensor([[-1.0, -2.0, -0.5]]), torch.tensor([[-0.6, -2.4, -9.0]])
    loss, stats = gated_distillation_loss(student, teacher, torch.tensor([[1, 1, 0]]), beta=5.0)
    up, down = 1 / (1 + math.exp(-2.0)), 1 / (1 + math.exp(2.0))
    assert loss.item() == pytest.approx((0.4 * up - 0.4 * down) / 2)
    assert stats == pytest.approx(
        {
            "tokens": 2.0,
            "gate": 1.0,
            "gate_active": 1.0,
            "gap": 0.0,
            "gap_squared": 0.32,
            "gap_positive": 1.0,
            "loss": 0.4 * (up - down),
        },
        abs=1e-6,
    )


def test_gradient_is_the_gate_times_the_score_of_the_token(batch: Batch) -> None:
    loss, _ = gated_distillation_loss(batch.student(), batch.teacher, batch.mask, beta=5.0)
    gate = torch.sigmoid(5.0 * (batch.teacher - batch.student().detach()))
    score = torch.nn.functional.one_hot(batch.tokens.squeeze(-1), VOCAB) - batch.logits.detach().softmax(-1)
    expected = -(gate * batch.mask / batch.mask.sum()).unsqueeze(-1) * score
    torch.testing.assert_close(gradient(loss, batch.logits), expected)


def test_gradient_agrees_with_finite_differences_at_a_frozen_gate(batch: Batch) -> None:
    terms = distillation_terms(batch.student(), batch.teacher, batch.mask)

    def frozen_gate(logits: torch.Tensor) -> torch.Tensor:
        return (terms.gate * (batch.teacher - batch.student(logits)))[batch.mask.bool()].mean()

    loss, _ = gated_distillation_loss(batch.student(), batch.teacher, batch.mask)
    numeric = finite_difference(frozen_gate, batch.logits.detach())
    torch.testing.assert_close(gradient(loss, batch.logits), numeric, rtol=1e-5, atol=1e-8)


def test_without_the_stop_gradient_the_loss_would_be_another(batch: Batch) -> None:
    """-[g + beta Delta g (1 - g)] grad log pi is what a gate with gradient gives; ours is -g grad log pi."""
    beta = 5.0

    def moving_gate(logits: torch.Tensor) -> torch.Tensor:
        gap = batch.teacher - batch.student(logits)
        return (torch.sigmoid(beta * gap) * gap)[batch.mask.bool()].mean()

    ours, _ = gated_distillation_loss(batch.student(), batch.teacher, batch.mask, beta=beta)
    torch.testing.assert_close(ours, moving_gate(batch.logits))  # the same value ...
    terms = distillation_terms(batch.student(), batch.teacher, batch.mask, beta=beta)
    gate, gap = terms.gate, terms.gap
    attached = -(gate + beta * gap * gate * (1 - gate)) * batch.mask / batch.mask.sum()
    score = torch.autograd.grad(batch.student(), batch.logits, grad_outputs=attached)[0]
    numeric = finite_difference(moving_gate, batch.logits.detach())
    torch.testing.assert_close(numeric, score, rtol=1e-5, atol=1e-8)
    assert (gradient(ours, batch.logits) - numeric).abs().max() > 1e-2  # ... but another gradient


def test_no_gradient_reaches_teacher_or_entropy_or_old_log_probs(batch: Batch) -> None:
    others = [batch.teacher.clone().requires_grad_() for _ in range(3)]
    teacher, entropy, old = others
    terms = distillation_terms(batch.student(), teacher, batch.mask, entropy=entropy, old_log_probs=old)
    assert not terms.gate.requires_grad
    assert not terms.gap.requires_grad
    terms.loss.sum().backward()
    assert batch.logits.grad is not None
    assert all(tensor.grad is None for tensor in others)


def test_a_gate_is_called_without_gradient(batch: Batch) -> None:
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    register_gate("learned_in_a_test")(lambda gap, **_: torch.sigmoid(scale * gap))
    try:
        terms = distillation_terms(batch.student(), batch.teacher, batch.mask, gate="learned_in_a_test")
    finally:
        del _GATES._entries["learned_in_a_test"]
    terms.loss.sum().backward()
    assert scale.grad is None


def test_own_objective_gets_the_old_log_probs(batch: Batch) -> None:
    @register_objective("ratio_in_a_test")
    def ratio(
        student: torch.Tensor, teacher: torch.Tensor, *, old_log_probs: torch.Tensor, **_: object
    ) -> torch.Tensor:
        return torch.exp(student - old_log_probs) * (teacher - student)

    old = batch.student().detach() - math.log(3.0)
    options = {"gate": "none", "old_log_probs": old}
    try:
        terms = distillation_terms(batch.student(), batch.teacher, batch.mask, objective="ratio_in_a_test", **options)
    finally:
        del _OBJECTIVES._entries["ratio_in_a_test"]
    torch.testing.assert_close(terms.loss, 3.0 * terms.gap * batch.mask)


def test_importing_the_algorithm_does_not_import_verl_or_ray() -> None:
    code = (
        "import sys, sdar_verl.algorithm.loss, sdar_verl.algorithm.advantages;"
        "print([name for name in ('verl', 'ray', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# aggregation: verl's own, over the global batch


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("with_global_info", [False, True])
def test_aggregation_is_verls(batch: Batch, mode: str, with_global_info: bool) -> None:
    from verl.trainer.ppo.core_algos import agg_loss

    info = {"dp_size": 2, **batch.global_info()} if with_global_info else {}
    loss, _ = gated_distillation_loss(batch.student(), batch.teacher, batch.mask, loss_agg_mode=mode, **info)
    gap = batch.teacher - batch.student().detach()
    matrix = torch.sigmoid(5.0 * gap) * (batch.teacher - batch.student())
    expected = agg_loss(loss_mat=matrix, loss_mask=batch.mask, loss_agg_mode=mode, **info)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient(loss, batch.logits), gradient(expected, batch.logits))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("split", [[[0, 1, 2, 3, 4, 5]], [[0], [1, 2], [3, 4, 5]], [[5, 3], [0, 4], [2, 1]]])
@pytest.mark.parametrize("ranks", [1, 2])
def test_split_into_micro_batches_and_ranks_changes_nothing(
    batch: Batch, mode: str, split: list[list[int]], ranks: int
) -> None:
    """Gradients add up over a rank's micro-batches and are averaged over ranks, as FSDP does."""
    info = batch.global_info()
    whole, whole_stats = gated_distillation_loss(
        batch.student(), batch.teacher, batch.mask, loss_agg_mode=mode, dp_size=1, **info
    )
    total, parts = torch.zeros_like(batch.logits), []
    for rows in split:
        for rank in range(ranks):
            mine = rows[rank::ranks]
            if not mine:
                continue
            loss, stats = gated_distillation_loss(
                batch.student()[mine],
                batch.teacher[mine],
                batch.mask[mine],
                loss_agg_mode=mode,
                dp_size=ranks,
                **info,
            )
            total += gradient(loss, batch.logits) / ranks
            parts.append(stats)
    torch.testing.assert_close(total, gradient(whole, batch.logits))
    assert add_stats(parts) == pytest.approx(whole_stats)


@pytest.mark.parametrize("mode", MODES)
def test_padding_and_row_order_change_nothing(batch: Batch, mode: str) -> None:
    order = torch.tensor([4, 0, 3, 5, 1, 2])
    junk = float("nan")

    def pad(values: torch.Tensor, fill: float) -> torch.Tensor:
        return torch.nn.functional.pad(values[order], (0, 3, 0, 2), value=fill)

    options = {"loss_agg_mode": mode, "loss_scale_factor": 11}
    plain, plain_stats = gated_distillation_loss(batch.student(), batch.teacher, batch.mask, **options)
    padded, padded_stats = gated_distillation_loss(
        pad(batch.student(), junk), pad(batch.teacher, junk), pad(batch.mask, 0), **options
    )
    torch.testing.assert_close(padded, plain)
    torch.testing.assert_close(gradient(padded, batch.logits), gradient(plain, batch.logits))
    assert padded_stats == pytest.approx(plain_stats)


def test_unknown_aggregation_mode_is_refused(batch: Batch) -> None:
    with pytest.raises(ValueError, match="loss_agg_mode"):
        gated_distillation_loss(batch.student(), batch.teacher, batch.mask, loss_agg_mode="mean")


# masks


@pytest.mark.parametrize("mode", MODES)
def test_masked_positions_may_hold_anything(batch: Batch, mode: str) -> None:
    off = batch.mask == 0
    clean_loss, clean_stats = gated_distillation_loss(batch.student(), batch.teacher, batch.mask, loss_agg_mode=mode)
    for junk in (float("nan"), float("inf"), -float("inf")):
        student = batch.student().masked_fill(off, junk)
        teacher = batch.teacher.masked_fill(off, junk)
        loss, stats = gated_distillation_loss(student, teacher, batch.mask, loss_agg_mode=mode)
        torch.testing.assert_close(loss, clean_loss)
        torch.testing.assert_close(gradient(loss, batch.logits), gradient(clean_loss, batch.logits))
        assert stats == pytest.approx(clean_stats)


def test_a_row_without_teacher_contributes_zero_and_still_counts_in_the_mean(batch: Batch) -> None:
    has_teacher = torch.tensor([True, True, False, True, False, True])
    teacher = batch.teacher.masked_fill(~has_teacher.unsqueeze(-1), float("nan"))
    loss, stats = gated_distillation_loss(batch.student(), teacher, batch.mask, distill_mask=has_teacher)
    terms = distillation_terms(batch.student(), batch.teacher, batch.mask)
    torch.testing.assert_close(loss, terms.loss[has_teacher].sum() / batch.mask.sum())
    assert stats["tokens"] == batch.mask[has_teacher].sum()
    by_row = gradient(loss, batch.logits).abs().sum(dim=(1, 2))
    assert torch.equal(by_row > 0, has_teacher & (batch.mask.sum(-1) > 0))
    per_token, _ = gated_distillation_loss(
        batch.student(), teacher, batch.mask, distill_mask=has_teacher.unsqueeze(-1).expand(ROWS, LENGTH)
    )
    torch.testing.assert_close(per_token, loss)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("with_global_info", [False, True])
def test_nothing_to_learn_from_is_a_zero_that_can_be_differentiated(
    batch: Batch, mode: str, with_global_info: bool
) -> None:
    info = batch.global_info() if with_global_info else {}
    nothing = torch.zeros_like(batch.mask)
    loss, stats = gated_distillation_loss(batch.student(), batch.teacher, nothing, loss_agg_mode=mode, **info)
    assert loss.item() == 0.0
    assert not gradient(loss, batch.logits).any()
    assert stats["tokens"] == 0.0
    means = finalize_stats(stats)
    assert means.pop("tokens") == 0.0
    assert all(math.isnan(value) for value in means.values())


# statistics


def test_final_statistics_are_means_over_distilled_tokens(batch: Batch) -> None:
    distill = torch.tensor([True, True, True, True, False, True])
    terms = distillation_terms(batch.student(), batch.teacher, batch.mask, distill_mask=distill)
    on = batch.mask.bool() & distill.unsqueeze(-1)
    gap = (batch.teacher - batch.student()).detach()[on]
    gate = torch.sigmoid(5.0 * gap)
    assert finalize_stats(stats_sums(terms)) == pytest.approx(
        {
            "tokens": on.sum().item(),
            "gate_mean": gate.mean().item(),
            "active_share": (gate > 0.5).double().mean().item(),
            "gap_mean": gap.mean().item(),
            "gap_std": gap.std(unbiased=False).item(),
            "gap_positive_share": (gap > 0).double().mean().item(),
            "distill_loss": (gate * gap).mean().item(),
        }
    )


def test_final_statistics_do_not_depend_on_a_common_factor_of_the_sums(batch: Batch) -> None:
    """verl averages summed metrics over ranks: all sums shrink by the number of ranks, the means stay."""
    sums = stats_sums(distillation_terms(batch.student(), batch.teacher, batch.mask))
    full, averaged = finalize_stats(sums), finalize_stats({key: value / 4 for key, value in sums.items()})
    assert averaged.pop("tokens") == full.pop("tokens") / 4
    assert averaged == pytest.approx(full)


def test_equal_gaps_have_a_standard_deviation_of_zero() -> None:
    for tokens in range(1, 13):  # for some of these, rounding takes mean(x^2) - mean(x)^2 below zero
        student = torch.full((1, tokens), -1.0, dtype=torch.float64)
        terms = distillation_terms(student, student - 0.7, torch.ones(1, tokens))
        assert finalize_stats(stats_sums(terms))["gap_std"] == pytest.approx(0.0, abs=1e-7)


def test_a_teacher_without_context_is_the_student() -> None:
    student = torch.tensor([[-0.3, -2.0, -7.0]])
    loss, stats = gated_distillation_loss(student, student, torch.tensor([[1, 1, 0]]))
    assert loss.item() == 0.0
    assert finalize_stats(stats) == {
        "tokens": 2.0,
        "gate_mean": 0.5,
        "active_share": 0.0,
        "gap_mean": 0.0,
        "gap_std": 0.0,
        "gap_positive_share": 0.0,
        "distill_loss": 0.0,
    }


# bad input


@pytest.mark.parametrize("beta", [-1.0, float("nan"), float("inf")])
def test_beta_out_of_range_is_refused(batch: Batch, beta: float) -> None:
    with pytest.raises(ValueError, match="beta is"):
        distillation_terms(batch.student(), batch.teacher, batch.mask, beta=beta)


def test_unknown_objective_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown objective 'kl'; known: .*k3, .*sampled"):
        get_objective("kl")


def test_shapes_that_do_not_fit_are_named(batch: Batch) -> None:
    with pytest.raises(ValueError, match=r"teacher_log_probs has shape \(6, 4\), but response_mask has \(6, 5\)"):
        distillation_terms(batch.student(), batch.teacher[:, :4], batch.mask)
    with pytest.raises(ValueError, match=r"distill_mask has shape \(5,\)"):
        distillation_terms(batch.student(), batch.teacher, batch.mask, distill_mask=torch.ones(5))


def test_a_gate_of_the_wrong_shape_is_named(batch: Batch) -> None:
    register_gate("scalar_in_a_test")(lambda gap, **_: gap.mean())
    try:
        with pytest.raises(ValueError, match="gate 'scalar_in_a_test' returned shape"):
            distillation_terms(batch.student(), batch.teacher, batch.mask, gate="scalar_in_a_test")
    finally:
        del _GATES._entries["scalar_in_a_test"]


def test_broken_values_name_tensor_and_rows(batch: Batch) -> None:
    teacher = batch.teacher.clone()
    teacher[1, 0], teacher[4, 1], teacher[4, 2] = float("nan"), float("inf"), float("nan")
    with pytest.raises(ValueError, match=r"teacher_log_probs .* 3 unmasked positions, in 2 of 6 rows: 1, 4\."):
        distillation_terms(batch.student(), teacher, batch.mask)


# properties

log_probs = arrays("float32", (3, 4), elements=st.floats(-1e4, 0.0, width=32))
masks = arrays("bool", (3, 4))


@settings(deadline=None, max_examples=60)
@given(
    student=log_probs, teacher=log_probs, mask=masks, beta=st.floats(0.0, 1e4), gate=st.sampled_from(["gap", "none"])
)
def test_extreme_log_probs_stay_finite_and_bounded(student, teacher, mask, beta, gate) -> None:  # type: ignore[no-untyped-def]
    student = torch.from_numpy(student).requires_grad_()
    mask = torch.from_numpy(mask)
    terms = distillation_terms(student, torch.from_numpy(teacher), mask, gate=gate, beta=beta)
    assert torch.isfinite(terms.loss).all()
    assert ((terms.gate >= 0) & (terms.gate <= 1)).all()
    for tensor in (terms.loss, terms.gate, terms.gap):
        assert not tensor[~mask].any()
    # d loss / d log pi = -gate: the bound ||grad L|| <= Agg(||grad log pi||) of the paper
    torch.testing.assert_close(gradient(terms.loss.sum(), student), -terms.gate)


@settings(deadline=None, max_examples=60)
@given(
    mask=masks,
    row=st.integers(0, 2),
    column=st.integers(0, 3),
    value=st.sampled_from([float("nan"), float("inf"), -float("inf")]),
    name=st.sampled_from(["student_log_probs", "teacher_log_probs", "entropy", "old_log_probs"]),
)
def test_a_broken_value_raises_exactly_where_it_counts(mask, row, column, value, name) -> None:  # type: ignore[no-untyped-def]
    mask = torch.from_numpy(mask)
    tensors = {
        key: torch.full((3, 4), -1.0) for key in ("student_log_probs", "teacher_log_probs", "entropy", "old_log_probs")
    }
    tensors[name][row, column] = value
    if mask[row, column]:
        with pytest.raises(ValueError, match=f"{name} holds NaN or infinity .* rows: {row}"):
            distillation_terms(response_mask=mask, **tensors)
    else:
        terms = distillation_terms(response_mask=mask, **tensors)
        assert torch.isfinite(terms.loss).all()


@settings(deadline=None, max_examples=40)
@given(student=log_probs, teacher=log_probs, mask=masks, cut=st.integers(0, 3))
def test_statistics_of_parts_add_up(student, teacher, mask, cut) -> None:  # type: ignore[no-untyped-def]
    tensors = [torch.from_numpy(array) for array in (student, teacher, mask)]
    whole = stats_sums(distillation_terms(*tensors))
    parts = [stats_sums(distillation_terms(*(t[rows] for t in tensors))) for rows in (slice(cut), slice(cut, None))]
    assert add_stats(parts) == pytest.approx(whole, rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_lifted_to_float32(dtype: torch.dtype) -> None:
    student = torch.full((1, 4), -1.0, dtype=dtype, requires_grad=True)
    terms = distillation_terms(student, student.detach() - 2, torch.ones(1, 4), beta=0.3)
    assert terms.loss.dtype == terms.gate.dtype == torch.float32
    # sigmoid(-0.6) to more digits than half precision has
    torch.testing.assert_close(terms.gate, torch.full((1, 4), 1 / (1 + math.exp(0.6))))


def test_the_importance_weight_is_capped_above_only_and_carries_no_gradient() -> None:
    """TRL's distillation_is_clip: min(exp(log pi_theta - log pi_old), c) on every token's loss."""
    student = torch.tensor([[-1.0, -1.0, -1.0]], dtype=torch.float64, requires_grad=True)
    old, teacher = torch.tensor([[-3.0, -1.2, 0.0]]).double(), torch.tensor([[-0.5, -1.5, -1.0]]).double()
    options = {"gate": "none", "objective": "k2", "old_log_probs": old}
    plain = distillation_terms(student, teacher, torch.ones(1, 3), **options)
    capped = distillation_terms(student, teacher, torch.ones(1, 3), importance_clip=2.0, **options)
    weight = torch.tensor([[2.0, math.exp(0.2), math.exp(-1.0)]], dtype=torch.float64)
    torch.testing.assert_close(capped.loss, plain.loss * weight)
    (gradient,), (unweighted,) = (
        torch.autograd.grad(t.loss.sum(), student, retain_graph=True) for t in (capped, plain)
    )
    torch.testing.assert_close(gradient, unweighted * weight)
    on_policy = {**options, "old_log_probs": None}
    assert torch.equal(
        distillation_terms(student, teacher, torch.ones(1, 3), importance_clip=2.0, **on_policy).loss, plain.loss
    )
