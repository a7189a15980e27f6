"""The WebShop recipe through verl's main_ppo on the CPU: real Ray, real workers, a tiny policy, a generated shop."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

pytest.importorskip("bm25s")

import torch
from transformers import AutoTokenizer

from sdar_verl.cli import main
from sdar_verl.envs.webshop.store import Catalogue
from sdar_verl.panels import read_panel, write_panel
from tests.support.tiny_model import make_talkative_model
from tests.support.verl_run import run_main_ppo

pytestmark = [pytest.mark.integration, pytest.mark.slow]


def often(action: str, count: int) -> list[str]:
    """The same action ``count`` times, told apart by blanks behind it: as many tokens, so that it is often sampled."""
    return [f"<action>{action}</action>{' ' * blanks}" for blanks in range(count)]


def test_the_recipe_trains_and_validates_on_the_cpu(tmp_path: Path) -> None:
    data = tmp_path / "data" / "webshop"
    assert main(["prepare", "webshop", "--generate", "--out", str(data)]) == 0
    # Coffee only: a policy of a few hundred phrases can buy that.
    for panel, count in (("train", 2), ("test", 2)):
        tasks = [task for task in read_panel(data / f"{panel}.parquet") if task.data["goal"]["query"] == "coffee"]
        write_panel(tasks[:count], data / f"{panel}.parquet", panel)
    shop = Catalogue(data / "catalogue")
    found = [shop[row] for row in shop.search("dark roast ground coffee")[:10]]
    offered = [product.asin.lower() for product in found if product.query == "coffee"]
    phrases = [*often("search[dark roast ground coffee]", 600), *often("click[buy now]", 600)]
    phrases += [phrase for asin in offered for phrase in often(f"click[{asin}]", 60)]
    model = make_talkative_model(tmp_path / "model", phrases)

    run = run_main_ppo(
        tmp_path,
        [
            "hardware=cpu",
            f"actor_rollout_ref.model.path={model}",
            f"data.val_files={data / 'test.parquet'}",
            "data.train_batch_size=2",
            "data.max_prompt_length=12288",  # of bytes, here
            "data.max_response_length=1",  # one action
            "sdar.teacher.max_prompt_length=20480",
            "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=65536",
            "actor_rollout_ref.rollout.n=4",
            "actor_rollout_ref.actor.ppo_mini_batch_size=2",
            "sdar.update.mini_batch_rows=48",
            "sdar.env.max_steps=6",
            "sdar.rollout.seed=0",
            "sdar.env.options.graded_reward=True",
            "trainer.total_training_steps=2",
            "trainer.test_freq=2",
            "trainer.save_freq=-1",
            "trainer.val_before_train=False",
            "trainer.logger=[console,file]",
            "trainer.v1.trainer_mode=sdar_recording",
        ],
        config="sdar_webshop",
        timeout=1200,
        VERL_USE_EXTERNAL_MODULES="sdar_verl.plugin,tests.support.recording",
        SDAR_RECORD=str(tmp_path),
    )
    for step in (1, 2):
        metrics = run.metrics[step]
        assert (metrics["sdar/episodes"], metrics["sdar/failed_episodes"]) == (8, 0)
        assert 0 < metrics["sdar/invalid_share"] < 1
        assert metrics["sdar/context_share"] == 1
        assert 0 <= metrics["sdar/success"] <= metrics["sdar/score"] <= 1
        assert all(
            math.isfinite(metrics[name]) for name in ("actor/loss", "actor/grad_norm", "sdar/loss", "sdar/gap_mean")
        )
    validation = run.metrics[2]
    assert validation["sdar-val/student/episodes"] == 2
    assert 0 <= validation["sdar-val/student/success"] <= validation["sdar-val/student/score"] <= 1

    # What was graded, recorded and rewarded is one number; somebody bought something.
    rows = []
    for step in (1, 2):
        record = torch.load(tmp_path / f"step_{step}.pt", weights_only=False)
        rows += [row for row in zip(record["infos"], record["rm_scores"], record["prompts"], strict=True) if row[0]]
    assert max(info.score for info, _, _ in rows) > 0
    for info, scores, _ in rows:
        assert scores.sum().item() == pytest.approx(10 * info.score, abs=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(model)
    prompts = [tokenizer.decode(prompt.tolist()) for _, _, prompt in rows]
    assert any("The page now: Back to Search [SEP] Page 1 (Total results: " in prompt for prompt in prompts)
    assert any("Price: $" in prompt.split("The page now:")[1] for prompt in prompts)
