"""verl's options, all of them: which work here, which do nothing, which break a run (``verl_options.yaml``)."""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from importlib import resources, util
from typing import Any, Literal

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf

from sdar_verl.checks.modes import verl_mode
from sdar_verl.config import SdarConfig
from sdar_verl.recipe import plays_environments

Status = Literal["works", "verls", "needs", "recipes", "no_effect", "refused"]

_NUMBER = (int, float)

_OPTIM = "actor_rollout_ref.actor.optim"
_OPTIMIZER = ("optimizer_impl", "optimizer", "lr", "weight_decay", "betas", "override_optimizer_config")
_LISTS = ("checkpoint.load_contents", "model.external_lib")
"""Ends of options that take a list, though their default is none."""
_OR_A_WORD = ("trainer.logger", "lora.target_modules", "lora.exclude_modules", "model.external_lib")
"""Ends of options that take one word in the place of a list."""
_DATACLASSES = ("actor_rollout_ref.actor", "actor_rollout_ref.rollout", "algorithm")


def _is_whole(value: float, _: int) -> bool:
    return isinstance(value, int)  # verl counts with it: 4.0 fails in range()


_BOUNDS: dict[str, list[tuple[Callable[[Any, Any], bool], float]]] = {
    "whole, at least 1": [(_is_whole, 0), (operator.ge, 1)],
    "whole, other than 0": [(_is_whole, 0), (operator.ne, 0)],
    "whole, at least 0": [(_is_whole, 0), (operator.ge, 0)],
    "whole": [(_is_whole, 0)],
    "above 1": [(operator.gt, 1)],
    "at least 0": [(operator.ge, 0)],
    "above 0": [(operator.gt, 0)],
    "above 0 and at most 1": [(operator.gt, 0), (operator.le, 1)],
    "at least 0 and at most 1": [(operator.ge, 0), (operator.le, 1)],
    "any": [],
}


@dataclass(frozen=True)
class Entry:
    """What an option does here; ``why``: a test, a reason with a remedy, or (``needs``) the switch."""

    status: Status
    why: str


def option_faults(config: DictConfig, sdar: SdarConfig) -> list[str]:
    """Every option of verl's that is set to something that does nothing here, or breaks a run; one text each.

    In a recipe of verl's, whose flags stay as they are, what does nothing is no fault (:func:`idle_options`).
    """
    broken, idle = _option_faults(config)
    return broken + idle if plays_environments(config) else broken


def idle_options(config: DictConfig) -> list[str]:
    """Flags of a recipe of verl's that do nothing; most of them do nothing without us, either."""
    return [] if plays_environments(config) else _option_faults(config)[1]


def _option_faults(config: DictConfig) -> tuple[list[str], list[str]]:
    defaults, broken, idle = Defaults(config), [], []
    for key, value in _given(config).items():
        if key.startswith("sdar.") or key.endswith("_target_"):
            continue
        entry = find_entry(key)
        if entry is None and not key.startswith("trainer.v1."):  # a trainer of somebody's has a node there
            like = get_close_matches(key, verl_defaults(), 1)
            broken.append(
                f"{key}={value}: verl has no such option, or nothing in a run reads it"
                + (f"; is {like[0]} meant?" if like else "; leave it out")
            )
        if entry is None or entry.status in ("works", "verls") or defaults.has(key, value):
            continue
        if entry.status == "needs" and not _switched(config, entry.why):
            switch = entry.why.replace("|", " or ")
            idle.append(f"{key}={value} has no effect without {switch}; leave it out, or set that")
        elif entry.status == "no_effect" or (entry.status == "recipes" and plays_environments(config)):
            idle.append(f"{key}={value} has no effect: {entry.why}")
        elif entry.status == "refused":
            broken.append(f"{key}={value} is not supported: {entry.why}")
    return broken, idle


def missing_faults(config: DictConfig) -> list[str]:
    """What verl leaves to the user (``???``) and nobody has set."""
    unused = () if OmegaConf.select(config, "reward.reward_model.enable") else ("reward.reward_model.",)
    keys = [key for key, value in options_of(config, resolve=False).items() if value == "???"]
    return [f"{key} has no value; set it: {key}=..." for key in sorted(keys) if not key.startswith(unused)]


def type_faults(config: DictConfig, sdar: SdarConfig) -> list[str]:
    """Numbers, flags, lists and texts of verl's that are none, or out of range; the other checks rely on them."""
    # What is written out comes first: an interpolation that calculates with a word can only say that it cannot.
    written = {key: value for key, value in options_of(config, resolve=False).items() if "${" not in str(value)}
    return _type_faults(written) or _type_faults(options_of(config))


