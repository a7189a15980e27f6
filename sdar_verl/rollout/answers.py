"""Between a tokenizer and the texts that are read: what the model wrote, and what it was shown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sdar_verl.rollout.actions import marks_thought


class AnswerReader:
    """Decodes answers. Special tokens are left out, since they are no words of the model's; those that hold a tag are
    its words: some tokenizers have ``<action>`` or ``<think>`` among their special tokens.

    Args:
        tokenizer: a Hugging Face tokenizer.
        action_tags: names of the tags that an action is read from.
    """

    def __init__(self, tokenizer: Any, action_tags: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self.tags = tuple(f"<{slash}{name}>" for name in ("think", *action_tags) for slash in ("", "/"))
        added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        special = added | set(tokenizer.all_special_ids)
        self._left_out = {i for i in special if not self._holds_tag(tokenizer.convert_ids_to_tokens(i))}

    def text(self, ids: Sequence[int]) -> str:
        """What the model wrote, tags and all."""
        kept = [i for i in ids if i not in self._left_out]
        # Cleaned up, "a , b" would be "a, b", and no longer the action that the prompt showed.
        return str(self._tokenizer.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def lost_tags(self) -> list[str]:
        """Tags that do not come back when they are written and read; an action in one of them is never seen."""
        written = [f"word {tag} word" for tag in self.tags]
        encoded = [self._tokenizer(text, add_special_tokens=False)["input_ids"] for text in written]
        return [tag for tag, ids in zip(self.tags, encoded, strict=True) if tag not in self.text(ids).lower()]

    def _holds_tag(self, token: object) -> bool:
        return marks_thought(str(token)) or any(tag in str(token).lower() for tag in self.tags)


def shows(tokenizer: Any, ids: Sequence[int], line: str) -> bool:
    """Whether a prompt shows a line of text, as the tokenizer writes it, whatever the white space."""
    alone = tokenizer(line, add_special_tokens=False)["input_ids"]
    return _bare(tokenizer.decode(alone)) in _bare(tokenizer.decode(ids))


def _bare(text: str) -> str:
    return "".join(text.split()).casefold()


def eos_token_ids(model: Any, *sources: Any) -> list[int]:
    """The tokens that end an answer: of a tokenizer and a generation config together, as vLLM takes them.

    Args:
        model: its path, for the message.
        sources: objects with an ``eos_token_id``: a token, several, or None.

    Raises:
        ValueError: there is none.
    """
    found: set[int] = set()
    for source in sources:
        eos = getattr(source, "eos_token_id", None)
        found.update([eos] if isinstance(eos, int) else eos or [])
    if not found:
        raise ValueError(f"model {model} names no end-of-sequence token: set eos_token in its tokenizer_config.json")
    return sorted(found)
