"""Text files of a skill bank."""

from __future__ import annotations

from pathlib import Path

from sdar_verl.skills.skill import SkillBankError
from sdar_verl.untrusted import is_inside


def read_text(path: Path, limit: int, folder: Path | None = None) -> str:
    """Content of a UTF-8 file of at most ``limit`` bytes, without a byte-order mark and with plain line ends.

    Args:
        path: the file.
        limit: of its size, bytes.
        folder: the bank's. A file outside it, named by ``..`` or behind a symbolic link, is refused: its content would
            go into prompts and traces, and whoever wrote the bank must not choose among this machine's files.

    Raises:
        SkillBankError: it is larger, unreadable, not UTF-8, or not in ``folder``.
    """
    if folder is not None and not is_inside(path, folder):
        raise SkillBankError(f"{path} leads out of the skill bank's folder {folder}; copy the file into it")
    try:
        with path.open("rb") as stream:
            content = stream.read(limit + 1)  # not the whole file: its size may be unknown, as in /proc
        if len(content) > limit:
            raise SkillBankError(
                f"{path} has {path.stat().st_size} bytes, more than {limit}; shorten it or split it into skills"
            )
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SkillBankError(f"{path} is not UTF-8 ({error}); save it as UTF-8") from error
    except OSError as error:
        raise SkillBankError(f"{path} cannot be read ({error})") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")