def _type_faults(values: Mapping[str, Any]) -> list[str]:
    defaults, faults = verl_defaults(), []
    bounds, texts = _table("numbers"), _table("texts")
    for key, value in values.items():
        bound = bounds.get(key)
        default = defaults.get(key)
        if key in verl_nodes():
            faults.append(f"{key}={_shown(value)} is a whole node of verl's; leave it out, or set options within it")
        elif key in texts:
            if value is None or not str(value).strip():
                faults.append(f"{key}={_shown(value)} must be {texts[key]}")
        elif isinstance(default, bool):
            if not isinstance(value, bool):
                faults.append(f"{key}={_shown(value)} must be True or False (verl's default: {default})")
        elif isinstance(default, list) or key.endswith(_LISTS):
            word = key.endswith(_OR_A_WORD)
            other = word and isinstance(value, str)
            none = value is None and ".checkpoint." not in key  # verl looks for words in those
            if not (isinstance(value, list) or other or none):
                usual = f"[{','.join(map(str, default))}]" if isinstance(default, list) else _shown(default)
                faults.append(f"{key}={_shown(value)} must be a list{word * ', or a name'} (verl's default: {usual})")
        elif bound is not None or isinstance(default, _NUMBER):
            wanted, _, null = (bound or "any").partition(", or ")
            if value is None and null:
                continue
            number = isinstance(value, _NUMBER) and not isinstance(value, bool) and math.isfinite(value)
            if not number or not all(compare(value, limit) for compare, limit in _BOUNDS[wanted]):
                bounded = wanted.removeprefix("whole").removeprefix(", ")
                text = "" if bounded in ("", "any") else f" {bounded}"
                usual = "" if not isinstance(default, _NUMBER) else f" (verl's default: {default})"
                kind = "a whole number" if wanted.startswith("whole") else "a number"
                faults.append(f"{key}={_shown(value)} must be {kind}{text}{null and ', or ' + null}{usual}")
    return faults


def dataclass_faults(config: DictConfig) -> list[str]:
    """What verl's own classes of settings refuse: they are made in its workers, after the start."""
    from verl.utils.config import omega_conf_to_dataclass

    faults = []
    for node in _DATACLASSES:
        settings = OmegaConf.select(config, node)
        try:
            omega_conf_to_dataclass(settings)
        except Exception as error:  # whatever they raise, verl would raise it later
            told = " ".join(str(error).split())
            faults.append(f"{node}: verl does not take these settings ({type(error).__name__}: {told[:400]})")
    return faults


def optimizer_faults(config: DictConfig) -> list[str]:
    """What PyTorch's optimizer refuses: it is made in the workers. Those of other packages may need a device."""
    from torch import nn, zeros
    from verl.utils.config import omega_conf_to_dataclass
    from verl.workers.config.optimizer import build_optimizer

    settings = config.actor_rollout_ref.actor.optim
    if settings.optimizer_impl.split(".")[0] != "torch":
        found = util.find_spec(settings.optimizer_impl.split(".")[0])
        return [] if found else [f"{_OPTIM}.optimizer_impl={settings.optimizer_impl}: no such package here; install it"]
    try:
        build_optimizer([nn.Parameter(zeros(1))], omega_conf_to_dataclass(settings))
    except Exception as error:  # whatever it raises, verl would raise it later
        given = ", ".join(f"{name}={settings[name]}" for name in _OPTIMIZER if settings[name] is not None)
        told = " ".join(str(error).split()).partition("Available optimizers")[0]
        return [f"{_OPTIM}: {given}: the optimizer cannot be made ({type(error).__name__}: {told[:400]})"]
    return []


def choice_faults(config: DictConfig, sdar: SdarConfig) -> list[str]:
    """Words that must be one of a few."""
    faults = []
    for key, words in _table("choices").items():
        value, known = OmegaConf.select(config, key), words.split()
        given = list(value) if OmegaConf.is_list(value) else [value]
        if OmegaConf.select(config, key.rpartition(".")[0]) is not None and not set(given) <= {*known}:
            faults.append(f"{key}={_shown(value)} must be of {', '.join(known)}")
    return faults


def path_faults(config: DictConfig, sdar: SdarConfig) -> list[str]:
    """verl takes a path as it is written: a ``~`` would be a folder of that name, and the shell expands few of them."""
    faults = []
    for key, value in options_of(config, resolve=False).items():
        if "${" in str(value):
            if "oc.env" not in str(value):
                continue  # told where it is written
            value = OmegaConf.select(config, key)
        if value == verl_defaults().get(key):
            continue
        if key == "trainer.default_local_dir" and "://" in str(value):
            faults.append(
                f"{key}={value}: verl writes checkpoints into a folder of this machine; name one, and for a bucket "
                f"add sdar.cloud.mirror={value}"
            )
        for path in value if isinstance(value, (list, ListConfig)) else [value]:
            if isinstance(path, str) and path.startswith("~"):
                faults.append(f'{key}={path}: verl does not expand ~; write "$HOME{path[1:]}", or the path from / on')
    return faults


def find_entry(key: str) -> Entry | None:
    """What the table says of an option: by its name, else by the longest node that it is in."""
    return next((entry for name in _names(key) if (entry := table().get(name)) is not None), None)


