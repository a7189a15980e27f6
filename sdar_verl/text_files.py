"""Text files that a user brings, whatever they are: UTF-8, with or without a byte-order mark, with any line ends."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from sdar_verl.errors import SdarError
from sdar_verl.untrusted import is_inside

_MARK = "\ufeff"
_ESCAPED = re.compile(r"[\udc80-\udcff]")


class TextFileError(SdarError, ValueError):
    """A text file that cannot be read; the message names it and the remedy."""


def read_text(
    path: Path, limit: int | None = None, folder: Path | None = None, fault: type[Exception] = TextFileError
) -> str:
    """Content of a UTF-8 file, without a byte-order mark and with plain line ends.

    Args:
        path: the file.
        limit: of its size, bytes.
        folder: a file outside it, named by ``..`` or behind a symbolic link, is refused: where its content goes into
            prompts and traces, whoever wrote the name must not choose among this machine's files.
        fault: raised instead of TextFileError.

    Raises:
        TextFileError: it is larger, unreadable, not UTF-8, or not in ``folder``.
    """
    if folder is not None and not is_inside(path, folder):
        raise fault(f"{path} leads out of the folder {folder}; copy the file into it")
    try:
        with path.open("rb") as stream:
            # Not the whole file: its size may be unknown, as in /proc.
            content = stream.read() if limit is None else stream.read(limit + 1)
        if limit is not None and len(content) > limit:
            raise fault(f"{path} has {path.stat().st_size} bytes, more than {limit}; shorten it or split it")
        text = content.decode("utf-8").lstrip(_MARK)
    except UnicodeDecodeError as error:
        raise fault(f"{path} is not UTF-8 ({error}); save it as UTF-8") from error
    except OSError as error:
        raise fault(f"{path} cannot be read ({error})") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def open_text(path: Path) -> TextIO:
    """The same content as a stream, for files that are too large to be held; faults are those of ``open``."""
    return path.open(encoding="utf-8-sig")


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines of a file that are not blank, with their numbers from 1.

    Raises:
        TextFileError: it is unreadable, or not UTF-8.
    """
    try:
        # Bytes that are no UTF-8 come as halves of surrogate pairs, so that their line can be named.
        with path.open(encoding="utf-8-sig", errors="surrogateescape") as stream:
            for number, line in enumerate(stream, 1):
                if not line.isascii() and _ESCAPED.search(line):
                    raise TextFileError(f"{path}, line {number} is not UTF-8 text; unpack it first if it is compressed")
                if line := line.strip().lstrip(_MARK):
                    yield number, line
    except OSError as error:
        raise TextFileError(f"{path.absolute()} cannot be read here ({error.strerror or error})") from error
