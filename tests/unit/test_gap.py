"""From the token's gap to the gate's: brute force over rows, statistics of a step, divisors, limits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from sdar_verl.algorithm.gap import StepStatistics, gate_gap, step_statistics
from sdar_verl.algorithm.loss import distillation_terms
from sdar_verl.algorithm.turns import episode_means, turn_means
from sdar_verl.verl.scalar_loss import gated_distillation_loss

ROWS, LENGTH = 6, 5
EPISODES = ["x", "y", "x", "z", "y", "x"]


class Batch:
    """Six rows of three episodes, one row without a teacher, one without tokens."""

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def draw() -> torch.Tensor:
            return -torch.rand(ROWS, LENGTH, generator=generator, dtype=torch.float64)

        self.old, self.teacher, self.entropy = draw(), 2 * draw(), -draw()
        self.response = torch.arange(LENGTH) < torch.tensor([5, 3, 4, 0, 2, 5]).unsqueeze(-1)
        self.has_teacher = torch.tensor([True, True, True, True, False, True])
        self.mask = self.response & self.has_teacher.unsqueeze(-1)
        self.gap = torch.where(self.mask, self.teacher - self.old, 0.0)

    def statistics(self, **options: object) -> StepStatistics:
        return step_statistics(
            self.old, self.teacher, self.response, EPISODES, distill_mask=self.has_teacher, **options
        )

    def entering(self, **options: object) -> torch.Tensor:
        return gate_gap(self.gap, self.mask, self.response, statistics=self.statistics(**options), **options)


@pytest.fixture
def batch() -> Batch:
    return Batch()


def of_episode(batch: Batch, name: str) -> torch.Tensor:
    """The gaps of all distilled tokens of an episode."""
    rows = [row for row, episode in enumerate(EPISODES) if episode == name]
    return torch.cat([batch.gap[row][batch.mask[row]] for row in rows])


def test_by_default_the_gate_sees_the_gap_itself(batch: Batch) -> None:
    assert torch.equal(gate_gap(batch.gap, batch.mask, batch.response), batch.gap)


def test_centring_takes_off_the_mean_of_the_trajectory(batch: Batch) -> None:
    centred = batch.entering(centre="trajectory")
    for row, episode in enumerate(EPISODES):
        values = of_episode(batch, episode)
        if len(values):
            torch.testing.assert_close(centred[row][batch.mask[row]], batch.gap[row][batch.mask[row]] - values.mean())
    assert not centred[~batch.mask].any()


def test_centring_over_the_batch_leaves_a_mean_of_zero(batch: Batch) -> None:
    centred = batch.entering(centre="batch")
    assert centred[batch.mask].mean().item() == pytest.approx(0.0, abs=1e-12)
    shifts = (batch.gap - centred)[batch.mask]
    torch.testing.assert_close(shifts, batch.gap[batch.mask].mean().expand_as(shifts))


def test_the_clamp_cuts_what_centring_left(batch: Batch) -> None:
    plain, clamped = (batch.entering(centre="batch", clamp=clamp) for clamp in (None, 0.3))
    torch.testing.assert_close(clamped, plain.clamp(-0.3, 0.3))
    assert (plain.abs() > 0.3).any()


def test_a_turn_gets_the_mean_over_its_row(batch: Batch) -> None:
    pooled = batch.entering(granularity="turn")
    for row in range(ROWS):
        values = batch.gap[row][batch.mask[row]]
        if len(values):
            torch.testing.assert_close(pooled[row][batch.mask[row]], values.mean().expand_as(values))


def test_a_row_with_several_turns_is_split_at_its_observations() -> None:
    response = torch.tensor([[1, 1, 0, 0, 1, 1, 1, 0], [0, 1, 0, 1, 0, 1, 0, 1]]).bool()
    values = torch.arange(16, dtype=torch.float64).reshape(2, 8)
    mask = response.clone()
    mask[0, 5] = False
    means = turn_means(values, mask, response)
    expected = torch.tensor([[0.5, 0.5, 0, 0, 5, 0, 5, 0], [0, 9, 0, 11, 0, 13, 0, 15]], dtype=torch.float64)
    torch.testing.assert_close(means, expected)


def test_a_trajectory_gets_the_mean_of_its_clamped_centred_gaps(batch: Batch) -> None:
    pooled = batch.entering(granularity="trajectory", centre="batch", clamp=0.3)
    shift = batch.gap[batch.mask].mean()
    for row, episode in enumerate(EPISODES):
        if batch.mask[row].any():
            expected = (of_episode(batch, episode) - shift).clamp(-0.3, 0.3).mean()
            torch.testing.assert_close(pooled[row][batch.mask[row]], expected.expand(int(batch.mask[row].sum())))


@pytest.mark.parametrize("options", [{"centre": "batch"}, {"centre": "trajectory"}, {"granularity": "trajectory"}])
def test_what_spans_rows_asks_for_statistics(batch: Batch, options: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"spans several rows: pass statistics=step_statistics"):
        gate_gap(batch.gap, batch.mask, batch.response, **options)


def test_the_centred_gate_still_teaches_what_the_gap_says() -> None:
    """E[(g - const) grad log pi] does not care about a constant, so centring changes the gate's bend alone.

    Exact expectation over a softmax: sigmoid(beta (Delta - c)) has the expected weight of
    sigmoid(beta (Delta - c)) minus any constant, here its value at Delta = c.
    """
    vocabulary, beta = 6, 3.0
    student, teacher = torch.randn(2, vocabulary, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    student.requires_grad_()
    log_probs, target = student.log_softmax(-1), teacher.log_softmax(-1)
    gap = (target - log_probs).detach()
    shift = (log_probs.exp() * gap).sum().detach()
    assert shift < 0  # E[Delta] = -KL
    statistics = StepStatistics(shift=shift.expand(vocabulary, 1))
    terms = distillation_terms(
        log_probs.unsqueeze(-1),
        target.unsqueeze(-1),
        torch.ones(vocabulary, 1),
        beta=beta,
        centre="batch",
        statistics=statistics,
    )
    (gradient,) = torch.autograd.grad((log_probs.exp().detach() * terms.loss.squeeze(-1)).sum(), student)
    weight = torch.sigmoid(beta * (gap - shift)) - 0.5
    probs = log_probs.exp().detach()
    expected = -(probs * weight) @ (torch.eye(vocabulary, dtype=torch.float64) - probs)
    torch.testing.assert_close(gradient, expected)


# divisors


def mean_loss(batch: Batch, **options: object) -> float:
    statistics = batch.statistics(**options)
    options = {key: value for key, value in options.items() if key not in ("divide_by", "gap_threshold")}
    loss, _ = gated_distillation_loss(
        batch.old, batch.teacher, batch.response, distill_mask=batch.has_teacher, statistics=statistics, **options
    )
    return loss.item()


def test_divided_by_weights_is_the_gate_weighted_mean_of_the_objective(batch: Batch) -> None:
    gap = batch.gap[batch.mask]
    weight = torch.sigmoid(5.0 * gap)
    expected = ((weight * gap).sum() / weight.sum()).item()
    assert mean_loss(batch, divide_by="weights") == pytest.approx(expected)


def test_divided_by_gap_bearing_tokens_is_the_mean_over_them(batch: Batch) -> None:
    gap = batch.gap[batch.mask]
    bearing = gap[gap.abs() >= 0.5]
    assert 0 < len(bearing) < len(gap)
    expected = (torch.sigmoid(5.0 * bearing) * bearing).mean().item()
    assert mean_loss(batch, divide_by="gap_bearing", gap_threshold=0.5) == pytest.approx(expected)


def test_divided_by_trajectory_is_the_papers_agg(batch: Batch) -> None:
    """Token mean of every trajectory (all its tokens, with a teacher or without), then the mean over trajectories."""
    means = []
    for name in "xy":  # z has no tokens
        rows = [row for row, episode in enumerate(EPISODES) if episode == name]
        total = sum((torch.sigmoid(5.0 * batch.gap[row]) * batch.gap[row]).sum() for row in rows)
        means.append(float(total) / sum(int(batch.response[row].sum()) for row in rows))
    assert mean_loss(batch, divide_by="trajectory") == pytest.approx(sum(means) / len(means))


def test_nothing_to_divide_by_gives_zero(batch: Batch) -> None:
    assert mean_loss(batch, divide_by="gap_bearing", gap_threshold=1e9) == 0.0
    batch.has_teacher[:] = False
    assert mean_loss(batch, divide_by="weights") == 0.0


def test_the_scale_does_not_depend_on_what_masked_positions_hold(batch: Batch) -> None:
    clean = batch.statistics(divide_by="weights", centre="trajectory", granularity="turn")
    batch.old[~batch.mask] = float("nan")
    batch.teacher[~batch.mask] = float("inf")
    dirty = batch.statistics(divide_by="weights", centre="trajectory", granularity="turn")
    torch.testing.assert_close(dirty.scale, clean.scale)
    torch.testing.assert_close(dirty.shift, clean.shift)


@pytest.mark.parametrize("divide_by", ["tokens", "trajectory", "weights", "gap_bearing"])
@pytest.mark.parametrize("centre", ["none", "trajectory", "batch"])
def test_order_of_rows_and_padding_change_nothing(batch: Batch, divide_by: str, centre: str) -> None:
    options = {"centre": centre, "granularity": "turn"}
    order = [4, 0, 3, 5, 1, 2]

    def loss(rows: list[int], pad: int) -> float:
        def shape(values: torch.Tensor, fill: float) -> torch.Tensor:
            return torch.nn.functional.pad(values[rows], (0, pad, 0, pad), value=fill)

        old, teacher = shape(batch.old, float("nan")), shape(batch.teacher, float("nan"))
        response, seen = shape(batch.response.double(), 0.0).bool(), torch.zeros(ROWS + pad, dtype=torch.bool)
        seen[:ROWS] = batch.has_teacher[rows]
        episodes = [EPISODES[row] for row in rows] + [f"padding {i}" for i in range(pad)]
        statistics = step_statistics(
            old, teacher, response, episodes, distill_mask=seen, divide_by=divide_by, **options
        )
        value, _ = gated_distillation_loss(old, teacher, response, distill_mask=seen, statistics=statistics, **options)
        return value.item()

    assert loss(order, 3) == pytest.approx(loss(list(range(ROWS)), 0))


@settings(deadline=None, max_examples=60)
@given(
    old=arrays("float32", (4, 3), elements=st.floats(-1e4, 0.0, width=32)),
    teacher=arrays("float32", (4, 3), elements=st.floats(-1e4, 0.0, width=32)),
    mask=arrays("bool", (4, 3)),
    centre=st.sampled_from(["none", "trajectory", "batch"]),
    granularity=st.sampled_from(["token", "turn", "trajectory"]),
    divide_by=st.sampled_from(["tokens", "trajectory", "weights", "gap_bearing"]),
)
def test_extreme_gaps_and_any_mask_stay_finite(old, teacher, mask, centre, granularity, divide_by) -> None:  # type: ignore[no-untyped-def]
    old, teacher, mask = (torch.from_numpy(array) for array in (old, teacher, mask))
    options = {"centre": centre, "granularity": granularity, "clamp": 5.0}
    statistics = step_statistics(old, teacher, mask, [0, 1, 1, 0], divide_by=divide_by, **options)
    loss, _ = gated_distillation_loss(old, teacher, mask, statistics=statistics, **options)
    assert torch.isfinite(loss)


def test_broken_values_raise_and_wrong_names_list_the_known(batch: Batch) -> None:
    with pytest.raises(ValueError, match="centre is 'mean'; known: none, trajectory, batch"):
        batch.statistics(centre="mean")
    with pytest.raises(ValueError, match="granularity is 'row'; known: token, turn, trajectory"):
        batch.statistics(granularity="row")
    with pytest.raises(ValueError, match="divide_by is 'gates'; known: tokens, trajectory, weights, gap_bearing"):
        batch.statistics(divide_by="gates")
    with pytest.raises(ValueError, match="episode_ids has 2 entries for 6 rows"):
        episode_means(batch.gap, batch.mask, ["a", "b"])
    batch.teacher[0, 0] = float("nan")
    with pytest.raises(ValueError, match="teacher_log_probs holds NaN"):
        batch.statistics()
