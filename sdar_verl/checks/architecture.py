"""What a model's architecture does not work with, before Ray starts; of models that lie on this machine, and heads of
the recipes' models too."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from sdar_verl.checks.engine import frozen_models, sequence_parallel
from sdar_verl.config import SdarConfig
from sdar_verl.errors import ConfigError
from sdar_verl.planner.families import find_architecture
from sdar_verl.requests import distribution_option, reads_distributions
from sdar_verl.untrusted import parse_json

ATTENTION = "actor_rollout_ref.model.override_config.attn_implementation"
_SINKS = ("gpt_oss",)
"""Attention with sinks, whose modules in transformers make masks without position ids."""
_PACKED_BY_VERL = ("qwen3_5", "qwen3_5_moe")
"""Linear attention whose rows verl keeps apart itself, on an accelerator."""
_AFTER_THE_HEAD = ("final_logit_softcapping", "logits_scaling", "logit_scale")
"""Settings by which a model changes its logits behind the head."""


def architecture_faults(config: DictConfig, sdar: SdarConfig) -> list[str]:
    """Every fault, one text each, with the option that helps."""
    faults, described = _heads(config, sdar), _described(config)
    if described is None:
        return faults
    text: Mapping[str, Any] = described.get("text_config") or described
    kind = str(described.get("model_type"))
    return [*faults, *_rows(config, kind, text), *_attention(config, kind), *_logits(sdar, kind, text)]


def _heads(config: DictConfig, sdar: SdarConfig) -> list[str]:
    """Ranks that share a row, and those of a server, each take some of the attention heads: verl asserts that they can,
    and vLLM does. Fewer key-value heads than ranks are repeated."""
    node, faults = config.actor_rollout_ref, dict[Any, str]()
    own = str(node.model.path)
    shares = [("actor", *sequence_parallel(node.actor), own)]
    shares += [("ref", *sequence_parallel(node.ref), path) for path, *_ in frozen_models(config, sdar)]
    if node.rollout.name == "vllm":
        shares.append(("rollout", "tensor_model_parallel_size", node.rollout.tensor_model_parallel_size, own))
    for role, option, size, path in shares:
        if size == 1:
            continue
        try:
            model = find_architecture(str(node.model.get("hf_config_path", None) or own) if path == own else path)
        except ConfigError:
            continue  # neither on this machine nor one of the recipes' models
        heads, kv = model.heads, model.kv_heads
        sound = [n for n in range(1, heads + 1) if heads % n == 0 and (kv % n == 0 or n % kv == 0)]
        if size not in sound:
            fault = (
                f"actor_rollout_ref.{role}.{option}={size} cannot share out the {heads} attention heads ({kv} of keys "
                f"and values) of {path}; use one of {', '.join(map(str, sound))}"
            )
            faults.setdefault((option, size, path), fault)  # the reference follows the actor's size
    return [*faults.values()]


def _described(config: DictConfig) -> Mapping[str, Any] | None:
    model = config.actor_rollout_ref.model
    file = Path(str(model.get("hf_config_path", None) or model.path)) / "config.json"
    return parse_json(file.read_bytes()) if file.is_file() else None


def _rows(config: DictConfig, kind: str, text: Mapping[str, Any]) -> Iterator[str]:
    if not config.actor_rollout_ref.model.use_remove_padding:
        return
    packed = f"actor_rollout_ref.model.use_remove_padding=True packs rows into one, and model_type={kind}"
    remedy = "set actor_rollout_ref.model.use_remove_padding=False"
    kept_apart = kind in _PACKED_BY_VERL and config.trainer.device != "cpu"
    if "linear_attention" in (text.get("layer_types") or []) and not kept_apart:
        yield f"{packed} has linear attention, whose state would go on from row to row; {remedy}"
    if kind in _SINKS and OmegaConf.select(config, ATTENTION) in ("eager", "sdpa"):
        yield f"{packed} lets them see each other with this attention (its masks do not look at position ids); {remedy}"


def _attention(config: DictConfig, kind: str) -> Iterator[str]:
    attention = OmegaConf.select(config, ATTENTION)
    if kind in _SINKS and attention == "sdpa":
        yield f"{ATTENTION}=sdpa: model_type={kind} has attention sinks, which sdpa does not know; set it to eager"


def _logits(sdar: SdarConfig, kind: str, text: Mapping[str, Any]) -> Iterator[str]:
    if sdar.teacher.source == "none" or not reads_distributions(sdar.loss):
        return
    for name in _AFTER_THE_HEAD:
        value = text.get(name)
        if value not in (None, 1, 1.0):
            yield (
                f"{distribution_option(sdar.loss)} is computed from the language-model head, and model_type={kind} "
                f"changes its logits behind it ({name}={value}); use sdar.loss.objective=sampled without an anchor"
            )
