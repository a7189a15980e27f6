"""What a writer is, and what a step counts of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

from sdar_verl.errors import RolloutError
from sdar_verl.table import LOST_LIMIT


@dataclass(frozen=True)
class Answer:
    """What came of one prompt.

    Attributes:
        text: None where there is none.
        tokens: read and written, as far as the writer says.
        cached: it was known before, and cost nothing.
        failure: why there is none although it was asked for.
        length: it ended where ``max_tokens`` were reached.
    """

    text: str | None = None
    tokens: int = 0
    cached: bool = False
    failure: str | None = None
    length: bool = False


LEAST = 8
"""Prompts that must have been sent before their failures are judged."""

NOT_PAID = Answer()
"""The budget is spent."""


class Writer(Protocol):
    """Answers prompts with text."""

    limit: int
    """Tokens of a prompt."""

    during_rollout: bool
    """It can answer as long as the rollout servers are awake, and no longer."""

    def tokens(self, text: str) -> int:
        """Of the prompt that ``text`` becomes."""

    def write(self, texts: Sequence[str], step: int) -> list[Answer]:
        """One answer to each, in order; all are sent at once. A failure is an answer, too.

        Args:
            texts: different ones.
            step: the trainer's.
        """


@dataclass
class WriterCounts:
    """What became of a step's prompts, over all rounds.

    Attributes:
        asked: different prompts.
        too_long: of these not sent, since even without what may be left out they are too long.
        cut: sent without their oldest turns.
        answered: got a text.
        cached: of the answered ones known before.
        failed: got none.
        length: ended at the endpoint's ``max_tokens``.
        over_budget: not sent, since the budget is spent.
        unparsed: of the answered ones not what was asked for.
        tokens: read and written.
        seconds: all of it took.
    """

    asked: int = 0
    too_long: int = 0
    cut: int = 0
    answered: int = 0
    cached: int = 0
    failed: int = 0
    length: int = 0
    over_budget: int = 0
    unparsed: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def add(self, answers: Sequence[Answer]) -> None:
        """Count what a writer gave."""
        self.answered += sum(answer.text is not None for answer in answers)
        self.cached += sum(answer.cached for answer in answers)
        self.over_budget += sum(answer == NOT_PAID for answer in answers)
        self.tokens += sum(answer.tokens for answer in answers)
        self.failed += sum(answer.failure is not None for answer in answers)
        self.length += sum(answer.length for answer in answers)

    def metrics(self) -> dict[str, float]:
        """Under the names of docs/metrics.md."""
        counts = asdict(self)
        return {"timing_s/writer": counts.pop("seconds"), **{f"sdar/writer/{name}": n for name, n in counts.items()}}


class FailureWatch:
    """Stops a run whose writer does not do its work, as one that loses most of its episodes is stopped.

    Looked at are at least :data:`LEAST` prompts: of one step, or where steps have few, of several. So a single prompt
    that a server refuses ends nothing.

    Args:
        what: names the writer.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._sent = 0
        self._reasons: Counter[str] = Counter()

    def add(self, answers: Sequence[Answer]) -> None:
        """Look at what a writer gave; known answers, and prompts that no budget was left for, are not its doing.

        Raises:
            RolloutError: more than half failed.
        """
        asked = [answer for answer in answers if not answer.cached and answer != NOT_PAID]
        self._sent += len(asked)
        self._reasons.update(answer.failure for answer in asked if answer.failure is not None)
        if self._sent < LEAST:
            return
        failed, sent = self._reasons.total(), self._sent
        told = "\n".join(f"{count} times: {reason}" for reason, count in self._reasons.most_common(3))
        self._sent, self._reasons = 0, Counter()
        if failed > LOST_LIMIT * sent:
            raise RolloutError(
                f"{self._what} left {failed} of {sent} prompts without an answer, so most contexts would be missing. "
                "Mend the cause and start again: trainer.resume_mode=auto goes on from the last checkpoint.\n" + told
            )
