"""Reading the action out of a response: ``<think> apple in fridge </think> <action> go to fridge 1 </action>``.

An environment may use other tags, or several: ``<search> ... </search>`` and ``<answer> ... </answer>``.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from sdar_verl.envs.base import DEFAULT_ACTION_TAGS

# Letter case is that of ASCII: elsewhere "ſearch" would be a tag, too, and name one that no environment knows.
_FLAGS = re.IGNORECASE | re.ASCII
# Of Qwen, DeepSeek and most; of reasoning prompts; of Seed; in brackets, of Magistral.
_THOUGHTS = "think|thinking|thought|reasoning|seed:think|mm:think"
_THINK_OPEN = re.compile(rf"<(?:{_THOUGHTS})>|\[THINK\]|◁think▷", _FLAGS)
_THINK_CLOSE = re.compile(rf"</(?:{_THOUGHTS})>|\[/THINK\]|◁/think▷", _FLAGS)
_FREE_PART = re.compile(r"<\w+>")


@dataclass(frozen=True)
class ParsedAction:
    """What a response says.

    Attributes:
        action: the action with its white space squeezed and its case kept, behind ``tag: `` where there are several
            tags (``search: capital of Norway``); None when there is an error.
        thought: what stands in the think block, squeezed alike; None without a block, empty for an empty one.
        error: why there is no action; None when there is one.
    """

    action: str | None
    thought: str | None
    error: str | None


def parse_action(
    text: str,
    *,
    think: Literal["required", "optional"] = "optional",
    tags: tuple[str, ...] = DEFAULT_ACTION_TAGS,
    opened: bool = False,
) -> ParsedAction:
    """Read thought and action; a response it cannot read is an error in the result, never an exception.

    The thought ends at the first ``</think>``, or what other models write for it; it may have been opened by the chat
    template, so ``<think>`` need not be there. Action tags inside the thought belong to the thought, and a thought that
    was cut off holds no action.
    After it comes one block in one of the tags, with any text around. Several blocks are an error unless they agree:
    taking the first or the last would reward guessing.

    Args:
        text: the response, decoded with its tags kept.
        think: ``required`` makes a missing think block an error. Qwen3 with thinking off writes none: the default.
        tags: names of the action tags, see :attr:`sdar_verl.envs.base.TextEnv.action_tags`.
        opened: the prompt ended within a thought, so that the answer begins in it.
    """
    thought, answer = None, text
    if close := _THINK_CLOSE.search(text):
        start = _THINK_OPEN.search(text, 0, close.start())
        thought = _squeeze(text[start.end() if start else 0 : close.start()])
        answer = text[close.end() :]
    elif opened:
        return ParsedAction(None, None, "think block not closed")
    elif think == "required" and not _THINK_OPEN.search(text):
        return ParsedAction(None, None, "no think block")
    if _THINK_OPEN.search(answer) or _THINK_CLOSE.search(answer):
        return ParsedAction(None, thought, "think block opened again" if close else "think block not closed")
    action, error = _read_action_block(answer, tags)
    return ParsedAction(action, thought, error)


def leaves_thought_open(text: str) -> bool:
    """Whether ``text``, what a chat template writes in front of an answer, opens a thought and does not close it."""
    *_, opened = (-1, *(match.start() for match in _THINK_OPEN.finditer(text)))
    return opened >= 0 and not _THINK_CLOSE.search(text, opened)


def without_thought(text: str, *, opened: bool = False) -> str:
    """What an answer says behind its thought; empty where the thought was cut off.

    Args:
        text: the answer.
        opened: the prompt ended within a thought, so that the answer begins in it.
    """
    *_, close = (None, *_THINK_CLOSE.finditer(text))
    if close is not None:
        opened, text = False, text[close.end() :]
    return "" if opened or _THINK_OPEN.match(text.lstrip()) else text.strip()


def marks_thought(token: str) -> bool:
    """Whether a token's text begins or ends a thought."""
    return bool(_THINK_OPEN.search(token) or _THINK_CLOSE.search(token))


def match_admissible(
    action: str, admissible: Iterable[str], forms: Iterable[str] = (), shown: Callable[[str], str] | None = None
) -> str | None:
    """The admissible action that ``action`` means, whatever its case and white space; None when there is none.

    Nor does it matter how Unicode writes a letter: many tokenizers compose ``e`` and its accent before they encode a
    prompt, and the model copies what it was shown.

    Whether a response parses and whether its action is admissible are two figures; an action is valid when both hold.

    Args:
        action: see :attr:`ParsedAction.action`.
        admissible: what the environment accepts now. Where it cannot tell, do not ask.
        forms: actions with a free part, see :attr:`sdar_verl.envs.base.Step.action_forms`; the free part is any text
            that is not blank, and comes back as it was written.
        shown: how the prompt shows an action, where that differs: a title with a control string in it is shown broken,
            and copied so.
    """
    wanted, admissible = _alike(action), list(admissible)
    for show in (_as_it_is, *([shown] if shown is not None else [])):
        meant = [candidate for candidate in admissible if _alike(show(candidate)) == wanted]
        if meant:  # of two that differ in case alone, the one that was written
            return next((one for one in meant if _squeeze(show(one)) == _squeeze(action)), meant[0])
    return next((filled for form in forms if (filled := _fill(form, action)) is not None), None)


def _alike(text: str) -> str:
    return unicodedata.normalize("NFKC", _squeeze(text)).casefold()


def _as_it_is(text: str) -> str:
    return text


def _fill(form: str, action: str) -> str | None:
    """``form`` with the free part of ``action``; None when ``action`` is not of that form.

    By length and not by a regular expression, whose time would grow with the square of what the model wrote.
    """
    hole = _FREE_PART.search(form)
    if hole is None:
        return None
    before, after, text = form[: hole.start()], form[hole.end() :], _squeeze(action)
    stop = len(text) - len(after)
    same = text[: len(before)].casefold() == before.casefold() and text[stop:].casefold() == after.casefold()
    free = text[len(before) : stop].strip() if same and stop >= len(before) else ""
    return f"{before}{free}{after}" if free else None


@functools.lru_cache(maxsize=8)
def _tag_pattern(tags: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile(f"<(/?)({'|'.join(map(re.escape, tags))})>", _FLAGS)


def last_line(text: str, tags: Sequence[str] = DEFAULT_ACTION_TAGS) -> str | None:
    """The last line of a response that is not empty, think and action tags taken out; None when there is none."""
    plain = _tag_pattern(("think", *tags)).sub("\n", text)
    return next((line for line in map(_squeeze, reversed(plain.splitlines())) if line), None)


def _read_action_block(text: str, tags: tuple[str, ...]) -> tuple[str | None, str | None]:
    """(action, None) or (None, error)."""
    blocks: list[tuple[str, str]] = []
    opened: re.Match[str] | None = None
    for tag in _tag_pattern(tags).finditer(text):
        name = tag[2].lower()
        if not tag[1]:
            if opened is not None:
                return None, f"{name} block inside another"
            opened = tag
        elif opened is None or opened[2].lower() != name:
            return None, f"{name} block closed but not opened"
        else:
            blocks.append((name, _squeeze(text[opened.end() : tag.start()])))
            opened = None
    if opened is not None:
        return None, f"{opened[2].lower()} block not closed"
    if not blocks:
        return None, f"no {' or '.join(tags)} block"
    if len(set(blocks)) > 1:
        return None, "several different actions"
    name, content = blocks[0]
    if not content:
        return None, f"empty {name}"
    return (content if len(tags) == 1 else f"{name}: {content}"), None


def _squeeze(text: str) -> str:
    return " ".join(text.split())
