"""One local update, in its order; the phases are noted, the looks at broken numbers are the real ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

from sdar_verl.config import SdarConfig
from sdar_verl.errors import NonFiniteError
from sdar_verl.fields import TEACHER_LOG_PROBS, TEACHER_MASK
from sdar_verl.rollout.rows import RowInfo
from sdar_verl.step import LocalUpdate
from sdar_verl.table import StepTable
from sdar_verl.verl.queue import RowColumns
from tests.support.table import StoredRows, make_table

EOS = 7
NAN = float("nan")
ROWS = 3


def verls(name: str, *columns: str) -> Any:
    """A phase that writes columns, and gives another batch back, as some of verl's do."""

    def phase(self: Trainer, batch: str, metrics: dict[str, Any]) -> str:
        self.calls.append(name)
        if columns:
            self.write(*columns)
        return f"{batch}'"

    return phase


class Trainer(LocalUpdate):
    """A trainer whose phases write what workers would.

    Args:
        late: contexts are made by the trainer.
        teacher: there is one.
        broken: column -> row that is written with NaN.
        on_nonfinite: ``error`` or ``drop``.
    """

    last: ClassVar[Trainer]

    def __init__(
        self,
        *,
        late: bool = False,
        teacher: bool = True,
        broken: dict[str, int] | None = None,
        on_nonfinite: str = "error",
        **settings: Any,
    ) -> None:
        Trainer.last = self
        self.calls: list[str] = []
        self.seen: dict[str, Any] = {}
        self.broken = broken or {}
        self.sdar = SdarConfig(on_nonfinite=on_nonfinite)
        self.tokenizer = SimpleNamespace(eos_token_id=EOS)
        self.config = SimpleNamespace(trainer=SimpleNamespace(critic_warmup=settings.pop("critic_warmup", 0)))
        self.global_steps = 1
        self.row_columns = RowColumns()
        self.teacher_columns = [TEACHER_LOG_PROBS] if teacher else []
        self.late_contexts = SimpleNamespace(fill=self.fill) if late else None
        self.teacher = self if teacher else None
        self.taught = teacher
        self.phases: list[str] = []
        for name in ("use_reference_policy", "use_critic"):
            setattr(self, name, settings.get(name, False))
        handles = None if settings.get("colocated_reward_model") else ()
        self.reward_loop_manager = SimpleNamespace(reward_loop_worker_handles=handles)

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        self.phases.append(phase)
        yield

    def write(self, *names: str) -> None:
        columns = {name: torch.zeros(ROWS, 2) for name in names}
        for name in names:
            if name in self.broken:
                columns[name][self.broken[name]] = NAN
        rows: Any = self.table.rows
        rows.stored |= {name: list(values) for name, values in columns.items()}

    # verl's phases

    _compute_reward_colocate = verls("_compute_reward_colocate")
    _balance_batch = verls("_balance_batch")
    _compute_ref_log_prob = verls("_compute_ref_log_prob", "ref_log_prob")
    _compute_values = verls("_compute_values", "values")
    _update_critic = verls("_update_critic")

    # ours

    def finished_episodes(self, size: int, metrics: dict[str, Any]) -> str:
        self.calls.append(f"finished_episodes({size})")
        return "batch"

    def read_table(self, batch: str) -> StepTable:
        self.calls.append("read_table")
        tokens = None if self.late_contexts else 4
        infos = [RowInfo(0, "t", teacher_prompt_tokens=tokens if self.teacher else None) for _ in range(ROWS - 1)]
        columns = {name: [torch.ones(2, dtype=torch.long)] * ROWS for name in ("prompts", "responses", "response_mask")}
        self.table = make_table(["a_0_0", "b_0_0", "p_0_0"], [*infos, None])
        self.table.rows = StoredRows(self.table.rows.keys, {**columns, "rm_scores": [torch.zeros(2)] * ROWS})
        self.table.batch = batch
        return self.table

    def count_crashed(self, table: StepTable, size: int) -> dict[str, float]:
        return {"sdar/crashed_episodes": 0}

    def fill(self, table: StepTable) -> dict[str, float]:
        self.calls.append("fill")
        table.infos[0].teacher_prompt_tokens = 4  # type: ignore[union-attr]
        return {"sdar/writer/asked": 2}

    def first_checks(self, table: StepTable) -> dict[str, float]:
        self.calls.append("first_checks")
        return {"sdar/packing_gap": 0.0}

    def begin(self, table: StepTable) -> None:
        self.calls.append("begin")

    def old_log_probs(self, table: StepTable, metrics: dict[str, Any]) -> None:
        table.batch = verls("old_log_probs", "old_log_probs")(self, table.batch, metrics)

    def score_teacher(self, table: StepTable) -> dict[str, float]:
        self.calls.append("score_teacher")
        self.seen["batch of the teacher"] = table.batch
        self.write(TEACHER_LOG_PROBS)
        table.rows.stored[TEACHER_MASK] = [torch.ones(2, dtype=torch.long)] * ROWS  # type: ignore[attr-defined]
        return {"sdar/empty_context_gap": 0.0}

    def verify(self, table: StepTable) -> dict[str, float]:
        self.calls.append("verify")
        self.seen["verified"] = table.mask.any(1).tolist()
        return {"sdar/teacher_staleness": 0.0}

    def advantages(self, table: StepTable, metrics: dict[str, Any]) -> None:
        self.seen["estimated"] = [info is not None for info in table.infos]
        table.batch = verls("advantages", "advantages")(self, table.batch, metrics)
        table.read(["advantages"])

    def judge(self, table: StepTable) -> dict[str, float]:
        self.calls.append("judge")
        self.seen["judged"] = table.mask.any(1).tolist()
        return {"sdar/lambda": 1.0}

    def update_actor(self, table: StepTable, metrics: dict[str, Any]) -> None:
        table.batch = verls("update_actor")(self, table.batch, metrics)


