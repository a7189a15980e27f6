"""``sdar-verl skills take``: keeps of a candidate's skills those with which success rose, on a panel of its own.

Two evaluations are compared that differ in nothing but the bank: one with the bank that the candidate was made of, one
with the candidate, task by task. A skill is judged by the tasks of its types that no other learned skill is for, and
taken when the whole 95 % interval of the difference lies above 0. A panel that the run had trained or validated on, or
that shares a task with what the writer was shown or the run validated on, is refused.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdar_verl.report.compare import Comparison, load
from sdar_verl.report.read import RunData
from sdar_verl.skills.bank import SkillBank
from sdar_verl.skills.learn import NOTE
from sdar_verl.skills.loading import RENAMED, bank_settings, load_as_recorded
from sdar_verl.skills.skill import SkillBankError
from sdar_verl.skills.verdict import Verdict, judge_skill
from sdar_verl.untrusted import parse_json, shorten

_BANK = "sdar.skills.bank"


def read_note(candidate: Path) -> dict[str, Any]:
    """A candidate's note.

    Raises:
        SkillBankError: the folder is no candidate, or its note is damaged.
    """
    file = candidate / NOTE
    try:
        note = parse_json(file.read_bytes())
    except FileNotFoundError:
        raise SkillBankError(
            f"{candidate} holds no {NOTE}: it is no candidate; `sdar-verl skills learn` makes one"
        ) from None
    except ValueError as error:
        raise SkillBankError(f"{file} is damaged ({error}); make the candidate again") from error
    kinds = {"bank": str, "digest": str, "settings": dict, "skills": list, "panels": list, "tasks": list}
    if not isinstance(note, dict) or any(not isinstance(note.get(key), kind) for key, kind in kinds.items()):
        raise SkillBankError(f"{file} is damaged (it holds {shorten(note)}); make the candidate again")
    return note


def judge(candidate: Path, before: str, after: str, arm: str) -> list[Verdict]:
    """Compare two evaluations.

    Args:
        candidate: the folder that ``skills learn`` made.
        before: folder of an evaluation with the bank that it was made of.
        after: of one with the candidate.
        arm: validation arm with the skills in the prompt.

    Raises:
        SkillBankError: the evaluations do not answer the question; says which way.
        ComparisonError, RecordError: they cannot be compared at all.
    """
    note = read_note(candidate)
    learned, base = SkillBank.load(candidate), load_as_recorded(note["bank"], note["settings"])
    if base.digest != note["digest"]:
        raise SkillBankError(f"the bank {note['bank']} has changed since {candidate} was made of it; make it again")
    comparison = load([f"without={before}", f"with={after}"], arm=arm)
    without, with_it = (comparison.group(name).runs[0] for name in ("without", "with"))
    _check_runs(candidate, base, without, with_it)
    _check_panel(note, with_it, comparison)
    types = _task_types(with_it, arm)
    outcomes = [_by_task(comparison, name) for name in ("without", "with")]
    judged = [skill for skill in learned if skill.name in note["skills"]]
    shown = Counter(task_type for skill in judged for task_type in skill.task_types)
    alone = {task: task_type for task, task_type in types.items() if shown[task_type] == 1}
    return [
        judge_skill(skill, [task for task in comparison.tasks if alone.get(task) in skill.task_types], *outcomes)
        for skill in judged
    ]


def _by_task(comparison: Comparison, name: str) -> dict[str, float]:
    """Task -> success at the end of one of the evaluations."""
    return dict(zip(comparison.tasks, comparison.group(name).success[0, -1].tolist(), strict=True))


def _check_runs(candidate: Path, base: SkillBank, without: RunData, with_it: RunData) -> None:
    recorded, other = (dict(run.run.get("settings", {})) for run in (without, with_it))
    # A candidate's task types are translated already; the digest below says what they were to the other run.
    one, other = ({k: v for k, v in found.items() if not k.startswith(RENAMED)} for found in (recorded, other))
    banks = [settings.pop(_BANK, "") for settings in (one, other)]
    if not str(banks[1]) or Path(str(banks[1])).resolve() != candidate.resolve():
        raise SkillBankError(f"{with_it.folder} was run with {_BANK}={banks[1]}, not with the candidate {candidate}")
    if load_as_recorded(str(banks[0]), bank_settings(recorded)).digest != base.digest:
        raise SkillBankError(
            f"{without.folder} was run with {_BANK}={banks[0]}, not with the bank that {candidate} was made of"
        )
    different = sorted(key for key in {*one, *other} if one.get(key) != other.get(key))
    if different:
        raise SkillBankError(
            f"{without.folder} and {with_it.folder} differ in more than the bank: {', '.join(different[:6])}; a rise "
            "would not be the skills'"
        )


def _check_panel(note: Mapping[str, Any], run: RunData, comparison: Comparison) -> None:
    panels = {str(digest) for digest in run.run.get("panels", {}).get("val_files") or []}
    if panels & set(note["panels"]):
        raise SkillBankError(
            f"{run.folder} was validated on a panel of the run that the skills were learned from; evaluate on one that "
            "neither training nor validation nor test have seen (data.val_files)"
        )
    shared = sorted(set(comparison.tasks) & set(note["tasks"]))
    if shared:
        raise SkillBankError(
            f"{len(shared)} tasks of the panel of {run.folder} are among those that the writer was shown or that its "
            f"run validated on, {shared[0]} for one; use a panel without them"
        )
    if not comparison.tasks:
        raise SkillBankError(f"{run.folder} kept no outcomes per task; evaluate with trainer.v1.trainer_mode=sdar")


def _task_types(run: RunData, arm: str) -> dict[str, str]:
    """Task -> its type, from the outcomes of a run's validations."""
    found: dict[str, str] = {}
    for columns in run.outcomes.values():
        for name, task, kind in zip(columns["arm"], columns["task_id"], columns["task_type"], strict=True):
            if name == arm and task is not None:
                found[str(task)] = str(kind)
    return found


def as_json(verdicts: list[Verdict]) -> str:
    """For scripts."""
    rows = [
        {
            "skill": verdict.skill.name,
            "tasks": verdict.tasks,
            **verdict.numbers,
            "taken": verdict.taken,
        }
        for verdict in verdicts
    ]
    return json.dumps(rows, indent=1)
