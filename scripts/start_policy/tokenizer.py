"""The start policy's word-level tokenizer: lower-cased words, punctuation apart, tags whole."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

CONTROL = ("<pad>", "<unk>", "<eos>", "<user>", "<assistant>")
TAGS = ("<think>", "</think>", "<action>", "</action>")

# eos closes an assistant's message; a user's message needs no end, the next marker is one
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}<user> {{ message['content'] }} "
    "{% elif message['role'] == 'assistant' %}<assistant> {{ message['content'] }} <eos> "
    "{% else %}{{ raise_exception('this policy knows the roles user and assistant, not ' + message['role']) }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def words_of(texts: Iterable[str]) -> list[str]:
    """Distinct words of texts as the tokenizer cuts them, sorted; tags left out."""
    cut = _splitter()
    found: set[str] = set()
    for text in texts:
        for tag in TAGS:
            text = text.replace(tag, " ")
        found.update(word for word, _ in cut.pre_tokenize_str(text.lower()))
    return sorted(found)


def build_tokenizer(words: Iterable[str]) -> Any:
    """A transformers tokenizer whose vocabulary is the control tokens, the tags and ``words``.

    The tags are added but not special: decoding with ``skip_special_tokens=True`` keeps them.
    """
    from tokenizers import AddedToken, Tokenizer, models, normalizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = [*CONTROL, *TAGS, *sorted(set(words))]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = _splitter()
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in CONTROL])
    core.add_tokens([AddedToken(token, special=False, normalized=False) for token in TAGS])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<eos>",
        clean_up_tokenization_spaces=False,
        model_max_length=512,
        padding_side="left",
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _splitter() -> Any:
    from tokenizers import pre_tokenizers

    return pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation("isolated")])