def is_listed(section: str, key: str) -> bool:
    """Whether a section of ``verl_options.yaml`` names the option, or a node that it is in."""
    return any(name in _table(section) for name in _names(key))


def _names(key: str) -> list[str]:
    parts = key.split(".")
    return [key, *(".".join([*parts[:end], "*"]) for end in range(len(parts), 0, -1))]


@cache
def table() -> dict[str, Entry]:
    """Option, or node with ``.*`` -> what it does here."""
    statuses: tuple[Status, ...] = ("works", "verls", "needs", "recipes", "no_effect", "refused")
    return {key: Entry(status, why) for status in statuses for key, why in _table(status).items()}


@cache
def _table(section: str) -> dict[str, str]:
    return {
        f"{node}.{name}": why
        for why, nodes in _sections()[section].items()
        for node, names in nodes.items()
        for name in names.split()
    }


@cache
def _sections() -> Any:
    text = resources.files("sdar_verl.checks").joinpath("verl_options.yaml").read_text(encoding="utf-8")
    return yaml.safe_load(text)


@cache
def verl_defaults() -> dict[str, Any]:
    """Every option of the installed verl's ``ppo_trainer`` -> its default, interpolations unresolved."""
    # The file that verl's own checks keep equal to its schema: reading it needs no second composition by Hydra.
    text = resources.files("verl.trainer.config").joinpath("_generated_ppo_trainer.yaml").read_text(encoding="utf-8")
    return flat(OmegaConf.to_container(OmegaConf.create(text), resolve=False))


@cache
def verl_nodes() -> frozenset[str]:
    """The top-level nodes that are verl's."""
    return frozenset(key.split(".")[0] for key in verl_defaults())


def options_of(config: DictConfig, *, resolve: bool = True) -> dict[str, Any]:
    """Name -> value of every option of verl's nodes and ours; Hydra's own node is not resolved outside of Hydra."""
    values: dict[str, Any] = {}
    for node in {*verl_nodes(), "model_engine", "sdar"} & {*config}:
        tree = config[node]
        values |= flat(OmegaConf.to_container(tree, resolve=resolve) if OmegaConf.is_config(tree) else tree, node)
    return dict(sorted(values.items()))


def _given(config: DictConfig) -> dict[str, Any]:
    """:func:`options_of` without what is written as verl's defaults are; to resolve an interpolation takes long."""
    values: dict[str, Any] = {}
    for key, value in options_of(config, resolve=False).items():
        if key not in verl_defaults() or value != verl_defaults()[key]:
            if "${" in str(value):
                value = OmegaConf.select(config, key)
                value = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
            values |= flat(value, key)
    return values


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings -> dotted name of each leaf: its value. Lists and empty mappings are leaves."""
    if not isinstance(tree, Mapping) or not tree:
        return {prefix: tree}
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= flat(value, f"{prefix}.{key}" if prefix else str(key))
    return leaves


class Defaults:
    """verl's defaults and ours as they would be in one config: many of verl's follow other options of it."""

    def __init__(self, config: DictConfig) -> None:
        self._config = config
        self._copy: DictConfig | None = None

    def has(self, key: str, value: Any) -> bool:
        """Whether the option has its default."""
        if key.startswith("sdar."):
            return bool(value == flat({"sdar": SdarConfig().model_dump()}).get(key))
        defaults, parts = verl_defaults(), key.split(".")
        for end in range(len(parts), 0, -1):
            name = ".".join(parts[:end])
            default = defaults.get(name)
            if isinstance(default, str) and "${" in default:
                return bool(value == self._follow(name, default, key))
        if key in defaults:
            return bool(value == defaults[key])
        return value == {} or any(known.startswith(f"{key}.") for known in defaults)

    def _follow(self, name: str, default: str, key: str) -> Any:
        if self._copy is None:
            self._copy = copy.deepcopy(self._config)
            OmegaConf.set_struct(self._copy, False)
        set_to = OmegaConf.select(self._copy, name)
        OmegaConf.update(self._copy, name, default)
        value = OmegaConf.select(self._copy, key)
        OmegaConf.update(self._copy, name, set_to, merge=False)  # what follows it goes on following
        return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def _switched(config: DictConfig, switch: str) -> bool:
    option, _, wanted = switch.partition("=")
    value = OmegaConf.select(config, option)
    if not wanted:
        return bool(value)
    words = wanted.split("|")
    if not option.endswith("trainer_mode") or value in words:
        return str(value) in words
    mode = verl_mode(str(value))  # a subclass of somebody's
    return mode is None or mode in map(verl_mode, words)


def _shown(value: Any) -> Any:
    return "null" if value is None else value


def unlisted() -> Iterator[str]:
    """Options of the installed verl that the table does not know; a test wants none."""
    return (key for key in verl_defaults() if not key.endswith("_target_") and find_entry(key) is None)
