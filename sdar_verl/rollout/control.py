"""Control strings: what a tokenizer or a chat template takes for the end of a turn, a role or a tag.

Slots of a prompt hold texts from games, web pages, files and models. Such a text must never become a control token: an
observation that says ``<|im_end|>`` and opens an assistant's turn would speak with the model's own voice. So control
strings in slots are broken by a space (:func:`neutralise`) before the chat template is applied.

Why not ``split_special_tokens=True``, by which a tokenizer reads control strings as plain text? The chat template's
own ones, in the same text, would be split, too. Encoding slots apart from the template would keep those, but text
encoded in pieces gets other token ids than the whole (words merge over the seam, some tokenizers begin each piece with
a space), and it does nothing for markers that are plain text (``[INST]``), nor for tags that the action parser reads.
A space changes no token of any text that holds no control string, on any tokenizer.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sdar_verl.untrusted import whole_characters

_BRACKETS = "<>[]{}|｜"
_DEPTH = 50  # of nested groups, which Python's compiler of patterns reads by recursion

RESPONSE_TAGS = ("<think>", "</think>", "<action>", "</action>")

_USER, _ASSISTANT, _SYSTEM = "first words", "second words", "third words"
# What marks a role where the chat template writes plain text: <|user|>, <<SYS>>, [INST].
_MARK = re.compile(r"<[^<>\s]{1,60}>|\[/?[A-Z_]{2,60}\]")


def special_tokens_of(tokenizer: Any) -> tuple[str, ...]:
    """Strings that ``tokenizer`` turns into control tokens.

    These are its special tokens and those of its added ones that look like a mark: Qwen3's tool tags are added without
    being special. Words, runs of white space and single characters that were added are text like any other.

    Args:
        tokenizer: a Hugging Face tokenizer.
    Returns:
        Sorted, without white space around them.
    """
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if _is_control(token)]
    found = {token.strip() for token in [*tokenizer.all_special_tokens, *added]}
    return tuple(sorted(token for token in found if len(token) > 1))


def control_ids_of(tokenizer: Any) -> frozenset[int]:
    """Token ids of :func:`special_tokens_of`, without the one of unknown words."""
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if _is_control(token)}
    return frozenset({*added, *tokenizer.all_special_ids} - {tokenizer.unk_token_id})


def _is_control(token: Any) -> bool:
    text = str(token).strip()
    return len(text) > 1 and (getattr(token, "special", False) or any(letter in text for letter in _BRACKETS))


def role_marks_of(tokenizer: Any, chat_template_kwargs: Mapping[str, Any] | None = None) -> tuple[str, ...]:
    """Bracketed words that the chat template puts around messages, whether they are special tokens or plain text.

    Read off a short conversation; roles that the template refuses are left out. Markers that are plain words
    (``USER:``) are not among them: nothing tells them from a text that holds them.

    Args:
        tokenizer: a Hugging Face tokenizer.
        chat_template_kwargs: verl's ``data.apply_chat_template_kwargs``.
    """
    said = [("user", _USER), ("assistant", _ASSISTANT), ("user", _USER)]
    marks: set[str] = set()
    for conversation in (said, [("system", _SYSTEM), *said]):
        messages = [{"role": role, "content": content} for role, content in conversation]
        try:
            text = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=False, **(chat_template_kwargs or {})
            )
        except Exception:  # a template raises what it likes, e.g. for a role that it does not know
            continue
        marks.update(_MARK.findall(str(text)))
    return tuple(sorted(marks))


def control_strings_of(tokenizer: Any, chat_template_kwargs: Mapping[str, Any] | None = None) -> tuple[str, ...]:
    """All that no slot may contain beside the response tags: special tokens and the chat template's marks, sorted."""
    return tuple(sorted({*special_tokens_of(tokenizer), *role_marks_of(tokenizer, chat_template_kwargs)}))


@functools.lru_cache(maxsize=32)
def control_pattern(special_tokens: tuple[str, ...]) -> re.Pattern[str]:
    """Finds the response tags and ``special_tokens``, whatever their letter case."""
    tokens: list[str] = []
    for token in sorted({token for token in (*RESPONSE_TAGS, *special_tokens) if token.strip()}):
        if not tokens or not token.startswith(tokens[-1]):  # what begins with another is found with it
            tokens.append(token)
    # Case is ignored because a tokenizer may lower-case its text before it looks a word up.
    return re.compile(_one_of(tokens), re.IGNORECASE)


