"""Makes the teacher's text for a row: the contexts of ``sdar.context.sources`` in order, then the control; with
``sdar.context.teachers`` each of them is a teacher's of its own.

The same object serves both places where teacher prompts are made: the agent loop, when everything is known before an
episode begins, and the trainer, when a context reads finished episodes (``late``). A bad context to compare with
(``sdar.context.contrast``) is a second such object beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from sdar_verl.config.context import ContextConfig, ContrastConfig, TeachersConfig
from sdar_verl.context import builtin  # noqa: F401  registers the contexts of this package
from sdar_verl.context.base import ContextRequest, Passage
from sdar_verl.context.controls import placebo
from sdar_verl.context.registry import Context, ContextError, check_contexts, get_context
from sdar_verl.context.words import WORDS
from sdar_verl.envs.base import Task
from sdar_verl.fields import contrast_pass, teacher_pass

MIN_KNOWN_WORDS = 16
TASK_TYPE = "task_type"


class Part(NamedTuple):
    """What one pass of a row shows: the contexts together, and which of their different texts.

    Attributes:
        teacher: the source whose teacher it is; empty where all of them have one teacher.
        contexts: shown together, in this order.
        number: of the text.
    """

    teacher: str
    contexts: Sequence[Context]
    number: int = 0

    @property
    def draw(self) -> str:
        """Tells the draws of its placebo from those of the row's other passes."""
        return self.teacher or str(self.number or "")


class ContextBuilder:
    """Contexts of one run.

    Args:
        settings: the ``sdar.context`` node, or ``contrast`` within it.
        tokenizer: of the policy; placebos of the same length need it.
        seed: of the draws, for the inner node, which has none of its own.

    Attributes:
        control: the placebo.
        contrast: contexts of the bad slot; None without one.

    Raises:
        ContextError: see :func:`~sdar_verl.context.registry.check_contexts`.
    """

    def __init__(self, settings: ContextConfig | ContrastConfig, tokenizer: Any, seed: int | None = None) -> None:
        bad = isinstance(settings, ContrastConfig)
        check_contexts(settings.sources, settings.options, "sdar.context.contrast" if bad else "sdar.context")
        self._settings = settings
        self._tokenizer = tokenizer
        self._contexts = [get_context(name) for name in settings.sources]
        self._prefix = "contrast/" if bad else ""  # of a slot's early passages: its options are its own
        self.control = settings.control
        self.seed = seed
        self._texts, self._teachers = 1, TeachersConfig()
        self.contrast: ContextBuilder | None = None
        if isinstance(settings, ContrastConfig):
            self._texts = settings.texts
        else:
            self.seed, self._teachers = settings.seed, settings.teachers
            if settings.contrast.sources:
                self.contrast = ContextBuilder(settings.contrast, tokenizer, settings.seed)

    @property
    def late(self) -> bool:
        """Whether teacher prompts can only be made when the whole group has ended."""
        assert isinstance(self._settings, ContextConfig)
        return is_late(self._settings)

    @property
    def by_turn(self) -> bool:
        """Whether an episode's turns have contexts of their own, in either slot."""
        return any(context.by_turn for context in self._contexts) or (
            self.contrast is not None and self.contrast.by_turn
        )

    def parts(self, task: Task) -> list[Part]:
        """What the passes of a row of this task show, as far as it exists: one, one per mixed teacher, one per text.

        Raises:
            ContextError: no teacher is chosen for the task.
        """
        if self._teachers.weights:
            return [Part(context.name, [context]) for context in self._contexts]
        contexts = self._chosen(task)
        teacher = contexts[0].name if self._teachers.by is not None else ""
        return [Part(teacher, contexts, number) for number in range(self._texts)]

    def teachers(self, task: Task) -> tuple[str, ...]:
        """The sources whose teachers a row of this task has; empty where all have one teacher."""
        return tuple(part.teacher for part in self.parts(task) if part.teacher)

    def _chosen(self, task: Task) -> list[Context]:
        if self._teachers.by is None:
            return self._contexts
        name = chosen_source(self._teachers, task)
        return [context for context in self._contexts if context.name == name]

    def early_passages(self, request: ContextRequest) -> dict[str, Passage]:
        """Name -> passage of every context that is known before the episode; those of the bad slot have a prefix."""
        found = {
            self._prefix + context.name: context.make(request, self._options(context.name))
            for context in self._chosen(request.task)
            if not context.late
        }
        return found if self.contrast is None else found | self.contrast.early_passages(request)

    @property
    def writes(self) -> bool:
        """Whether a context of either slot asks the run's writer."""
        written = any(context.writes for context in self._contexts)
        return written or (self.contrast is not None and self.contrast.writes)

    def written(self, part: Part) -> dict[str, tuple[Context, Mapping[str, Any]]]:
        """What of it the run's writer is asked for: name among early passages -> context and its options."""
        found = (context for context in part.contexts if context.writes)
        return {self._prefix + context.name: (context, self._options(context.name)) for context in found}

    def passage(self, request: ContextRequest, made: Mapping[str, Passage], part: Part | None = None) -> Passage:
        """The contexts of a part, in its order; with an empty text when there is none.

        Args:
            request: with the finished episodes, where a context is late.
            made: those made already, see :meth:`early_passages` and :meth:`written`; none was written where one is
                missing.
            part: one of :meth:`parts`; None: the first.
        """
        passages = []
        for context in (part or self.parts(request.task)[0]).contexts:
            name = self._prefix + context.name
            if context.writes:
                passages.append(made.get(name, Passage("")))
            else:
                passages.append(context.make(request, self._options(context.name)) if context.late else made[name])
        return join(passages)

    def controlled(self, real: Passage, task_id: str, other: Passage | None = None, draw: str = "") -> Passage | None:
        """What the teacher sees: ``real``, or its placebo by ``sdar.context.control``; None when it has no say.

        Args:
            real: see :meth:`passage`.
            task_id: seeds the placebo's draws.
            other: the passage of a task of another type, for the control ``wrong``.
            draw: of the part, see :class:`Part`.
        """
        if not real.text:
            return None
        control, named = self.control, f"{task_id}:{draw}" if draw else task_id
        made = placebo(
            control,
            real,
            seed=f"{self.seed}:{named}",
            count_tokens=self.count_tokens,
            other=other,
            vocabulary=self._known_words if control == "random_text" else WORDS,
        )
        return made if made is None or made.text or control == "empty" else None

    def count_tokens(self, text: str) -> int:
        """Tokens of ``text``, without special ones."""
        return len(self._ids(text))

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _options(self, name: str) -> Mapping[str, Any]:
        return self._settings.options.get(name, {})

    @cached_property
    def _known_words(self) -> Sequence[str]:
        """Words that the tokenizer knows: a small word-level one makes one and the same token of all others."""
        unknown = getattr(self._tokenizer, "unk_token_id", None)
        known = [word for word in WORDS if unknown is None or unknown not in self._ids(word)]
        if len(known) < MIN_KNOWN_WORDS:
            raise ContextError(
                f"sdar.context.control=random_text: the tokenizer knows {len(known)} of the {len(WORDS)} words to "
                "draw from, too few for a text; use control=shuffled or wrong"
            )
        return known


