"""ICSD's gate against its equation turn by turn in plain Python; what it reads, and what it keeps."""

from __future__ import annotations

import math
from statistics import median

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sdar_verl.algorithm.gap import step_statistics
from sdar_verl.algorithm.gates import gate_weight
from sdar_verl.algorithm.loss import distillation_terms
from sdar_verl.algorithm.turns import row_turns, turn_medians
from sdar_verl.config.loss import LossConfig
from sdar_verl.fields import TEACHER_LOG_PROBS, TEACHER_MASK
from sdar_verl.method import Method, StepValues

BETA = 5.0


def icsd(gaps: list[float], advantages: list[float], ratios: list[float]) -> list[float]:
    """The weights of one turn, as the equation is written."""
    plain = [1 / (1 + math.exp(-BETA * gap)) for gap in gaps]
    agreement = [a * rho * gap for a, rho, gap in zip(advantages, ratios, gaps, strict=True)]
    middle = median(agreement)
    below = [abs(u - middle) for u in agreement if u < middle]
    above = [abs(u - middle) for u in agreement if u >= middle]
    ranks = []
    for u in agreement:
        if u < middle:
            ranks.append(0.5 * math.exp(-(middle - u) / (sum(below) / len(below))))
        else:
            spread = sum(above) / len(above)
            ranks.append(1 - 0.5 * math.exp(-(u - middle) / spread) if spread else 0.5)
    dealt = [not (a < 0 and gap < 0) for a, gap in zip(advantages, gaps, strict=True)]
    before = sum(g for g, inside in zip(plain, dealt, strict=True) if inside)
    after = sum(g * m for g, m, inside in zip(plain, ranks, dealt, strict=True) if inside)
    return [g * m * before / after if inside else g for g, m, inside in zip(plain, ranks, dealt, strict=True)]


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_the_gate_is_the_equation_on_every_turn(data: st.DataObject) -> None:
    """Two rows of several turns with gaps between them and tokens without a teacher; ties and zeros among them."""
    length, numbers = 9, st.sampled_from([-0.5, -0.2, 0.0, 0.1, 0.1, 0.7])
    drawn = [[data.draw(numbers) for _ in range(length)] for _ in range(2)]
    response = torch.tensor([[data.draw(st.booleans()) for _ in range(length)] for _ in range(2)])
    mask = response & torch.tensor([[data.draw(st.integers(0, 4)) > 0 for _ in range(length)] for _ in range(2)])
    gap = torch.tensor(drawn, dtype=torch.float64) * mask
    advantages = torch.tensor([[data.draw(st.sampled_from([-1.0, 0.0, 2.0]))] for _ in range(2)]).double()
    advantages = advantages.expand(2, length) * response
    log_ratio = torch.tensor([[data.draw(st.sampled_from([-0.3, 0.0, 0.3])) for _ in range(length)] for _ in range(2)])
    log_ratio = log_ratio.double()
    weight = gate_weight(
        "calibrated",
        gap,
        beta=BETA,
        mask=mask,
        response_mask=response,
        advantages=advantages,
        log_ratio=log_ratio,
    )
    turn = row_turns(response)
    for row in range(2):
        for number in range(int(turn[row].max()) + 1):
            inside = (mask[row] & (turn[row] == number)).nonzero().flatten().tolist()
            if not inside:
                continue
            columns = (gap[row], advantages[row], log_ratio[row].exp())
            expected = icsd(*([column[i].item() for i in inside] for column in columns))
            assert weight[row, inside].tolist() == pytest.approx(expected, rel=1e-9)


def test_a_turn_keeps_its_mass_and_a_turn_of_one_mind_its_gates() -> None:
    generator = torch.Generator().manual_seed(0)
    gap, on = torch.randn(3, 8, generator=generator), torch.ones(3, 8, dtype=torch.bool)
    given_to = {"beta": BETA, "mask": on, "response_mask": on}
    plain = torch.sigmoid(BETA * gap)
    won = gate_weight("calibrated", gap, advantages=torch.ones_like(gap), **given_to)
    torch.testing.assert_close(won.sum(-1), plain.sum(-1))
    assert (won - plain).abs().max() > 0.1
    order = gap[0].argsort()
    assert (won[0, order] / plain[0, order]).diff().min() >= 0, "the more both agree, the larger the share"
    torch.testing.assert_close(gate_weight("calibrated", gap, advantages=torch.zeros_like(gap), **given_to), plain)
    lost = gate_weight("calibrated", gap, advantages=-torch.ones_like(gap), **given_to)
    assert torch.equal(lost[gap < 0], plain[gap < 0])
    # Where an episode failed, the token that the teacher likes best is the one that outcome and teacher disagree on.
    assert lost[0, gap[0].argmax()] < plain[0, gap[0].argmax()]


def test_the_one_token_to_deal_to_far_from_all_others_keeps_its_gate() -> None:
    """Its rank is about exp(-600): gone in float32."""
    gap = -torch.arange(1.0, 1201.0).unsqueeze(0) * 1e-9
    gap[0, 0] = 1.0
    on = torch.ones(1, 1200, dtype=torch.bool)
    weight = gate_weight("calibrated", gap, beta=BETA, mask=on, response_mask=on, advantages=-torch.ones(1, 1200))
    torch.testing.assert_close(weight, torch.sigmoid(BETA * gap))


def test_medians_of_turns_are_those_of_the_statistics_module() -> None:
    response = torch.tensor([[1, 1, 1, 0, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1, 1, 1], [0] * 8]).bool()
    values = torch.tensor([[3.0, 1, 2, 99, 5, 8, 99, 99], [99, 4, -2, 7, 7, 0, 1, 1], [99] * 8])
    mask = response.clone()
    mask[1, 6:] = False
    found = turn_medians(values, mask, row_turns(response))
    assert found.tolist() == [[2.0, 6.5], [4.0, 0.0], [0.0, 0.0]]


def test_the_loss_offers_the_ratio_and_the_advantages_of_the_update() -> None:
    """The worker's terms and a divisor over the step ask the gate with the same numbers."""
    student = torch.tensor([[-1.0, -2.0, -0.5, -0.7]])
    old = student - torch.tensor([[0.2, -0.1, 0.0, 0.1]])
    teacher, advantages = student + torch.tensor([[0.4, -0.3, 0.1, -0.05]]), torch.full((1, 4), 1.5)
    expected = icsd((teacher - student)[0].tolist(), [1.5] * 4, (student - old).exp()[0].tolist())
    method = Method(LossConfig(gate="calibrated"))
    rows = {
        "response_mask": torch.ones(1, 4),
        "old_log_probs": old,
        "advantages": advantages,
        TEACHER_LOG_PROBS: teacher,
        TEACHER_MASK: torch.ones(1, 4),
    }
    terms = method.terms(student, rows, StepValues(1.0, BETA))
    assert terms.gate[0].tolist() == pytest.approx(expected, rel=1e-5)
    on_policy = icsd((teacher - student)[0].tolist(), [1.5] * 4, [1.0] * 4)
    options = {"gate": "calibrated", "divide_by": "weights", "advantages": advantages}
    scale = step_statistics(student, teacher, torch.ones(1, 4), ["e"], **options).scale
    assert scale is not None and scale[0, 0].item() == pytest.approx(4 / sum(on_policy), rel=1e-5)


def test_without_advantages_it_says_so() -> None:
    with pytest.raises(ValueError, match="gate 'calibrated' reads the student's advantages, not given here"):
        distillation_terms(-torch.ones(1, 1), -torch.ones(1, 1), torch.ones(1, 1), gate="calibrated")
