"""An answer that is interrupted goes on: tokens, log-probs and weight versions in order, no random number twice."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from verl.workers.rollout.replica import TokenOutput

from sdar_verl.local.sampling import SamplingParams
from sdar_verl.verl.continuing import ContinuingClient, seed_of_rest
from tests.support.plain import plain_logits
from tests.support.tiny_model import make_tiny_model

PROMPT = [5, 6, 7]
LONG = 100


class Server:
    """Answers a request with as many tokens as the script says, then interrupts; notes what it was asked."""

    def __init__(self, script: list[tuple[int, int]]):
        self.script = list(script)
        self.asked: list[tuple[list[int], dict[str, Any]]] = []
        self.generate = SimpleNamespace(remote=self._generate)

    async def _generate(self, prompt_ids, sampling_params, **kwargs) -> TokenOutput:
        self.asked.append((list(prompt_ids), dict(sampling_params)))
        count, version = self.script.pop(0)
        tokens = [100 + len(prompt_ids) + i for i in range(count)]
        return TokenOutput(
            token_ids=tokens,
            log_probs=[-float(token) for token in tokens],
            stop_reason="aborted" if self.script else "completed",
            num_preempted=0,
            extra_fields={"global_steps": version},
        )


@pytest.fixture
def ask(monkeypatch):
    async def at_once(_: float) -> None:
        """verl waits a second before it asks again."""

    monkeypatch.setattr("verl.workers.rollout.llm_server.asyncio.sleep", at_once)

    async def send(server: Server, **params: Any) -> TokenOutput:
        client = ContinuingClient(
            SimpleNamespace(actor_rollout_ref=SimpleNamespace(rollout=SimpleNamespace(name="transformers")))
        )

        async def acquire(request_id: Any, **_: Any) -> tuple[str, Server]:
            return "server", server

        client._acquire_server = acquire
        client._release_server = lambda *args, **kwargs: None
        return await client.generate("request", prompt_ids=PROMPT, sampling_params=params)

    return send


def test_an_answer_goes_on_where_it_was_interrupted(ask):
    server = Server([(2, 3), (0, 4), (3, 5)])
    output = asyncio.run(ask(server, max_tokens=10, seed=11))
    assert output.token_ids == [103, 104, 105, 106, 107]
    assert output.log_probs == [-103.0, -104.0, -105.0, -106.0, -107.0]
    assert [prompt for prompt, _ in server.asked] == [PROMPT, [*PROMPT, 103, 104], [*PROMPT, 103, 104]]
    assert [params["max_tokens"] for _, params in server.asked] == [10, 8, 8]
    assert [output.extra_fields[f"{end}_global_steps"] for end in ("min", "max")] == [3, 5]


def test_the_rest_of_an_answer_has_random_numbers_of_its_own(ask):
    server = Server([(2, 0), (3, 0), (1, 0)])
    asyncio.run(ask(server, max_tokens=10, seed=11))
    seeds = [params["seed"] for _, params in server.asked]
    assert seeds == [11, seed_of_rest(11, 2), seed_of_rest(11, 5)]
    assert len(set(seeds)) == 3
    assert all(0 <= seed < 2**31 for seed in seeds)


def test_a_server_with_another_name_for_the_seed_gets_other_numbers_too(ask):
    server = Server([(2, 0), (3, 0)])
    asyncio.run(ask(server, max_tokens=10, sampling_seed=11))
    assert [params["sampling_seed"] for _, params in server.asked] == [11, seed_of_rest(11, 2)]


def test_a_request_without_a_seed_stays_without(ask):
    server = Server([(2, 0), (3, 0)])
    asyncio.run(ask(server, max_tokens=10))
    assert all("seed" not in params for _, params in server.asked)


def test_answers_at_the_same_time_do_not_mix_up_their_lengths(ask):
    async def both() -> list[Server]:
        servers = [Server([(1, 0), (1, 0)]), Server([(4, 0), (1, 0)])]
        await asyncio.gather(*(ask(server, max_tokens=10, seed=2) for server in servers))
        return servers

    first, second = asyncio.run(both())
    assert [params["seed"] for _, params in first.asked] == [2, seed_of_rest(2, 1)]
    assert [params["seed"] for _, params in second.asked] == [2, seed_of_rest(2, 4)]


def test_an_answer_that_an_update_interrupts_has_the_log_probs_of_both_weights(tmp_path):
    """As verl's colocated trainer does it: requests aborted, weights replaced, generation resumed."""
    from transformers import AutoModelForCausalLM

    from tests.support.cpu_server import make_server

    folders = [make_tiny_model(tmp_path / str(seed), scale=3.0, seed=seed) for seed in (0, 1)]
    states = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).state_dict() for path in folders]
    parts: list[int] = []

    async def main() -> TokenOutput:
        server = make_server(folders[0], ignore_eos=True)
        await server.update_weights(states[0], 3)

        async def generate(**request: Any) -> TokenOutput:
            output = await server.generate(**request)
            parts.append(len(output.token_ids))
            return output

        client = ContinuingClient(SimpleNamespace(actor_rollout_ref=SimpleNamespace(rollout=SimpleNamespace(name="x"))))
        handle = SimpleNamespace(generate=SimpleNamespace(remote=generate))

        async def acquire(request_id: Any, **_: Any) -> tuple[str, Any]:
            return "server", handle

        client._acquire_server = acquire
        client._release_server = lambda *args, **kwargs: None
        params = {"max_tokens": LONG, "temperature": 0.7, "seed": 4, "logprobs": True}
        asked = asyncio.create_task(client.generate("request", prompt_ids=PROMPT, sampling_params=params))
        while (await server.get_stats())["response_tokens"] < 2:
            await asyncio.sleep(0.001)
        await server.abort_all_requests()
        await server.sleep()
        await server.update_weights(states[1], 4)
        await server.wake_up()
        await server.resume_generation()
        return await asyncio.wait_for(asked, 60)

    output = asyncio.run(main())
    start = parts[0]
    assert len(parts) == 2 and 2 <= start < LONG, "the answer was not interrupted"
    assert len(output.token_ids) == len(output.log_probs) == LONG
    assert [output.extra_fields[f"{end}_global_steps"] for end in ("min", "max")] == [3, 4]
    tokens = torch.tensor(output.token_ids)
    prompts = [torch.tensor(PROMPT), torch.tensor([*PROMPT, *output.token_ids[:start]])]
    for prompt, answer, folder, found in (
        (prompts[0], tokens[:start], folders[0], output.log_probs[:start]),
        (prompts[1], tokens[start:], folders[1], output.log_probs[start:]),
    ):
        (logits,) = plain_logits([prompt], [answer], folder)
        expected = (logits / 0.7).log_softmax(-1).gather(1, answer[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(found), expected, atol=1e-4, rtol=0)


def test_the_cpu_server_goes_on_with_the_log_probs_of_one_undisturbed_answer(tmp_path):
    """What the scheduler gives for prompt + first tokens is what it would have given in one go, greedily."""
    from transformers import AutoModelForCausalLM

    from sdar_verl.local.scheduler import BatchScheduler

    make_tiny_model(tmp_path, scale=4.0)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="sdpa").eval()
    scheduler = BatchScheduler(model, eos_token_ids=[0])
    try:
        params = {"temperature": 0.0, "logprobs": True, "ignore_eos": True}
        whole = scheduler.submit(PROMPT, SamplingParams(max_tokens=12, **params)).result(60)
        start = scheduler.submit(PROMPT, SamplingParams(max_tokens=5, **params)).result(60)
        rest = scheduler.submit([*PROMPT, *start.token_ids], SamplingParams(max_tokens=7, **params)).result(60)
    finally:
        scheduler.close()
    assert whole.token_ids == [*start.token_ids, *rest.token_ids]
    assert whole.log_probs == pytest.approx([*start.log_probs, *rest.log_probs], abs=1e-5)
