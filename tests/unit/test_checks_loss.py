"""Faults of the sdar.loss node: names, options, and options that nothing would read."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from sdar_verl.algorithm import gates, objectives, schedules, signals
from sdar_verl.algorithm.loss import distillation_terms
from sdar_verl.checks.loss import loss_faults, needs_step_statistics
from sdar_verl.config import load_config
from sdar_verl.modules import import_modules

REGISTRIES = ((gates, "_GATES"), (objectives, "_OBJECTIVES"), (signals, "_SIGNALS"), (schedules, "_SCHEDULES"))

THEIR_MODULE = """
from dataclasses import dataclass
from sdar_verl.algorithm.gates import register_gate
from sdar_verl.algorithm.objectives import register_objective
from sdar_verl.algorithm.schedules import Schedule, register_schedule
from sdar_verl.algorithm.signals import register_signal

@register_gate("their_gate")
def their_gate(gap, *, width, **_):
    return (gap / width).clamp(0.0, 1.0)

@register_objective("their_objective")
def their_objective(student_log_probs, teacher_log_probs, **_):
    return 3.0 * (teacher_log_probs - student_log_probs)

@register_signal("their_signal", reads=("gap", "token_mean"))
def their_signal(rows, *, strength):
    return rows.advantages + strength * rows.gap

