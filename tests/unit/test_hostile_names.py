"""Names and texts of others on a terminal: shown, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given

from sdar_verl.cli import main
from sdar_verl.doctor.findings import Finding, as_text
from sdar_verl.untrusted import printable, shorten
from tests.support.fuzzing import TEXTS, VALUES, quick

ESCAPE = "\x1b]0;owned\x07\x1b[2Jall is well\r\u202e"


@quick(100)
@given(text=TEXTS)
def test_what_is_printed_is_plain(text: str) -> None:
    shown = printable(text)
    shown.encode()
    assert not [letter for letter in shown if ord(letter) < 32 and letter not in "\n\t"]
    assert printable(shown) == shown
    if text.isprintable():
        assert shown == text


@quick(80)
@given(value=VALUES)
def test_a_value_in_a_message_is_short(value: object) -> None:
    assert len(shorten([value] * 1000)) < 2500


def test_the_doctor_shows_hostile_names_as_escapes() -> None:
    text = as_text([Finding("fail", "training panel", f"no game at {ESCAPE}", ESCAPE)], colour=False)
    assert "\x1b" not in text and "\r" not in text and "\u202e" not in text
    assert "\\x1b]0;owned\\x07" in text


@pytest.mark.parametrize("action", ["list", "show", "check"])
def test_the_command_line_shows_hostile_skills_as_escapes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], action: str
) -> None:
    (tmp_path / "mugs").mkdir()
    front = 'name: mugs\ndescription: "a\\e[31m"\ntask-types: ["b\\e[31m"]'
    (tmp_path / "mugs" / "SKILL.md").write_text(f"---\n{front}\n---\n{ESCAPE}\n")
    assert main(["skills", action, "--bank", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out and "\\x1b[31m" in out


def test_an_error_shows_hostile_names_as_escapes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", f"no/such/{ESCAPE}\udcff"]) == 2
    error = capsys.readouterr().err
    assert "\x1b" not in error and "\\x1b[2J" in error
