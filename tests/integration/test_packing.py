"""The check of packed rows on verl's own engine, without Ray: an attention that mixes them stops the run."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sdar_verl.table import StepTable, nested
from sdar_verl.verl.queue import QueueRows
from tests.support.one_update import ROWS, make_rows
from tests.support.ranks import run_on_ranks
from tests.support.teacher_worker import recipe, worker_config
from tests.support.tiny_model import make_tiny_model

pytestmark = [pytest.mark.integration, pytest.mark.slow]


def packing_gap(root: Path, attention: str) -> float | str:
    """What the check of a run's first step finds on this worker: the difference, or its message."""
    import transfer_queue as tq
    from tensordict import TensorDict
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from verl.utils import tensordict_utils as tu

    from sdar_verl.errors import ConfigError
    from sdar_verl.rollout.rows import RowInfo
    from sdar_verl.verl.packing import check_packing
    from sdar_verl.verl.worker import TeacherWorker

    # Without a mask function of its own, an attention is given none, and sees the packed row as one.
    AttentionInterface.register("leaking", sdpa_attention_forward)
    settings = {"model.use_remove_padding": True, "model.override_config.attn_implementation": attention}
    whole = copy.deepcopy(recipe())
    whole.actor_rollout_ref = worker_config(str(root / "model"), overrides=settings, source="actor")
    worker = TeacherWorker(copy.deepcopy(whole.actor_rollout_ref), "actor")
    worker.init_model()
    prompts, responses = ([row[part] for row in make_rows()] for part in (0, 1))
    positions = [torch.arange(len(p) + len(r)) for p, r in zip(prompts, responses, strict=True)]
    queue: dict[str, Any] = {"train": {"prompts": prompts, "responses": responses, "position_ids": positions}}

    class Group:
        """verl's worker group, of this one worker."""

        world_size = 1

        def compute_log_prob(self, meta: Any) -> None:
            data = TensorDict(queue[meta.partition_id], batch_size=len(meta.keys))
            tu.assign_non_tensor(data, **meta.extra_info)
            queue[meta.partition_id] = {"log_probs": worker.compute_log_prob(data)["log_probs"]}

    def get(keys: list[str], partition_id: str, select_fields: list[str]) -> Any:
        return {name: nested(list(queue[partition_id][name])) for name in select_fields}

    def put(keys: list[str], partition_id: str, fields: Any, tags: Any) -> None:
        queue[partition_id] = {name: nested(list(fields[name].unbind())) for name in fields.keys()}  # noqa: SIM118

    tq.kv_batch_get, tq.kv_batch_put, tq.kv_clear = get, put, lambda keys, partition_id: queue.pop(partition_id)
    batch = SimpleNamespace(keys=[f"row_{i}" for i in range(ROWS)], partition_id="train")
    table = StepTable(1, QueueRows(batch), [], [RowInfo(0, "t")] * ROWS)
    try:
        return check_packing(SimpleNamespace(config=whole, actor_rollout_wg=Group()), table)
    except ConfigError as error:
        return str(error)


def run(rank: int, folder: Path) -> None:
    torch.save({name: packing_gap(folder, name) for name in ("sdpa", "eager", "leaking")}, folder / "gaps.pt")


@pytest.fixture(scope="module")
def gaps(tmp_path_factory) -> dict[str, float | str]:
    """Attention -> difference, or the error's message."""
    folder = tmp_path_factory.mktemp("packing")
    make_tiny_model(folder / "model", scale=4.0)
    run_on_ranks(run, folder, ranks=1)
    return torch.load(folder / "gaps.pt", weights_only=False)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_check_passes_where_packed_rows_are_kept_apart(gaps, attention):
    assert gaps[attention] < 1e-5


def test_the_check_stops_a_run_whose_attention_mixes_packed_rows(gaps):
    told = gaps["leaking"]
    assert isinstance(told, str), f"a difference of {told} nats was let through"
    for word in ("use_remove_padding=True", "attn_implementation=leaking", "flash_attention_2"):
        assert word in told
