"""Search-QA on a real Ray: waits that overlap, and the recipe through verl's main_ppo on the CPU."""

from __future__ import annotations

import asyncio
import json
import math
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("bm25s")

import ray
import torch

from sdar_verl.cli import main
from sdar_verl.envs.base import Task
from sdar_verl.envs.pool import EnvError, EnvPool, EnvProcessError
from sdar_verl.panels import read_panel
from tests.support.retrieval_server import ScriptedServer, good
from tests.support.tiny_model import make_talkative_model
from tests.support.verl_run import run_main_ppo

pytestmark = pytest.mark.integration

EPISODES = 24


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    # Ray's sockets lie here and their paths must be short.
    with tempfile.TemporaryDirectory(prefix="sdar", ignore_cleanup_errors=True) as folder:
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, _temp_dir=folder)
        yield
        ray.shutdown()


def task(name: str) -> Task:
    return Task("search", name, "one_hop", "Who?", {"answers": ["Orrin"]})


def test_searches_of_all_episodes_of_one_process_wait_at_the_same_time(cluster) -> None:
    """The server answers no search before all have come: one after the other, none would ever be answered."""
    everybody = threading.Barrier(EPISODES)

    def script(number, body):
        everybody.wait(timeout=30)
        return good()

    async def episode(pool: EnvPool, name: str) -> float:
        async with pool.session(task(name)) as session:
            await session.reset()
            assert "Vessaly" in (await session.step(f"search: {name}")).observation
            return (await session.step("answer: orrin")).reward

    async def run(url: str) -> None:
        options = {"retriever": url, "timeout_s": 30, "retries": 0}
        pool = EnvPool("search", options, processes=1, envs_per_process=EPISODES, step_timeout_s=60)
        assert await asyncio.gather(*(episode(pool, f"t{i}") for i in range(EPISODES))) == [1.0] * EPISODES
        assert (pool.stats.failures, pool.stats.timeouts, pool.stats.restarts) == (0, 0, 0)
        pool.close()

    with ScriptedServer(script) as server:
        asyncio.run(run(server.url))
    assert sorted(request["queries"][0] for request in server.requests) == sorted(f"t{i}" for i in range(EPISODES))


def test_a_server_that_dies_costs_the_episode_and_then_stops_the_run(cluster) -> None:
    up = True

    async def run(url: str) -> None:
        nonlocal up
        options = {"retriever": url, "retries": 1, "backoff_s": 0.01}
        pool = EnvPool("search", options, processes=1, envs_per_process=2, step_timeout_s=60)
        async with pool.session(task("t")) as session:
            await session.reset()
            up = False
            with pytest.raises(EnvProcessError, match=r"no answer from the retrieval server in 2 attempts.*503"):
                await session.step("search: x")
            with pytest.raises(EnvError, match=r"no answer from the retrieval server.*serve-retriever"):
                await session.reset()
            up = True
            await session.reset()
            assert "Vessaly" in (await session.step("search: x")).observation
        assert pool.stats.restarts == 0, "the process did nothing wrong"
        pool.close()

    with ScriptedServer(lambda number, body: good() if up else (503, b"", 0)) as server:
        asyncio.run(run(server.url))


@pytest.mark.slow
def test_the_recipe_trains_and_validates_on_the_cpu(tmp_path: Path) -> None:
    data = tmp_path / "data" / "search"
    counts = ("--train", "8", "--validation", "4", "--test", "4")
    assert main(["prepare", "search", "--out", str(data), *counts]) == 0
    tasks = [task for panel in ("train", "validation") for task in read_panel(data / f"{panel}.parquet")]
    phrases = {f"<search>{query}</search>" for task in tasks for query in task.data["searches"]}
    phrases |= {f"<answer>{task.data['answers'][0]}</answer>" for task in tasks}
    model = make_talkative_model(tmp_path / "model", sorted(phrases))

    run = run_main_ppo(
        tmp_path,
        [
            "hardware=cpu",
            f"actor_rollout_ref.model.path={model}",
            "data.train_batch_size=4",
            "data.max_prompt_length=8192",  # of bytes, here
            "data.max_response_length=6",
            "sdar.teacher.max_prompt_length=16384",
            "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=65536",
            "actor_rollout_ref.rollout.n=2",
            "actor_rollout_ref.actor.ppo_mini_batch_size=4",
            "sdar.update.mini_batch_rows=32",
            "sdar.env.envs_per_process=8",
            "trainer.total_training_steps=2",
            "trainer.test_freq=2",
            "trainer.save_freq=-1",
            "trainer.val_before_train=False",
            "trainer.logger=[console,file]",
            "trainer.v1.trainer_mode=sdar_recording",
        ],
        config="sdar_search",
        VERL_USE_EXTERNAL_MODULES="sdar_verl.plugin,tests.support.recording",
        timeout=1200,
        SDAR_RECORD=str(tmp_path),
    )
    for step in (1, 2):
        metrics = run.metrics[step]
        assert (metrics["sdar/episodes"], metrics["sdar/failed_episodes"]) == (8, 0)
        assert 0 < metrics["sdar/invalid_share"] < 1
        assert 1 < metrics["sdar/turns"] <= 4
        assert metrics["sdar/context_share"] == 1
        assert 0 < metrics["sdar/gate_mean"] < 1
        assert all(
            math.isfinite(metrics[name]) for name in ("actor/loss", "actor/grad_norm", "sdar/loss", "sdar/gap_mean")
        )
    validation = run.metrics[2]
    assert validation["sdar-val/student/episodes"] == 4
    for task_type in ("one_hop", "two_hop", "three_hop", "comparison"):
        assert validation[f"sdar-val/student/success/{task_type}"] in (0.0, 1.0)
    assert 0 <= validation["sdar-val/student/success_mean_of_types"] <= 1

    # The corpus was really searched, and what was found came back into the next turn's prompt.
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    record = torch.load(tmp_path / "step_1.pt", weights_only=False)
    prompts = [tokenizer.decode(prompt.tolist()) for prompt in record["prompts"]]
    passages = {json.loads(line)["contents"].splitlines()[1] for line in (data / "corpus.jsonl").open()}
    assert any("Now you see: [1]" in prompt for prompt in prompts)
    assert any(passage in prompt for prompt in prompts for passage in passages)
