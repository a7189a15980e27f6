"""What the trainer's side of the teacher pass guarantees, without workers."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from sdar_verl.config import TeacherConfig
from sdar_verl.errors import NonFiniteError, TeacherError
from sdar_verl.fields import (
    SUPPORT_IDS,
    TEACHER_LOG_PROBS,
    TEACHER_MASK,
    TEACHER_MESH,
    TEACHER_PROMPTS,
    contrast_pass,
    log_probs_of,
    prompts_of,
)
from sdar_verl.finite import check_teacher
from sdar_verl.requests import SCORING_PASS, HeadRequest, ScoringPass, StepRequests
from sdar_verl.rollout.rows import RowInfo
from sdar_verl.table import StepTable
from sdar_verl.teacher.rows import deal, scored_rows, stop_without_contexts, teacher_row
from sdar_verl.verl.teacher import PrivilegedTeacher, check_not_lost
from tests.support.fuzzing import quick
from tests.support.table import make_table, stored

VOCABULARY = 1000
CHANCE = -math.log(VOCABULARY)


def teacher(
    step: int = 1,
    adapter: str | None = None,
    precision: str | None = None,
    requests: StepRequests | None = None,
    **settings: Any,
) -> PrivilegedTeacher:
    fsdp = {"mixed_precision": precision and {"param_dtype": precision}}
    config = OmegaConf.create(
        {
            "actor_rollout_ref": {
                "model": {"lora_adapter_path": adapter},
                "actor": {"fsdp_config": fsdp},
                "rollout": {"temperature": 0.8},
            }
        }
    )
    trainer = SimpleNamespace(
        global_steps=step, config=config, tokenizer=range(VOCABULARY), bypasses=False, actor_rollout_wg=None
    )
    return PrivilegedTeacher(TeacherConfig(**settings), requests or StepRequests(), trainer)


@pytest.mark.parametrize("mean", [CHANCE, 1.3 * CHANCE, 0.99 * CHANCE, float("nan")])
def test_a_teacher_that_knows_nothing_stops_the_run(mean):
    with pytest.raises(TeacherError, match=r"weights are lost.*sdar\.teacher\.path"):
        check_not_lost(mean, -0.3, VOCABULARY)


@pytest.mark.parametrize(("mean", "student"), [(-0.5, -0.3), (0.9 * CHANCE, -0.3), (CHANCE, CHANCE)])
def test_a_teacher_that_knows_something_or_as_little_as_its_student_does_not(mean, student):
    check_not_lost(mean, student, VOCABULARY)


@pytest.mark.parametrize(
    ("expected", "arguments"),
    [
        (True, {"source": "actor", "step": 50}),
        (True, {"source": "actor_fresh", "step": 50}),
        (True, {"source": "ema"}),
        (True, {"source": "snapshot", "adapter": "some/adapter"}),
        (True, {"source": "reference"}),
        (True, {"source": "lora_base"}),
        (False, {"source": "ema", "step": 2}),
        (False, {"source": "reference", "step": 50}),
        (False, {"source": "reference", "path": "another/model"}),
        (False, {"source": "lora_base", "adapter": "some/adapter"}),
    ],
)
def test_the_empty_context_is_checked_where_the_weights_are_the_students(expected, arguments):
    assert teacher(**arguments).equals_student is expected


def test_the_tolerance_is_stated_or_the_default_of_engine_and_precision():
    assert teacher(source="actor", precision="fp32").tolerance == 1e-3
    assert teacher(source="actor", precision="bf16").tolerance == 0.05
    assert teacher(source="actor").tolerance == 0.05, "verl's default is bf16"
    assert teacher(source="reference", precision="fp32").tolerance == 0.05
    assert teacher(source="actor", precision="fp32", placement="rollout_server").tolerance == 0.05
    assert teacher(source="reference", sanity_tolerance=0.5).tolerance == 0.5


def test_a_teachers_row_is_its_prompt_and_the_sampled_ids():
    row = teacher_row(torch.tensor([5, 5, 1], dtype=torch.int32), torch.tensor([7, 8]), torch.tensor([1, 0]))
    assert row["input_ids"].tolist() == [5, 5, 1, 7, 8] and row["input_ids"].dtype == torch.int64
    assert row["position_ids"].tolist() == list(range(5))
    assert row["loss_mask"].tolist() == row["response_mask"].tolist() == [1, 0]


# ---------------------------------------------------------------- the pass


def pass_of(meta: Any) -> ScoringPass:
    return ScoringPass.from_json(meta.extra_info[SCORING_PASS])


class Workers:
    """A group of workers; the log-prob of every token is minus the length of its row's prompt.

    Attributes:
        asked: what each pass was sent.
    """

    def __init__(self, table: StepTable, ranks: int = 1, *, waits: bool = True) -> None:
        self.table = table
        self.waits = waits
        self.asked: list[Any] = []
        self.anchored: list[Any] = []
        # Two in each rank's group.
        self._dispatch_info = {TEACHER_MESH: [rank for rank in range(ranks) for _ in range(2)]}
        self._query_dispatch_info = lambda mesh: self._dispatch_info[mesh]

    def compute_teacher_log_prob(self, meta: Any) -> Any:
        self.asked.append(meta)
        rows = stored(self.table)
        prompts = rows["prompts" if pass_of(meta) == ScoringPass.empty_context() else TEACHER_PROMPTS]
        values = [-len(prompt) * torch.ones(len(row)) for prompt, row in zip(prompts, rows["responses"], strict=True)]
        column = pass_of(meta).writes[TEACHER_LOG_PROBS]
        rows[column] = values
        done = Done(fields=[column], keys=meta.keys)
        return done if self.waits else SimpleNamespace(futures=[done])

    def compute_anchor(self, meta: Any) -> Any:
        self.anchored.append(meta)
        return Done(fields=[], keys=meta.keys)


class Done(SimpleNamespace):
    """verl's description of rows: some of its attributes."""

    def __len__(self) -> int:
        return len(self.keys)

    @classmethod
    def concat(cls, parts: list[Done]) -> Done:
        return parts[0]


