"""Writes docs/options.md and hydra_configs/sdar_node.yaml from the typed settings of the ``sdar:`` node.

python scripts/make_options_doc.py            write both
python scripts/make_options_doc.py --check    exit status 1 when one is stale
"""

from __future__ import annotations

import sys
import textwrap
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from sdar_verl.algorithm.gates import list_gates
from sdar_verl.algorithm.objectives import list_objectives
from sdar_verl.algorithm.schedules import list_schedules
from sdar_verl.algorithm.signals import list_signals
from sdar_verl.config import SdarConfig
from sdar_verl.context import builtin  # noqa: F401  registers the contexts
from sdar_verl.context.registry import context_names
from sdar_verl.envs.registry import known_envs
from sdar_verl.rollout.prompts import template_names
from sdar_verl.skills.bank import bank_names
from sdar_verl.skills.retrieval import retriever_names
from sdar_verl.teacher.sources import list_sources

ROOT = Path(__file__).resolve().parents[1]
WIDTH = 120

# Options whose values are names that a registry or a folder knows.
NAMES: dict[str, tuple[Callable[[], typing.Iterable[str]], str]] = {
    "sdar.loss.gate": (list_gates, ""),
    "sdar.loss.objective": (list_objectives, ""),
    "sdar.loss.signal": (list_signals, ""),
    "sdar.loss.coef_schedule.name": (list_schedules, ""),
    # grad_share follows a gradient that lambda moves.
    "sdar.loss.beta_schedule.name": (lambda: (name for name in list_schedules() if name != "grad_share"), ""),
    "sdar.teacher.source": (list_sources, ", `none`"),
    "sdar.context.sources": (context_names, ", or one registered by `sdar.modules`; a list"),
    "sdar.skills.bank": (bank_names, ", or a folder"),
    "sdar.skills.retrieval": (retriever_names, "; a list"),
    "sdar.env.name": (known_envs, ", or one registered by `sdar.modules`"),
    "sdar.prompt.template": (template_names, ", or a `.jinja` file"),
}

HEADER = """\
# Options of the `sdar:` node

Written by `python scripts/make_options_doc.py` from `sdar_verl/config/`; a test fails when it is stale.

An unknown key, or a value that is not allowed, stops the run before Ray starts, with a message that names the option.
Options are set like any of verl's: `sdar.loss.coef=0.1` on the command line, or in a YAML file of your own. Everything
that is verl's (group size, learning rate, KL, clip range, ...) stays in verl's nodes.

`<arm>` stands for a name of your choice. A recipe that names arms adds to those it inherits; beside another arm, leave
an inherited one out with `~sdar.validation.arms.student`. Keyword arguments for `sdar.env.options` are listed in
[environments.md](environments.md).
"""


class Option(NamedTuple):
    """One row: dotted name, default in YAML, allowed values, meaning."""

    name: str
    default: str
    allowed: str
    meaning: str


def main(arguments: list[str]) -> int:
    """Write or check; returns the exit status."""
    status = 0
    for path, text in (
        (ROOT / "docs" / "options.md", render()),
        (
            ROOT / "hydra_configs" / "sdar_node.yaml",
            NODE_HEADER + node("sdar", SdarConfig, SdarConfig(), "") + NODE_END,
        ),
    ):
        if "--check" not in arguments:
            path.write_text(text)
        elif not path.is_file() or path.read_text() != text:
            print(f"{path} is stale: run python scripts/{Path(__file__).name}", file=sys.stderr)
            status = 1
    return status


NODE_HEADER = """\
# @package _global_
# The sdar node with all its options and their defaults, the trainer that reads it, and the check of a run before Ray
# starts. Of verl's nothing else is set. Written by scripts/make_options_doc.py from sdar_verl/config/, which holds
# types, ranges and sources.

"""
NODE_END = """
trainer:

  v1:

    # verl's synchronous trainer with a teacher pass.
    trainer_mode: sdar

# Read the config once more with all of verl's nodes in view, before Ray starts.
hydra:

  callbacks:

    sdar_check:

      _target_: sdar_verl.checks.callback.CheckBeforeStart
"""


