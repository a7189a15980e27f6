"""Makes a tiny random Qwen2 model with its tokenizer, offline, in a fraction of a second."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer() -> Any:
    """Byte-level BPE without merges, 256 bytes and three special tokens, with a ChatML template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens = special + sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token=special[0], eos_token=special[2])
    tokenizer.add_special_tokens({"additional_special_tokens": [special[1]]})
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_tiny_model(
    path: Path | str,
    *,
    vocab: int = 300,
    seed: int = 0,
    hidden: int = 32,
    layers: int = 2,
    scale: float = 1.0,
    tie_word_embeddings: bool = True,
) -> Path:
    """Write model, tokenizer and chat template to ``path`` and return it.

    The tokenizer is byte-level BPE without merges: 256 bytes and three special tokens, so it reads any text and a
    ``vocab`` above 259 leaves rows of the embedding unused (they can still be sampled, and decode to nothing).

    Args:
        path: folder, made when missing.
        vocab: rows of the embedding, at least 259.
        seed: of the weights.
        hidden: hidden size; 4 heads, 2 key-value heads.
        layers: decoder layers.
        scale: factor on all weights but the norms'; above 1 the distribution is less flat.
        tie_word_embeddings: one matrix for input and output.
    """
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tokenizer = make_tokenizer()
    if vocab < len(tokenizer):
        raise ValueError(f"vocab={vocab}: at least {len(tokenizer)}")
    config = Qwen2Config(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=tie_word_embeddings,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.mul_(scale)
    path = Path(path)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def make_talkative_model(path: Path | str, phrases: Sequence[str]) -> Path:
    """A tiny random model with a token for every one of ``phrases``: sampled at random, it often says one of them.

    Args:
        path: folder, made when missing.
        phrases: all different.
    """
    from transformers import AutoTokenizer

    model = make_tiny_model(path, vocab=259 + len(phrases), tie_word_embeddings=False)
    tokenizer = AutoTokenizer.from_pretrained(model)
    if tokenizer.add_tokens(list(phrases)) != len(phrases):
        raise ValueError("phrases must be different, and none may be a token already")
    tokenizer.save_pretrained(model)
    config = json.loads((model / "config.json").read_text())
    # Prompts are counted in bytes here.
    (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 32768}))
    return model