def step(prompts: list[int], *, fields: list[str] | None = None) -> StepTable:
    """Rows with one, two, ... sampled tokens; ``prompts`` are the lengths of the teacher's, 0 where it has no say."""
    count = len(prompts)
    columns = {
        "prompts": [torch.arange(2) for _ in prompts],
        "responses": [torch.arange(i + 1) for i in range(count)],
        "response_mask": [torch.ones(i + 1, dtype=torch.long) for i in range(count)],
        "old_log_probs": [-2.0 * torch.ones(i + 1) for i in range(count)],
        TEACHER_PROMPTS: [torch.arange(length) for length in prompts],
    }
    infos = [RowInfo(turn=0, task_type="t", teacher_prompt_tokens=length or None) for length in prompts]
    tags = [{"response_len": i + 1} for i in range(count)]
    return make_table([f"u_{i}_0" for i in range(count)], infos, columns, tags=tags, fields=fields)


def test_the_pass_is_asked_for_with_the_teachers_prompts():
    one, table = teacher(source="actor", sanity_check=False), step([4, 0], fields=["prompts", "responses"])
    one._trainer.actor_rollout_wg = workers = Workers(table)
    one.begin(table)
    assert workers.asked == [], "the actor's devices are busy with the student"
    assert one.score(table) == {}
    (meta,) = workers.asked
    assert meta.fields == [TEACHER_PROMPTS, "responses", "response_mask"]
    assert meta.extra_info.keys() == {"temperature", SCORING_PASS} and meta.extra_info["temperature"] == 0.8
    assert pass_of(meta) == ScoringPass()
    table.read([TEACHER_LOG_PROBS])
    assert one.verify(table) == {"sdar/teacher_log_prob": -4.0, "sdar/teacher_staleness": 0.0}


