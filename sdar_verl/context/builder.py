"""Makes the teacher's text for a row: the contexts of ``sdar.context.sources`` in order, then the control.

The same object serves both places where teacher prompts are made: the agent loop, when everything is known before an
episode begins, and the trainer, when a context reads finished episodes (``late``). A bad context to compare with
(``sdar.context.contrast``) is a second such object beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from sdar_verl.config.context import ContextConfig, ContrastConfig
from sdar_verl.context import builtin  # noqa: F401  registers the contexts of this package
from sdar_verl.context.base import ContextRequest, Passage
from sdar_verl.context.controls import placebo
from sdar_verl.context.registry import Context, ContextError, check_contexts, get_context
from sdar_verl.context.words import WORDS

MIN_KNOWN_WORDS = 16


class ContextBuilder:
    """Contexts of one run.

    Args:
        settings: the ``sdar.context`` node, or ``contrast`` within it.
        tokenizer: of the policy; placebos of the same length need it.
        seed: of the draws, for the inner node, which has none of its own.

    Attributes:
        control: the placebo.
        texts: different texts per row.
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
        self.texts, self.seed = 1, seed
        self.contrast: ContextBuilder | None = None
        if isinstance(settings, ContrastConfig):
            self.texts = settings.texts
        else:
            self.seed = settings.seed
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

    def early_passages(self, request: ContextRequest) -> dict[str, Passage]:
        """Name -> passage of every context that is known before the episode; those of the bad slot have a prefix."""
        found = {
            self._prefix + context.name: context.make(request, self._options(context.name))
            for context in self._contexts
            if not context.late
        }
        return found if self.contrast is None else found | self.contrast.early_passages(request)

    @property
    def writes(self) -> bool:
        """Whether a context of either slot asks the run's writer."""
        return bool(self.written) or (self.contrast is not None and self.contrast.writes)

    @property
    def written(self) -> dict[str, tuple[Context, Mapping[str, Any]]]:
        """Contexts of this slot that ask the run's writer: name among early passages -> context and its options."""
        found = (context for context in self._contexts if context.writes)
        return {self._prefix + context.name: (context, self._options(context.name)) for context in found}

    def passage(self, request: ContextRequest, made: Mapping[str, Passage]) -> Passage:
        """All contexts in the order of ``sdar.context.sources``; with an empty text when there is none.

        Args:
            request: with the finished episodes, where a context is late.
            made: those made already, see :meth:`early_passages` and :attr:`written`; none was written where one is
                missing.
        """
        passages = []
        for context in self._contexts:
            name = self._prefix + context.name
            if context.writes:
                passages.append(made.get(name, Passage("")))
            else:
                passages.append(context.make(request, self._options(context.name)) if context.late else made[name])
        return join(passages)

    def controlled(self, real: Passage, task_id: str, other: Passage | None = None, number: int = 0) -> Passage | None:
        """What the teacher sees: ``real``, or its placebo by ``sdar.context.control``; None when it has no say.

        Args:
            real: see :meth:`passage`.
            task_id: seeds the placebo's draws.
            other: the passage of a task of another type, for the control ``wrong``.
            number: of the text, where a row has several.
        """
        if not real.text:
            return None
        control, named = self.control, f"{task_id}:{number}" if number else task_id
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


def is_late(settings: ContextConfig) -> bool:
    """Whether a source reads finished episodes, or something else is known only when the group has ended: a context of
    another group (``control=wrong``), how the episode went (``episodes``), a bad context, which the trainer makes."""
    waits = (settings.control == "wrong", settings.episodes != "all", bool(settings.contrast.sources))
    return any(waits) or any(get_context(name).late for name in settings.sources)


def late_options(settings: ContextConfig) -> str:
    """The options that make it late, for messages."""
    if settings.contrast.sources:
        return f"sdar.context.contrast.sources={settings.contrast.sources}"
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
