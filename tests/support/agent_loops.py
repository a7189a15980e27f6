"""Agent loops of a user's own, registered as verl's documentation says."""

from __future__ import annotations

from typing import Any

from verl.experimental.agent_loop.agent_loop import AgentLoopBase, AgentLoopMetrics, AgentLoopOutput, register


class _Loop(AgentLoopBase):
    """Asks once or twice."""

    async def ask(self, prompt: list[int], sampling_params: dict[str, Any]) -> AgentLoopOutput:
        answer = await self.server_manager.generate(
            request_id="own", prompt_ids=prompt, sampling_params=sampling_params
        )
        response = answer.token_ids[: self.rollout_config.response_length]
        return AgentLoopOutput(
            prompt_ids=prompt,
            response_ids=response,
            response_mask=[1] * len(response),
            response_logprobs=answer.log_probs[: len(response)] if answer.log_probs else None,
            reward_score=float(len(response) % 3 == 0),
            num_turns=2,
            metrics=AgentLoopMetrics(),
            extra_fields={**answer.extra_fields, "reward_extra_info": {}},
        )

    async def initial(self, messages: list[dict[str, Any]]) -> list[int]:
        if self.continuous_token_builder is not None:  # 0.9.0 makes one only when told to
            return list(await self.ct_build_initial_tokens(messages))
        return list(await self.apply_chat_template(messages))


@register("two_drafts")
class TwoDrafts(_Loop):
    """Returns several outputs per prompt: a draft, and a second one that has seen the first."""

    async def run(self, sampling_params: dict[str, Any], **kwargs: Any) -> list[AgentLoopOutput]:
        messages = [dict(message) for message in kwargs["raw_prompt"]]
        first = await self.ask(await self.initial(messages), sampling_params)
        messages += [
            {"role": "assistant", "content": self.tokenizer.decode(first.response_ids, skip_special_tokens=True)},
            {"role": "user", "content": "Again."},
        ]
        return [first, await self.ask(await self.initial(messages), sampling_params)]


@register("own_words")
class OwnWords(_Loop):
    """Makes its prompt without verl's tokenisation, so nobody else can put a context into it."""

    async def run(self, sampling_params: dict[str, Any], **kwargs: Any) -> AgentLoopOutput:
        text = kwargs["raw_prompt"][-1]["content"]
        return await self.ask(self.tokenizer.encode(text), sampling_params)


@register("own_template")
class OwnTemplate(_Loop):
    """Calls the tokenizer's chat template itself, as loops around other agent frameworks do."""

    async def run(self, sampling_params: dict[str, Any], **kwargs: Any) -> AgentLoopOutput:
        encoded = self.tokenizer.apply_chat_template(
            list(kwargs["raw_prompt"]), add_generation_prompt=True, tokenize=True
        )
        ids = encoded if isinstance(encoded, list) else encoded["input_ids"]
        return await self.ask(ids, sampling_params)


@register("own_teacher")
class OwnTeacher(OwnWords):
    """The same, with the teacher's prompt beside it."""

    async def run(self, sampling_params: dict[str, Any], **kwargs: Any) -> AgentLoopOutput:
        output = await super().run(sampling_params, **kwargs)
        hint = f"{kwargs['raw_prompt'][-1]['content']} It is {kwargs['reward_model']['ground_truth']}."
        output.extra_fields["teacher_prompt_ids"] = self.tokenizer.encode(hint)
        return output
