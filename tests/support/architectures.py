"""Small random models of today's architectures, with the byte tokenizer of :mod:`tests.support.tiny_model`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.support.tiny_model import make_tokenizer

_SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_DELTA = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
_SLIDING = {"sliding_window": 16}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "qwen3": {"num_hidden_layers": 2},
    "qwen3_moe": {"num_hidden_layers": 2, **_EXPERTS},
    "qwen3_5_text": {"num_hidden_layers": 4, **_DELTA},
    "llama": {"num_hidden_layers": 2},
    "gemma3_text": {
        "num_hidden_layers": 2,
        **_SLIDING,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "gpt_oss": {"num_hidden_layers": 2, **_SLIDING, "num_local_experts": 4, "num_experts_per_tok": 2},
    "glm4": {"num_hidden_layers": 2},
    "gemma2": {"num_hidden_layers": 2, **_SLIDING, "final_logit_softcapping": 3.0},
}
"""``model_type`` -> settings beyond the sizes."""


def random_model(kind: str, *, vocab: int = 300, scale: float = 2.0, seed: int = 0, **settings: Any) -> Any:
    """A model of ``kind`` with random weights.

    Args:
        kind: of :data:`ARCHITECTURES`.
        vocab: rows of the embedding.
        scale: factor on all matrices; above 1 the distribution is less flat.
        seed: of the weights.
        **settings: of its configuration.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    ids = {"bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0}  # as the tokenizer has them
    sizes = {**_SIZES, "head_dim": 16, "vocab_size": vocab, "max_position_embeddings": 2048, **ids}
    config = CONFIG_MAPPING[kind](**{**sizes, **ARCHITECTURES[kind], **settings})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention_of(kind))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name and parameter.dim() > 1:
                parameter.mul_(scale)
    return model


def attention_of(kind: str) -> str:
    """The attention that runs on a CPU; gpt-oss's sinks are in none but the plain one."""
    return "eager" if kind == "gpt_oss" else "sdpa"


def make_architecture(path: Path | str, kind: str, **options: Any) -> Path:
    """Write :func:`random_model`, its tokenizer and chat template to ``path`` and return it."""
    random_model(kind, **options).save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return Path(path)
