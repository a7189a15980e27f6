"""A teacher for each context: mixed with weights, or one that a row's task chooses."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from sdar_verl.config.context import ContextConfig
from sdar_verl.config.loss import LossConfig
from sdar_verl.context.base import ContextRequest
from sdar_verl.context.builder import ContextBuilder, further_passes, is_late
from sdar_verl.context.registry import ContextError
from sdar_verl.envs.base import Task
from sdar_verl.errors import ConfigError, NonFiniteError
from sdar_verl.fields import TEACHER_LOG_PROBS, TEACHER_MASK, contrast_pass, log_probs_of, prompts_of, teacher_pass
from sdar_verl.finite import check_teacher
from sdar_verl.local import start_policy
from sdar_verl.method import Method, Strengths
from sdar_verl.rollout.rows import RowInfo
from sdar_verl.table import StepTable
from sdar_verl.teacher.several import mix, teacher_metrics
from tests.support.checked_recipe import checked_recipe, run_checks
from tests.support.scripted import GOOD, LOST, TASK, WRONG
from tests.support.table import make_table, stored
from tests.unit.test_late_context import GROUP, step  # noqa: F401  the fixture

SHARES = {"skills": 3.0, "sibling": 1.0}
LENGTHS = [3, 2, 4, 2]
IDS = np.ones(4, dtype=np.int32)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(start_policy())


def table_of(**broken: float) -> StepTable:
    """Rows with both teachers, with each one alone, and without any."""
    generator = torch.Generator().manual_seed(0)

    def column() -> list[torch.Tensor]:
        return [-torch.rand(length, generator=generator) for length in LENGTHS]

    names = ("old_log_probs", TEACHER_LOG_PROBS, log_probs_of(teacher_pass(1)))
    columns = {
        "response_mask": [torch.ones(length, dtype=torch.long) for length in LENGTHS],
        "advantages": [torch.ones(length) for length in LENGTHS],
        "rm_scores": [torch.zeros(length) for length in LENGTHS],
        **{name: column() for name in names},
    }
    for name, value in broken.items():
        columns[name][0][1] = value
    infos = [
        RowInfo(0, "a", teacher_prompt_tokens=4, teachers=("skills", "sibling"), other_prompt_ids=(IDS,)),
        RowInfo(0, "a", teacher_prompt_tokens=4, teachers=("sibling",)),
        RowInfo(0, "a", teacher_prompt_tokens=4, teachers=("skills",)),
        RowInfo(0, "a"),
    ]
    table = make_table([f"a_{row}_0" for row in range(4)], infos, columns)
    table.read(list(columns))
    return table


def test_the_mixture_is_the_log_of_the_weighted_mean_probability_and_travels_to_the_workers() -> None:
    table = table_of()
    first, second = (table.columns[name].clone() for name in (TEACHER_LOG_PROBS, log_probs_of(teacher_pass(1))))
    mix(table, SHARES)
    mixed = table.columns[TEACHER_LOG_PROBS]
    for token in range(LENGTHS[0]):
        expected = math.log(0.75 * math.exp(first[0, token]) + 0.25 * math.exp(second[0, token]))
        assert mixed[0, token].item() == pytest.approx(expected, rel=1e-6)
    assert torch.equal(mixed[1:], first[1:]), "a row's only teacher keeps its very digits"
    for row, length in enumerate(LENGTHS):
        assert torch.equal(stored(table)[TEACHER_LOG_PROBS][row], mixed[row, :length])
    settings = LossConfig()
    judged = Method(settings).judge(table, *Strengths(settings).at(1))
    torch.testing.assert_close(judged.gap[0], (mixed - table.columns["old_log_probs"])[0])
    rows = {name: table.columns[name] for name in ("response_mask", "old_log_probs", TEACHER_LOG_PROBS)}
    rows |= {TEACHER_MASK: table.mask.long()}
    terms = Method(settings).terms(table.columns["old_log_probs"], rows, judged.values)
    assert torch.equal(terms.gap, judged.gap)


def test_gap_gate_and_share_of_each_teacher_are_those_of_a_plain_loop() -> None:
    table = table_of()
    own = {("skills", row): table.columns[TEACHER_LOG_PROBS][row].clone() for row in (0, 2)}
    own |= {("sibling", 0): table.columns[log_probs_of(teacher_pass(1))][0].clone()}
    own |= {("sibling", 1): table.columns[TEACHER_LOG_PROBS][1].clone()}
    mix(table, SHARES)
    gate = torch.rand(4, 4, generator=torch.Generator().manual_seed(1))
    found = teacher_metrics(table, gate, SHARES)
    student, tokens = table.columns["old_log_probs"], sum(LENGTHS[:3])
    for name in SHARES:
        gaps, parts, gated = [], [], []
        for row in range(3):
            if (name, row) not in own:
                continue
            for token in range(LENGTHS[row]):
                said = own[name, row][token].item()
                total = sum(
                    SHARES[other] * math.exp(own[other, row][token].item()) for other in SHARES if (other, row) in own
                )
                gaps.append(said - student[row, token].item())
                parts.append(SHARES[name] * math.exp(said) / total)
                gated.append(parts[-1] * gate[row, token].item())
        assert found[f"sdar/teachers/{name}/gap"] == pytest.approx(sum(gaps) / len(gaps), rel=1e-6)
        assert found[f"sdar/teachers/{name}/share"] == pytest.approx(sum(parts) / tokens, rel=1e-6)
        assert found[f"sdar/teachers/{name}/gate"] == pytest.approx(sum(gated) / sum(parts), rel=1e-6)
    assert found["sdar/teachers/skills/share"] + found["sdar/teachers/sibling/share"] == pytest.approx(1.0)


def test_with_a_bad_context_each_gap_is_taken_to_it() -> None:
    table = table_of()
    table.columns[log_probs_of(contrast_pass(0))] = torch.full((4, 4), -0.5)
    for info in table.infos[:3]:
        assert info is not None
        info.contrast_prompt_ids = (IDS,)
    mix(table, SHARES)
    found = teacher_metrics(table, torch.ones(4, 4), SHARES)
    sibling = [*table.columns[log_probs_of(teacher_pass(1))][0, :3], *table.columns[TEACHER_LOG_PROBS][1, :2]]
    expected = sum(value.item() + 0.5 for value in sibling) / 5
    assert found["sdar/teachers/sibling/gap"] == pytest.approx(expected, rel=1e-6)


def test_chosen_teachers_have_their_rows_to_themselves_and_one_teacher_has_no_such_metrics() -> None:
    table = table_of()
    first = table.infos[0]
    assert first is not None
    first.teachers, first.other_prompt_ids = ["skills"], ()  # type: ignore[assignment]  # as the queue may give it
    before = table.columns[TEACHER_LOG_PROBS].clone()
    mix(table, {})
    assert torch.equal(table.columns[TEACHER_LOG_PROBS], before) and log_probs_of(teacher_pass(0)) not in table.columns
    found = teacher_metrics(table, torch.full((4, 4), 0.5), {})
    assert found["sdar/teachers/skills/share"] == pytest.approx(7 / 9)
    assert found["sdar/teachers/sibling/share"] == pytest.approx(2 / 9)
    assert found["sdar/teachers/sibling/gate"] == pytest.approx(0.5)
    for info in table.infos:
        assert info is not None
        info.teachers = ()
    assert teacher_metrics(table, torch.ones(4, 4), {}) == {}


def test_a_broken_number_of_any_teacher_is_told_or_silences_the_row() -> None:
    name = log_probs_of(teacher_pass(1))
    with pytest.raises(NonFiniteError, match="the teacher's log-probs hold NaN or infinity in 1 of 4 rows: a_0_0"):
        check_teacher(table_of(**{name: float("nan")}), "error")
    table = table_of(**{name: float("nan")})
    assert check_teacher(table, "drop") == {"sdar/nonfinite_teacher_rows": 1}
    mix(table, SHARES)
    assert table.columns[TEACHER_LOG_PROBS].isfinite().all() and not table.mask[0].any()
    found = teacher_metrics(table, torch.ones(4, 4), SHARES)
    assert found["sdar/teachers/sibling/share"] == pytest.approx(2 / 6)


# ---------------------------------------------------------------- contexts and prompts


MIXED = {"context__sources": ["skills", "sibling"], "context__teachers": {"weights": [3, 1]}}
BY = {"by": "task_type", "choice": {"pick_and_place_simple": "skills", "heat": "feedback"}}


def test_a_mixed_rows_prompts_are_those_that_each_teacher_alone_has(step) -> None:  # noqa: F811
    rows = step(GROUP, **MIXED)
    alone = {name: step(GROUP, context__sources=[name]) for name in ("skills", "sibling")}
    for key, info in rows.items():
        expected = {name: found[key].teacher_prompt_ids for name, found in alone.items()}
        expected = {name: ids.tolist() for name, ids in expected.items() if ids is not None}
        assert info.teachers == tuple(expected)
        made = [ids.tolist() for ids in (info.teacher_prompt_ids, *info.other_prompt_ids)]
        assert made == list(expected.values()), key
        assert not info.context_missing and info.has_teacher
        assert list(info.further_prompts) == [teacher_pass(1)][: len(made) - 1]


def test_a_teacher_without_a_context_or_room_leaves_the_row_to_the_others(step) -> None:  # noqa: F811
    lone = {("u0", 0): (TASK, [LOST, GOOD]), ("u0", 1): (TASK, [LOST, LOST, WRONG])}
    rows = step(lone, **MIXED)
    assert rows["u0_0_0"].teachers == ("skills",) and rows["u0_0_0"].other_prompt_ids == ()
    assert rows["u0_1_0"].teachers == ("skills", "sibling")
    longest = len(rows["u0_1_0"].other_prompt_ids[0])
    short = step(lone, **MIXED, teacher__max_prompt_length=longest - 1, teacher__on_long_prompt="mask")["u0_1_0"]
    assert short.truncated and (short.teachers, short.other_prompt_ids) == (("skills",), ())
    swapped = {"context__sources": ["sibling", "skills"], "context__teachers": {"weights": [1, 3]}}
    other = step(lone, **swapped, teacher__max_prompt_length=longest - 1, teacher__on_long_prompt="mask")["u0_1_0"]
    assert other.teachers == ("skills",) and np.array_equal(other.teacher_prompt_ids, short.teacher_prompt_ids)


def test_each_teachers_placebo_is_drawn_by_itself(step, tokenizer) -> None:  # noqa: F811
    rows = step(GROUP, **MIXED, context__control="random_text")
    first, second = rows["u0_2_0"].teacher_prompt_ids, rows["u0_2_0"].other_prompt_ids[0]
    slot = next(i for i, pair in enumerate(zip(first, second, strict=False)) if pair[0] != pair[1])
    shared = sum(a == b for a, b in zip(first[slot:], second[slot:], strict=False))
    assert shared < 0.5 * min(len(first), len(second)), "other words, not the same ones cut elsewhere"


def test_mixed_teachers_against_a_bad_context(step) -> None:  # noqa: F811
    bad = {"sources": ["skills"], "control": "shuffled", "options": {}, "texts": 1}
    rows = step(GROUP, **MIXED, context__contrast=bad)
    assert list(rows["u0_2_0"].further_prompts) == [teacher_pass(1), contrast_pass(0)]


def test_a_row_whose_bad_context_does_not_fit_has_no_teacher_at_all(step) -> None:  # noqa: F811
    lost = [LOST, LOST, WRONG]
    episodes = {("u0", 0): (TASK, [LOST, GOOD]), ("u0", 1): (TASK, lost), ("u0", 2): (TASK, lost)}
    bad = {"sources": ["failed_sibling"], "control": "none", "options": {}, "texts": 1}
    settings = {**MIXED, "context__contrast": bad, "teacher__on_long_prompt": "mask"}
    whole = step(episodes, **settings)["u0_1_0"]
    room = len(whole.contrast_prompt_ids[0]) - 1
    assert whole.teachers == ("skills", "sibling") and len(whole.other_prompt_ids[0]) <= room
    info = step(episodes, **settings, teacher__max_prompt_length=room)["u0_1_0"]
    assert (info.teachers, info.other_prompt_ids, info.contrast_prompt_ids) == ((), (), ()) and not info.has_teacher


def test_a_rows_task_chooses_its_teacher(step) -> None:  # noqa: F811
    egg = Task("scripted", "task-2", "heat", "heat some egg", {})
    episodes = {("u0", 0): (TASK, [LOST, GOOD]), ("u1", 0): (egg, [GOOD])}
    rows = step(episodes, context__sources=["skills", "feedback"], context__teachers=BY)
    for source, key in (("skills", "u0_0_0"), ("feedback", "u1_0_0")):
        alone = step(episodes, context__sources=[source])[key]
        assert rows[key].teachers == (source,) and rows[key].further_prompts == {}
        assert np.array_equal(rows[key].teacher_prompt_ids, alone.teacher_prompt_ids)


def test_an_early_choice_is_made_in_the_agent_loop(step) -> None:  # noqa: F811
    settings = {"context__sources": ["skills", "column"], "context__options": {"column": {"path": "solution"}}}
    told = replace(TASK, task_id="task-2", data={"kind": {"is": 1}, "solution": "go on"})
    plain = replace(TASK, data={"kind": {"is": "2"}})
    chosen = {"by": "kind.is", "choice": {"1": "column", "2": "skills"}}
    rows = step({("u0", 0): (plain, [GOOD]), ("u1", 0): (told, [GOOD])}, **settings, context__teachers=chosen)
    assert rows["u0_0_0"].teachers == ("skills",) and rows["u1_0_0"].teachers == ("column",)
    assert rows["u1_0_0"].episode.context == "go on" and "go on" not in rows["u0_0_0"].episode.context


def test_one_teacher_is_as_before(step) -> None:  # noqa: F811
    for info in step(GROUP, context__sources=["skills", "sibling"]).values():
        assert info.teachers == () and info.further_prompts == {}


def test_a_task_without_a_teacher_is_told(tokenizer) -> None:
    settings = ContextConfig(sources=["skills", "feedback"], teachers=BY)
    builder = ContextBuilder(settings, tokenizer)
    assert builder.teachers(TASK) == ("skills",)
    with pytest.raises(ContextError, match=r"no teacher for task_type=cool .*known: heat, pick_and_place_simple"):
        builder.parts(replace(TASK, task_type="cool"))
    by_column = ContextConfig(sources=["skills", "feedback"], teachers={**BY, "by": "extra_info.kind"})
    with pytest.raises(ContextError, match=r"teachers.by=extra_info.kind: task .* \(it has: level\)"):
        ContextBuilder(by_column, tokenizer).early_passages(ContextRequest(replace(TASK, data={"level": 1})))


def test_passes_and_lateness_follow_the_settings() -> None:
    mixed = ContextConfig(sources=["skills", "answer", "sibling"], teachers={"weights": [1, 1, 2]})
    assert further_passes(mixed) == [teacher_pass(1), teacher_pass(2)] and is_late(mixed)
    assert mixed.shares == {"skills": 1, "answer": 1, "sibling": 2}
    early = ContextConfig(sources=["skills", "answer"], teachers=BY)
    assert further_passes(early) == [] and not is_late(early) and early.shares == {}
    both = mixed.model_copy(update={"contrast": mixed.contrast.model_copy(update={"sources": ["feedback"]})})
    assert further_passes(both) == [teacher_pass(1), teacher_pass(2), contrast_pass(0)]
    assert prompts_of(teacher_pass(1)) != prompts_of(contrast_pass(1))


# ---------------------------------------------------------------- told before the start


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return checked_recipe(tmp_path_factory.mktemp("panels"))


SOURCES = {"sdar.context.sources": ["skills", "feedback"]}
CHOICE = {"pick_and_place_simple": "skills", "look_at_obj_in_light": "feedback"}
CASES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "too few weights": (
        {**SOURCES, "sdar.context.teachers.weights": [1.0]},
        ["sdar.context.teachers.weights=[1.0] must have a number per source", "sources=['skills', 'feedback']"],
    ),
    "a weight of nothing": (
        {**SOURCES, "sdar.context.teachers.weights": [1.0, 0.0]},
        ["sdar.context.teachers.weights.1=0.0", "greater than 0"],
    ),
    "one teacher": (
        {"sdar.context.teachers.weights": [1.0]},
        ["sdar.context.teachers needs several sdar.context.sources", "['skills']"],
    ),
    "weights and a choice": (
        {**SOURCES, "sdar.context.teachers.weights": [1.0, 1.0], "sdar.context.teachers.by": "task_type"},
        ["sdar.context.teachers.weights=[1.0, 1.0] mixes", "sdar.context.teachers.by=task_type chooses"],
    ),
    "a choice of nothing": (
        {**SOURCES, "sdar.context.teachers.choice": CHOICE},
        ["sdar.context.teachers.choice=", "has no effect with sdar.context.teachers.by=null"],
    ),
    "nothing to choose from": (
        {**SOURCES, "sdar.context.teachers.by": "task_type"},
        ["sdar.context.teachers.by=task_type needs sdar.context.teachers.choice"],
    ),
    "an unknown teacher": (
        {
            **SOURCES,
            "sdar.context.teachers.by": "task_type",
            "sdar.context.teachers.choice": {**CHOICE, "pick_and_place_simple": "answer"},
        },
        ["sdar.context.teachers.choice.pick_and_place_simple=answer is none of sdar.context.sources"],
    ),
    "a teacher of no row": (
        {
            **SOURCES,
            "sdar.context.teachers.by": "task_type",
            "sdar.context.teachers.choice": {"pick_and_place_simple": "skills"},
        },
        ["feedback would teach no row"],
    ),
    "a task type without a teacher": (
        {
            **SOURCES,
            "sdar.context.teachers.by": "task_type",
            "sdar.context.teachers.choice": {"a": "skills", "b": "feedback"},
        },
        ["data.train_files: sdar.context.teachers.choice has no teacher for task_type=pick_and_place_simple"],
    ),
    "a column that is not there": (
        {
            **SOURCES,
            "sdar.context.teachers.by": "extra_info.kind",
            "sdar.context.teachers.choice": CHOICE,
        },
        ["data.train_files: sdar.context.teachers.by=extra_info.kind", "no such column"],
    ),
    "a mixture of distributions": (
        {**SOURCES, "sdar.context.teachers.weights": [1.0, 1.0], "sdar.loss.objective": "reverse_kl"},
        ["sdar.context.teachers.weights=[1.0, 1.0]", "sdar.loss.objective=reverse_kl"],
    ),
    "a mixture within the update": (
        {**SOURCES, "sdar.context.teachers.weights": [1.0, 1.0], "sdar.teacher.source": "actor_fresh"},
        ["sdar.context.teachers.weights=[1.0, 1.0] needs the teacher's", "sdar.teacher.source=actor_fresh"],
    ),
    "a mixture of the rollout server's": (
        {
            "sdar.context.sources": ["skills", "demonstration"],
            "sdar.context.teachers.weights": [1.0, 1.0],
            "sdar.teacher.placement": "rollout_server",
            "sdar.teacher.source": "actor",
        },
        ["sdar.teacher.placement=rollout_server", "sdar.context.teachers.weights=[1.0, 1.0]"],
    ),
    "teachers without a teacher": (
        {
            **SOURCES,
            "sdar.context.teachers.weights": [1.0, 1.0],
            "sdar.teacher.source": "none",
            "sdar.loss.coef": 0,
        },
        ["sdar.context.teachers.weights=[1.0, 1.0] has no effect with sdar.teacher.source=none"],
    ),
    "a validation arm of a mixture": (
        {
            "sdar.context.sources": ["skills", "demonstration"],
            "sdar.context.teachers.weights": [1.0, 1.0],
            "sdar.validation.arms": {"taught": {"context": "teacher", "temperature": 1.0}},
        },
        ["sdar.validation.arms.taught.context=teacher cannot be shown with sdar.context.teachers.weights=[1.0, 1.0]"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_fault_is_told_with_its_remedy(recipe, case) -> None:
    overrides, told = CASES[case]
    with pytest.raises(ConfigError) as error:
        run_checks(recipe, **overrides)
    for text in told:
        assert text in str(error.value)


@pytest.mark.parametrize(
    "teachers",
    [
        {"weights": [2.0, 1.0]},
        {"by": "task_type", "choice": CHOICE},
    ],
)
def test_what_can_be_done_is_let_through(recipe, teachers) -> None:
    run_checks(recipe, **SOURCES, **{f"sdar.context.teachers.{name}": value for name, value in teachers.items()})