def node(name: str, model: type[BaseModel], value: BaseModel, indent: str) -> str:
    """A node as YAML: the model's own words above each key."""
    lines = [*_comment(" ".join((model.__doc__ or "").split()), indent), f"{indent}{name}:"]
    text = "\n".join(lines) + "\n"
    inner = f"{indent}  "
    for key, field in model.model_fields.items():
        mine = getattr(value, key)
        if isinstance(mine, BaseModel):
            text += "\n" + node(key, type(mine), mine, inner)
            continue
        text += "\n" + "".join(f"{line}\n" for line in _comment(field.description or "", inner))
        if isinstance(mine, dict) and any(isinstance(item, BaseModel) for item in mine.values()):
            text += f"{inner}{key}:\n"
            for arm, item in mine.items():
                text += "\n" + node(arm, type(item), item, f"{inner}  ")
            continue
        shown = yaml.safe_dump(mine, default_flow_style=True, width=10_000).removesuffix("...\n").strip()
        text += f"{inner}{key}: {shown}\n"
    return text


def _comment(text: str, indent: str) -> list[str]:
    plain = text.replace("``", "").strip()
    mark = f"{indent}# "
    return textwrap.wrap(plain[:1].upper() + plain[1:], WIDTH, initial_indent=mark, subsequent_indent=mark)


def render() -> str:
    """The whole document."""
    parts = [HEADER, _table("sdar", SdarConfig, lambda field: not _is_node(field))]
    for name, field in SdarConfig.model_fields.items():
        if _is_node(field):
            parts.append(_table(f"sdar.{name}", field.annotation, lambda _: True))
    return "".join(parts)


def _is_node(field: FieldInfo) -> bool:
    return isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)


def _table(name: str, model: type[BaseModel], chosen: Callable[[FieldInfo], bool]) -> str:
    summary = " ".join((model.__doc__ or "").split()).replace("``", "`")
    rows = "\n".join(f"| {' | '.join(option)} |" for option in _options(model, name, chosen))
    return f"\n## `{name}`\n\n{summary}\n\n| option | default | allowed | meaning |\n|---|---|---|---|\n{rows}\n"


def _options(
    model: type[BaseModel], prefix: str, chosen: Callable[[FieldInfo], bool] = lambda _: True
) -> Iterator[Option]:
    for key, field in model.model_fields.items():
        if not chosen(field):
            continue
        name = f"{prefix}.{key}"
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _options(field.annotation, name)
            continue
        yield Option(f"`{name}`", _default(field), _allowed(name, field), _escape(field.description or ""))
        values = typing.get_args(field.annotation)[1:] if typing.get_origin(field.annotation) is dict else ()
        for value in values:
            if isinstance(value, type) and issubclass(value, BaseModel):
                yield from _options(value, f"{name}.<{key.removesuffix('s')}>")


def _escape(text: str) -> str:
    """Plain text as a cell of a Markdown table."""
    return text.replace("|", "\\|").replace("<", "&lt;")


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "none, must be given"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, dict):
        value = {key: item.model_dump() if isinstance(item, BaseModel) else item for key, item in value.items()}
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("...\n").strip()
    return f"`{text}`"


def _allowed(name: str, field: FieldInfo) -> str:
    if name in NAMES:
        names, more = NAMES[name]
        return ", ".join(f"`{known}`" for known in names()) + more
    limits = {
        symbol: getattr(limit, attribute)
        for limit in field.metadata
        for attribute, symbol in (("ge", "at least"), ("gt", "above"), ("lt", "below"), ("min_length", "at least"))
        if getattr(limit, attribute, None) is not None
    }
    kind = _type_name(field.annotation)
    if kind.startswith(("text", "a list", "a mapping")):
        return kind + (", not empty" if limits else "")
    return kind + "".join(f", {symbol} {limit:g}" for symbol, limit in limits.items())


def _type_name(annotation: Any) -> str:
    if typing.get_origin(annotation) is Literal:
        return ", ".join(f"`{value}`" for value in typing.get_args(annotation))
    if isinstance(annotation, UnionType) or typing.get_origin(annotation) is typing.Union:
        parts = [part for part in typing.get_args(annotation) if part is not NoneType]
        return " or ".join(["null", *map(_type_name, parts)])
    simple = {float: "number", int: "whole number", bool: "`true`, `false`", str: "text"}
    if annotation in simple:
        return simple[annotation]
    origin = typing.get_origin(annotation)
    if origin is list:
        item = typing.get_args(annotation)[0]
        return "a list of numbers" if float in (item, *typing.get_args(item)) else "a list of names"
    if origin is dict:
        return "a mapping"
    raise TypeError(f"no words for the type {annotation}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
