"""What the doctor says: one line per check, green, yellow or red, with a remedy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from sdar_verl.config.context import ContextConfig
from sdar_verl.context.builder import further_passes
from sdar_verl.untrusted import printable

Level = Literal["ok", "warn", "fail"]

_COLOURS = {"ok": "\033[32m", "warn": "\033[33m", "fail": "\033[31m"}
_WORDS = {"ok": "ok  ", "warn": "warn", "fail": "FAIL"}


@dataclass(frozen=True)
class Finding:
    """Outcome of one check.

    Attributes:
        level: ``ok``, ``warn`` (the run may start, but look at this) or ``fail`` (it cannot work).
        check: short name of what was looked at.
        text: what was found.
        remedy: what to do; empty where nothing is to be done or the text says it.
    """

    level: Level
    check: str
    text: str
    remedy: str = ""


def about_late(context: ContextConfig) -> str:
    """Why there is no teacher's prompt to look at, and what one costs."""
    passes = 1 + len(further_passes(context))
    text = f"{', '.join(context.sources)}: known only when a group has ended"
    return text if passes == 1 else f"{text}; up to {passes} teacher passes over a row"


def exit_status(findings: Sequence[Finding]) -> int:
    """1 when something is red, else 0."""
    return int(any(finding.level == "fail" for finding in findings))


def as_text(findings: Sequence[Finding], colour: bool = False) -> str:
    """One line per finding, the remedy below it, and a last line that counts."""
    lines = []
    for finding in findings:
        word = _WORDS[finding.level]
        if colour:
            word = f"{_COLOURS[finding.level]}{word}\033[0m"
        first, *more = printable(finding.text).splitlines() or [""]
        lines += [f"{word}  {finding.check:<20} {first}", *(f"{'':26} {line}" for line in more)]
        if finding.remedy:
            lines.append(f"{'':26} -> {printable(finding.remedy)}")
    counts = Counter(finding.level for finding in findings)
    lines.append(f"{counts['ok']} ok, {counts['warn']} to look at, {counts['fail']} to mend")
    return "\n".join(lines)


def as_json(findings: Sequence[Finding]) -> dict[str, Any]:
    """Plain JSON values: all findings and the exit status."""
    return {"findings": [asdict(finding) for finding in findings], "exit_status": exit_status(findings)}
