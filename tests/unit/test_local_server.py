"""The CPU rollout server and the pieces that verl loads on the CPU, without Ray."""

from __future__ import annotations

import asyncio

import pytest
import torch
from omegaconf import OmegaConf

from sdar_verl.local.server import load_weights
from tests.support.cpu_server import make_server, rollout_config
from tests.support.plain import plain_logits
from tests.support.tiny_model import make_tiny_model

PROMPT = list(range(10, 30))


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model"), scale=3.0)


@pytest.fixture(scope="module")
def weights(model_path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).state_dict()


def test_a_response_carries_tokens_log_probs_and_the_step_of_its_weights(model_path, weights):
    async def main():
        server = make_server(model_path, ignore_eos=True)
        await server.update_weights(weights, global_steps=7)
        asked = server.generate(PROMPT, {"logprobs": True, "temperature": 0.7}, "a")
        plain = server.generate(PROMPT, {"max_tokens": 3}, "b")
        return await asyncio.gather(asked, plain), await server.get_stats()

    (asked, plain), stats = asyncio.run(main())
    assert len(asked.token_ids) == len(asked.log_probs) == 12  # response_length
    assert len(plain.token_ids) == 3 and plain.log_probs is None
    assert (asked.stop_reason, asked.extra_fields["global_steps"], asked.num_preempted) == ("completed", 7, 0)
    assert (stats["requests"], stats["response_tokens"]) == (2, 15)


def test_the_default_length_is_that_of_verls_vllm_server(model_path, weights):
    async def main():
        server = make_server(model_path, ignore_eos=True)
        await server.update_weights(weights, 0)
        # Longer than prompt_length = 40: the response gives way, so that both fit in 52 tokens.
        return await server.generate(PROMPT * 2 + PROMPT[:5], {}, "a")

    assert len(asyncio.run(main()).token_ids) == 52 - 45


def test_prompt_log_probs_have_the_shape_of_verls_servers(model_path, weights):
    """One entry per prompt token, each about the next one, and a dummy at the end; nothing where none were asked."""

    async def main():
        server = make_server(model_path)
        await server.update_weights(weights, global_steps=7)
        asked = server.generate(PROMPT, {"max_tokens": 1, "temperature": 0.5, "prompt_logprobs": 0}, "a")
        return await asyncio.gather(asked, server.generate(PROMPT, {"max_tokens": 1}, "b"))

    asked, plain = asyncio.run(main())
    assert asked.extra_fields["prompt_ids"] == [*([token] for token in PROMPT[1:]), [0]]
    values = asked.extra_fields["prompt_logprobs"]
    assert len(values) == len(PROMPT) and values[-1] == [0.0]
    rows = torch.tensor(PROMPT[:1]), torch.tensor(PROMPT[1:])
    (logits,) = plain_logits([rows[0]], [rows[1]], model_path)
    expected = (logits / 0.5).log_softmax(-1).gather(1, rows[1][:, None])
    torch.testing.assert_close(torch.tensor(values[:-1]), expected, atol=1e-5, rtol=0)
    assert set(plain.extra_fields) == {"global_steps"}


def test_the_likeliest_tokens_stand_in_the_place_of_the_prompts_own(model_path, weights):
    async def main():
        server = make_server(model_path)
        await server.update_weights(weights, global_steps=7)
        return await server.generate(PROMPT, {"max_tokens": 1, "temperature": 0.5, "prompt_logprobs": 3}, "a")

    fields = asyncio.run(main()).extra_fields
    assert fields["prompt_ids"][-1] == [0] * 3 and fields["prompt_logprobs"][-1] == [0.0] * 3
    rows = torch.tensor(PROMPT[:1]), torch.tensor(PROMPT[1:])
    (logits,) = plain_logits([rows[0]], [rows[1]], model_path)
    expected, ids = (logits / 0.5).log_softmax(-1).topk(3)
    torch.testing.assert_close(torch.tensor(fields["prompt_logprobs"][:-1]), expected, atol=1e-5, rtol=0)
    assert fields["prompt_ids"][:-1] == ids.tolist()


def test_no_response_without_weights_or_while_asleep(model_path, weights):
    async def main():
        server = make_server(model_path)
        with pytest.raises(RuntimeError, match="before its first weights"):
            await server.generate(PROMPT, {}, "a")
        await server.update_weights(weights, 0)
        await server.sleep()
        with pytest.raises(RuntimeError, match="request a reached rollout replica while it sleeps"):
            await server.generate(PROMPT, {}, "a")
        await server.wake_up(tags=["weights"])  # verl: weights first, then the update, then the cache
        with pytest.raises(RuntimeError, match="sleeps"):
            await server.generate(PROMPT, {}, "a")
        await server.wake_up(tags=["kv_cache"])
        assert (await server.generate(PROMPT, {}, "a")).token_ids
        never_sleeps = make_server(model_path, free_cache_engine=False)  # verl wakes nothing then
        await never_sleeps.update_weights(weights, 0)
        await never_sleeps.sleep()
        assert (await never_sleeps.generate(PROMPT, {}, "a")).token_ids

    asyncio.run(main())