def test_an_anchor_is_one_pass_of_the_reference_over_the_students_prompts():
    anchor = ScoringPass.anchor(HeadRequest("on_support", True, 4, 5), reads=(SUPPORT_IDS,))
    requests = StepRequests(teacher=ScoringPass(HeadRequest("top_k", True, 4, 5)), anchor=anchor)
    one, table = teacher(source="actor", sanity_check=False, requests=requests), step([4, 0])
    one._trainer.actor_rollout_wg = workers = Workers(table)
    one.score(table)
    (meta,) = workers.anchored
    assert meta.fields == ["prompts", "responses", TEACHER_MASK, SUPPORT_IDS]
    assert pass_of(meta) == anchor
    assert meta.keys == table.rows.keys
    untaught = step([0, 0])
    one._trainer.actor_rollout_wg = workers = Workers(untaught)
    one.score(untaught)
    assert workers.anchored == [], "on a step on which no row has a teacher there is nothing to draw"


@pytest.mark.parametrize("placement", ["colocated", "pool"])
def test_each_text_of_a_bad_context_is_a_pass_over_the_rows_that_have_it(placement, monkeypatch):
    monkeypatch.setattr("ray.get", lambda futures: futures)
    settings = {"source": "reference", "placement": "pool", "pool_gpus_per_node": 1} if placement == "pool" else {}
    one, table = teacher(**{"source": "actor", "sanity_check": False, **settings}), step([4, 5, 0, 3])
    for info, texts in zip(table.infos, (2, 1, 0, 1), strict=True):
        assert info is not None
        info.contrast_prompt_ids = tuple(np.ones(6 + number, dtype=np.int32) for number in range(texts))
    workers = Workers(table, ranks=2, waits=placement == "colocated")
    if placement == "pool":
        one.pool = workers
    one._trainer.actor_rollout_wg = workers
    one.begin(table)
    one.score(table)
    first, *others = workers.asked
    assert first.fields[0] == TEACHER_PROMPTS and pass_of(first) == ScoringPass()
    assert [meta.fields[0] for meta in others] == [prompts_of(contrast_pass(0)), prompts_of(contrast_pass(1))]
    assert [pass_of(meta).writes for meta in others] == [
        {TEACHER_LOG_PROBS: log_probs_of(contrast_pass(number))} for number in range(2)
    ]
    # Two ranks get as many rows with a text each: the second text's one row has another beside it, for the other rank.
    halves = [others[0].keys[:2], others[0].keys[2:]]
    with_text = {"u_0_0", "u_1_0", "u_3_0"}
    assert sorted(len(with_text & {*half}) for half in halves) == [1, 2]


def test_a_pool_scores_while_the_student_is_scored(monkeypatch):
    monkeypatch.setattr("ray.get", lambda futures: futures)
    one, table = teacher(source="reference", placement="pool", pool_gpus_per_node=1), step([4, 0])
    one.pool = workers = Workers(table, waits=False)
    one.begin(table)
    assert len(workers.asked) == 1
    assert one.score(table) == {"sdar/empty_context_gap": 0.0}  # on the student's prompts: minus their lengths
    assert [meta.fields[0] for meta in workers.asked] == [TEACHER_PROMPTS, "prompts"], "nothing is asked twice"
    assert workers.asked[1].fields == ["prompts", "responses", "response_mask"]
    table.read([TEACHER_LOG_PROBS])
    assert one.verify(table)["sdar/teacher_log_prob"] == -4.0
    one.begin(table)
    assert one.score(table) == {}, "the context is checked once"
    assert len(workers.asked) == 3, "what was begun is what counts"


def test_a_pass_that_reads_the_students_numbers_cannot_start_before_them(monkeypatch):
    monkeypatch.setattr("ray.get", lambda futures: futures)
    requests = StepRequests(teacher=ScoringPass(HeadRequest("on_support", True, 4, 2), reads=(SUPPORT_IDS,)))
    one = teacher(requests=requests, source="reference", placement="pool", pool_gpus_per_node=1, sanity_check=False)
    table = step([4, 0])
    one.pool = workers = Workers(table, waits=False)
    one.begin(table)
    assert workers.asked == []
    one.score(table)
    assert workers.asked[0].fields == [TEACHER_PROMPTS, "responses", "response_mask", SUPPORT_IDS]