def choosing_value(teachers: TeachersConfig, task: Task) -> str | None:
    """What a task has in ``sdar.context.teachers.by``; None: no such column."""
    assert teachers.by is not None
    if teachers.by == TASK_TYPE:
        return task.task_type
    value = task.at(teachers.by)
    return None if value is None else str(value)


def chosen_source(teachers: TeachersConfig, task: Task) -> str:
    """The source that ``sdar.context.teachers.choice`` has for a task.

    Raises:
        ContextError: it has none.
    """
    value = choosing_value(teachers, task)
    if value is None:
        keys = ", ".join(sorted(task.data)) or "nothing"
        raise ContextError(
            f"sdar.context.teachers.by={teachers.by}: task {task.task_id!r} has no such column in its data (it has: "
            f"{keys}); name another, or {TASK_TYPE}"
        )
    if value not in teachers.choice:
        known = ", ".join(sorted(teachers.choice)) or "none"
        raise ContextError(
            f"sdar.context.teachers.choice has no teacher for {teachers.by}={value} (task {task.task_id!r}); known: "
            f"{known}. Add choice.{value}=SOURCE"
        )
    return teachers.choice[value]


def further_passes(settings: ContextConfig) -> list[str]:
    """Names of the teacher passes that a row may have beyond the first: its other teachers', a bad context's texts'."""
    others = [teacher_pass(number) for number in range(1, len(settings.teachers.weights))]
    texts = settings.contrast.texts if settings.contrast.sources else 0
    return others + [contrast_pass(number) for number in range(texts)]


def is_late(settings: ContextConfig) -> bool:
    """Whether a source reads finished episodes, or something else is known only when the group has ended: a context of
    another group (``control=wrong``), how the episode went (``episodes``); or the trainer makes prompts of its own, of
    several teachers, of a bad context."""
    waits = (settings.control == "wrong", settings.episodes != "all", bool(further_passes(settings)))
    return any(waits) or any(get_context(name).late for name in settings.sources)


def late_options(settings: ContextConfig) -> str:
    """The options that make it late, for messages."""
    if settings.contrast.sources:
        return f"sdar.context.contrast.sources={settings.contrast.sources}"
    if settings.teachers.weights:
        return f"sdar.context.teachers.weights={settings.teachers.weights}"
    if settings.episodes != "all":
        return f"sdar.context.episodes={settings.episodes}"
    return f"sdar.context.sources={settings.sources} with control={settings.control}"


def join(passages: Sequence[Passage]) -> Passage:
    """Several passages as one, a blank line between them."""
    return Passage(
        text="\n\n".join(passage.text for passage in passages if passage.text),
        skills=tuple(name for passage in passages for name in passage.skills),
        no_match=any(passage.no_match for passage in passages),
        dropped=sum(passage.dropped for passage in passages),
    )
