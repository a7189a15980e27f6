"""Text files of a skill bank."""

from __future__ import annotations

from pathlib import Path

from sdar_verl.skills.skill import SkillBankError


def read_text(path: Path, limit: int) -> str:
    """Content of a UTF-8 file of at most ``limit`` bytes, without a byte-order mark.

    Raises:
        SkillBankError: it is larger, unreadable, or not UTF-8.
    """
    try:
        size = path.stat().st_size
        if size > limit:
            raise SkillBankError(f"{path} has {size} bytes, more than {limit}; shorten it or split it into skills")
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise SkillBankError(f"{path} is not UTF-8 ({error}); save it as UTF-8") from error
    except OSError as error:
        raise SkillBankError(f"{path} cannot be read ({error})") from error