def test_a_teacher_that_is_not_the_student_without_a_context_stops_the_first_step():
    one, table = teacher(source="actor"), step([4, 3])
    stored(table)["old_log_probs"][1][1] = -3.0
    one._trainer.actor_rollout_wg = Workers(table)
    with pytest.raises(TeacherError, match=r"differs by 0\.333 nats .*\(largest 1\); sdar\.teacher\.sanity_tolerance"):
        one.score(table)


def test_under_bypass_there_is_nothing_to_compare_the_empty_context_with():
    one, table = teacher(source="actor"), step([4, 3])
    one._trainer.actor_rollout_wg, one._trainer.bypasses = Workers(table), True
    assert one.score(table) == {}


@pytest.mark.parametrize("settings", [{"source": "actor_fresh"}, {"source": "actor", "placement": "rollout_server"}])
def test_a_teacher_that_is_scored_elsewhere_is_not_asked(settings):
    one, table = teacher(**settings, sanity_check=False), step([4, 3])
    one._trainer.actor_rollout_wg = workers = Workers(table)
    one.begin(table)
    assert one.score(table) == {} and workers.asked == []


def test_rows_that_went_missing_are_a_fault_of_the_engine():
    one, table = teacher(source="actor", sanity_check=False), step([4, 3])
    one._trainer.actor_rollout_wg = workers = Workers(table)
    workers.compute_teacher_log_prob = lambda meta: Done(keys=meta.keys[:1], fields=[])
    with pytest.raises(TeacherError, match="returned 1 rows for 2"):
        one.score(table)


def test_a_teacher_that_says_nan_is_left_out_before_it_is_looked_at():
    table = step([4, 3])
    stored(table)[TEACHER_LOG_PROBS] = [torch.tensor([float("nan")]), torch.tensor([-1.0, -2.0])]
    table.read([TEACHER_LOG_PROBS])
    with pytest.raises(NonFiniteError):
        check_teacher(table, "error")
    check_teacher(table, "drop")
    assert teacher(source="actor").verify(table)["sdar/teacher_log_prob"] == -1.5


# ---------------------------------------------------------------- who scores which rows

LENGTHS = st.integers(1, 4).flatmap(
    lambda ranks: st.tuples(
        st.just(ranks),
        st.integers(1, 8).flatmap(
            lambda share: st.lists(
                st.one_of(st.just(0), st.integers(1, 400)), min_size=share * ranks, max_size=share * ranks
            )
        ),
    )
)


@quick(100)
@given(LENGTHS)
def test_every_rank_scores_as_many_rows_and_no_row_is_lost(drawn):
    ranks, lengths = drawn
    scored = scored_rows(lengths, ranks)
    assert len(scored) % ranks == 0 and len(set(scored)) == len(scored)
    assert {row for row, length in enumerate(lengths) if length} <= set(scored)
    if not scored:
        return
    balanced = [list(range(len(scored)))[rank::ranks] for rank in range(ranks)]
    order = deal(lengths, ranks, balanced)
    assert sorted(order) == list(range(len(lengths)))
    share = len(lengths) // ranks
    mine = [order[rank * share : (rank + 1) * share] for rank in range(ranks)]
    for rank, rows in enumerate(mine):
        assert [row for row in rows if row in set(scored)] == [scored[place] for place in balanced[rank]]


