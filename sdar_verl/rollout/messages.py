"""The teacher's messages: a row's own, with the privileged context put in (``sdar.context.place``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from sdar_verl.rollout.control import control_strings_of, neutralise
from sdar_verl.rollout.prompts import PromptTemplateError
from sdar_verl.text_files import TextFileError, read_text
from sdar_verl.untrusted import shorten

Message = Mapping[str, Any]

PLACES = ("user", "system")
"""Words of ``sdar.context.place``; anything else is the path of a template."""

_SLOTS = ("prompt", "context")


class MessagesError(ValueError):
    """A row's messages have a form into which no context can be put."""


class ContextPlace:
    """Puts a context into messages.

    Args:
        place: ``user`` (behind the last user message), ``system`` (behind the system message, or as one), or the path
            of a Jinja template with the slots ``prompt`` (the last user message) and ``context``.
        tokenizer: of the policy; its control strings in a context are broken by a space.
        chat_template_kwargs: of the chat template.

    Raises:
        PromptTemplateError: the template cannot be read, or does not show both slots.
    """

    def __init__(self, place: str, tokenizer: Any, chat_template_kwargs: Mapping[str, Any] | None = None):
        self._place = place
        self._control = control_strings_of(tokenizer, chat_template_kwargs)
        self._template = load_place(place)

    def put(self, messages: Sequence[Message], context: str) -> list[dict[str, Any]]:
        """A copy of ``messages`` with ``context`` in them; the same messages where it is empty.

        Raises:
            MessagesError: there is no user message, or its content is not text.
        """
        copied = [dict(message) for message in messages]
        if not context:
            return copied
        context = neutralise(context, self._control)
        if self._place == "system":
            if copied and copied[0]["role"] == "system":
                copied[0]["content"] = f"{_text(copied[0])}\n\n{context}"
            else:
                copied.insert(0, {"role": "system", "content": context})
            return copied
        last = next((message for message in reversed(copied) if message["role"] == "user"), None)
        if last is None:
            roles = ", ".join(str(message.get("role")) for message in copied) or "none"
            raise MessagesError(
                f"the prompt has no user message to put the context behind (its roles: {roles}); set "
                "sdar.context.place=system"
            )
        said = _text(last)
        if self._template is None:
            last["content"] = f"{said}\n\n{context}"
        else:
            last["content"] = self._template.render(prompt=said, context=context)
        return copied


def asks(messages: Any) -> bool:
    """Whether these are messages of one conversation, with something said by a user."""
    return isinstance(messages, Sequence) and any(
        isinstance(message, Mapping) and message.get("role") == "user" for message in messages
    )


def last_user_text(messages: Sequence[Message]) -> str:
    """What the user said last; empty where that is no text."""
    last = next((message for message in reversed(messages) if message.get("role") == "user"), None)
    content = last.get("content") if last is not None else None
    return content if isinstance(content, str) else ""


def _text(message: Message) -> str:
    content = message.get("content")
    if not isinstance(content, str):
        raise MessagesError(
            f"a message of role {message['role']} holds {shorten(content)} instead of text: prompts with images, "
            "videos or audio are not supported (data.image_key, data.video_key); leave such rows out of the data"
        )
    return content


def load_place(path: str) -> Any:
    """The template of a place; None for ``user`` and ``system``.

    Raises:
        PromptTemplateError: it cannot be read, or does not show both slots.
    """
    if path in PLACES:
        return None
    environment = ImmutableSandboxedEnvironment(keep_trailing_newline=False)
    try:
        source = read_text(Path(path))
        slots = meta.find_undeclared_variables(environment.parse(source))
        template = environment.from_string(source)
        shown = template.render(prompt="\ue000prompt", context="\ue000context")
    except (TextFileError, TemplateError) as error:
        raise PromptTemplateError(
            f"sdar.context.place={path}: {error}; it is user, system, or the path of a Jinja template"
        ) from error
    unknown = sorted(slots - set(_SLOTS))
    if unknown:
        raise PromptTemplateError(f"sdar.context.place={path}: unknown slots {unknown}; known: {list(_SLOTS)}")
    hidden = [slot for slot in _SLOTS if f"\ue000{slot}" not in shown]
    if hidden:
        raise PromptTemplateError(
            f"sdar.context.place={path} does not show {' and '.join(hidden)}; put "
            f"{', '.join('{{ ' + slot + ' }}' for slot in hidden)} into it"
        )
    return template
