"""Which shapes the planner knows: families by the ``model_type`` of their config.json, and the recipes' models."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdar_verl.errors import ConfigError
from sdar_verl.planner.architecture import Architecture, Experts, LinearAttention
from sdar_verl.untrusted import parse_json

_QWEN3 = {"qk_norm": True}
_QWEN3_5 = {"qk_norm": True, "gated": True}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {"attention_bias": True},
    "qwen3": _QWEN3,
    "qwen3_moe": _QWEN3,
    "qwen3_5_text": _QWEN3_5,
    "qwen3_5_moe_text": _QWEN3_5,
    "llama": {},
    "gemma3_text": {"qk_norm": True, "norms": 4},
    "glm4": {"norms": 4, "output_bias": False},
    "gpt_oss": {"sinks": True},
}
"""``model_type`` -> what its config.json does not say."""


def _config(
    kind: str,
    hidden: int,
    intermediate: int,
    layers: int,
    heads: int,
    kv: int,
    vocabulary: int,
    tied: bool,
    **more: Any,
) -> dict[str, Any]:
    sizes = {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers}
    sizes |= {"num_attention_heads": heads, "num_key_value_heads": kv, "vocab_size": vocabulary}
    return {"model_type": kind, **sizes, "tie_word_embeddings": tied, **more}


_EXPERTS = {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768}
_DELTA = {"linear_num_key_heads": 16, "linear_num_value_heads": 32, "linear_conv_kernel_dim": 4}
_DELTA |= {"linear_key_head_dim": 128, "linear_value_head_dim": 128}
_EVERY_FOURTH = [*["linear_attention"] * 3, "full_attention"]
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen2.5-3b": _config("qwen2", 2048, 11008, 36, 16, 2, 151936, True),
    "qwen2.5-7b": _config("qwen2", 3584, 18944, 28, 28, 4, 152064, False),
    "qwen3-1.7b": _config("qwen3", 2048, 6144, 28, 16, 8, 151936, True, head_dim=128),
    "qwen3-4b": _config("qwen3", 2560, 9728, 36, 32, 8, 151936, True, head_dim=128),
    "qwen3-8b": _config("qwen3", 4096, 12288, 36, 32, 8, 151936, False, head_dim=128),
    "qwen3-30b-a3b": _config("qwen3_moe", 2048, 6144, 48, 32, 4, 151936, False, head_dim=128, **_EXPERTS),
    "qwen3.5-4b": _config(
        "qwen3_5_text", 2560, 9216, 32, 16, 4, 248320, True, head_dim=256, layer_types=_EVERY_FOURTH * 8, **_DELTA
    ),
}
"""Of the recipes' models, from their published config.json; names without ``-Instruct``, ``-Base`` or a date."""

_VARIANT = re.compile(r"-(instruct|thinking|base|\d{4})(?=-|$)")


def read_config(config: Mapping[str, Any], name: str = "model") -> Architecture:
    """Read a Hugging Face ``config.json``; of a model with a vision tower the text model.

    Raises:
        ConfigError: a family that the planner does not know.
    """
    text: Mapping[str, Any] = config.get("text_config") or config
    kind = str(text.get("model_type") or config.get("model_type"))
    kind = kind if kind in FAMILIES else f"{kind}_text"
    if kind not in FAMILIES:
        raise ConfigError(
            f"{name}: model_type={config.get('model_type')!r}; the planner knows {', '.join(sorted(FAMILIES))}"
        )
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    whole = CONFIG_MAPPING[kind](**text).to_dict()  # a config.json may leave out what is transformers' default
    hidden, heads = int(whole["hidden_size"]), int(whole["num_attention_heads"])
    bias = bool(whole.get("attention_bias", False))
    return Architecture(
        **{
            "name": name,
            "hidden": hidden,
            "intermediate": int(whole.get("intermediate_size") or 0),  # a model of experts alone has none
            "layers": int(whole["num_hidden_layers"]),
            "heads": heads,
            "kv_heads": int(whole.get("num_key_value_heads") or heads),
            "head_dim": int(whole.get("head_dim") or hidden // heads),
            "vocabulary": int(whole["vocab_size"]),
            "tied": bool(config.get("tie_word_embeddings", whole["tie_word_embeddings"])),
            "attention_bias": bias,
            "output_bias": bias,
            "mlp_bias": bool(whole.get("mlp_bias", False)),
            "experts": _experts(kind, whole),
            "linear": _linear(whole),
            **FAMILIES[kind],
        }
    )


def _experts(kind: str, config: Mapping[str, Any]) -> Experts | None:
    if kind == "gpt_oss":
        number, active = int(config["num_local_experts"]), int(config["num_experts_per_tok"])
        return Experts(number, active, int(config["intermediate_size"]), bias=True)
    if "moe" not in kind:
        return None
    layers, every = int(config["num_hidden_layers"]), int(config.get("decoder_sparse_step") or 1)
    dense = {*(config.get("mlp_only_layers") or []), *(i for i in range(layers) if (i + 1) % every)}
    return Experts(
        number=int(config.get("num_local_experts") or config["num_experts"]),  # the former is transformers 5's name
        active=int(config["num_experts_per_tok"]),
        intermediate=int(config["moe_intermediate_size"]),
        shared=int(config.get("shared_expert_intermediate_size") or 0),
        dense_layers=len(dense),
    )


def _linear(config: Mapping[str, Any]) -> LinearAttention | None:
    layers = sum(kind == "linear_attention" for kind in config.get("layer_types") or [])
    if not layers:
        return None
    return LinearAttention(
        layers,
        key_heads=int(config["linear_num_key_heads"]),
        value_heads=int(config["linear_num_value_heads"]),
        key_dim=int(config["linear_key_head_dim"]),
        value_dim=int(config["linear_value_head_dim"]),
        kernel=int(config["linear_conv_kernel_dim"]),
    )


def find_architecture(path: str) -> Architecture:
    """A local model folder's architecture, or that of one of the recipes' models by its hub name.

    Raises:
        ConfigError: neither, or a ``config.json`` that is none.
    """
    file = Path(path) / "config.json"
    if file.is_file():
        try:
            return read_config(parse_json(file.read_bytes()), name=Path(path).name)
        except ConfigError:
            raise
        except Exception as error:  # what transformers finds wrong with a config has no type of its own
            why = " ".join(f"{type(error).__name__}: {error}".split())
            raise ConfigError(
                f"actor_rollout_ref.model.path={path}: its config.json is none of a model ({why}); mend it, or give "
                "another model's folder"
            ) from error
    name = path.rsplit("/", 1)[-1]
    config = CONFIGS.get(_VARIANT.sub("", name.lower()))
    if config is None:
        raise ConfigError(
            f"actor_rollout_ref.model.path={path} is no local model folder and not one of the built-in architectures "
            f"({', '.join(sorted(CONFIGS))}); give a folder with a config.json"
        )
    return read_config(config, name)