@quick(60)
@given(st.lists(st.integers(0, 400), min_size=1, max_size=6).map(lambda prompts: prompts * 4))
def test_the_ranks_tokens_are_balanced(prompts):
    """The rows come in a row, as those of an episode do; dealt out in that order, one rank could get all long ones."""
    prompts, ranks = sorted(prompts, reverse=True), 4
    one, table = teacher(source="actor", sanity_check=False), step(prompts)
    one._trainer.actor_rollout_wg = workers = Workers(table, ranks)
    one.score(table)
    lengths = [
        length and length + tag["response_len"] for length, tag in zip(prompts, table.rows.batch.tags, strict=True)
    ]
    (meta,) = workers.asked
    order = [table.rows.keys.index(key) for key in meta.keys]
    assert [table.rows.batch.tags[row] for row in order] == meta.tags
    assert sorted(order) == list(range(len(prompts)))
    share = len(prompts) // ranks
    dealt = [[lengths[row] for row in order[rank * share : (rank + 1) * share]] for rank in range(ranks)]
    counts = [sum(length > 0 for length in mine) for mine in dealt]
    assert max(counts) <= math.ceil(sum(counts) / ranks), "nobody scores more than its share"
    if any(lengths):
        assert max(map(sum, dealt)) - min(map(sum, dealt)) <= max(lengths)


def test_an_empty_context_is_scored_on_all_rows_in_their_order():
    one, table = teacher(source="actor"), step([300, 0, 0, 4])
    stored(table)["old_log_probs"] = [-2.0 * torch.ones(i + 1) for i in range(4)]
    one._trainer.actor_rollout_wg = workers = Workers(table, ranks=2)
    assert one.score(table) == {"sdar/empty_context_gap": 0.0}
    assert list(workers.asked[0].keys) == list(table.rows.keys)


@pytest.mark.parametrize(("broken", "told"), [((0,), 0.0), ((0, 1, 2, 3), math.nan)])
def test_broken_numbers_of_the_student_are_not_taken_for_another_teacher(broken, told):
    """The look at the student's numbers comes after, names the rows and may leave them out (``sdar.on_nonfinite``)."""
    one, table = teacher(source="actor"), step([4, 4, 4, 4])
    stored(table)["old_log_probs"] = [(math.nan if i in broken else -2.0) * torch.ones(i + 1) for i in range(4)]
    one._trainer.actor_rollout_wg = Workers(table, ranks=2)
    assert one.score(table)["sdar/empty_context_gap"] == pytest.approx(told, nan_ok=True)


@pytest.mark.parametrize(
    ("info", "at_first", "later"),
    [
        ({}, "no context on any row", "no context on any row"),
        ({"context_empty": True}, "no context on any row", None),
        ({"truncated": True}, "not one teacher prompt of this step fits sdar.teacher.max_prompt_length", None),
        ({"foreign": True}, "verl's own tokenisation makes not one prompt of this step", None),
        ({"context_missing": True}, None, None),
        ({"teacher_prompt_tokens": 2}, None, None),
    ],
)
def test_a_step_without_any_context_is_an_error_when_it_is_the_set_ups_fault(info, at_first, later):
    """A later step may have nothing but tasks that an option leaves without a teacher: that must not kill the run."""
    infos = [RowInfo(turn=0, task_type="t", **info), RowInfo(turn=0, task_type="t", failed=True), None]
    for step, said in ((1, at_first), (2, later)):
        if said is None:
            stop_without_contexts(infos, step)
        else:
            with pytest.raises(TeacherError, match=said):
                stop_without_contexts(infos, step)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", None])
def test_positions_are_those_of_verls_own_function(family):
    """verl binds a model's function to the processor of a family with pictures; a text is the same on every axis."""
    import importlib
    from types import MethodType, SimpleNamespace

    from verl.experimental.agent_loop.agent_loop import AgentLoopWorker

    from sdar_verl.teacher.rows import rope_axes, teacher_row

    processor, inputs = None, {}
    if family is not None:
        modelling = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
        (model,) = (c for n, c in vars(modelling).items() if n.endswith("Model") and hasattr(c, "get_rope_index"))
        processor = SimpleNamespace(config=model.config_class())
        processor.get_rope_index = MethodType(model.get_rope_index, processor)
        inputs = {"mm_token_type_ids": torch.zeros(1, 5)}
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    worker = SimpleNamespace(processor=processor)
    verls = AgentLoopWorker._compute_position_ids(worker, ids, torch.ones_like(ids), inputs)
    row = teacher_row(ids[0, :3], ids[0, 3:], torch.ones(2), axes=rope_axes(processor))
    assert torch.equal(row["position_ids"], verls[0])
