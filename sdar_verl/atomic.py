"""Files that are complete or absent, whatever happens while they are written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import IO


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write ``path`` through a file beside it, which takes its place when all of it has reached the disk.

    Args:
        path: its folder is made.
        write: gets the open file.

    Raises:
        OSError: it cannot be written; then nothing is left of it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; give a file")
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name, too
    except OSError:
        pass  # some network file systems know no such thing
    finally:
        os.close(folder)


def write_text_atomically(path: Path, text: str) -> None:
    """The same for ``text``, in UTF-8."""
    write_atomically(path, lambda stream: stream.write(text.encode()))


def put_in_place(new: Path | None, target: Path) -> None:
    """Have ``new``, a file or a folder on the same disk, take the place of ``target``; None: nothing does.

    A link keeps leading where it leads: what lies there is replaced. The old is there until the new is; a kill between
    the two names leaves it beside, as ``.<name>.old``.
    """
    target = target.resolve()
    aside = target.with_name(f".{target.name}.old")
    remove(aside)  # of a call that was killed behind the next lines
    if target.exists():
        target.rename(aside)
    if new is not None:
        try:
            new.rename(target)
        except OSError:
            if aside.exists():
                aside.rename(target)
            raise
    remove(aside)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
