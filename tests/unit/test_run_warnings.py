"""Each warning has a run that provokes it, and a sound run provokes none."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest

from sdar_verl.config import load_config
from sdar_verl.observe.warnings import COLLAPSE_STEPS, FLAT_STEPS, RunWarnings
from sdar_verl.report.distributions import Tokens, token_distributions
from sdar_verl.rollout.rows import RowInfo
from tests.support.table import make_table

SOUND = {
    "sdar/success": 0.5,
    "sdar/episodes": 32,
    "sdar/groups": 4,
    "sdar/groups_without_variance": 1,
    "sdar/context_share": 1.0,
}


class Run:
    """Steps of a run that never trained: metrics and gaps go in, warnings come out."""

    def __init__(self, tmp_path, **node):
        self.settings = load_config({"validation": {"arms": ARMS}, **node})
        self.record = SimpleNamespace(folder=tmp_path, latest={})
        self.said: list[str] = []
        self.part = RunWarnings(self.settings, self.record, self.said.append)
        self.step = 0

    def play(self, gaps=None, beta=5.0, kl=None, infos=(), **metrics) -> dict:
        """One step of 8 turns with 100 tokens each; ``gaps`` (8, 100) or one number per turn."""
        self.step += 1
        drawn = np.random.default_rng(self.step).normal(-0.05, 0.5, (8, 100))
        gap = drawn if gaps is None else np.broadcast_to(np.asarray(gaps, float).reshape(8, -1), (8, 100))
        turn, position = np.indices((8, 100))
        tokens = Tokens(
            gap=gap.ravel(),
            gate=1 / (1 + np.exp(-beta * gap.ravel())),
            turn=turn.ravel(),
            position=position.ravel(),
            kl=None if kl is None else np.repeat(np.asarray(kl, float), 100),
        )
        self.record.latest = token_distributions(tokens, 100)
        seen = {**SOUND, **metrics}
        counts = self.look(seen, infos)
        return {name.removeprefix("sdar/warnings/"): count for name, count in counts.items()}

    def look(self, metrics: dict, infos=()) -> dict:
        """What the part says of a step with these metrics and rows."""
        table = make_table([f"u_{i}_0" for i in range(len(infos))], infos, step=self.step)
        return dict(self.part.after_updates(table, metrics))


ARMS = {
    "student": {"context": "none", "temperature": 0.4},
    "teacher": {"context": "skills", "temperature": 0.4},
    "teacher_hot": {"context": "skills", "temperature": 1.0},
}


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path)


def test_a_sound_run_warns_of_nothing(run):
    for _ in range(12):
        assert run.play() == {}
    assert run.said == []


def test_a_warning_is_told_once_and_counted_from_then_on(run):
    counts = [run.play(**{"sdar/context_share": 0.2}) for _ in range(3)]
    assert counts == [{"no_context": 1}, {"no_context": 2}, {"no_context": 3}]
    assert len(run.said) == 1 and "sdar.skills.retrieval" in run.said[0]
    assert run.play() == {"no_context": 3}
    assert (run.record.folder / "warnings.jsonl").read_text().count("\n") == 1


def test_a_step_on_which_the_teacher_sees_nothing_at_all(run):
    run.record.latest = {"reward": {}}  # no distilled token, no distribution
    assert run.look({**SOUND, "sdar/context_share": 0.0}) == {"sdar/warnings/no_context": 1}
    retired = {**SOUND, "sdar/context_share": 0.0, "sdar/lambda": 0.0}
    assert run.look({name: value for name, value in retired.items() if name != "sdar/gap_mean"}) == {
        "sdar/warnings/no_context": 1
    }, "a teacher that has retired is not missed"
    assert "sdar/context_empty_share" in run.said[0]


@pytest.mark.parametrize("norm", [float("nan"), float("inf")])
def test_an_update_that_verl_left_out(run, norm):
    assert run.play(**{"actor/grad_norm": norm}) == {"update_skipped": 1}
    assert "actor_rollout_ref.actor.optim.lr" in run.said[0]
    assert run.play(**{"actor/grad_norm": 3.0}) == {"update_skipped": 1}


def test_gaps_that_are_all_zero(run):
    assert run.play(gaps=np.zeros(8)) == {"zero_gap": 1}


def test_a_zero_gap_on_most_tokens_alone_is_no_zero_gap(run):
    gaps = np.zeros((8, 100))
    gaps[:, 0] = 3.0
    assert "zero_gap" not in run.play(gaps=gaps)


def test_a_gate_stuck_at_one_half(run):
    assert run.play(gaps=np.full(8, 1e-3)) == {"gate_at_half": 1}


def test_a_gate_of_one_half_that_was_asked_for(tmp_path):
    assert Run(tmp_path, loss={"gate": "half"}).play(gaps=np.full(8, 1e-3)) == {}
    without = Run(tmp_path / "signal", loss={"signal": "advantage_weight", "coef": 0.5})
    assert without.play(gaps=np.full(8, 1e-3)) == {}, "a signal that reads no gate"


def test_groups_without_reward_variance_over_several_steps(run):
    flat = {"sdar/groups_without_variance": 4}
    assert [run.play(**flat) for _ in range(FLAT_STEPS - 1)] == [{}] * (FLAT_STEPS - 1)
    assert run.play(**flat) == {"flat_rewards": 1}


def test_a_gap_that_grows_from_turn_to_turn(run):
    assert run.play(gaps=np.linspace(-0.2, -2.5, 8)) == {"gap_grows": 1}


def test_a_large_gap_that_does_not_grow(run):
    assert run.play(gaps=np.full(8, -1.5)) == {}


def test_turns_with_few_tokens_say_nothing(run):
    tokens = Tokens(np.linspace(0, -3, 30), np.full(30, 0.3), np.repeat(np.arange(3), 10), np.tile(np.arange(10), 3))
    run.record.latest = token_distributions(tokens, 10)
    assert run.look(SOUND) == {}


def test_a_server_that_drifts_away_from_the_trainer(run):
    assert run.play(**{"sdar/server_check/trainer": 0.049}) == {}
    assert run.play(**{"sdar/server_check/trainer": 0.051}) == {"engines_apart": 1}
    assert "0.051 nats" in run.said[0] and "placement=colocated" in run.said[0]


def test_a_drift_within_the_stated_tolerance(tmp_path):
    assert Run(tmp_path, teacher={"sanity_tolerance": 0.1}).play(**{"sdar/server_check/trainer": 0.09}) == {}


def test_a_server_that_leaves_requests_unanswered(run):
    assert run.play(**{"sdar/teacher_failed_share": 0.01}) == {}
    assert run.play(**{"sdar/teacher_failed_share": 0.02}) == {"teacher_unanswered": 1}


def test_episodes_that_a_step_goes_on_without(run):
    """Of 32: a crashed one left no row, a failed one a masked row."""
    assert run.play(**{"sdar/failed_episodes": 1}) == {}
    assert run.play(**{"sdar/failed_episodes": 2}) == {"episodes_lost": 1}
    assert run.play(**{"sdar/episodes": 31, "sdar/crashed_episodes": 1, "sdar/failed_episodes": 0}) == {
        "episodes_lost": 1
    }
    assert run.play(**{"sdar/episodes": 16, "sdar/crashed_episodes": 16}) == {"episodes_lost": 2}
    assert "2 of 32 episodes" in run.said[0]


def test_a_kl_that_grows_from_turn_to_turn(run):
    assert run.play(kl=np.linspace(0.01, 1.5, 8)) == {"kl_grows": 1}


def test_a_success_that_collapses(run):
    for _ in range(COLLAPSE_STEPS):
        assert run.play() == {}
    counts = [run.play(**{"sdar/success": 0.0}) for _ in range(COLLAPSE_STEPS)]
    assert counts[-1]["collapse"] >= 1 and "optim.lr" in run.said[0]


def test_a_fall_within_noise_is_no_collapse(run):
    few = {"sdar/episodes": 2}
    for _ in range(COLLAPSE_STEPS):
        run.play(**few)
    assert [run.play(**few, **{"sdar/success": 0.2}) for _ in range(COLLAPSE_STEPS)][-1] == {}


def outcomes(student: list[float], teacher: list[float]) -> dict:
    tasks = [f"t{i}" for i in range(len(student))]
    return {
        "arm": ["student"] * len(tasks) + ["teacher"] * len(tasks),
        "task_id": tasks * 2,
        "acc": student + teacher,
    }


def test_a_teacher_below_its_student_on_its_own_context(run):
    run.part.after_validation(0, {}, outcomes([1.0] * 20 + [0.0] * 20, [0.0] * 30 + [0.0] * 10))
    assert len(run.said) == 1 and "teacher_worse" in run.said[0] and "0.500 less" in run.said[0]


@pytest.mark.parametrize("teacher", [[1.0] * 40, [1.0] * 19 + [0.0] * 21])
def test_a_teacher_that_is_better_or_worse_by_chance(run, teacher):
    run.part.after_validation(0, {}, outcomes([1.0] * 20 + [0.0] * 20, teacher))
    assert run.said == []


SOLVED, LOST = [1.0] * 36 + [0.0] * 4, [1.0] * 20 + [0.0] * 20


def test_a_teacher_that_falls_with_the_policy(run, tmp_path):
    run.part.after_validation(0, {}, outcomes(LOST, LOST))
    run.part.after_validation(10, {}, outcomes(LOST, SOLVED))
    assert run.said == []
    resumed = Run(tmp_path)
    resumed.part.load_state_dict(json.loads(json.dumps(run.part.state_dict())))
    for step in (20, 30):
        resumed.part.after_validation(step, {}, outcomes(LOST, LOST))
    assert len(resumed.said) == 1 and "teacher_falls" in resumed.said[0]
    assert "0.500 of the panel, and 0.900 at step 10 (arm teacher" in resumed.said[0]
    assert resumed.play() == {"teacher_falls": 2}


@pytest.mark.parametrize(("source", "coef"), [("reference", 1.0), ("lora_base", 1.0), ("none", 0.0), ("actor", 0.0)])
def test_a_teacher_that_holds_still_or_teaches_nothing_does_not_fall_with_the_policy(tmp_path, source, coef):
    run = Run(tmp_path, teacher={"source": source}, loss={"coef": coef})
    for step, teacher in enumerate((SOLVED, LOST)):
        run.part.after_validation(step, {}, outcomes(LOST, teacher))
    assert run.said == [] and run.part.state_dict() == {}


def test_a_fall_of_the_teacher_within_noise(run):
    for step, teacher in enumerate((SOLVED, SOLVED[4:] + [0.0] * 4)):
        run.part.after_validation(step, {}, outcomes(LOST, teacher))
    assert run.said == []


def test_counts_and_memory_come_back_on_resume(run, tmp_path):
    for _ in range(COLLAPSE_STEPS):
        run.play(**{"sdar/context_share": 0.1})
    resumed = Run(tmp_path)
    resumed.part.load_state_dict(run.part.state_dict())
    counts = [resumed.play(**{"sdar/success": 0.0}) for _ in range(COLLAPSE_STEPS)][-1]
    assert counts["no_context"] == COLLAPSE_STEPS and counts["collapse"] >= 1
    assert not any("no_context" in text for text in resumed.said)


def test_answers_without_an_action_are_told_with_the_reasons(run):
    errors = ["no action block"] * 18 + ["think block not closed"] * 1 + [None]
    infos = [RowInfo(turn=0, task_type="", unparsed=error is not None, parse_error=error) for error in errors]
    assert run.play(infos=[*infos, None], **{"sdar/unparsed_share": 0.95}) == {"unparsed": 1}
    assert "95% of the answers of this step hold no action" in run.said[0]
    assert "'no action block' 18 times, 'think block not closed' 1 times" in run.said[0]
    assert run.play(infos=infos, **{"sdar/unparsed_share": 0.89}) == {"unparsed": 1}