def test_weights_that_do_not_fit_are_an_error(model_path, weights, tmp_path):
    async def main():
        server = make_server(model_path)
        with pytest.raises(ValueError, match=r"missing \['model.norm.weight'\]"):
            await server.update_weights({k: v for k, v in weights.items() if k != "model.norm.weight"}, 0)
        with pytest.raises(ValueError, match=r"unexpected \['adapter'\]"):
            await server.update_weights({**weights, "adapter": torch.zeros(1)}, 0)
        # With one matrix for input and output the trainer sends the embedding alone; with two it must send both.
        untied = make_server(make_tiny_model(tmp_path, tie_word_embeddings=False))
        without_head = {k: v for k, v in weights.items() if k != "lm_head.weight"}
        await server.update_weights(without_head, 0)
        with pytest.raises(ValueError, match=r"missing \['lm_head.weight'\]"):
            await untied.update_weights(without_head, 0)

    asyncio.run(main())


def test_input_it_cannot_serve_is_an_error(model_path, weights):
    async def main():
        server = make_server(model_path, max_model_len=30)
        await server.update_weights(weights, 0)
        with pytest.raises(ValueError, match="30 tokens leaves no room in the model's context of 30"):
            await server.generate(list(range(10, 40)), {}, "a")
        with pytest.raises(ValueError, match=r"text only, but the request carries \['image_data'\]"):
            await server.generate(PROMPT, {}, "a", image_data=["picture"])
        with pytest.raises(ValueError, match="min_p="):
            await server.generate(PROMPT, {"min_p": 0.2}, "a")
        for foreign in (-1, 10**6):
            good = asyncio.ensure_future(server.generate(PROMPT, {"max_tokens": 2, "ignore_eos": True}, "b"))
            with pytest.raises(ValueError, match=f"a prompt has token {foreign}, the model"):
                await server.generate([5, foreign], {}, "a")
            assert len((await good).token_ids) == 2, "others go on"
        full = await server.generate(list(range(10, 39)), {"ignore_eos": True}, "a")
        assert len(full.token_ids) == 1

    asyncio.run(main())


def test_abort_holds_or_rejects_requests_until_generation_resumes(model_path, weights):
    async def main():
        server = make_server(model_path)
        await server.update_weights(weights, 0)
        assert await server.abort_all_requests() == 0
        held = asyncio.create_task(server.generate(PROMPT, {}, "a"))
        await asyncio.sleep(0.05)
        assert not held.done()
        await server.abort_all_requests(reject_request=True)
        rejected = await server.generate(PROMPT, {}, "b")
        assert (rejected.stop_reason, rejected.token_ids) == ("aborted", [])
        await server.resume_generation()
        assert (await asyncio.wait_for(held, 30)).stop_reason == "completed"

    asyncio.run(main())


def test_settings_of_a_gpu_engine_are_refused():
    from verl.workers.rollout.replica import RolloutMode, get_rollout_replica_class

    replica_class = get_rollout_replica_class("transformers")

    def launch(mode=RolloutMode.HYBRID, is_reward_model=False, **given):
        replica = replica_class(
            0, rollout_config(**given), OmegaConf.create({}), gpus_per_node=1, is_reward_model=is_reward_model
        )
        replica.rollout_mode = mode
        asyncio.run(replica.launch_servers())

    with pytest.raises(ValueError, match=r"rollout.logprobs_mode='raw_logprobs'"):
        launch(logprobs_mode="raw_logprobs")
    with pytest.raises(ValueError, match=r"rollout.full_determinism=True"):
        launch(full_determinism=True)
    with pytest.raises(ValueError, match=r"rollout.data_parallel_size=2"):
        launch(data_parallel_size=2)
    for mode, is_reward_model in ((RolloutMode.COLOCATED, False), (RolloutMode.STANDALONE, True)):
        with pytest.raises(ValueError, match="serves the policy"):
            launch(mode, is_reward_model)


def test_experts_that_verl_sends_one_by_one_are_put_together():
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig
    from verl.workers.engine.fsdp.utils import unfuse_moe_params

    sizes = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 8}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "intermediate_size": 8}
    config = Qwen3MoeConfig(**sizes, **experts, num_key_value_heads=1, tie_word_embeddings=True)
    trained, served = (AutoModelForCausalLM.from_config(config) for _ in range(2))
    sent = dict(unfuse_moe_params(trained.state_dict().items(), config.model_type))
    del sent["lm_head.weight"]  # tied
    assert load_weights(served, sent) == (set(), set())
    for name, values in trained.state_dict().items():
        assert torch.equal(served.state_dict()[name], values), name
    del sent["model.layers.1.mlp.experts.3.down_proj.weight"]
    sent["model.norm.weight"] = torch.ones(1)
    assert load_weights(served, sent) == (
        {"model.layers.1.mlp.experts.3.down_proj.weight", "model.norm.weight"},
        {"model.norm.weight"},
    )
