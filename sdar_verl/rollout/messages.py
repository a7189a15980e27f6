"""The teacher's messages: a row's own, with the privileged context put in (``sdar.context.place``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from jinja2 import TemplateError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from sdar_verl.rollout.control import control_strings_of, neutralise
from sdar_verl.rollout.prompts import PromptTemplateError
from sdar_verl.text_files import TextFileError, read_text
from sdar_verl.untrusted import shorten

Message = Mapping[str, Any]
M = TypeVar("M", bound=Message)

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
        found = holder(copied, self._place)
        if found is None:
            copied.insert(0, {"role": "system", "content": context})
        elif self._template is None:
            found["content"] = f"{found['content']}\n\n{context}"
        else:
            found["content"] = self._template.render(prompt=found["content"], context=context)
        return copied


def holder(messages: Sequence[M], place: str) -> M | None:
    """The one of ``messages`` that a context is put into; None where it becomes a system message of its own.

    Raises:
        MessagesError: there is no user message, or its content is not text.
    """
    if place == "system":
        found = messages[0] if messages and messages[0].get("role") == "system" else None
    else:
        found = next((message for message in reversed(messages) if message.get("role") == "user"), None)
        if found is None:
            roles = ", ".join(str(message.get("role")) for message in messages) or "none"
            raise MessagesError(
                f"the prompt has no user message to put the context behind (its roles: {roles}); set "
                "sdar.context.place=system"
            )
    if found is not None and not isinstance(found.get("content"), str):
        raise MessagesError(
            f"a message of role {found['role']} holds {shorten(found.get('content'))} instead of text: write what is a "
            "list of parts as one text; prompts with images, videos or audio are not supported (data.image_key, "
            "data.video_key), leave such rows out of the data"
        )
    return found


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
    except Exception as error:  # a template's expressions can fail in any way Python can
        said = str(error) if isinstance(error, (TextFileError, TemplateError)) else f"{type(error).__name__}: {error}"
        raise PromptTemplateError(
            f"sdar.context.place={path}: {said}; it is user, system, or the path of a Jinja template"
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
