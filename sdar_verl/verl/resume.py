"""Guards verl's ``resume_mode=auto``: a run must not go on from the checkpoint of another experiment."""

from __future__ import annotations

import json
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from sdar_verl.atomic import write_text_atomically
from sdar_verl.checks.options import Defaults, find_entry, flat, is_listed, options_of, verl_nodes
from sdar_verl.checks.panel_tasks import panel_digests
from sdar_verl.checks.resume import TRACKER, checkpoint_folder, folder_faults
from sdar_verl.config import SdarConfig, load_config
from sdar_verl.errors import ConfigError
from sdar_verl.panels import PanelError, panel_digest
from sdar_verl.recipe import plays_environments
from sdar_verl.rollout.messages import PLACES
from sdar_verl.rollout.prompts import PromptTemplate, PromptTemplateError
from sdar_verl.skills.bank import SkillBank, SkillBankError
from sdar_verl.text_files import TextFileError, read_text
from sdar_verl.untrusted import parse_json, shorten

RUN_FILE = "sdar_run.json"
_PANEL = "data.train_files (hashes)"
_HASH = " (hash)"
"""Behind the name of an option that names a file or folder: what is compared is its content."""
_LENGTH = ("trainer.total_training_steps", "trainer.total_epochs")
_NAMED = 12


def fingerprint(config: DictConfig) -> dict[str, Any]:
    """Option -> value of everything that makes this experiment what it is.

    That is the resolved config, verl's nodes and ours, but for what ``verl_options.yaml`` lets a run change.
    """
    kept = {key: value for key, value in options_of(config).items() if _counts(key)}
    length = _LENGTH[:1] if OmegaConf.select(config, _LENGTH[0]) is not None else _LENGTH
    dropped = {*_LENGTH} - ({*length} if _learning_rate_follows_length(config) else set())
    kept = {key: value for key, value in kept.items() if key not in dropped}
    # As they will be read back.
    as_read: dict[str, Any] = json.loads(json.dumps(kept, default=str))
    return as_read


def experiment_faults(config: DictConfig, sdar: SdarConfig) -> list[str]:
    """What differs between this run and the checkpoint that ``trainer.resume_mode=auto`` would go on from; one text."""
    folder = checkpoint_folder(config)
    note = folder / RUN_FILE
    if config.trainer.resume_mode != "auto" or folder_faults(config):
        return []
    if not (folder / TRACKER).is_file() or not note.is_file():
        return []
    try:
        found = parse_json(note.read_bytes())
        if not isinstance(found, dict):
            raise ValueError(f"it holds {shorten(found)}, not an object")
    except (ValueError, OSError) as error:
        return [
            f"{note} is damaged ({error}), so nobody can tell whether its checkpoints are of this experiment; "
            "remove it when they are, or start over with trainer.resume_mode=disable"
        ]
    try:
        changes = differences(found, experiment(config), config)
    except PanelError:
        return []  # told by the checks of the data
    if not changes:
        return []
    return [
        f"trainer.default_local_dir={folder} holds checkpoints of another experiment ({named(changes)}). Give this "
        "run its own folder (trainer.experiment_name=... or trainer.default_local_dir=...), or start over with "
        f"trainer.resume_mode=disable. To go on from them all the same, remove {note}"
    ]


def claim_checkpoints(config: DictConfig) -> None:
    """Note this experiment in its checkpoint folder, or refuse the folder of another one.

    Raises:
        PanelError: a training panel is missing or not one of ours.
        ConfigError: ``trainer.resume_mode=auto`` would resume an experiment with other settings, which it names; or the
            note is damaged.
    """
    folder = checkpoint_folder(config)
    if faults := experiment_faults(config, SdarConfig()):
        raise ConfigError("\n".join(faults))
    text = json.dumps(experiment(config), indent=1) + "\n"
    note = folder / RUN_FILE
    if config.trainer.resume_mode == "disable" and not (note.is_file() and note.read_text(encoding="utf-8") == text):
        # Else the same command, started again before the first save, would go on from the other experiment.
        (folder / TRACKER).unlink(missing_ok=True)
    write_text_atomically(note, text)


def experiment(config: DictConfig) -> dict[str, Any]:
    """The note of an experiment: its fingerprint, and the hashes of its training panels.

    Raises:
        PanelError: a training panel is missing or not one of ours.
    """
    # Where the panel lies may change, but data.pt holds a place in it.
    digests = {f"{option}{_HASH}": digest for option, digest in content_digests(config).items()}
    return {**fingerprint(config), **digests, _PANEL: panel_digests(config, "train_files")}


