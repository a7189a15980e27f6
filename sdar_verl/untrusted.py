"""Small tools for reading what others wrote: files, answers of servers and texts that may be damaged or hostile.

docs/security.md says what is read where, and what it may do.
"""

from __future__ import annotations

import json
import os
import re
import reprlib
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

_SURROGATE = re.compile(r"[\ud800-\udfff]")

_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")

_short = reprlib.Repr()
_short.maxlevel, _short.maxstring, _short.maxother = 2, 80, 80
_short.maxlist = _short.maxtuple = _short.maxdict = _short.maxset = 4


def shorten(value: Any) -> str:
    """``repr(value)`` for a message, at most some hundred characters, however large or nested the value is."""
    return _short.repr(value)


def http_address(url: str) -> SplitResult:
    """The parts of the address of a server.

    Raises:
        ValueError: it is none, or has a user or password before the host, which would stand in logs and is not shown.
    """
    parts = urlsplit(url)
    if parts.username is not None or parts.password is not None:
        shown = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
        raise ValueError(f"{shown!r} has a user or password before the host, which would stand in logs")
    try:
        parts.port  # noqa: B018  a number above 65535 raises
    except ValueError as error:
        raise ValueError(f"{url!r}: {error}") from error
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{url!r} is no address of a server, such as http://127.0.0.1:8000")
    return parts


def parse_json(text: str | bytes, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """``json.loads``, whose faults are all ValueErrors: text nested too deeply would be a RecursionError.

    Args:
        text: JSON; bytes are UTF-8.
        pairs: makes an object of its names and values, see ``json.loads``.

    Raises:
        ValueError: it is no JSON, holds a number of thousands of digits, or is nested too deeply.
    """
    try:
        # A file that was put together of others may hold their byte-order marks; bytes are decoded without.
        text = text.lstrip("\ufeff") if isinstance(text, str) else text
        return json.loads(text, object_pairs_hook=pairs)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def whole_characters(text: str) -> str:
    """``text`` with U+FFFD for every half of a surrogate pair.

    JSON can carry such halves (``"\\ud800"``), but they are no text: tokenizers, Parquet and UTF-8 files refuse them.
    """
    return _SURROGATE.sub("\ufffd", text) if _SURROGATE.search(text) else text


def printable(text: str) -> str:
    """``text`` for a terminal: control characters (but line breaks and tabs) and marks that reverse the direction of
    writing are shown as escapes, so that a name can neither recolour, overwrite nor reorder what stands around it."""
    return _UNPRINTABLE.sub(lambda found: found.group().encode("unicode_escape").decode(), text)


def is_inside(path: Path, folder: Path) -> bool:
    """Whether ``path``, its symbolic links followed, lies in ``folder``."""
    try:
        return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))
    except ValueError:  # a name with a null byte is none
        return False
