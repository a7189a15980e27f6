"""What somebody's own gate, objective, signal, schedule or context can do wrong, told before the run starts."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
import torch

from sdar_verl.algorithm import divergences, gates, objectives, schedules, signals
from sdar_verl.checks.context import _try_late
from sdar_verl.config.loss import LossConfig
from sdar_verl.context import registry
from sdar_verl.context.prompt import Prompt
from sdar_verl.context.registry import ContextError, check_contexts, register_context
from sdar_verl.envs.base import Task
from sdar_verl.fields import TEACHER_LOG_PROBS
from sdar_verl.method import Strengths
from tests.unit.test_checks_loss import faults
from tests.unit.test_method import judged, table_of

TASK = Task("alfworld", "t", "look", "look at a book")


@pytest.fixture(autouse=True)
def registries(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is gone after it."""
    for table in (gates._GATES, objectives._OBJECTIVES, signals._SIGNALS, schedules._SCHEDULES):
        monkeypatch.setattr(table, "_entries", dict(table._entries))
        monkeypatch.setattr(table, "_facts", dict(table._facts))
    monkeypatch.setattr(registry, "_contexts", dict(registry._contexts))
    for name in ("DIVERGENCES", "SUPPORT_OF"):
        monkeypatch.setattr(objectives, name, dict(getattr(divergences, name)))


def undivided(gap, *, beta, **_):
    return gap / gap.abs()


def standard(gap, *, beta, **_):
    return ((gap - gap.mean()) / gap.std() * beta).sigmoid()


@pytest.mark.parametrize(
    ("gate", "words"),
    [
        (undivided, "what gate 'mine' returned holds NaN"),
        (lambda gap, *, beta, **_: torch.tanh(beta * gap), "gate 'mine' returned -0.905148; a weight must be at least"),
        (lambda gap, *, beta, **_: None, "gate 'mine' returned shape NoneType; expected"),
        (lambda gap, *, beta, **_: torch.tensor(0.5), r"gate 'mine' returned shape \(\); expected"),
        (lambda gap, *, beta, **_: gap.abs().mean(-1, keepdim=True), r"returned shape \(1, 1\); expected \(1, 3\)"),
        (standard, "gives a row other weights when it stands alone; rows are dealt to micro-batches"),
        (lambda gap, *, beta, advantage=None, **_: gap.abs(), "takes advantage=None, which nobody gives it: it is off"),
    ],
)
def test_a_gate_that_breaks_its_contract_is_told(gate, words: str) -> None:
    gates.register_gate("mine")(gate)
    with pytest.raises(ValueError, match=words):
        gates.check_gate_options("mine", {})


def test_a_gate_that_breaks_it_later_is_told_by_its_name() -> None:
    gates.register_gate("mine")(lambda gap, *, beta, **_: (gap < 10).float() - 2.0 * (gap < -5).float())
    gates.check_gate_options("mine", {})
    table = table_of()
    judged(table, gate="mine", divide_by="weights")
    table.columns[TEACHER_LOG_PROBS] = table.columns[TEACHER_LOG_PROBS] - 30.0
    with pytest.raises(ValueError, match="gate 'mine' returned -1; a weight must be at least 0"):
        judged(table, gate="mine", divide_by="weights")


def test_no_gradient_reaches_a_gates_own_parameters() -> None:
    scale = torch.ones((), requires_grad=True)

    def learned(gap, *, beta, **_):
        with torch.enable_grad():
            return torch.sigmoid(scale * gap)

    gates.register_gate("mine")(learned)
    student = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    on = torch.ones(1, 2, dtype=torch.bool)
    weight = gates.gate_weight("mine", student.detach(), beta=1.0, mask=on, response_mask=on)
    assert not weight.requires_grad


def test_an_objective_that_nothing_can_be_learned_from_is_told() -> None:
    objectives.register_objective("mine")(lambda student, teacher, **_: (student - teacher).detach())
    with pytest.raises(ValueError, match="objective 'mine' returned a loss without gradient"):
        objectives.check_objective_options("mine", {})
    objectives.register_objective("scalar")(lambda student, teacher, **_: (student - teacher).mean())
    with pytest.raises(ValueError, match=r"objective 'scalar' returned shape \(\); expected \(1, 3\)"):
        objectives.check_objective_options("scalar", {})
    objectives.register_divergence("summed", support="student")(lambda student, teacher: (student - teacher).sum())
    with pytest.raises(ValueError, match=r"divergence 'summed' of \(3, 4\) log-probs returned shape \(\); expected"):
        objectives.check_objective_options("summed", {})
    with pytest.raises(ValueError, match="support='both'; known: student, teacher"):
        objectives.register_divergence("both", support="both")  # type: ignore[arg-type]


def test_a_signal_that_breaks_its_contract_is_told() -> None:
    signals.register_signal("mine")(lambda rows, *, strength: None)
    with pytest.raises(ValueError, match="signal 'mine' returned shape NoneType"):
        signals.check_signal("mine", 0.5, {})
    for number, reads in enumerate((("gapp",), "gap")):
        signals.register_signal(f"reads_{number}", reads=reads)(lambda rows, *, strength: rows.advantages)
        with pytest.raises(ValueError, match=re.escape(f"is registered with reads={reads!r}; known: gap, gate, loss")):
            signals.check_signal(f"reads_{number}", 0.5, {})


