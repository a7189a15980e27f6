"""``sdar-verl skills learn`` and ``sdar-verl skills take``."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdar_verl.arguments import check_above_zero, given_path
from sdar_verl.untrusted import is_inside, printable

if TYPE_CHECKING:
    from sdar_verl.report.read import RunData
    from sdar_verl.skills.bank import SkillBank
    from sdar_verl.writer.step import StepWriting

CHARACTERS_PER_TOKEN = 3
"""A guess on the safe side: there is no tokenizer here."""


def add_actions(actions: Any) -> None:
    """Add both to ``sdar-verl skills``."""
    text = "have skills written or revised from a run's traces: a candidate bank, and a diff to read"
    learn = actions.add_parser("learn", help=text, description=text[0].upper() + text[1:] + ".")
    learn.set_defaults(run=_learn)
    learn.add_argument("folder", metavar="RUN", help="folder of a run that traced (sdar.trace.every)")
    learn.add_argument("--bank", required=True, help="name of a shipped bank, or a path: what is revised")
    learn.add_argument("--out", required=True, type=given_path, metavar="DIR", help="the candidate; a new folder")
    writer = learn.add_mutually_exclusive_group(required=True)
    writer.add_argument(
        "--policy", type=given_path, metavar="DIR", help="written by this model: a checkpoint's huggingface folder"
    )
    writer.add_argument("--url", help="written at an OpenAI-compatible endpoint")
    learn.add_argument("--model", help="its name there")
    learn.add_argument("--key-variable", metavar="NAME", help="environment variable that holds the key")
    learn.add_argument("--task-type", nargs="+", default=[], metavar="TYPE", help="only these; by default all traced")
    learn.add_argument("--episodes", type=int, default=6, help="shown per type, failures and successes (default 6)")
    learn.add_argument("--max-words", type=int, default=200, help="of a skill's text (default 200)")
    learn.add_argument("--max-tokens", type=int, default=1024, help="of an answer, thoughts included (default 1024)")
    text = "keep of a candidate's skills those with which success rose outside its interval, on a panel of its own"
    take = actions.add_parser("take", help=text, description=text[0].upper() + text[1:] + ".")
    take.set_defaults(run=_take)
    take.add_argument("candidate", type=given_path, metavar="DIR", help="what `learn` made")
    take.add_argument("--before", required=True, metavar="RUN", help="evaluation with the bank that it was made of")
    take.add_argument("--after", required=True, metavar="RUN", help="evaluation with the candidate as sdar.skills.bank")
    take.add_argument("--out", required=True, type=given_path, metavar="DIR", help="the new bank; a new folder")
    take.add_argument("--arm", default="with_skills", help="validation arm that shows the skills (default with_skills)")
    take.add_argument("--json", action="store_true", help="print JSON")


def _learn(arguments: argparse.Namespace) -> int:
    from sdar_verl.errors import ConfigError, SdarError
    from sdar_verl.report.one_run import quoted
    from sdar_verl.report.read import read_run
    from sdar_verl.skills import learn
    from sdar_verl.skills.bank import SkillBank
    from sdar_verl.skills.loading import bank_settings, load_as_recorded

    check_above_zero(arguments, "episodes", "max_words", "max_tokens")
    run = read_run(arguments.folder)
    settings = run.run.get("settings", {})
    bank = load_as_recorded(arguments.bank, bank_settings(settings))
    _check_out(arguments.out, bank)
    seen = learn.evidence(run, arguments.episodes, arguments.task_type)
    try:
        writing = _writing(arguments, _below(settings, "data.apply_chat_template_kwargs."))
        print(f"asking about {len(seen)} task types: {', '.join(one.task_type for one in seen)}", flush=True)
        made = learn.write_skills(bank, seen, writing, arguments.max_words)
    except SdarError as error:  # options are called otherwise here
        names = r"sdar\.context\.writer\.(url|model|key_variable|max_tokens)"
        said = re.sub(names, lambda name: f"--{name[1].replace('_', '-')}", str(error))
        raise ConfigError(said) from error
    for line in _told(writing.metrics()):
        print(line)
    learned = list(made.values())
    if not learned:
        print("no skill was written; the candidate is not made")
        return 1
    by = arguments.model or str(arguments.policy.resolve())
    about = {"learned-from": str(run.name), "writer": by, "revises": bank.digest[:16]}
    shown = {one.task_type: len(one.played) for one in seen}
    provenance = {skill.name: {**about, "episodes": shown[task_type]} for task_type, skill in made.items()}
    learn.write_bank(bank.with_skills(learned), arguments.out, provenance)
    SkillBank.load(arguments.out)  # the note, last, makes a candidate of what can be read
    panels = [digest for digests in run.run.get("panels", {}).values() for digest in digests]
    origin = bank.origin if bank.origin is not None else Path(arguments.bank)
    learn.write_note(
        arguments.out,
        {
            "bank": str(origin.resolve()),
            "digest": bank.digest,
            "skills": sorted(skill.name for skill in learned),
            "panels": panels,
            "settings": bank_settings(settings),
            "tasks": sorted({task.task_id for one in seen for task in one.tasks} | _validated(run)),
        },
    )
    old = {skill.name: skill for skill in bank}
    for skill in learned:
        print(printable("\n" + learn.difference_of(old.get(skill.name), skill)))
    print(f"\n{arguments.out} is a candidate. Evaluate both banks on a panel that the run has not seen, then take:")
    for name, where in (("before", arguments.bank), ("after", arguments.out.resolve())):
        print(
            "  python -m verl.trainer.main_ppo --config-name ... method=skill_prompt "
            "actor_rollout_ref.model.path=POLICY data.val_files=PANEL",
            shlex.quote(f"sdar.skills.bank={quoted(Path(where))}"),
            f"trainer.experiment_name={name}",
        )
    print("  sdar-verl skills take", shlex.quote(str(arguments.out)), "--before RUN --after RUN --out NEW_BANK")
    return 0


def _check_out(out: Path, bank: SkillBank) -> None:
    """ConfigError unless a candidate can be written there without touching anything else."""
    from sdar_verl.errors import ConfigError
    from sdar_verl.report.layout import WRITTEN_FILE
    from sdar_verl.skills.formats import is_skill_name

    unwritable = next((skill.name for skill in bank if not is_skill_name(skill.name)), None)
    if unwritable is not None:
        raise ConfigError(
            f"--bank {bank.origin or bank.name}: {unwritable} cannot be the name of a skill's folder (at most 64 "
            "lower-case letters, digits and single hyphens); rename it in the bank"
        )
    if bank.origin is not None and bank.origin.is_dir() and is_inside(out, bank.origin):
        raise ConfigError(f"--out {out} lies in the bank {bank.origin}, which stays as it is; name another folder")
    held = sorted(entry.name for entry in out.iterdir() if entry.name != WRITTEN_FILE) if out.exists() else []
    if held:
        raise ConfigError(
            f"--out {out} holds {held[0]}; name a new folder, or leave nothing in it but {WRITTEN_FILE}, the answers "
            "that were paid for"
        )


def _validated(run: RunData) -> set[str]:
    """The tasks that a run has validated on."""
    return {str(task) for columns in run.outcomes.values() for task in columns["task_id"] if task is not None}


def _below(settings: Mapping[str, Any], node: str) -> dict[str, Any]:
    """The options of a node; a record has the dotted name of each."""
    return {name.removeprefix(node): value for name, value in settings.items() if name.startswith(node)}


def _writing(arguments: argparse.Namespace, chat_template_kwargs: dict[str, Any]) -> StepWriting:
    from sdar_verl.config.context import WriterConfig
    from sdar_verl.errors import ConfigError
    from sdar_verl.writer.step import StepWriting

    named = {f"--{name.replace('_', '-')}": getattr(arguments, name) for name in ("model", "key_variable")}
    if arguments.policy is not None:
        from sdar_verl.writer.checkpoint import checkpoint_writing

        for option, value in named.items():
            if value is not None:
                raise ConfigError(f"{option} {value}: no effect with --policy, which asks no endpoint; leave it out")
        return checkpoint_writing(arguments.policy, chat_template_kwargs, arguments.max_tokens)
    from sdar_verl.writer.endpoint import EndpointWriter

    if arguments.model is None:
        raise ConfigError(f"--url {arguments.url}: name the endpoint's model with --model")
    given = {name: getattr(arguments, name) for name in ("url", "model", "key_variable", "max_tokens")}
    settings = WriterConfig(source="endpoint", **given)
    writer = EndpointWriter(settings, arguments.out, lambda text: len(text) // CHARACTERS_PER_TOKEN + 1)
    return StepWriting(writer, ())  # the endpoint's control strings are its own matter: there is no tokenizer here


def _told(metrics: Mapping[str, float]) -> list[str]:
    counts = {name.removeprefix("sdar/writer/"): int(value) for name, value in metrics.items() if "writer/" in name}
    counts["answered"] -= counts["unparsed"]
    said = {
        "answered": "written",
        "cached": "known from before",
        "unparsed": "no skill",
        "failed": "without an answer",
        "length": "cut off (more --max-tokens)",
        "too_long": "too long for the writer (fewer --episodes)",
    }
    parts = [f"{counts[name]} {words}" for name, words in said.items() if counts[name] or name == "answered"]
    cut = f"; of {counts['cut']} the oldest turns were left out" if counts["cut"] else ""
    return [f"{counts['asked']} task types asked about: {', '.join(parts)}{cut}"]


def _take(arguments: argparse.Namespace) -> int:
    from sdar_verl.errors import ConfigError
    from sdar_verl.skills import learn
    from sdar_verl.skills.bank import SkillBank
    from sdar_verl.skills.loading import load_as_recorded
    from sdar_verl.skills.take import as_json, judge, read_note

    if arguments.out.exists():
        raise ConfigError(f"--out {arguments.out} exists already; name a new folder")
    verdicts = judge(arguments.candidate, arguments.before, arguments.after, arguments.arm)
    taken = [verdict.skill for verdict in verdicts if verdict.taken]
    if arguments.json:
        print(as_json(verdicts))
    else:
        for verdict in verdicts:
            print(printable(str(verdict)))
    if not taken:
        if not arguments.json:
            print("no skill is taken; no bank is written")
        return 1
    note = read_note(arguments.candidate)
    base = load_as_recorded(note["bank"], note["settings"])
    measured = {v.skill.name: {"gain": round(v.gain, 4), "tasks": v.tasks} for v in verdicts}
    provenance = {
        skill.name: {"learned-as": str(arguments.candidate.resolve().name), **measured[skill.name]} for skill in taken
    }
    learn.write_bank(base.with_skills(taken), arguments.out, provenance)
    SkillBank.load(arguments.out)  # told now, not by the run that is to use it
    if not arguments.json:
        print(f"{arguments.out} is the bank {base.name} with them")
    return 0