@register_schedule("their_schedule")
@dataclass
class TheirSchedule(Schedule):
    every: int

    def factor(self, step):
        return 0.5 ** (step // self.every)
"""

VERL = {
    "actor_rollout_ref": {"actor": {"loss_agg_mode": "token-mean"}},
    "algorithm": {"rollout_correction": None},
}
SEQUENCE_MEAN = {"actor_rollout_ref": {"actor": {"loss_agg_mode": "seq-mean-token-mean"}}}


def faults(loss: dict[str, Any], verl: dict[str, Any] | None = None, **node: Any) -> list[str]:
    config = OmegaConf.merge(VERL, verl or {})
    return loss_faults(config, load_config({"loss": loss, **node}))


SOUND = {
    "paper": {},
    "entropy": {"gate": "entropy"},
    "soft_or": {"gate": "soft_or", "gate_options": {"norm": "squash"}, "clamp": 1.0, "granularity": "turn"},
    "k3": {"gate": "none", "objective": "k3", "objective_options": {"importance": False}},
    "opsd": {"gate": "none", "objective": "k1", "policy_gradient": False},
    "rlsd": {"signal": "advantage_weight", "coef": 0.5, "signal_options": {"clip": 0.2}, "centre": "trajectory"},
    "adrs": {
        "signal": "advantage_shaping",
        "coef": 0.02,
        "signal_options": {"weight": "teacher", "clip": 0.2},
        "coef_schedule": {"start_step": 21, "stop_step": 71},
    },
    "shaping by the gate": {"signal": "advantage_shaping", "granularity": "trajectory", "beta": 3.0},
    "follower": {"coef_schedule": {"name": "grad_share", "options": {"share": 0.1}}},
    "follower in the weights": {
        "coef_schedule": {"name": "grad_share", "options": {"share": 0.1, "of": "weights"}},
        "measure_every": 10,
    },
    "gap bearing": {"divide_by": "gap_bearing", "gap_threshold": 0.1, "gate": "none"},
    "switched off": {"coef": 0, "objective": "k3", "divide_by": "weights", "beta": 2.0, "gate": "none"},
}


@pytest.mark.parametrize("name", SOUND)
def test_sound_settings_have_no_fault(name: str) -> None:
    assert faults(SOUND[name]) == []


UNSOUND = {
    "gate": ({"gate": "gpa"}, ["sdar.loss.gate: unknown gate 'gpa'", "soft_or"]),
    "gate option": ({"gate_options": {"norm": "none"}}, ["sdar.loss.gate_options", "'gap' has no option 'norm'"]),
    "soft_or": ({"gate": "soft_or"}, ["sdar.loss.gate_options", "needs the option 'norm'"]),
    "objective": ({"objective": "kl"}, ["sdar.loss.objective: unknown objective 'kl'", "k3"]),
    "objective option": ({"objective_options": {"importance": True}}, ["sdar.loss.objective_options", "'sampled'"]),
    "signal": ({"signal": "reward"}, ["sdar.loss.signal: unknown signal 'reward'", "advantage_weight"]),
    "signal option": ({"signal": "advantage_weight", "signal_options": {"band": 1}}, ["signal_options", "clip"]),
    "mix": ({"signal": "advantage_weight", "coef": 2.0}, ["mix is 2.0"]),
    "schedule": ({"coef_schedule": {"name": "step"}}, ["sdar.loss.coef_schedule: unknown schedule 'step'"]),
    "schedule option": ({"beta_schedule": {"name": "linear_decay"}}, ["sdar.loss.beta_schedule", "'steps'"]),
    "schedule option's type": (
        {"coef_schedule": {"name": "linear_decay", "options": {"steps": "many"}}},
        ["sdar.loss.coef_schedule"],
    ),
    "beta that follows": (
        {"beta_schedule": {"name": "grad_share", "options": {"share": 0.1}}},
        ["sdar.loss.beta_schedule.name=grad_share", "coef_schedule"],
    ),
    "a share of no loss": (
        {
            "signal": "advantage_weight",
            "coef": 0.5,
            "coef_schedule": {"name": "grad_share", "options": {"share": 0.1}},
        },
        ["coef_schedule.name=grad_share", "sdar.loss.signal=advantage_weight"],
    ),
    "beta without a gate that reads it": ({"gate": "none", "beta": 2.0}, ["sdar.loss.beta=2.0", "sdar.loss.gate=none"]),
    "beta schedule": (
        {"gate": "half", "beta_schedule": {"warmup_steps": 3}},
        ["sdar.loss.beta_schedule", "sdar.loss.gate=half"],
    ),
    "granularity": (
        {"gate": "entropy", "granularity": "turn"},
        ["sdar.loss.granularity=turn has no effect with sdar.loss.gate=entropy"],
    ),
    "centre": ({"gate": "none", "centre": "batch"}, ["sdar.loss.centre=batch has no effect with sdar.loss.gate=none"]),
    "clamp": ({"gate": "half", "clamp": 1.0}, ["sdar.loss.clamp=1.0 has no effect", "leave it at null"]),
    "threshold": ({"gap_threshold": 0.2}, ["sdar.loss.gap_threshold=0.2", "sdar.loss.divide_by=tokens"]),
    "a measurement that is not made": (
        {"coef_schedule": {"name": "grad_share", "options": {"share": 0.1, "of": "weights"}}},
        ["options.of=weights", "sdar.loss.measure_every"],
    ),
    "a measurement of no loss": (
        {"signal": "advantage_weight", "coef": 0.5, "measure_every": 5},
        ["sdar.loss.measure_every=5 has no effect with sdar.loss.signal=advantage_weight"],
    ),
    "both trajectory": ({"centre": "trajectory", "granularity": "trajectory"}, ["centre=batch or granularity=turn"]),
    "objective of another signal": (
        {"signal": "advantage_weight", "coef": 0.5, "objective": "k3"},
        ["sdar.loss.objective=k3 has no effect with sdar.loss.signal=advantage_weight"],
    ),
    "gate of another signal": (
        {"signal": "advantage_factor", "coef": 0.5, "gate": "none"},
        ["sdar.loss.gate=none has no effect with sdar.loss.signal=advantage_factor"],
    ),
    "divisor of another signal": (
        {"signal": "advantage_shaping", "divide_by": "weights"},
        ["sdar.loss.divide_by=weights has no effect with sdar.loss.signal=advantage_shaping"],
    ),
    "gap of a signal that has none": (
        {"signal": "advantage_shaping", "signal_options": {"weight": "teacher"}, "centre": "batch"},
        ["sdar.loss.centre=batch has no effect with sdar.loss.signal=advantage_shaping"],
    ),
    "nothing to train on": ({"policy_gradient": False, "coef": 0}, ["policy_gradient=False", "sdar.loss.coef=0.0"]),
    "no policy gradient for a signal": (
        {"policy_gradient": False, "signal": "advantage_weight", "coef": 0.5},
        ["policy_gradient=False", "signal=advantage_weight"],
    ),
}


@pytest.mark.parametrize("name", UNSOUND)
def test_a_fault_is_named_once_with_its_option(name: str) -> None:
    loss, words = UNSOUND[name]
    found = faults(loss)
    assert len(found) == 1, found
    for word in words:
        assert word in found[0]


def test_a_divisor_wants_verls_token_mean() -> None:
    verl = SEQUENCE_MEAN
    assert faults({}, verl) == []
    (fault,) = faults({"divide_by": "weights"}, verl)
    assert "loss_agg_mode=seq-mean-token-mean" in fault


def test_a_gate_that_the_trainer_evaluates_wants_the_entropy_before_the_update() -> None:
    verl = {"algorithm": {"rollout_correction": {"bypass_mode": True}}}
    assert faults({"gate": "entropy"}, verl) == []
    (fault,) = faults({"gate": "entropy", "divide_by": "weights"}, verl)
    assert "bypass_mode=True" in fault


def test_no_policy_gradient_without_a_teacher_is_named() -> None:
    (fault,) = faults({"policy_gradient": False, "coef": 0}, teacher={"source": "none"})
    assert "policy_gradient=False" in fault


def test_a_window_that_is_empty_is_refused() -> None:
    from sdar_verl.errors import ConfigError

    with pytest.raises(ConfigError, match=r"sdar\.loss\.coef_schedule: stop_step=5 is not after start_step=5"):
        load_config({"loss": {"coef_schedule": {"start_step": 5, "stop_step": 5}}})


def test_what_needs_the_teacher_before_the_update_is_known() -> None:
    assert needs_step_statistics(load_config({}).loss) == []
    loss = load_config({"loss": {"centre": "batch", "divide_by": "weights", "granularity": "turn"}}).loss
    assert needs_step_statistics(loss) == ["sdar.loss.centre=batch", "sdar.loss.divide_by=weights"]


def test_a_package_of_someone_elses_adds_its_own_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gate, objective, signal and schedule from a module that this package does not know."""
    (tmp_path / "their_method.py").write_text(THEIR_MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    loss = {
        "gate": "their_gate",
        "gate_options": {"width": 2.0},
        "objective": "their_objective",
        "coef_schedule": {"name": "their_schedule", "options": {"every": 3}},
    }
    assert "unknown gate 'their_gate'" in faults(loss)[0]
    tables = [getattr(module, name)._entries for module, name in REGISTRIES]
    before = [dict(table) for table in tables]
    try:
        import_modules(["their_method"])
        assert faults(loss) == []
        assert faults({"signal": "their_signal", "coef": 0.5}) == []
        (fault,) = faults({"signal": "their_signal", "coef": 0.5}, SEQUENCE_MEAN)
        assert "sdar.loss.signal=their_signal" in fault and "re-weighs a token mean" in fault
        (fault,) = faults({**loss, "beta": 2.0})
        assert "sdar.loss.beta=2.0 has no effect with sdar.loss.gate=their_gate" in fault
        (fault,) = faults({**loss, "gate_options": {}})
        assert "gate 'their_gate' needs the option 'width'" in fault
        gap = torch.tensor([[0.5, 1.0]])
        terms = distillation_terms(
            torch.zeros(1, 2), gap, torch.ones(1, 2), **{k: loss[k] for k in ("gate", "gate_options", "objective")}
        )
        torch.testing.assert_close(terms.loss, (gap / 2.0) * (3.0 * gap))
    finally:
        sys.modules.pop("their_method", None)
        for table, entries in zip(tables, before, strict=True):
            table.clear()
            table.update(entries)


def test_the_policy_gradients_weight_needs_a_policy_gradient_and_a_teachers_run() -> None:
    assert faults({"rl_coef": 0.5, "coef": 0.5}) == []
    assert faults({"rl_coef": 0.0, "gate": "none", "objective": "k1"}) == []
    (alone,) = faults({"rl_coef": 0.5, "policy_gradient": False, "gate": "none", "objective": "k1"})
    assert alone.startswith("sdar.loss.rl_coef=0.5 has no effect with sdar.loss.policy_gradient=False")
    (untaught,) = faults({"rl_coef": 0.5, "coef": 0}, teacher={"source": "none"})
    assert untaught.startswith("sdar.loss.rl_coef=0.5 has no effect with sdar.teacher.source=none")
    (nothing,) = faults({"rl_coef": 0.0, "rl_schedule": {"name": "hand_off", "options": {"rising": True}}})
    assert nothing.startswith("sdar.loss.rl_schedule.name=hand_off has no effect with sdar.loss.rl_coef=0")


@pytest.mark.parametrize(
    ("loss", "told"),
    [
        ({"rl_coef": 0.0, "rl_schedule": {"start_step": 10}}, "nor has its window; set that above 0"),
        ({"rl_coef": 0.0, "signal": "advantage_weight", "coef": 0.5}, "signal=advantage_weight reads the advantages"),
        (
            {"rl_coef": 0.0, "signal": "advantage_nudge", "coef": 0.5},
            "signal=advantage_nudge reads the advantages of the policy gradient, and sdar.loss.rl_coef=0 makes all",
        ),
        ({"rl_coef": 0.0, "gate": "calibrated"}, "sdar.loss.gate=calibrated reads the advantages of the policy"),
        (
            {"rl_coef": 0.0, "signal": "advantage_shaping", "coef": 0.5, "signal_options": {"flat_groups": False}},
            "signal=advantage_shaping reads the advantages",
        ),
        (
            {"policy_gradient": False, "coef_schedule": {"name": "grad_share", "options": {"share": 0.1}}},
            "coef_schedule.name=grad_share follows a share of the policy gradient, and sdar.loss.policy_gradient=False",
        ),
        (
            {"policy_gradient": False, "measure_every": 1},
            "sdar.loss.measure_every=1 compares the distillation gradient",
        ),
        ({"beta": 0.0, "beta_schedule": {"warmup_steps": 3}}, "beta_schedule has no effect with sdar.loss.beta=0"),
        (
            {"signal": "advantage_factor", "coef": 0.5, "signal_options": {"evidence": "gap", "prior": 0.4}},
            "signal_options: advantage_factor has prior=0.4, which has no effect without evidence=belief",
        ),
        (
            {"signal": "advantage_shaping", "coef": 0.5, "signal_options": {"reliability_scale": 3.0}},
            "advantage_shaping has reliability_scale=3.0, which has no effect without reliability=group",
        ),
        (
            {"coef_schedule": {"name": "hand_off", "stop_step": 20}, "rl_schedule": {"name": "hand_off"}},
            "once sdar.loss.coef_schedule.stop_step=20 has ended the teacher",
        ),
        (
            {
                "coef_schedule": {"name": "retire", "options": {"teacher_success": 0.5}},
                "rl_schedule": {"name": "hand_off"},
            },
            "once sdar.loss.coef_schedule.name=retire has ended the teacher",
        ),
        (
            {"signal": "advantage_weight", "coef": 1.5},
            "sdar.loss.coef=1.5, the strength of sdar.loss.signal=advantage_weight: ",
        ),
        (
            {"coef_schedule": {"name": "hand_off", "options": {"window": 10.5}}},
            "sdar.loss.coef_schedule: schedule 'hand_off' has window=10.5: input should be a valid integer",
        ),
    ],
)
def test_what_takes_away_what_another_reads_is_told(loss: dict[str, Any], told: str) -> None:
    (fault,) = faults(loss)
    assert told in fault


def test_a_divisor_may_be_all_that_reads_the_gap() -> None:
    contrast = {"sources": ["skills"], "contrast": {"sources": ["skills"], "control": "shuffled"}}
    loss = {"gate": "none", "objective": "k1"}
    assert faults({**loss, "divide_by": "gap_bearing"}, context=contrast) == []
    (fault,) = faults(loss, context=contrast)
    assert "changes the gap, which sdar.loss.gate=none does not read" in fault


def test_tokens_taken_out_of_turns_leave_no_turn_to_look_at() -> None:
    rejects = {"algorithm": {"rollout_correction": {"rollout_rs": "token_k1"}}}
    found = {
        option: faults(loss, rejects)
        for option, loss in {
            "signal=advantage_distance": {"signal": "advantage_distance", "coef": 0.5},
            "gate=calibrated": {"gate": "calibrated"},
            "granularity=turn": {"granularity": "turn"},
            "coef_schedule.name=hand_off": {"coef_schedule": {"name": "hand_off"}},
        }.items()
    }
    for option, (fault,) in found.items():
        assert f"takes tokens out of the middle of turns, and sdar.loss.{option} looks at whole turns" in fault
        assert "reject sequences" in fault
    assert faults({}, rejects) == []
    assert faults({"granularity": "turn"}, {"algorithm": {"rollout_correction": {"rollout_rs": "seq_mean_k1"}}}) == []


def test_schedules_of_the_gap_are_for_any_signal_and_those_of_the_gradient_for_lambda() -> None:
    hand_off = {"name": "hand_off", "options": {}}
    assert faults({"signal": "advantage_weight", "coef": 0.5, "coef_schedule": hand_off, "rl_schedule": hand_off}) == []
    assert needs_step_statistics(load_config({"loss": {"coef_schedule": hand_off}}).loss) == [
        "sdar.loss.coef_schedule.name=hand_off"
    ]
    (fault,) = faults({"rl_schedule": {"name": "grad_share", "options": {"share": 0.1}}})
    assert "follows sdar/grad_share, which lambda moves and the policy gradient's weight does not" in fault


def test_a_gate_that_reads_the_advantages_needs_a_signal_that_leaves_them_alone() -> None:
    assert faults({"gate": "calibrated"}) == []
    (fault,) = faults({"gate": "calibrated", "signal": "advantage_shaping"})
    assert fault.startswith("sdar.loss.gate=calibrated reads the advantages, which sdar.loss.signal=advantage_shaping")


def test_an_importance_weight_is_for_objectives_that_have_none() -> None:
    assert faults({"importance_clip": 2.0}) == []
    assert (
        faults({"importance_clip": 2.0, "gate": "none", "objective": "k3", "objective_options": {"importance": False}})
        == []
    )
    for objective in ("k1", "k3"):
        (fault,) = faults({"importance_clip": 2.0, "gate": "none", "objective": objective})
        assert fault.startswith("sdar.loss.importance_clip=2.0") and f"sdar.loss.objective={objective} does so" in fault
    (unread,) = faults({"importance_clip": 2.0, "signal": "advantage_weight", "coef": 0.5})
    assert unread.startswith("sdar.loss.importance_clip=2.0 has no effect with sdar.loss.signal=advantage_weight")
