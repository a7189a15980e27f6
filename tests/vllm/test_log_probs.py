"""The same tokens through verl's vllm server and through our transformers server: the same log-probs.

Both servers get their weights through verl's own rollout classes, twice, and answer through verl's own interface.
"""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sdar_verl.local import start_policy
from sdar_verl.rollout.server_teacher import scored_response, scoring_params
from tests.support.plain import plain_log_probs
from tests.support.tiny_model import make_tiny_model
from tests.vllm.settings import VLLM_ON_CPU, needs_vllm_on_cpu

pytestmark = [*needs_vllm_on_cpu(), pytest.mark.timeout(900)]

# Nats, float32 on the CPU.
TOLERANCE = 2e-4
# What another set of weights, or another temperature, changes at the least: far above the tolerance.
VISIBLE = 0.05


def moved(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights after a large update."""
    generator = torch.Generator().manual_seed(1)
    return {
        name: value * (1 + 0.3 * torch.randn(value.shape, generator=generator)) if value.dim() > 1 else value * 1.1
        for name, value in weights.items()
    }


def qwen3(folder: Path) -> Path:
    """The shipped start policy: Qwen3, one matrix for input and output."""
    return Path(start_policy())


def qwen2(folder: Path) -> Path:
    """Biases in attention and a matrix of its own for the output. vLLM's CPU attention begins at heads of 32."""
    return make_tiny_model(folder, hidden=128, vocab=259, scale=2.0, tie_word_embeddings=False)


class Servers:
    """Both backends with one model."""

    def __init__(self, model: Path, ranks: tuple[int, int]) -> None:
        from tests.vllm.served import Served

        self.model = model
        self.states = [{name: value.float() for name, value in load_file(model / "model.safetensors").items()}]
        self.states.append(moved(self.states[0]))
        self.vocabulary = min(self.states[0]["model.embed_tokens.weight"].shape[0], 259)
        self.vllm = Served(model, ranks[0], VLLM_ON_CPU)
        self.ours = Served(model, ranks[1])
        self.step = -1

    def load(self, step: int) -> dict[str, torch.Tensor]:
        """Give both servers the weights of ``step`` (0 or 1), unless they have them."""
        if step != self.step:
            for server in (self.vllm, self.ours):
                server.load(self.states[step], step)
            self.step = step
        return self.states[step]

    def close(self) -> None:
        self.vllm.close()
        self.ours.close()

    def prompts(self, count: int = 6) -> list[list[int]]:
        """Prompts of different lengths, over more than one block of vLLM's cache."""
        draw = random.Random(0)
        return [[draw.randrange(3, self.vocabulary) for _ in range(3 + 47 * i)] for i in range(count)]


@pytest.fixture(scope="module")
def ray_cluster():
    import ray

    from tests.vllm.served import start_ray

    os.environ.update({"RANK": "0", "RAY_LOCAL_WORLD_SIZE": "1"})  # what verl's senders read
    start_ray(replicas=4)
    yield
    ray.shutdown()
    for name in ("RANK", "RAY_LOCAL_WORLD_SIZE"):
        del os.environ[name]


@pytest.fixture(scope="module", params=[qwen3, qwen2], ids=["qwen3", "qwen2"])
def servers(request, ray_cluster, tmp_path_factory):
    first = 2 * [qwen3, qwen2].index(request.param)
    servers = Servers(request.param(tmp_path_factory.mktemp("model")), (first, first + 1))
    yield servers
    servers.close()


def worst(ours, theirs) -> float:
    pairs = zip(ours, theirs, strict=True)
    return max((torch.as_tensor(a) - torch.as_tensor(b)).abs().max().item() for a, b in pairs)


def prompt_log_probs(server, prompts: list[list[int]], responses: list[list[int]], **sampling) -> list:
    """Log-probs of given responses, asked and read as for a teacher on the rollout server."""
    whole = [[*prompt, *response] for prompt, response in zip(prompts, responses, strict=True)]
    outputs = server.ask(whole, **{**scoring_params(server.engine, 1.0), **sampling})
    return [
        scored_response(output.extra_fields, len(prompt), response)[1][:, 0]
        for output, prompt, response in zip(outputs, prompts, responses, strict=True)
    ]


@pytest.mark.parametrize("sampler", ["vllm", "ours"])
@pytest.mark.parametrize("step", [0, 1])
def test_one_server_scores_what_the_other_sampled(servers, step, sampler):
    servers.load(step)
    prompts = servers.prompts()
    one, other = (servers.vllm, servers.ours) if sampler == "vllm" else (servers.ours, servers.vllm)
    sampled = one.ask(prompts, max_tokens=20, logprobs=True, ignore_eos=True, temperature=1.0, seed=7)
    assert {output.extra_fields["global_steps"] for output in sampled} == {step}
    responses = [list(output.token_ids) for output in sampled]
    scored = prompt_log_probs(other, prompts, responses)
    assert worst([output.log_probs for output in sampled], scored) < TOLERANCE
    before = plain_log_probs(*tensors(prompts, responses), servers.model, servers.states[1 - step])
    assert worst(scored, before) > VISIBLE, "a server that kept its weights would go unnoticed"


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("step", [0, 1])
def test_both_servers_report_the_log_probs_of_a_plain_forward_pass(servers, step, temperature):
    weights = servers.load(step)
    prompts = servers.prompts()
    for server in (servers.vllm, servers.ours):
        seeds = list(range(len(prompts)))
        asked = {"max_tokens": 20, "logprobs": True, "ignore_eos": True, "temperature": temperature}
        sampled = server.ask(prompts, seed=seeds, **asked)
        assert {output.extra_fields["global_steps"] for output in sampled} == {step}
        assert all(len(output.token_ids) == 20 for output in sampled)
        responses = [list(output.token_ids) for output in sampled]
        expected = plain_log_probs(*tensors(prompts, responses), servers.model, weights, temperature)
        assert worst([output.log_probs for output in sampled], expected) < TOLERANCE


@pytest.mark.parametrize("step", [0, 1])
def test_greedy_answers_are_the_same(servers, step):
    servers.load(step)
    asked = {"max_tokens": 20, "logprobs": True, "temperature": 0.0}
    theirs, ours = (server.ask(servers.prompts(), **asked) for server in (servers.vllm, servers.ours))
    assert [list(output.token_ids) for output in theirs] == [list(output.token_ids) for output in ours]
    assert worst([output.log_probs for output in theirs], [output.log_probs for output in ours]) < TOLERANCE


def test_truncated_sampling_has_the_same_log_probs(servers):
    """After temperature, top-k and top-p: the first tokens that either server draws, and how probable they were."""
    servers.load(0)
    prompts = servers.prompts()
    draws = [number for number in range(len(prompts)) for _ in range(16)]
    asked = {"max_tokens": 1, "logprobs": True, "temperature": 2.0, "top_k": 5, "top_p": 0.95}
    drawn: list[dict[tuple[int, int], float]] = []
    for server in (servers.vllm, servers.ours):
        outputs = server.ask([prompts[number] for number in draws], seed=list(range(len(draws))), **asked)
        tokens = [(number, output.token_ids[0]) for number, output in zip(draws, outputs, strict=True)]
        drawn.append({token: output.log_probs[0] for token, output in zip(tokens, outputs, strict=True)})
    theirs, ours = drawn
    common = sorted(theirs.keys() & ours.keys())
    assert len(common) > 1.5 * len(prompts), "hardly anything was drawn at random"
    assert worst([[theirs[token] for token in common]], [[ours[token] for token in common]]) < TOLERANCE
    for number in range(len(prompts)):
        kept = torch.tensor([value for (prompt, _), value in {**theirs, **ours}.items() if prompt == number])
        assert len(kept) <= 5 and kept.exp().sum() <= 1 + 1e-4


def test_a_seed_per_request_reaches_vllm(servers):
    """What makes the rollouts of a group differ, and a run repeat."""
    servers.load(0)
    prompt = servers.prompts()[1]
    asked = {"max_tokens": 12, "ignore_eos": True, "temperature": 1.0}
    first, again = (
        [tuple(output.token_ids) for output in servers.vllm.ask([prompt] * 6, seed=[1, 1, 2, 3, 4, 5], **asked)]
        for _ in range(2)
    )
    assert first == again
    assert first[0] == first[1]
    assert len(set(first)) >= 4


def test_prompt_log_probs_ignore_temperature_and_the_prefix_cache(servers):
    """Facts that a teacher's pass through vLLM rests on (``sdar.teacher.placement=rollout_server``)."""
    weights = servers.load(1)
    prompts = servers.prompts()
    responses = [list(output.token_ids) for output in servers.vllm.ask(prompts, max_tokens=20, ignore_eos=True)]
    expected = plain_log_probs(*tensors(prompts, responses), servers.model, weights)
    for sampling in ({"temperature": 1.0}, {"temperature": 0.3}, {"temperature": 1.0, "top_k": 2, "top_p": 0.5}):
        assert worst(prompt_log_probs(servers.vllm, prompts, responses, **sampling), expected) < TOLERANCE


def test_both_servers_give_the_same_likeliest_tokens(servers):
    """For an objective over the teacher's likeliest tokens with ``sdar.teacher.placement=rollout_server``."""
    servers.load(1)
    prompts = servers.prompts()
    responses = [list(output.token_ids) for output in servers.vllm.ask(prompts, max_tokens=20, ignore_eos=True)]
    whole = [[*prompt, *response] for prompt, response in zip(prompts, responses, strict=True)]
    found = [
        [
            scored_response(output.extra_fields, len(prompt), response, likeliest=8)
            for output, prompt, response in zip(
                server.ask(whole, **scoring_params(server.engine, 1.0, 8)), prompts, responses, strict=True
            )
        ]
        for server in (servers.vllm, servers.ours)
    ]
    for (ids, log_probs), (our_ids, our_log_probs) in zip(*found, strict=True):
        assert worst([log_probs], [our_log_probs]) < TOLERANCE
        assert (ids == our_ids).mean() > 0.95, "but for ties"


def tensors(prompts: list[list[int]], responses: list[list[int]]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    return [torch.tensor(prompt) for prompt in prompts], [torch.tensor(response) for response in responses]
