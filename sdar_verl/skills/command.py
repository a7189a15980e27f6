"""``sdar-verl skills``: look at skill banks and at what a retrieval rule makes of a task."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from sdar_verl.skills import learn_command
from sdar_verl.untrusted import parse_json, printable

if TYPE_CHECKING:
    from sdar_verl.skills.bank import SkillBank
    from sdar_verl.skills.skill import Skill


def add_parser(commands: Any) -> None:
    """Add ``skills`` and its actions to ``sdar-verl``."""
    parser = commands.add_parser("skills", help="list, show and check skill banks; try retrieval on a task")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name, function, text in (
        ("list", _list, "the shipped banks, or with --bank the skills of one"),
        ("show", _show, "the text of skills, as the teacher gets it"),
        ("check", _check, "whether a bank is sound and fits an environment; exit status 1 when it is not"),
        ("match", _match, "what retrieval finds for a task description"),
    ):
        action = actions.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        action.set_defaults(run=function)
        action.add_argument(
            "--bank", required=name != "list", help="name of a shipped bank, or a path (docs/skills.md has the formats)"
        )
        action.add_argument("--json", action="store_true", help="print JSON")
        if name == "show":
            action.add_argument("names", nargs="*", metavar="NAME", help="skills; by default all")
        if name in ("check", "match"):
            action.add_argument("--env", help="environment whose task types the bank must use, e.g. alfworld")
            action.add_argument(
                "--modules",
                nargs="+",
                default=[],
                metavar="MODULE",
                help="that register it, or rules: sdar.modules of its runs",
            )
        if name == "match":
            action.add_argument("task", help="description of a task, in the environment's words")
            action.add_argument("--task-type", default="", help="the environment's category of the task")
            action.add_argument("--task-id", default="task", help="for rules that draw per task")
            action.add_argument(
                "--retrieval", nargs="+", default=["keyword", "task_type"], metavar="RULE", help="rules, in order"
            )
            action.add_argument(
                "--options", type=_options, default={}, metavar="JSON", help='rule -> options: {"ucb": {"c": 2}}'
            )
            action.add_argument("--seed", type=int, default=0, help="sdar.skills.seed")
    learn_command.add_actions(actions)


def _options(text: str) -> dict[str, dict[str, Any]]:
    """``--options``: rule -> its options."""
    try:
        options = parse_json(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON ({error})") from error
    if not isinstance(options, dict) or not all(isinstance(given, dict) for given in options.values()):
        raise argparse.ArgumentTypeError(f'{text!r} must be rule -> options, such as {{"ucb": {{"c": 2}}}}')
    return options


def _load(arguments: argparse.Namespace) -> SkillBank:
    from sdar_verl.config import SkillsConfig
    from sdar_verl.modules import import_modules
    from sdar_verl.skills.bank import SkillBank
    from sdar_verl.skills.loading import load_run_bank

    import_modules(getattr(arguments, "modules", ()))
    if getattr(arguments, "env", None):
        return load_run_bank(SkillsConfig(bank=arguments.bank), arguments.env)
    return SkillBank.load(arguments.bank)


def _list(arguments: argparse.Namespace) -> int:
    from sdar_verl.skills.bank import SkillBank, bank_names

    if arguments.bank is None:
        banks = [SkillBank.load(name) for name in bank_names()]
        rows = [{"bank": bank.name, "skills": len(bank), "digest": bank.digest} for bank in banks]
        lines = [f"{bank.name:<24} {len(bank):>3} skills  {bank.digest[:16]}" for bank in banks]
    else:
        bank = _load(arguments)
        rows = [_as_dict(skill) for skill in bank]
        lines = [f"{skill.name:<28} {_scope(skill):<36} {skill.description}" for skill in bank]
    _print(arguments, rows, lines)
    return 0


def _show(arguments: argparse.Namespace) -> int:
    from sdar_verl.skills.skill import SkillBankError

    skills = {skill.name: skill for skill in _load(arguments)}
    if unknown := sorted(set(arguments.names) - set(skills)):
        raise SkillBankError(f"bank {arguments.bank!r} has no skill {', '.join(unknown)}; it has {', '.join(skills)}")
    shown = [skills[name] for name in arguments.names or skills]
    lines = [f"{skill.name} ({_scope(skill)}): {skill.description}\n\n{skill.text}\n" for skill in shown]
    _print(arguments, [_as_dict(skill) for skill in shown], lines)
    return 0


def _check(arguments: argparse.Namespace) -> int:
    from sdar_verl.skills.skill import SkillBankError

    try:
        bank = _load(arguments)
    except SkillBankError as error:
        faults = error.faults
        _print(arguments, {"sound": False, "faults": faults}, [f"not sound, {len(faults)} to mend:", *faults])
        return 1
    types = sorted({task_type for skill in bank for task_type in skill.task_types})
    uncovered = sorted(set(_known_types(arguments)) - set(types))
    report = {
        "sound": True,
        "format": bank.format,
        "digest": bank.digest,
        "skills": len(bank),
        "general": len(bank) - len(bank.specific),
        "task_types": types,
        "task_types_without_skill": uncovered,
        "notes": list(bank.notes),
    }
    lines = [
        f"sound: {len(bank)} skills ({report['general']} general), format {bank.format}, digest {bank.digest[:16]}",
        f"task types: {', '.join(types) or 'none'}",
    ]
    if uncovered:
        lines.append(f"without a skill of their own: {', '.join(uncovered)}")
    lines += [f"note: {note}" for note in bank.notes]
    _print(arguments, report, lines)
    return 0


def _match(arguments: argparse.Namespace) -> int:
    from sdar_verl.envs.base import Task
    from sdar_verl.skills.retrieval import render_skills, retrieve

    bank = _load(arguments)
    task = Task(arguments.env or "", arguments.task_id, arguments.task_type, arguments.task)
    found = retrieve(bank, task, arguments.retrieval, arguments.seed, arguments.options)
    text = render_skills(found.skills)
    lines = [
        f"skills: {', '.join(found.names) or 'none'}" + (" (none of this task's own)" if found.no_match else ""),
        *(["", text] if text else []),
    ]
    _print(arguments, {"skills": list(found.names), "no_match": found.no_match, "text": text}, lines)
    return 0


def _known_types(arguments: argparse.Namespace) -> tuple[str, ...]:
    from sdar_verl.envs.registry import task_types_of

    return task_types_of(arguments.env)[0] if arguments.env else ()


def _scope(skill: Skill) -> str:
    if skill.general:
        return "every task"
    return "; ".join(
        f"{what}: {', '.join(names)}" for what, names in (("type", skill.task_types), ("word", skill.keywords)) if names
    )


def _as_dict(skill: Skill) -> dict[str, Any]:
    return {
        "name": skill.name,
        "description": skill.description,
        "task_types": list(skill.task_types),
        "keywords": list(skill.keywords),
        "text": skill.text,
    }


def _print(arguments: argparse.Namespace, content: Any, lines: list[str]) -> None:
    print(json.dumps(content, indent=1, ensure_ascii=False) if arguments.json else printable("\n".join(lines)))