def test_a_signal_may_keep_the_auxiliary_loss_beside_the_advantages_that_it_makes() -> None:
    signals.register_signal("both", reads=("gap", "gate", "loss"))(lambda rows, *, strength: rows.advantages + strength)
    table = table_of()
    before = table.columns["advantages"].clone()
    found = judged(table, signal="both", coef=0.5)
    assert found.values.coef == 0.5 and found.change == pytest.approx(0.5)
    assert torch.equal(found.columns["advantages"], (before + 0.5) * table.response)
    assert not faults({"signal": "both", "objective": "k3", "measure_every": 10})
    (told,) = faults({"signal": "both", "gate": "calibrated"})
    assert "reads the advantages, which sdar.loss.signal=both changes" in told


def test_a_schedule_that_would_forget_is_refused() -> None:
    class Forgetful(schedules.Schedule):
        measures = "sdar/gap_mean"

        def observe(self, value: float, *measured: float) -> None:
            pass

    with pytest.raises(TypeError, match="'mine' overrides observe and not the property state"):
        schedules.register_schedule("mine")(Forgetful)


def test_a_schedule_that_follows_nothing_is_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    node = {"name": "grad_share", "options": {"share": 0.1}}
    strengths = Strengths(LossConfig(coef=1.0, coef_schedule=node))
    for step in (1, 2):
        strengths.observe(step, {"sdar/grad_shar": 1.0, "sdar/gap_mean": 0.1})
    (said,) = capsys.readouterr().out.splitlines()
    assert said.startswith("sdar: the schedule of coef follows sdar/grad_share, not measured at step 1; there is sdar/")


def test_what_is_measured_during_a_warm_up_is_not_learned_from() -> None:
    node = {"name": "grad_share", "options": {"share": 0.1, "smoothing": 0.0}, "warmup_steps": 4}
    strengths = Strengths(LossConfig(coef=1.0, coef_schedule=node))
    for step in range(1, 5):  # a share of 0.1 at full strength
        strengths.observe(step, {"sdar/grad_share": 0.1 * step / 4})
    assert strengths.at(5).coef == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        ({"rl_schedule": {"name": "hand_off", "options": {"rising": "no"}}}, "has rising='no': input should be"),
        ({"objective": "k3", "objective_options": {"importance": "no"}}, "importance='no': input should be a valid"),
        ({"signal": "advantage_shaping", "signal_options": {"flat_groups": "no"}}, "flat_groups='no'"),
        ({"coef_schedule": {"name": "linear_decay", "options": {"steps": 2.5}}}, "steps=2.5: input should be a valid"),
    ],
)
def test_values_of_the_wrong_type_are_told_as_a_contexts_are(loss: dict, words: str) -> None:
    told = faults(loss)
    assert len(told) == 1 and words in told[0]


def test_a_gates_metrics_end_with_the_teacher() -> None:
    @schedules.register_schedule("follow_gate")
    class FollowGate(schedules.Schedule):
        measures = "sdar/gate_mean"

    node = {"coef_schedule": {"stop_step": 50}, "rl_schedule": {"name": "follow_gate"}}
    (told,) = faults(node)
    assert "follows sdar/gate_mean, which nobody measures once sdar.loss.coef_schedule.stop_step=50" in told


def tried(name: str, **options: object) -> Iterator[None]:
    return _try_late(registry.get_context(name), TASK, 0, options)


@pytest.mark.parametrize(
    ("context", "words"),
    [
        (lambda request: ["a list"], "gave list; it must give text, Passage or None"),
        (lambda request: request.episod.name, "AttributeError.*episod"),
        (lambda request: request.skills().text, "'NoneType' object is not callable"),
        (lambda request: request.siblings[0].turns[0].action + 1, "TypeError"),
    ],
)
def test_a_late_context_is_tried_on_an_invented_group(context, words: str) -> None:
    register_context("mine", late=True)(context)
    with pytest.raises(ContextError, match=words):
        tried("mine")


def test_a_written_context_is_tried_without_an_answer() -> None:
    @register_context("mine")
    def mine(request):
        answer = yield Prompt("What now?")
        return answer.strip()

    with pytest.raises(ContextError, match="'NoneType' object has no attribute 'strip'"):
        tried("mine")


@pytest.mark.parametrize("name", [n for n in registry.context_names() if registry.get_context(n).late])
def test_the_packages_own_late_contexts_pass_the_trial(name: str) -> None:
    if name == "feedback":  # its field is the reward function's, of whom nothing is invented
        with pytest.raises(ContextError, match="name the right key") as told:
            tried(name, field="said")
        assert told.value.__cause__ is None
    else:
        tried(name)


def test_options_are_compared_where_a_context_takes_more() -> None:
    @register_context("mine")
    def mine(request, *, most: int = 2, **_):
        return "text"

    with pytest.raises(ContextError, match="context 'mine' has no option 'mst'; known: most"):
        check_contexts(["mine"], {"mine": {"mst": 3}})


def test_an_unknown_name_says_where_to_import_it_from() -> None:
    with pytest.raises(ValueError, match=r"unknown gate 'mine'.*name its module in sdar\.modules"):
        gates.get_gate("mine")
