"""Contexts that somebody writes, through verl's own main_ppo on the CPU: by the policy, and at an endpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from sdar_verl.report.layout import WRITTEN_FILE
from tests.support.chat_server import Reply, chat_server, says
from tests.support.plain import padded
from tests.support.resumed import back_to_step_one, differing
from tests.support.toy_run import SMALL, train
from tests.support.verl_run import Run

pytestmark = [pytest.mark.integration, pytest.mark.slow]


def step_one(run: Run) -> dict:
    return torch.load(run.folder / "step_1.pt", weights_only=False)


def test_seed_has_the_policy_write_of_each_episode_and_a_resume_repeats_it(tmp_path: Path) -> None:
    arguments = ["method=seed", "+sdar.context.options.lesson.form=text", "trainer.save_freq=1"]
    run = train(tmp_path, *arguments, base=SMALL, steps=2, record=True)
    metrics = run.metrics[1]
    # Half a million weights write words, and no JSON: so the lesson is taken as it comes.
    assert metrics["sdar/writer/asked"] > 8 and metrics["sdar/writer/failed"] == 0
    assert metrics["sdar/writer/answered"] == metrics["sdar/writer/asked"] - metrics["sdar/writer/too_long"]
    assert metrics["sdar/writer/tokens"] > 0 and metrics["timing_s/writer"] > 0
    record = step_one(run)
    texts: dict[str, set[str]] = {}
    prompts = {}
    for key, info in zip(record["keys"], record["infos"], strict=True):
        if info is not None and info.teacher_prompt_ids is not None:
            assert info.context_tokens > 0
            prompts[key] = tuple(info.teacher_prompt_ids.tolist())
            if info.episode is not None:
                texts.setdefault(key.rsplit("_", 2)[0], set()).add(info.episode.context)
    assert any(len(found) > 1 for found in texts.values()), "the episodes of a group differ, and so do their lessons"
    assert metrics["sdar/loss"] != 0 and metrics["sdar/lambda"] == 0.01

    # Killed after its first step, it goes on as if never stopped: the policy writes the same again.
    second = run.metrics[2]
    back_to_step_one(tmp_path)
    resumed = train(tmp_path, *arguments, base=SMALL, steps=2, record=True)
    assert set(resumed.metrics) == {2}
    assert differing(second, resumed.metrics[2]) == []


def test_opid_is_written_at_an_endpoint_which_a_resume_does_not_pay_twice(tmp_path: Path) -> None:
    """Disjoint masks, an endpoint that fails at times, and a key that stands nowhere."""

    def script(number: int, prompt: str) -> Reply:
        if number % 7 == 3:
            return Reply("busy", status=503)
        if number % 11 == 5:
            return says("I had rather not answer in JSON.")
        return says(json.dumps({"lesson": "go to the desk", "hints": [{"turn": 2, "hint": "take it"}]}))

    with chat_server(script) as server:
        arguments = [
            "method=opid",
            f"sdar.context.writer.url={server.url}",
            "sdar.context.writer.model=toy",
            "sdar.context.writer.key_variable=TOY_KEY",
            "trainer.save_freq=1",
        ]
        run = train(tmp_path, *arguments, base=SMALL, steps=2, record=True, TOY_KEY="sk-toy-secret")
        asked = len(server.requests)
        metrics = run.metrics[1]
        assert metrics["sdar/writer/asked"] == metrics["sdar/writer/answered"] and metrics["sdar/writer/failed"] == 0
        assert 0 < metrics["sdar/writer/unparsed"] < metrics["sdar/writer/asked"]
        assert all(headers["Authorization"] == "Bearer sk-toy-secret" for headers in server.headers)
        assert "sk-toy-secret" not in run.output
        assert not any("sk-toy-secret" in file.read_text("utf-8", "replace") for file in tmp_path.rglob("*.json*"))

        record = step_one(run)
        infos = [info for info in record["infos"] if info is not None]
        missing = sum(info.teacher_prompt_ids is None for info in infos) / len(infos)
        assert missing == pytest.approx(metrics["sdar/context_missing_share"] + metrics["sdar/truncated_share"])
        assert metrics["sdar/advantage_change"] > 0
        assert metrics["actor/loss"] == pytest.approx(metrics["actor/pg_loss"], rel=1e-4, abs=1e-7)
        ours, taught = padded(record["advantages"]), 0
        for row, (key, info) in enumerate(zip(record["keys"], record["infos"], strict=True)):
            if info is None or info.teacher_prompt_ids is None:
                continue
            # A_t + .001 (log pi_T - log pi_old), on rows with a hint or a lesson.
            gap = record["sdar_teacher_log_probs"][row] - record["old_log_probs"][row]
            base = ours[row][: len(gap)] - 0.001 * gap
            assert (base - base.mean()).abs().max() < 1e-5, f"{key}: one advantage per turn lies below"
            taught += 1
        assert taught

        folder = tmp_path / "checkpoints"
        lines = (folder / WRITTEN_FILE).read_text().splitlines()
        assert len(lines) == len({json.loads(line)["request"] for line in lines}) <= asked
        second = run.metrics[2]
        back_to_step_one(tmp_path)
        resumed = train(tmp_path, *arguments, base=SMALL, steps=2, record=True, TOY_KEY="sk-toy-secret")
        assert len(server.requests) == asked, "all that it asks for is in its folder"
    again = resumed.metrics[2]
    assert again["sdar/writer/cached"] == again["sdar/writer/answered"] > 0
    assert set(differing(second, again)) <= {"sdar/writer/cached", "sdar/writer/tokens"}


def test_hero_distils_the_hinted_turns_alone(tmp_path: Path) -> None:
    """On the endpoint, since the small policy writes no JSON; without a policy gradient."""
    answer = json.dumps({"hints": [{"turn": 1, "hint": "go to the fridge"}]})
    with chat_server(lambda *_: says(answer)) as server:
        run = train(
            tmp_path,
            "method=hero",
            "sdar.context.writer.source=endpoint",
            f"sdar.context.writer.url={server.url}",
            "sdar.context.writer.model=toy",
            base=SMALL,
            steps=2,
            record=True,
        )
    first = run.metrics[1]
    infos = [info for info in step_one(run)["infos"] if info is not None]
    seen = {info.turn for info in infos if info.teacher_prompt_ids is not None}
    assert seen == {0}, "hinted turns only"
    assert {info.turn for info in infos} > {0}
    assert first["actor/loss"] == pytest.approx(first["sdar/loss"], rel=1e-3, abs=1e-6) and first["sdar/loss"] > 0
    assert first["sdar/divergence"] > 0 and run.metrics[2]["actor/grad_norm"] > 0


def test_an_endpoint_that_is_down_stops_the_run_with_the_cause(tmp_path: Path) -> None:
    with chat_server(lambda *_: Reply("out of order", status=500)) as server:
        run = train(
            tmp_path,
            "method=seed",
            "sdar.context.writer.source=endpoint",
            f"sdar.context.writer.url={server.url}",
            "sdar.context.writer.model=toy",
            "sdar.context.writer.retries=0",
            base=SMALL,
            steps=2,
            check=False,
        )
    assert run.returncode != 0
    assert "prompts without an answer" in run.output and "status 500" in run.output


@pytest.mark.parametrize(
    ("mode", "further"),
    [
        ("sdar_colocate_async", []),
        (
            "sdar_separate_async",
            [
                "trainer.v1.separate_async.parameter_sync_step=2",
                "trainer.v1.separate_async.num_warmup_batches=0",
                "actor_rollout_ref.actor.ppo_mini_batch_size=2",
                "sdar.update.mini_batch_rows=24",
                "actor_rollout_ref.rollout.nnodes=1",
                "actor_rollout_ref.rollout.n_gpus_per_node=1",
            ],
        ),
    ],
)
def test_the_policy_writes_while_other_episodes_still_run(mode: str, further: list[str], tmp_path: Path) -> None:
    """Asynchronous modes; with two updates per weight sync, both parts of a step are counted together."""
    arguments = ["method=seed", "+sdar.context.options.lesson.form=text", "trainer.save_freq=-1", *further]
    run = train(tmp_path, *arguments, base=SMALL, steps=2, mode=mode)
    for metrics in run.metrics.values():
        assert 8 < metrics["sdar/writer/asked"] <= 16
        assert metrics["sdar/writer/answered"] == metrics["sdar/writer/asked"] and metrics["sdar/writer/failed"] == 0
        assert 0 < metrics["sdar/context_share"] < 1
