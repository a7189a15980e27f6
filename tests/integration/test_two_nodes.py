"""A Ray cluster of two nodes, simulated by two raylets: the recipe spreads over it and trains as on one."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest

from tests.support.toy_run import SAME, train
from tests.support.two_nodes import actor_nodes, ray_cluster
from tests.support.verl_run import Run

pytestmark = [pytest.mark.integration, pytest.mark.slow]

METRICS = ("actor/loss", "actor/pg_loss", "actor/grad_norm", "sdar/loss", "sdar/gap_mean", "sdar/success")


OPTIONS = ["sdar.teacher.source=actor", "actor_rollout_ref.rollout.agent.num_workers=2"]


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> tuple[Run, dict[str, list[tuple[str, str]]]]:
    """A run on two nodes, and where its processes were."""
    root = str(Path(__file__).parents[2])
    # Workers of a cluster that runs get their environment from its raylets.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]))
        with ray_cluster(nodes=2) as cluster:
            folder = tmp_path_factory.mktemp("two")
            run = train(
                folder,
                *OPTIONS,
                "trainer.nnodes=2",
                "trainer.n_gpus_per_node=1",
                # Where verl's file tracker writes; the trainer has its environment from the cluster.
                f"+ray_kwargs.ray_init.runtime_env.env_vars.VERL_FILE_LOGGER_PATH={folder / 'metrics.jsonl'}",
                steps=2,
                timeout=560,
                RAY_ADDRESS=cluster.address,
            )
            return run, actor_nodes(cluster.address)


def test_every_kind_of_process_is_on_both_nodes(two):
    _, actors = two
    workers = [node for kind, found in actors.items() if "WorkerDict" in kind for _, node in found]
    nodes = set(workers)
    assert len(workers) == len(nodes) == 2, list(actors)
    # Rollout servers beside their ranks, agent loops, and the environments beside those.
    for kind in ("TransformersServer", "AgentLoopWorkerTQ", "EnvHost"):
        assert {node for _, node in actors[kind]} == nodes, kind


def test_two_nodes_train(two):
    run, _ = two
    for step in (1, 2):
        assert all(math.isfinite(run.metrics[step][name]) for name in METRICS)
        assert run.metrics[step]["sdar/episodes"] == 16
        assert run.metrics[step]["sdar/failed_episodes"] == 0
    assert run.metrics[1]["sdar/empty_context_gap"] <= 1e-6
    checkpoint = run.folder / "checkpoints" / "global_step_2" / "actor"
    assert len(list(checkpoint.glob("model_world_size_2_rank_*.pt"))) == 2


def test_two_nodes_train_as_two_ranks_of_one(two, tmp_path):
    one = train(tmp_path, *OPTIONS, "trainer.n_gpus_per_node=2", steps=2)
    for step in (1, 2):
        for name in METRICS:
            assert two[0].metrics[step][name] == pytest.approx(one.metrics[step][name], **SAME), (step, name)
