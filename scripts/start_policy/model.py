"""The start policy's network: a tiny Qwen3, initialised so that looking things up in the prompt is quick to learn."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

MAX_POSITIONS = 512


def new_model(tokenizer: Any, *, hidden: int = 128, layers: int = 3, heads: int = 4) -> Qwen3ForCausalLM:
    """A fresh model for a tokenizer; hidden 128 and 3 layers make about half a million weights."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=hidden // heads,
        intermediate_size=2 * hidden,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        attention_dropout=0.0,
        initializer_range=0.05,
        bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = Qwen3ForCausalLM(config)
    # Mimetic initialisation: from the second layer on, attention begins by finding equal tokens and copying what it
    # finds, which is most of what reading a skill out of the prompt takes.
    with torch.no_grad():
        for layer in model.model.layers[1:]:
            attention = layer.self_attn
            match = torch.nn.init.orthogonal_(torch.empty_like(attention.q_proj.weight))
            copy = torch.nn.init.orthogonal_(torch.empty_like(attention.v_proj.weight))
            attention.q_proj.weight.copy_(match)
            attention.k_proj.weight.copy_(match + 0.02 * torch.randn_like(match))
            attention.v_proj.weight.copy_(copy)
            attention.o_proj.weight.copy_(0.5 * copy.T)
    return model