def content_digests(config: DictConfig) -> dict[str, str]:
    """Option -> hash of the skill bank and the templates of this run, where it has them; faults of theirs are told
    elsewhere."""
    try:
        sdar = load_config(config.get("sdar"))
    except ConfigError:
        return {}
    made = {}
    if sdar.skills.learn.panel is not None:
        with suppress(PanelError):
            made["sdar.skills.learn.panel"] = panel_digest(sdar.skills.learn.panel)
    taught = "skills" in sdar.context.named and sdar.teacher.source != "none"
    if taught or sdar.context.student == "skills":
        with suppress(SkillBankError):
            made["sdar.skills.bank"] = SkillBank.load(sdar.skills.bank).digest
    if plays_environments(config):
        with suppress(PromptTemplateError):
            made["sdar.prompt.template"] = PromptTemplate.load(sdar.prompt.template).digest
    elif sdar.context.place not in PLACES:
        with suppress(TextFileError):
            made["sdar.context.place"] = sha256(read_text(Path(sdar.context.place)).encode()).hexdigest()
    return made


def differences(found: dict[str, Any], wanted: dict[str, Any], config: DictConfig) -> list[str]:
    """``option: value there, value here``; an option that one of the two versions did not have yet had its default."""
    found, defaults = flat(found), Defaults(config)
    changes = []
    for key in sorted({*found, *wanted}):
        if key.endswith(_HASH):
            if key in found and key in wanted and found[key] != wanted[key]:
                changes.append(
                    f"the content of {key.removesuffix(_HASH)}: {found[key][:12]} there, {wanted[key][:12]} here"
                )
            continue
        if f"{key}{_HASH}" in found and f"{key}{_HASH}" in wanted:
            continue  # wherever it lies
        if {} in (found.get(key), wanted.get(key)):
            continue  # nothing set in that node, on one side; what is set on the other has names of its own
        if key != _PANEL and (not _counts(key) or (key in _LENGTH and not {key} <= {*found} & {*wanted})):
            continue
        there, here = found.get(key), wanted.get(key)
        if key not in found and defaults.has(key, here):
            continue
        if _bare(there) != _bare(here):
            changes.append(f"{key}: {there!r} there, {here!r} here")
    return changes


def _bare(value: Any) -> Any:
    """A folder is the same with a slash at its end."""
    return value.rstrip("/") if isinstance(value, str) else value


def _counts(key: str) -> bool:
    if key.split(".")[0] not in {*verl_nodes(), "sdar", "model_engine"} or key.endswith("_target_"):
        return False
    entry = find_entry(key)  # what does nothing is at its default, which may follow an option that may change
    return not (is_listed("may_change", key) or (entry is not None and entry.status in ("no_effect", "refused")))


def _learning_rate_follows_length(config: DictConfig) -> bool:
    """Whether a longer run has another learning rate at the same step."""
    optimizer = OmegaConf.select(config, "actor_rollout_ref.actor.optim") or {}
    warmup = (optimizer.get("lr_warmup_steps", -1) or -1) < 0 and optimizer.get("lr_warmup_steps_ratio", 0)
    return bool(warmup) or "cosine" in (optimizer.get("lr_scheduler_type", None), optimizer.get("warmup_style", None))


def resumed_folder(config: DictConfig, step: int) -> Path:
    """The checkpoint folder that verl has just resumed from."""
    if config.trainer.resume_mode == "resume_path":
        return Path(str(config.trainer.resume_from_path))
    return checkpoint_folder(config) / f"global_step_{step}"


def from_scratch(config: DictConfig) -> str:
    """A line for a run that should have resumed and found nothing but checkpoints that were never finished."""
    folder = checkpoint_folder(config)
    left = sorted(path.name for path in folder.glob("global_step_*"))
    if config.trainer.resume_mode != "auto" or not left:
        return ""
    return (
        f"sdar: {folder} holds {', '.join(left)}, but no {TRACKER}: none was finished, training starts from scratch\n"
    )


def named(changes: list[str]) -> str:
    """The first of ``changes``, and how many more there are."""
    more = f"; and {len(changes) - _NAMED} more" if len(changes) > _NAMED else ""
    return "; ".join(changes[:_NAMED]) + more
