"""Runs the contexts that ask a writer, all of a step together: every round of theirs is one batch of prompts."""

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from sdar_verl.context.base import Passage
from sdar_verl.context.prompt import Prompt, UnreadableAnswer
from sdar_verl.context.registry import Context, ContextError

Key = TypeVar("Key", bound=Hashable)

Ask = Callable[[Sequence[Prompt]], Sequence[str | None]]
"""Answers prompts, in order; the same prompt may be there several times."""

Job = tuple[Context, Any, Mapping[str, Any]]
"""A context to be made, of what (a :class:`~sdar_verl.context.base.ContextRequest`), and its options."""


@dataclass
class _Open:
    """A context that waits for answers to ``prompts``; ``single``: it yielded one and no list."""

    context: Context
    generator: Generator[Any, Any, Any]
    prompts: list[Prompt]
    single: bool = True


def written_passages(
    jobs: Mapping[Key, Job], ask: Ask, unreadable: Callable[[Sequence[Prompt]], None]
) -> dict[Key, Passage]:
    """Make contexts that ask a writer.

    Args:
        jobs: by name, in the order in which they ask.
        ask: called once per round, with the prompts of all that wait.
        unreadable: told of prompts whose answers a context could not read; it has no passage then.

    Returns:
        The passages that there are; empty ones, too.

    Raises:
        ContextError: a function fails, or yields something else than prompts.
    """
    made: dict[Key, Passage] = {}
    waiting: dict[Key, _Open] = {}

    def go_on(key: Key, job: _Open, answer: Any) -> None:
        with job.context.named_faults():
            try:
                asked = job.generator.send(answer)
            except StopIteration as end:
                made[key] = job.context.passage(end.value)
                return
            except UnreadableAnswer:
                unreadable(job.prompts)
                return
        job.single = not isinstance(asked, list)
        job.prompts = [one if isinstance(one, Prompt) else _prompt(one, job.context) for one in _listed(asked)]
        waiting[key] = job

    for key, (context, request, options) in jobs.items():
        with context.named_faults():
            generator = context.function(request, **options)
        go_on(key, _Open(context, generator, []), None)  # type: ignore[arg-type]
    while waiting:
        answers = iter(ask([prompt for job in waiting.values() for prompt in job.prompts]))
        open_jobs, waiting = waiting, {}
        for key, job in open_jobs.items():
            said = [next(answers) for _ in job.prompts]
            go_on(key, job, said[0] if job.single else said)
    return made


def _listed(asked: Any) -> list[Any]:
    return asked if isinstance(asked, list) else [asked]


def _prompt(asked: Any, context: Context) -> Prompt:
    if isinstance(asked, str):
        return Prompt(asked)
    raise ContextError(
        f"context {context.name!r} yields {type(asked).__name__}; it must yield a text, a Prompt, or a list of them"
    )