def _one_of(strings: Sequence[str], depth: int = 0) -> str:
    """A pattern of ``strings``, sorted and none the start of another, that looks at every letter once.

    A flat alternation tries them one after the other, wherever one could begin; Gemma 3 has six thousand.
    """
    if len(strings) == 1 or depth == _DEPTH:
        return "|".join(map(re.escape, strings))
    pairs = zip(strings[0], strings[-1], strict=False)
    common = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    rest = (string[common:] for string in strings)
    branches = (_one_of(list(group), depth + 1) for _, group in itertools.groupby(rest, lambda string: string[0]))
    return f"{re.escape(strings[0][:common])}(?:{'|'.join(branches)})"


def _break_token(match: re.Match[str]) -> str:
    token = match.group()
    return f"{token[0]} {token[1:]}" if len(token) > 1 else " "


def neutralise(text: str, special_tokens: Iterable[str] = ()) -> str:
    """Break every control token and response tag in ``text`` with a space after its first character.

    ``<|im_end|>`` becomes ``< |im_end|>``: still legible, but ordinary text to the tokenizer and the action parser.
    Halves of surrogate pairs, which no tokenizer reads, become U+FFFD.

    Args:
        text: the value of one slot.
        special_tokens: control tokens besides the response tags, see :func:`control_strings_of`.
    """
    pattern = control_pattern(tuple(special_tokens))
    text = whole_characters(text)
    # Overlapping tokens come apart one by one; each round adds a space inside a token, so this ends.
    while pattern.search(text):
        text = pattern.sub(_break_token, text)
    return text


def disguised(strings: Iterable[str]) -> str:
    """All ``strings`` in one text, as they are and in forms that a filter or a tokenizer may turn back into them.

    The forms: upper case, full-width letters (Unicode's NFKC form undoes them), HTML entities, a tag inside the tag.
    """
    forms = []
    for string in strings:
        wide = "".join(chr(ord(letter) + 0xFEE0) if "!" <= letter <= "~" else letter for letter in string)
        entities = string.replace("<", "&lt;").replace(">", "&gt;")
        forms += [string, string.upper(), wide, entities, f"{string[:2]}<b>{string[2:]}", f"{string[0]} {string[1:]}"]
    return " ".join(forms)


def joints(text: str, start: str, stop: str) -> list[tuple[str, bool, bool]]:
    """The pieces of ``text`` outside slots, each with whether a slot stands before it and behind it.

    Args:
        text: rendered with slots whose values begin with ``start`` and end with ``stop``.
        start: a character that is nowhere else.
        stop: another.
    """
    pieces = re.split(f"{start}[^{start}{stop}]*{stop}", text)
    return [(piece, index > 0, index < len(pieces) - 1) for index, piece in enumerate(pieces)]


class Completions:
    """Finds what a slot can complete to, so that breaking strings within slots does not help.

    ``<{{ task }}>`` is such a place: the task ``think`` would make a tag of it.

    Args:
        strings: what must not be completed, whatever its letter case.
    """

    def __init__(self, strings: Iterable[str]):
        self._heads: dict[str, str] = {}
        self._tails: dict[str, str] = {}
        folded = {string.casefold(): string for string in strings}
        for low, string in folded.items():
            for at in range(1, len(low)):
                self._heads.setdefault(low[:at], string)
                self._tails.setdefault(low[at:], string)
        self._folded = folded
        self._longest = max(map(len, folded), default=0)

    def beside(self, piece: str, after_slot: bool, before_slot: bool) -> str | None:
        """A string that the slots before and behind ``piece``, where there are any, can make of it; else None."""
        piece = piece.casefold()
        if after_slot and before_slot and len(piece) < self._longest:
            for low, string in self._folded.items():
                if piece in low[1:-1]:
                    return string
        for length in range(1, min(len(piece), self._longest) + 1):
            head, tail = self._heads.get(piece[-length:]), self._tails.get(piece[:length])
            if before_slot and head:
                return head
            if after_slot and tail:
                return tail
        return None