@pytest.fixture(autouse=True)
def rows_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdar_verl.step.read_table", lambda batch, step, columns: Trainer.last.read_table(batch))


def updated(**settings: Any) -> tuple[Trainer, dict[str, Any], StepTable]:
    run, metrics = Trainer(**settings), {"a": 1}
    return run, metrics, run.local_update(metrics, 16)


def test_the_least_there_is():
    run, metrics, table = updated(teacher=False)
    assert run.calls == [
        "finished_episodes(16)",
        "_balance_batch",
        "read_table",
        "first_checks",
        "old_log_probs",
        "advantages",
        "update_actor",
    ]
    assert run.phases == ["gen", "old_log_prob", "adv", "update_actor"]
    assert metrics["a"] == 1 and metrics["sdar/rows"] == 2 and metrics["sdar/packing_gap"] == 0.0
    assert table is run.table


def test_everything_there_can_be():
    run, metrics, table = updated(late=True, colocated_reward_model=True, use_reference_policy=True, use_critic=True)
    assert run.calls == [
        "finished_episodes(16)",
        "_compute_reward_colocate",
        "_balance_batch",
        "read_table",
        "fill",
        "first_checks",
        # A teacher on devices of its own scores while the actor's devices do what follows.
        "begin",
        "old_log_probs",
        "_compute_ref_log_prob",
        "_compute_values",
        "score_teacher",
        "verify",
        "advantages",
        "judge",
        "_update_critic",
        "update_actor",
    ]
    assert run.phases == [
        *("gen", "reward", "contexts", "old_log_prob", "ref", "values", "teacher", "adv", "method"),
        *("update_critic", "update_actor"),
    ]
    assert metrics["sdar/context_share"] == 0.5, "rows are counted when late contexts are there"
    assert {"sdar/empty_context_gap", "sdar/teacher_staleness", "sdar/lambda"} <= metrics.keys()
    assert run.seen["batch of the teacher"] == "batch'''''", "that of verl's last phase"
    assert table.batch == "batch''''''''", "every phase got the one before it"


def test_the_actor_waits_for_its_critic():
    run, _, _ = updated(critic_warmup=2, use_critic=True)
    assert run.calls[-1] == "_update_critic"


@pytest.mark.parametrize("column", ["old_log_probs", "ref_log_prob", "values"])
def test_rows_that_broke_are_gone_before_anything_is_computed_from_them(column):
    settings = {"use_reference_policy": True, "use_critic": True, "broken": {column: 0}}
    with pytest.raises(NonFiniteError, match="a_0_0"):
        updated(**settings)
    run, metrics, _ = updated(**settings, on_nonfinite="drop")
    assert metrics["sdar/nonfinite_rows"] == 1 and metrics["sdar/nonfinite_teacher_rows"] == 0
    assert run.seen["estimated"] == [False, True, False]
    assert run.seen["verified"] == run.seen["judged"] == [False, True, False]


def test_a_retired_teacher_is_not_asked_and_the_policy_gradients_weight_still_counts():
    run = Trainer(teacher=False)
    run.taught = True
    run.local_update({}, 4)
    assert "judge" in run.calls and "score_teacher" not in run.calls


def test_a_teacher_that_broke_has_no_say_and_its_row_is_trained():
    with pytest.raises(NonFiniteError, match=r"teacher's log-probs .*b_0_0"):
        updated(broken={TEACHER_LOG_PROBS: 1})
    run, metrics, _ = updated(broken={TEACHER_LOG_PROBS: 1}, on_nonfinite="drop")
    assert metrics["sdar/nonfinite_rows"] == 0 and metrics["sdar/nonfinite_teacher_rows"] == 1
    assert run.seen["estimated"] == [True, True, False]
    assert run.seen["verified"] == run.seen["judged"] == [True, False, False]


def test_advantages_that_broke_are_gone_before_the_method_sees_them():
    run, metrics, _ = updated(broken={"advantages": 0}, on_nonfinite="drop")
    assert metrics["sdar/nonfinite_rows"] == 1
    assert run.seen["verified"] == [True, True, False] and run.seen["judged"] == [False, True, False]
