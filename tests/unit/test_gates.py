"""Gates in closed form, and what each does on-policy: exact expectation over a small vocabulary."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch

from sdar_verl.algorithm.gates import (
    _GATES,
    Ranges,
    check_gate_options,
    gate_reads,
    get_gate,
    list_gates,
    register_gate,
    value_ranges,
)
from sdar_verl.algorithm.loss import distillation_terms

VOCAB = 7


@pytest.fixture
def logits() -> tuple[torch.Tensor, torch.Tensor]:
    """Student and teacher logits over the vocabulary, (VOCAB,) each, float64."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, VOCAB, generator=generator, dtype=torch.float64)
    return student.requires_grad_(), teacher


@pytest.fixture
def clipped_gate() -> Iterator[str]:
    """A gate as a third party would write it."""
    name = "clipped_in_a_test"

    @register_gate(name)
    def clipped(gap: torch.Tensor, *, beta: float, **_: object) -> torch.Tensor:
        return (beta * gap).clamp(0.0, 1.0)

    yield name
    del _GATES._entries[name]


def expected_gradient(student: torch.Tensor, teacher: torch.Tensor, **options: object) -> torch.Tensor:
    """E_{y ~ softmax(student)}[grad of l(y) in the student's logits], exactly: one row per token of the vocabulary."""
    student_log_probs, teacher_log_probs = student.log_softmax(-1), teacher.log_softmax(-1)
    terms = distillation_terms(
        student_log_probs.unsqueeze(-1), teacher_log_probs.unsqueeze(-1), torch.ones(VOCAB, 1), **options
    )
    expectation = (student_log_probs.exp().detach() * terms.loss.squeeze(-1)).sum()
    return torch.autograd.grad(expectation, student)[0]


def weighted_score(student: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """-E_y[weight(y) grad log pi(y)] written out: grad of log-softmax is onehot(y) - pi."""
    probs = student.softmax(-1).detach()
    return -(probs * weight) @ (torch.eye(VOCAB, dtype=probs.dtype) - probs)


def gap_of(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    return (teacher.log_softmax(-1) - student.log_softmax(-1)).detach()


def test_gap_gate_is_a_sigmoid() -> None:
    weight = get_gate("gap")(torch.tensor([-0.4, 0.0, 0.4]), beta=5.0)
    e2 = math.exp(2.0)
    torch.testing.assert_close(weight, torch.tensor([1 / (1 + e2), 0.5, e2 / (1 + e2)]))


@pytest.mark.parametrize(("name", "weight"), [("none", 1.0), ("half", 0.5)])
def test_constant_gates_do_not_look_at_the_gap(name: str, weight: float) -> None:
    gap = torch.tensor([[-3.0, 0.0, 8.0]])
    assert torch.equal(get_gate(name)(gap, beta=5.0, entropy=None), torch.full_like(gap, weight))


def test_half_is_gap_with_beta_zero(logits: tuple[torch.Tensor, torch.Tensor]) -> None:
    gap = gap_of(*logits)
    assert torch.equal(get_gate("half")(gap, beta=5.0), get_gate("gap")(gap, beta=0.0))


@pytest.mark.parametrize("beta", [0.3, 1.0, 5.0, 10.0])
def test_expected_weight_is_centred_sigmoid(logits: tuple[torch.Tensor, torch.Tensor], beta: float) -> None:
    student, teacher = logits
    gap = gap_of(student, teacher)
    gradient = expected_gradient(student, teacher, beta=beta)
    assert gradient.abs().max() > 1e-3
    torch.testing.assert_close(gradient, weighted_score(student, torch.sigmoid(beta * gap) - 0.5))
    torch.testing.assert_close(gradient, weighted_score(student, torch.tanh(beta * gap / 2) / 2))


@pytest.mark.parametrize("options", [{"gate": "gap", "beta": 0.0}, {"gate": "half"}, {"gate": "none"}])
def test_constant_weight_has_no_expected_gradient(
    logits: tuple[torch.Tensor, torch.Tensor], options: dict[str, object]
) -> None:
    gradient = expected_gradient(*logits, **options)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient))


def test_large_beta_keeps_only_the_sign_of_the_gap(logits: tuple[torch.Tensor, torch.Tensor]) -> None:
    student, teacher = logits
    gradient = expected_gradient(student, teacher, beta=1e6)
    torch.testing.assert_close(gradient, weighted_score(student, gap_of(student, teacher).sign() / 2))


@pytest.mark.parametrize("beta", [1.0, 5.0])
def test_small_gaps_give_a_quarter_beta_of_the_reverse_kl_gradient(
    logits: tuple[torch.Tensor, torch.Tensor], beta: float
) -> None:
    student, direction = logits
    teacher = student.detach() + 1e-4 * direction
    log_probs = student.log_softmax(-1)
    reverse_kl = (log_probs.exp() * (log_probs - teacher.log_softmax(-1))).sum()
    (kl_gradient,) = torch.autograd.grad(reverse_kl, student)
    gradient = expected_gradient(student, teacher, beta=beta)
    torch.testing.assert_close(gradient, beta / 4 * kl_gradient, rtol=1e-3, atol=0.0)


def test_descending_moves_the_student_to_its_teacher(logits: tuple[torch.Tensor, torch.Tensor]) -> None:
    student, teacher = logits

    def distance() -> float:
        log_probs = student.detach().log_softmax(-1)
        return float((log_probs.exp() * (log_probs - teacher.log_softmax(-1))).sum())

    start = distance()
    for _ in range(200):
        student.data -= 0.5 * expected_gradient(student, teacher, beta=5.0)
    assert distance() < 0.02 * start


