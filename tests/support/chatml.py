"""A byte-level BPE tokenizer with a ChatML template, as the models of the recipes have; trained in a blink."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is defined and not enable_thinking %}"
    "<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


QWEN_TOKENS = (
    *("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|object_ref_start|>", "<|vision_start|>", "<|image_pad|>"),
    *("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|repo_name|>", "<|file_sep|>"),
)
"""Of Qwen2.5's added tokens; those after the sixth are not marked special."""
QWEN3_TOKENS = (*QWEN_TOKENS, "<tool_response>", "</tool_response>", "<think>", "</think>")


def qwen_like_tokenizer(tokens: Sequence[str] = QWEN_TOKENS, template: str = TEMPLATE) -> Any:
    """Qwen's kind of tokenizer: Unicode's NFC form, its splitting into words, bytes, and added tokens of both sorts."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    base = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    base.normalizer = normalizers.NFC()
    words = Regex(r"\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+")
    base.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    base.decoder = decoders.ByteLevel()
    base.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in tokens[:6]])
    base.add_tokens([AddedToken(token, normalized=False) for token in tokens[6:]])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=base, eos_token=tokens[1], pad_token=tokens[2])
    tokenizer.chat_template = template
    return tokenizer


def chatml_tokenizer(texts: Iterable[str], vocab_size: int = 700) -> Any:
    """Trained on ``texts``; ``<|im_end|>`` ends a turn."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    base = Tokenizer(models.BPE())
    base.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    base.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=alphabet, special_tokens=["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
    )
    base.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=base,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer
