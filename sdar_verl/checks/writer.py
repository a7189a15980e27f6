"""What can be wrong with ``sdar.context.writer`` and is known before Ray starts."""

from __future__ import annotations

from omegaconf import DictConfig, OmegaConf

from sdar_verl.config import SdarConfig
from sdar_verl.config.context import WriterConfig
from sdar_verl.context.registry import ContextError, context_names, get_context
from sdar_verl.errors import ConfigError
from sdar_verl.writer.endpoint import endpoint_address, endpoint_key

_NODE = "sdar.context.writer"
_OF_ENDPOINTS = ("url", "model", "key_variable", "body", "in_flight", "timeout_s", "budget")


def writer_faults(config: DictConfig, sdar: SdarConfig) -> list[str]:
    """Faults of the node, one text each."""
    writer = sdar.context.writer
    try:
        writing = [name for name in sdar.context.named if get_context(name).writes]
    except ContextError:
        return []  # found elsewhere
    if sdar.teacher.source == "none":
        writing = []
    if sdar.skills.learn.every:
        writing.append("sdar.skills.learn")
    if not writing:
        known = ", ".join(name for name in context_names() if get_context(name).writes)
        why = (
            f"no context of sdar.context.sources={sdar.context.sources} is written ({known} are), and no skill is "
            "(sdar.skills.learn.every=0)"
        )
        # The source may be a preset's, whose context was replaced on the command line.
        return _unread(writer, tuple(name for name in type(writer).model_fields if name != "source"), why)
    if writer.source == "endpoint":
        return _endpoint(writer, writing)
    return _unread(writer, _OF_ENDPOINTS, "the policy writes; set source=endpoint") + _policy(config, writer, writing)


def _unread(writer: WriterConfig, options: tuple[str, ...], why: str) -> list[str]:
    defaults = WriterConfig()
    return [
        f"{_NODE}.{name}={getattr(writer, name)} has no effect: {why}, or leave it out"
        for name in options
        if getattr(writer, name) != getattr(defaults, name)
    ]


def _endpoint(writer: WriterConfig, writing: list[str]) -> list[str]:
    faults = [
        f"{_NODE}.source=endpoint needs {_NODE}.{name}={example} ({', '.join(writing)} is written there); or let the "
        f"policy write ({_NODE}.source=policy), or show a context that nobody writes, such as "
        "sdar.context.sources=[feedback]"
        for name, example in (("url", "http://127.0.0.1:8000/v1"), ("model", "NAME"))
        if getattr(writer, name) is None
    ]
    for check, value in ((endpoint_address, writer.url), (endpoint_key, writer.key_variable)):
        try:
            if value is not None:
                check(value)
        except ConfigError as error:
            faults.append(str(error))
    reserved = sorted({"model", "messages", "stream", "n"} & set(writer.body))
    if reserved:
        faults.append(f"{_NODE}.body has {', '.join(reserved)}, which this package sets or cannot read; leave it out")
    return faults


def _policy(config: DictConfig, writer: WriterConfig, writing: list[str]) -> list[str]:
    faults = []
    reward = OmegaConf.select(config, "reward.reward_model") or {}
    if reward.get("enable") and not reward.get("enable_resource_pool"):
        faults.append(
            f"{', '.join(writing)} is written by the policy while the rollout servers are awake, but "
            "reward.reward_model.enable=True on the training devices knows how an episode went only after that; give "
            f"the reward model devices of its own (reward.reward_model.enable_resource_pool=True), or use "
            f"{_NODE}.source=endpoint"
        )
    data, rollout = config.data, config.actor_rollout_ref.rollout
    prompt, answer = writer.max_prompt_length or data.max_prompt_length, writer.max_tokens or data.max_response_length
    room = rollout.max_model_len or data.max_prompt_length + data.max_response_length
    if prompt + answer > room:
        faults.append(
            f"{_NODE}: a prompt of max_prompt_length={prompt} and an answer of max_tokens={answer} tokens are more "
            f"than the rollout servers have room for, {room}; lower one of them, or set "
            f"actor_rollout_ref.rollout.max_model_len={prompt + answer}"
        )
    return faults
