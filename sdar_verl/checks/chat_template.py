"""Arguments of the chat template: Jinja passes over one that is not read, and takes any text for true."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from sdar_verl.config import SdarConfig

# What transformers' apply_chat_template and verl's loops take beside the template's own names.
_CALLERS = frozenset({"tools", "documents", "tokenizer_kwargs", "padding", "truncation", "max_length"})
# What every template has at hand, without an argument.
_TEMPLATES = frozenset({"messages", "add_generation_prompt", "raise_exception", "strftime_now", "bos_token",
                        "eos_token", "pad_token", "unk_token"})  # fmt: skip
_WORDS = ("true", "false")  # "none", "off" and the like are levels that templates ask for by name


def chat_template_faults(config: DictConfig, sdar: SdarConfig) -> list[str]:
    """Arguments that the model's chat template does not know, and flags that are texts; of a model that lies here."""
    given = {
        "data.apply_chat_template_kwargs": _plain(config.data.get("apply_chat_template_kwargs", None)),
        "sdar.context.chat_template_kwargs": sdar.context.chat_template_kwargs,
    }
    return [
        fault
        for option, arguments in given.items()
        if arguments
        for fault in (*_texts(option, arguments), *_unread(config, option, arguments))
    ]


def _plain(node: Any) -> Mapping[str, Any]:
    made: Any = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
    return made or {}


def _texts(option: str, arguments: Mapping[str, Any]) -> Iterator[str]:
    for name, value in arguments.items():
        if isinstance(value, str) and value.strip().lower() in _WORDS:
            yield (
                f"{option}.{name}={value!r} is a text, which a chat template takes for true whatever it says; write it "
                f"without quotes: {option}.{name}={value.strip().capitalize()}"
            )


def _unread(config: DictConfig, option: str, arguments: Mapping[str, Any]) -> Iterator[str]:
    read = _names_of(config)
    if read is None:
        return
    for name in sorted({*arguments} - read - _CALLERS):
        like = get_close_matches(name, read, 1)
        remedy = f"is {like[0]} meant?" if like else f"it reads {', '.join(sorted(read - _CALLERS)) or 'none'}"
        yield (
            f"{option}.{name}={arguments[name]} has no effect: the chat template of actor_rollout_ref.model.path="
            f"{config.actor_rollout_ref.model.path} does not read it; {remedy}"
        )


def _names_of(config: DictConfig) -> set[str] | None:
    """Names that the chat template reads; None where there is none to look at."""
    from jinja2 import Environment, TemplateSyntaxError, meta
    from transformers import AutoTokenizer

    model = config.actor_rollout_ref.model
    path = str(model.get("tokenizer_path", None) or model.path)
    template = model.get("custom_chat_template", None)
    if template is None and Path(path).is_dir():
        trust = model.get("trust_remote_code", False)
        try:
            template = AutoTokenizer.from_pretrained(path, trust_remote_code=trust).chat_template
        except (OSError, ValueError):
            return None  # told by whoever makes prompts
    if not isinstance(template, str):
        return None
    try:
        parsed = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(template)
    except TemplateSyntaxError:
        return None  # a tag of somebody's; whoever makes prompts tells what is wrong with it
    return meta.find_undeclared_variables(parsed) - _TEMPLATES
