"""A step's prompts on their way to the writer: fitted, cleaned, each sent once, counted."""

from __future__ import annotations

import logging
import time
from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

from sdar_verl.context.base import Passage
from sdar_verl.context.prompt import Prompt
from sdar_verl.context.writing import Job, written_passages
from sdar_verl.rollout.control import neutralise
from sdar_verl.writer.base import FailureWatch, Writer, WriterCounts

logger = logging.getLogger(__name__)

Key = TypeVar("Key", bound=Hashable)


class StepWriting:
    """Between contexts and writer.

    Args:
        writer: of the run.
        control: control strings of the policy's tokenizer and chat template, broken in whatever is sent.
    """

    def __init__(self, writer: Writer, control: Sequence[str]) -> None:
        self._writer = writer
        self._control = tuple(control)
        self._counts = WriterCounts()
        self._watch = FailureWatch(str(writer))

    @property
    def during_rollout(self) -> bool:
        """Whether the writer needs the rollout servers awake."""
        return self._writer.during_rollout

    def passages(self, jobs: Mapping[Key, Job], step: int) -> dict[Key, Passage]:
        """See :func:`~sdar_verl.context.writing.written_passages`.

        Raises:
            RolloutError: most of the prompts that were sent failed.
        """
        self._counts, started = WriterCounts(), time.perf_counter()
        fitted: dict[Prompt, str | None] = {}
        answers: dict[str, str | None] = {}
        unreadable: set[str] = set()
        causes: set[str] = set()

        def ask(prompts: Sequence[Prompt]) -> list[str | None]:
            for prompt in dict.fromkeys(prompts):
                if prompt not in fitted:
                    fitted[prompt] = self._fit(prompt)
            new = list(dict.fromkeys(t for p in prompts if (t := fitted[p]) is not None and t not in answers))
            if new:
                found = self._writer.write(new, step)
                self._counts.add(found)
                for cause in dict.fromkeys(answer.failure for answer in found):
                    if cause is not None and cause not in causes:
                        causes.add(cause)
                        logger.warning("the writer left prompts without an answer: %s", cause)
                self._watch.add(found)
                answers.update({text: answer.text for text, answer in zip(new, found, strict=True)})
            texts = [fitted[prompt] for prompt in prompts]
            return [None if text is None else answers[text] for text in texts]

        def not_read(prompts: Sequence[Prompt]) -> None:
            unreadable.update(text for prompt in prompts if (text := fitted[prompt]) is not None)

        made = written_passages(jobs, ask, not_read)
        self._counts.unparsed = sum(answers[text] is not None for text in unreadable)
        self._counts.seconds = time.perf_counter() - started
        return made

    def metrics(self) -> dict[str, float]:
        """Of the latest :meth:`passages`."""
        return self._counts.metrics()

    def _fit(self, prompt: Prompt) -> str | None:
        self._counts.asked += 1
        # Broken before it is measured: the spaces are tokens, too.
        clean = Prompt(*(self._clean(p) if isinstance(p, str) else tuple(map(self._clean, p)) for p in prompt.pieces))
        found = clean.fit(self._writer.limit, self._writer.tokens)
        if found is None:
            self._counts.too_long += 1
            return None
        text, cut = found
        self._counts.cut += cut
        return text

    def _clean(self, text: str) -> str:
        return neutralise(text, self._control)
