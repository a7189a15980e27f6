"""From a sampled turn to the fields of a training step, with the real CPU server and policy; only Ray is left out."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sdar_verl.config import TeacherConfig
from sdar_verl.fields import TEACHER_LOG_PROBS, TEACHER_MASK, TEACHER_PROMPTS
from sdar_verl.local import start_policy
from sdar_verl.requests import StepRequests
from sdar_verl.rollout.rows import RowInfo
from sdar_verl.verl.teacher import PrivilegedTeacher
from tests.support.cpu_server import make_server
from tests.support.plain import plain_logits
from tests.support.scripted import play_episode
from tests.support.table import make_table, stored

TEACHER_COLUMNS = (TEACHER_PROMPTS, TEACHER_LOG_PROBS, TEACHER_MASK)
TEMPERATURE = 0.8  # that of tests.support.scripted
NATS = 1e-5
ROWS = {
    "per_turn": {"max_response_length": 20},
    "trajectory": {
        "max_response_length": 170,
        "rollout__rows": "trajectory",
        "rollout__turn_length": 20,
        "prompt__history_length": 0,
    },
}


class InProcess:
    """verl's client, without the way to another process."""

    def __init__(self, server):
        self.server = server

    async def generate(self, request_id, *, prompt_ids, sampling_params):
        # As verl's worker samples: at the run's temperature, with log-probs (rollout.calculate_log_probs).
        sampling_params = {"logprobs": True, **sampling_params, "temperature": TEMPERATURE}
        return await self.server.generate(prompt_ids, sampling_params, request_id)


@pytest.fixture(scope="module")
def server():
    server = make_server(start_policy(), prompt_length=340, response_length=170)
    weights = AutoModelForCausalLM.from_pretrained(start_policy(), dtype=torch.float32).state_dict()
    asyncio.run(server.update_weights(weights, global_steps=1))
    return InProcess(server)


def plain(prompts, responses):
    """Log-probs at the temperature, by one plain forward pass per row."""
    prompts, responses = ([torch.as_tensor(row, dtype=torch.int64) for row in rows] for rows in (prompts, responses))
    return [
        (logits / TEMPERATURE).log_softmax(-1).gather(1, response[:, None])[:, 0]
        for logits, response in zip(plain_logits(prompts, responses, start_policy()), responses, strict=True)
    ]


@pytest.mark.parametrize("kind", ROWS)
def test_a_step_has_the_log_probs_of_plain_forward_passes(monkeypatch, server, kind):
    tokenizer = AutoTokenizer.from_pretrained(start_policy())
    outputs, _, _, _ = play_episode(
        monkeypatch,
        tokenizer,
        [],
        server=server,
        teacher__placement="rollout_server",
        **ROWS[kind],
    )
    assert len(outputs) == 1 if kind == "trajectory" else len(outputs) > 1
    # As verl's agent loop puts them into its queue, and as the trainer takes them out.
    rows = [output.as_dict() for output in outputs]
    infos = [RowInfo.from_extra_fields(output.extra_fields) for output in outputs]
    names = ("prompts", "responses", "response_mask", "rollout_log_probs", *TEACHER_COLUMNS)
    columns = {name: [row[name] for row in rows] for name in names}
    columns["old_log_probs"] = plain(columns["prompts"], columns["responses"])
    table = make_table([f"u_0_{i}" for i in range(len(rows))], infos, columns)
    trainer = SimpleNamespace(global_steps=1, config=None, tokenizer=tokenizer)
    settings = TeacherConfig(source="actor", placement="rollout_server")
    metrics = PrivilegedTeacher(settings, StepRequests(), trainer).verify(table)

    expected = plain(columns[TEACHER_PROMPTS], columns["responses"])
    for i, row in enumerate(outputs):
        mask = stored(table)[TEACHER_MASK][i].bool()
        assert mask.tolist() == [bool(sampled) for sampled in row.response_mask]
        assert torch.equal(table.mask[i, : len(mask)], mask)
        assert (stored(table)[TEACHER_LOG_PROBS][i] - expected[i])[mask].abs().max().item() < NATS
        assert (expected[i] - columns["old_log_probs"][i])[mask].abs().max().item() > 0.01, "no context"
    assert metrics["sdar/server_check/trainer"] < NATS and metrics["sdar/server_check/rollout"] < NATS
    assert metrics["sdar/teacher_failed_share"] == 0.0
