"""The actor worker's loss on verl's data layout: beside verl's ppo_loss, over splits, entropy, no policy gradient."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from verl.utils import tensordict_utils as tu
from verl.workers.config import ActorConfig
from verl.workers.utils.losses import ppo_loss

from sdar_verl.algorithm.gap import step_statistics
from sdar_verl.algorithm.loss import distillation_terms
from sdar_verl.algorithm.masking import NonFiniteValues
from sdar_verl.config.loss import LossConfig
from sdar_verl.errors import ConfigError, NonFiniteError
from sdar_verl.fields import (
    GAP_POOLED,
    GAP_SHIFT,
    LOSS_SCALE,
    STEP_VALUES,
    SUMS_PREFIX,
    TEACHER_LOG_PROBS,
    TEACHER_MASK,
)
from sdar_verl.method import Method, StepValues
from sdar_verl.verl.loss import sdar_loss

PROMPTS, RESPONSES = [2, 3, 1, 2, 2, 1], [3, 2, 4, 1, 2, 5]
EPISODES = ["a", "a", "b", "b", "c", "d"]
ROWS, WIDTH = len(PROMPTS), max(RESPONSES)


class Step:
    """Rows of a step in float64; ``scores`` stands for the model's log-probs of every token of every row."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)

        def draw(rows: int = ROWS) -> torch.Tensor:
            return -torch.rand(rows, WIDTH, generator=generator, dtype=torch.float64)

        self.mask = torch.arange(WIDTH) < torch.tensor(RESPONSES).unsqueeze(-1)
        self.student = draw().requires_grad_()
        self.entropy = draw().abs().requires_grad_()
        self.old, self.teacher, self.reference = draw(), draw() * 2, draw()
        self.advantages = torch.randn(ROWS, 1, generator=generator, dtype=torch.float64).expand(ROWS, WIDTH)
        self.has_teacher = torch.tensor([1, 1, 1, 0, 1, 1], dtype=torch.bool)

    def micro_batch(
        self, rows: Sequence[int], settings: LossConfig, *, coef: float, dp_size: int = 1, entropy: bool = True
    ) -> tuple[dict[str, Any], TensorDict]:
        """What the engine hands to the loss for some of the rows."""
        statistics = step_statistics(
            self.old,
            self.teacher,
            self.mask,
            EPISODES,
            distill_mask=self.has_teacher,
            entropy=self.entropy,
            gate=settings.gate,
            gate_options=settings.gate_options,
            beta=settings.beta,
            granularity=settings.granularity,
            centre=settings.centre,
            clamp=settings.clamp,
            divide_by=settings.divide_by,
            gap_threshold=settings.gap_threshold,
        )
        columns = {
            "response_mask": self.mask.long(),
            "old_log_probs": self.old,
            "advantages": self.advantages,
            "ref_log_prob": self.reference,
            TEACHER_LOG_PROBS: self.teacher,
            TEACHER_MASK: (self.mask & self.has_teacher.unsqueeze(-1)).long(),
            GAP_SHIFT: statistics.shift,
            GAP_POOLED: statistics.pooled,
            LOSS_SCALE: statistics.scale,
        }
        ragged = {
            name: nested([column[row, : RESPONSES[row]] for row in rows])
            for name, column in columns.items()
            if column is not None
        }
        ids = {
            "prompts": nested([torch.ones(PROMPTS[row], dtype=torch.long) for row in rows]),
            "responses": nested([torch.ones(RESPONSES[row], dtype=torch.long) for row in rows]),
        }
        data = TensorDict({**ragged, **ids}, batch_size=len(rows))
        values = StepValues(coef, settings.beta, tuple(statistics.ranges) if statistics.ranges else None)
        info = {"dp_size": dp_size, "batch_num_tokens": int(self.mask.sum()), "global_batch_size": ROWS}
        tu.assign_non_tensor(data, **{STEP_VALUES: asdict(values)}, **info)
        output = {"log_probs": self.whole_rows(self.student, rows)}
        if entropy:
            output["entropy"] = self.whole_rows(self.entropy, rows)
        return output, data

    def whole_rows(self, values: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        """Nested over prompt and response; verl's engines give the log-prob of token t at position t - 1."""
        parts = []
        for row in rows:
            before, after = torch.zeros(PROMPTS[row] - 1), torch.zeros(1)
            parts.append(torch.cat([before.to(values), values[row, : RESPONSES[row]], after.to(values)]))
        offsets = torch.tensor([0, *[len(part) for part in parts]]).cumsum(0)
        return torch.nested.nested_tensor_from_jagged(torch.cat(parts), offsets)


def nested(rows: list[torch.Tensor]) -> torch.Tensor:
    return torch.nested.as_nested_tensor([row.clone() for row in rows], layout=torch.jagged)


def actor(**options: Any) -> ActorConfig:
    return ActorConfig(**{"strategy": "fsdp2", "rollout_n": 2, "use_dynamic_bsz": True, "use_kl_loss": True, **options})


def run(step: Step, settings: LossConfig, rows: Sequence[int] = range(ROWS), **kwargs: Any) -> tuple[Any, dict]:
    output, data = step.micro_batch(rows, settings, coef=settings.coef, **kwargs)
    return sdar_loss(actor(), Method(settings), output, data)


def gradient(loss: torch.Tensor, step: Step) -> torch.Tensor:
    return torch.autograd.grad(loss, step.student, retain_graph=True)[0]


def sums(metrics: dict[str, Any]) -> dict[str, float]:
    return {
        name.removeprefix(SUMS_PREFIX): metric.aggregate()
        for name, metric in metrics.items()
        if name.startswith(SUMS_PREFIX)
    }


SETTINGS = {
    "paper": {},
    "k3": {"gate": "none", "objective": "k3"},
    "trajectory": {"granularity": "trajectory", "centre": "batch", "divide_by": "weights"},
    "turn": {"granularity": "turn", "centre": "trajectory", "clamp": 0.4, "divide_by": "trajectory"},
    "gap bearing": {"divide_by": "gap_bearing", "gap_threshold": 0.5},
    "soft or": {"gate": "soft_or", "gate_options": {"norm": "batch_minmax"}, "divide_by": "weights"},
}
SPLITS = [[[0, 1, 2, 3, 4, 5]], [[0], [1, 2], [3, 4, 5]], [[5, 3], [0, 4], [2, 1]]]


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("split", SPLITS[1:])
def test_micro_batches_and_ranks_change_neither_gradient_nor_sums(
    name: str, ranks: int, split: list[list[int]]
) -> None:
    """Gradients add up over a rank's micro-batches and are averaged over ranks, as FSDP does."""
    step, settings = Step(), LossConfig(coef=0.7, **SETTINGS[name])
    whole, metrics = run(step, settings)
    total, parts = torch.zeros_like(step.student), []
    for rows in split:
        for rank in range(ranks):
            mine = rows[rank::ranks]
            if mine:
                loss, part = run(step, settings, mine, dp_size=ranks)
                total += gradient(loss, step) / ranks
                parts.append(sums(part))
    torch.testing.assert_close(total, gradient(whole, step))
    added = {key: sum(part[key] for part in parts) for key in parts[0]}
    for key in ("grad_rl_squared", "grad_distill_squared"):
        added[key] /= ranks**2  # verl scales a rank's loss by the number of ranks, before gradients are averaged
    assert added == pytest.approx(sums(metrics))


def test_the_gradient_is_verls_plus_lambda_times_the_distillation_terms() -> None:
    step, settings = Step(), LossConfig(coef=0.7)
    loss, metrics = run(step, settings)
    output, data = step.micro_batch(range(ROWS), settings, coef=0.7)
    verl_loss, _ = ppo_loss(actor(), output, data)
    terms = distillation_terms(step.student, step.teacher, step.mask, distill_mask=step.has_teacher)
    ours = terms.loss.sum() / step.mask.sum()
    torch.testing.assert_close(gradient(loss, step), gradient(verl_loss + 0.7 * ours, step))
    assert metrics["sdar/loss"].aggregate() == pytest.approx(ours.item())


def test_the_gradient_share_is_that_of_the_two_losses() -> None:
    step, settings = Step(), LossConfig(coef=0.7)
    _, metrics = run(step, settings)
    output, data = step.micro_batch(range(ROWS), settings, coef=0.7)
    verl_loss, _ = ppo_loss(actor(), output, data)
    terms = distillation_terms(step.student, step.teacher, step.mask, distill_mask=step.has_teacher)
    squares = sums(metrics)
    assert squares["grad_rl_squared"] == pytest.approx(gradient(verl_loss, step).square().sum().item())
    ours = gradient(terms.loss.sum() / step.mask.sum(), step)
    assert squares["grad_distill_squared"] == pytest.approx(ours.square().sum().item())


def test_lambda_zero_is_verls_loss_and_still_counts() -> None:
    step, settings = Step(), LossConfig(coef=0.0)
    loss, metrics = run(step, settings)
    output, data = step.micro_batch(range(ROWS), settings, coef=0.0)
    verl_loss, _ = ppo_loss(actor(), output, data)
    assert torch.equal(loss, verl_loss)
    assert torch.equal(gradient(loss, step), gradient(verl_loss, step))
    assert sums(metrics)["tokens"] == sum(RESPONSES) - RESPONSES[3]


def test_rows_without_a_teachers_column_are_verls_alone_when_lambda_is_zero() -> None:
    """The teacher has retired; a column that was lost on the way is an error, as are a step's lost values."""
    step, settings = Step(), LossConfig()
    for coef in (0.0, 0.5):
        output, data = step.micro_batch(range(ROWS), settings, coef=coef)
        bare = data.exclude(TEACHER_LOG_PROBS)
        if coef:
            with pytest.raises(KeyError, match=TEACHER_LOG_PROBS):
                sdar_loss(actor(), Method(settings), output, bare)
        else:
            loss, metrics = sdar_loss(actor(), Method(settings), output, bare)
            assert loss == run(step, LossConfig(coef=0.0))[0] and "sdar/loss" not in metrics
        with pytest.raises(ConfigError, match="trainer_mode=sdar"):
            sdar_loss(actor(), Method(settings), output, data.exclude(STEP_VALUES))


def test_lambda_and_beta_are_the_steps_not_the_settings() -> None:
    step, settings = Step(), LossConfig(coef=0.0)
    output, data = step.micro_batch(range(ROWS), settings, coef=0.0)
    tu.assign_non_tensor(data, **{STEP_VALUES: asdict(StepValues(coef=0.7, beta=1.0))})
    loss, _ = sdar_loss(actor(), Method(settings), output, data)
    expected, _ = run(step, LossConfig(coef=0.7, beta=1.0))
    torch.testing.assert_close(loss, expected)


def test_a_measurement_differentiates_one_loss_at_a_time() -> None:
    step, settings = Step(), LossConfig(coef=0.7)
    both, metrics = run(step, settings)
    parts = {}
    for part in ("rl", "distillation"):
        output, data = step.micro_batch(range(ROWS), settings, coef=0.7)
        tu.assign_non_tensor(data, **{STEP_VALUES: asdict(StepValues(0.7, 5.0, measure=1, only=part))})
        parts[part] = gradient(sdar_loss(actor(), Method(settings), output, data)[0], step)
    torch.testing.assert_close(parts["rl"] + 0.7 * parts["distillation"], gradient(both, step))
    squares = sums(metrics)
    assert parts["rl"].square().sum().item() == pytest.approx(squares["grad_rl_squared"])


def test_the_term_is_not_computed_in_the_engines_half_precision() -> None:
    step = Step()
    step.student = step.student.detach().float().requires_grad_()
    step.old, step.teacher = step.old.float(), step.teacher.float()
    settings = LossConfig(coef=0.7, objective="k1", objective_options={"discount": 0.99}, gate="none")
    _, expected = run(step, settings)
    with torch.autocast("cpu", torch.bfloat16):
        _, got = run(step, settings)
    assert got["sdar/loss"].aggregate() == pytest.approx(expected["sdar/loss"].aggregate(), rel=1e-6)


def test_without_the_policy_gradient_its_advantages_do_not_matter_and_the_rest_stays() -> None:
    step = Step()
    kept, metrics = run(step, LossConfig(coef=0.7, policy_gradient=False))
    assert metrics["actor/pg_loss"].aggregate() == 0.0
    step.advantages = -3.0 * step.advantages
    other, _ = run(step, LossConfig(coef=0.7, policy_gradient=False))
    torch.testing.assert_close(other, kept)
    expected = 0.001 * metrics["kl_loss"].aggregate() + 0.7 * metrics["sdar/loss"].aggregate()
    assert metrics["kl_loss"].aggregate() > 0
    assert kept.item() == pytest.approx(expected)


def test_no_gradient_goes_through_the_entropy_of_the_gate() -> None:
    step = Step()
    loss, _ = run(step, LossConfig(coef=0.7, gate="entropy"))
    loss.backward()
    assert step.entropy.grad is None
    assert step.student.grad is not None


def test_a_log_prob_that_broke_within_the_update_is_named() -> None:
    step = Step()
    with torch.no_grad():
        step.student[1, 0] = step.student[4, 1] = float("nan")
        step.student[3, 0] = float("inf")  # has no teacher: verl's gradient norm will show it
    output, data = step.micro_batch([0, 1, 3, 4], LossConfig(), coef=0.5)
    columns = {
        "uid": ["a", "a", "b", "c"],
        "session_id": [0, 0, 1, 0],
    }
    for name, values in columns.items():
        tu.assign_non_tensor_stack(data, name, values)
    text = r"student_log_probs holds NaN .* rows: 1, 3\..* a_0, c_0\."
    with pytest.raises(NonFiniteError, match=text):
        sdar_loss(actor(), Method(LossConfig(coef=0.5)), output, data)
    _, bare = step.micro_batch([0, 1], LossConfig(), coef=0.5)
    output, _ = step.micro_batch([0, 1], LossConfig(), coef=0.5)
    with pytest.raises(NonFiniteError, match="rows: 1"):
        sdar_loss(actor(), Method(LossConfig(coef=0.5)), output, bare)
    assert pickle.loads(pickle.dumps(NonFiniteValues("x", [1]))).rows == (1,), "Ray sends it to the trainer"


def test_an_engine_without_entropy_is_named() -> None:
    step = Step()
    with pytest.raises(ConfigError, match=r"sdar\.loss\.gate=entropy reads the student's entropy"):
        run(step, LossConfig(gate="entropy"), entropy=False)


def test_the_worker_gets_the_steps_values_through_mini_and_micro_batches() -> None:
    from verl.workers.engine.utils import prepare_micro_batches

    _, data = Step().micro_batch(range(ROWS), LossConfig(), coef=0.25)
    tu.assign_non_tensor(data, use_dynamic_bsz=False, micro_batch_size_per_gpu=1)
    seen = []
    for mini in tu.make_iterator(data, mini_batch_size=2, epochs=1, seed=0, dataloader_kwargs={"shuffle": True}):
        for micro in prepare_micro_batches(mini)[0]:
            seen.append(StepValues(**tu.get_non_tensor_data(micro, STEP_VALUES, None)))
    assert seen == [StepValues(0.25, 5.0)] * ROWS