def test_own_gate_is_selectable_by_name(clipped_gate: str) -> None:
    student, teacher = torch.tensor([[-1.0, -1.0, -1.0]]), torch.tensor([[-2.0, -0.9, -0.5]])
    terms = distillation_terms(student, teacher, torch.ones(1, 3), gate=clipped_gate, beta=5.0)
    torch.testing.assert_close(terms.gate, torch.tensor([[0.0, 0.5, 1.0]]))
    assert clipped_gate in list_gates()


def test_unknown_gate_lists_the_known_ones() -> None:
    known = "calibrated, entropy, gap, half, none, soft_or"
    with pytest.raises(ValueError, match=f"unknown gate 'sigmoid'; known: {known}"):
        get_gate("sigmoid")


def test_a_taken_name_is_refused(clipped_gate: str) -> None:
    with pytest.raises(ValueError, match=r"gate 'gap' is already registered by sdar_verl\.algorithm\.gates\.gap_gate"):
        register_gate("gap")(lambda gap, **_: gap)
    register_gate("gap")(get_gate("gap"))  # the same function again is no conflict


def test_entropy_gate_is_a_sigmoid_of_the_entropy_and_never_below_half() -> None:
    gap, entropy = torch.tensor([[-9.0, 9.0, 0.0]]), torch.tensor([[0.0, 0.2, 3.0]])
    weight = get_gate("entropy")(gap, beta=2.0, entropy=entropy)
    torch.testing.assert_close(weight, torch.sigmoid(2.0 * entropy))
    assert (weight >= 0.5).all()


def test_entropy_gate_has_no_expected_gradient(logits: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Every token that could have been sampled at a position has the same entropy."""
    student, teacher = logits
    entropy = torch.distributions.Categorical(logits=student.detach()).entropy().expand(VOCAB, 1)
    gradient = expected_gradient(student, teacher, gate="entropy", entropy=entropy)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient))


def test_soft_or_is_an_or_of_numbers_between_zero_and_one() -> None:
    gap, entropy = torch.tensor([[0.0, 1.0, 0.0, 1.0, 0.5]]), torch.tensor([[0.0, 0.0, 1.0, 1.0, 0.5]])
    weight = get_gate("soft_or")(gap, beta=3.0, entropy=entropy, norm="none")
    torch.testing.assert_close(weight, torch.sigmoid(3.0 * torch.tensor([[0.0, 1.0, 1.0, 1.0, 0.75]])))


def test_soft_or_normalises_over_the_step_or_by_squashing() -> None:
    gap, entropy = torch.tensor([[-1.0, 0.0, 3.0]]), torch.tensor([[0.5, 1.5, 2.5]])
    ranges = Ranges(entropy_min=0.5, entropy_max=2.5, gap_min=-1.0, gap_max=3.0)
    minmax = get_gate("soft_or")(gap, beta=1.0, entropy=entropy, ranges=ranges, norm="batch_minmax")
    torch.testing.assert_close(minmax, torch.sigmoid(torch.tensor([[0.0, 1 - 0.5 * 0.75, 1.0]])))
    mask = torch.ones(1, 3, dtype=torch.bool)
    assert value_ranges(entropy, gap, mask) == ranges
    alone = get_gate("soft_or")(gap, beta=1.0, entropy=entropy, mask=mask, norm="batch_minmax")
    torch.testing.assert_close(alone, minmax)
    squashed = get_gate("soft_or")(gap, beta=1.0, entropy=entropy, norm="squash")
    score = 1 - (1 - torch.tanh(entropy)) * (1 - torch.sigmoid(gap))
    torch.testing.assert_close(squashed, torch.sigmoid(score))


def test_soft_or_with_one_value_everywhere_is_half() -> None:
    same = torch.full((1, 3), 0.7)
    weight = get_gate("soft_or")(same, beta=5.0, entropy=same, norm="batch_minmax")
    assert torch.equal(weight, torch.full((1, 3), 0.5))


def test_soft_or_without_a_choice_of_norm_is_refused() -> None:
    with pytest.raises(ValueError, match="gate 'soft_or' needs the option 'norm'"):
        check_gate_options("soft_or", {})
    with pytest.raises(ValueError, match="norm='zscore'; known: none, batch_minmax, squash"):
        check_gate_options("soft_or", {"norm": "zscore"})
    check_gate_options("soft_or", {"norm": "squash"})


def test_unknown_options_of_a_gate_list_the_known_ones() -> None:
    with pytest.raises(ValueError, match="gate 'gap' has no option 'norm'; known: none"):
        check_gate_options("gap", {"norm": "squash"})
    with pytest.raises(ValueError, match="gate 'soft_or' has no option 'scale'; known: norm"):
        check_gate_options("soft_or", {"norm": "none", "scale": 2})


@pytest.mark.parametrize("gate", ["entropy", "soft_or"])
def test_a_gate_without_the_entropy_it_reads_says_so(gate: str) -> None:
    options = {"norm": "none"} if gate == "soft_or" else {}
    with pytest.raises(ValueError, match=f"gate '{gate}' reads the student's entropy"):
        distillation_terms(-torch.ones(1, 1), -torch.ones(1, 1), torch.ones(1, 1), gate=gate, gate_options=options)


def test_a_gate_says_what_it_reads() -> None:
    reads = {
        name: [signal for signal in ("gap", "beta", "entropy") if gate_reads(name, signal)] for name in list_gates()
    }
    assert reads == {
        "gap": ["gap", "beta"],
        "entropy": ["beta", "entropy"],
        "soft_or": ["gap", "beta", "entropy"],
        "none": [],
        "half": [],
        "calibrated": ["gap", "beta"],
    }
