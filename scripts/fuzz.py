"""Coverage-guided fuzzing of what reads other people's texts, by atheris (pip install atheris; no test needs it).

    python scripts/fuzz.py TARGET [libFuzzer's options, such as -max_total_time=60]

A target ends with the first exception that is not the one it promises, and libFuzzer writes the input to a file,
crash-...; give that file as an argument to run it again. tests/unit/test_hostile_*.py keep what was found.
"""

from __future__ import annotations

import contextlib
import json
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import atheris

# Found on the path, not through an editable installation's own finder, which atheris does not see.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

with atheris.instrument_imports(include=["sdar_verl", "yaml", "json"]):
    from sdar_verl.envs.alfworld.expressions import ForbiddenExpression, evaluate
    from sdar_verl.envs.search.client import _hits
    from sdar_verl.panels import PanelError, task_from_json
    from sdar_verl.rollout.actions import last_line, match_admissible, parse_action
    from sdar_verl.rollout.control import RESPONSE_TAGS, neutralise
    from sdar_verl.skills.formats import _read_skill
    from sdar_verl.skills.formats_json import read_json_bank
    from sdar_verl.skills.skill import SkillBankError
    from sdar_verl.untrusted import parse_json

SEEDS: dict[str, list[bytes]] = {
    "actions": [b"<think>a</think><action>look</action>", b"<search>a</search>", b"search[red shoes]"],
    "control": [b"<|im_end|>\n<|im_start|>assistant", b"ababab", b"</action><think>"],
    "skills": [b"description: d\ntask-types: [clean]\nkeywords: ['mug']\nmetadata: {a: {b: 1}}\n---\nLook.\n"],
    "banks": [
        b'{"general_skills": [{"skill_id": "g", "title": "t", "principle": "p", "when_to_apply": "a"}]}',
        b'{"skill_files": {"general_skills": "a.md"}, "task_to_skill": {"c": "b"}, "task_keywords": {"c": ["d"]}}',
        b'{"common_mistakes": [{"mistake_id": "m", "description": "d", "why_it_happens": "w", "how_to_avoid": "h"}]}',
    ],
    "tasks": [b'{"env": "e", "task_id": "t", "task_type": "p", "description": "d", "data": {"answers": ["a"]}}'],
    "answers": [b'{"result": [[{"document": {"id": "1", "contents": "\\"t\\"\\na"}, "score": 2.5}]]}'],
    "expressions": [b"o.indefinite + ' ' + o.name", b"r.name or r.id", b"__import__('os').system('true')"],
}

FOLDER = Path(tempfile.mkdtemp(prefix="sdar_fuzz_"))
TOKENS = ("<|im_start|>", "<|im_end|>", "<tool_call>", "[INST]", "<s>", "aba", "bab")


def text_of(data: bytes) -> str:
    """UTF-8, with halves of surrogate pairs where it is none."""
    return data.decode("utf-8", "surrogateescape")


def actions(data: bytes) -> None:
    """A response is parsed, or has an error; any action fits a form, or does not."""
    text = text_of(data)
    for tags in (("action",), ("search", "answer")):
        parsed = parse_action(text, tags=tags)
        assert (parsed.action is None) != (parsed.error is None)
        assert parsed.action is None or not re.search("</?think>", parsed.action, re.IGNORECASE | re.ASCII)
        last_line(text, tags)
    match_admissible(text, ["look", text], ["search[<query>]", text])


def control(data: bytes) -> None:
    """No control string is left, only spaces were added, and a second time changes nothing."""
    text = text_of(data)
    clean = neutralise(text, TOKENS)
    assert not any(token.lower() in clean.lower() for token in (*TOKENS, *RESPONSE_TAGS))
    assert neutralise(clean, TOKENS) == clean
    clean.encode()


def skills(data: bytes) -> None:
    """A skill's file is read, or a SkillBankError."""
    file = FOLDER / "mugs" / "SKILL.md"
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(b"---\nname: mugs\n" + data)
    with contextlib.suppress(SkillBankError):
        _read_skill(file, FOLDER)


def banks(data: bytes) -> None:
    """A JSON file is a bank, or a SkillBankError."""
    path = FOLDER / "bank.json"
    path.write_bytes(data)
    with contextlib.suppress(SkillBankError):
        read_json_bank(path)


def tasks(data: bytes) -> None:
    """A panel's task is one, or a PanelError."""
    with contextlib.suppress(PanelError):
        json.dumps(task_from_json(text_of(data)).description).encode()


def answers(data: bytes) -> None:
    """A retrieval server's answer is a list of passages, or one of the errors that the client turns into its own."""
    try:
        for hit in _hits(parse_json(data)):
            hit.passage.text.encode()
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError):
        pass


def expressions(data: bytes) -> None:
    """An expression of a game's grammar has a value, or is refused; there is nothing that it could call."""
    with contextlib.suppress(ForbiddenExpression):
        evaluate(text_of(data), {"o": "mug", "r": 3})


TARGETS: dict[str, Callable[[bytes], None]] = {
    target.__name__: target for target in (actions, control, skills, banks, tasks, answers, expressions)
}


def main() -> None:
    """Run one target until it fails or libFuzzer's limits are reached."""
    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        raise SystemExit(f"usage: python scripts/fuzz.py TARGET [options]; targets: {', '.join(TARGETS)}")
    name = sys.argv.pop(1)
    seeds = FOLDER / "seeds"
    seeds.mkdir()
    for number, seed in enumerate(SEEDS[name]):
        (seeds / str(number)).write_bytes(seed)
    atheris.Setup([*sys.argv, str(seeds)], TARGETS[name])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
