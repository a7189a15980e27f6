"""Search-QA: the agent answers a question, and may search a corpus before it does."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

from sdar_verl.envs.base import Step, Task, TextEnv
from sdar_verl.envs.fields import success_reward_of
from sdar_verl.envs.registry import register_env
from sdar_verl.envs.search.bm25 import MAX_QUERY_CHARACTERS, Bm25Retriever, Hit
from sdar_verl.envs.search.client import HttpRetriever
from sdar_verl.envs.search.passages import CorpusError, check_corpus
from sdar_verl.envs.search.retrievers import RetrieverSettings, get_retriever
from sdar_verl.envs.search.scoring import exact_match
from sdar_verl.words import first_words

NOTHING_YET = "Nothing has been searched for yet."
NOTHING_FOUND = "No passage was found for this query. Try other words."
NO_ACTION = "That was neither a search nor an answer, so nothing happened."
ANSWERED = "The answer was recorded."


@register_env("search")
class SearchEnv(TextEnv):
    """One question at a time (``task.description``), with its golden answers in ``task.data["answers"]``.

    ``search: words`` answers with passages, ``answer: text`` ends the episode; both are what :attr:`action_tags` make
    of ``<search>words</search>`` and ``<answer>text</answer>``. The reward is exact match, 0 or 1 (times
    ``success_reward``); an episode without an answer gets 0.

    Args:
        retriever: path of a JSONL corpus, which BM25 then searches in this process; or the address of a retrieval
            server, or a list of them, which share the load.
        topk: passages per search.
        max_passage_words: a longer passage is cut there, and says so.
        api: with a server: ``search_r1`` (default) or ``skyrl``, the form of its requests.
        timeout_s: with a server: for one attempt (default 20).
        retries: with a server: further attempts (default 4).
        backoff_s: with a server: pause before the second attempt, doubling with each (default 0.5).
        success_reward: reward of a correct answer.

    Raises:
        ValueError: an option has a wrong value, or no effect beside the others.
    """

    action_tags = ("search", "answer")
    thread_safe = True

    def __init__(
        self,
        retriever: str | Sequence[str],
        topk: int = 3,
        max_passage_words: int = 200,
        api: str | None = None,
        timeout_s: float | None = None,
        retries: int | None = None,
        backoff_s: float | None = None,
        success_reward: float = 1.0,
    ) -> None:
        for name, value in (("topk", topk), ("max_passage_words", max_passage_words)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"search option {name}={value!r}: give a whole number above 0")
        try:
            self._settings = RetrieverSettings.of(
                retriever, api=api, timeout_s=timeout_s, retries=retries, backoff_s=backoff_s
            )
        except ValueError as error:
            raise ValueError(f"search option retriever: {error}") from error
        self._topk = topk
        self._max_words = max_passage_words
        self._success_reward = success_reward_of("search", success_reward)
        self._golden: tuple[str, ...] = ()
        self._last: Step | None = None

    @property
    def longest_step_s(self) -> float:
        """All attempts of one search, with their pauses."""
        return self._settings.longest_s

    def check(self) -> None:
        """Look for the corpus, or ask the server.

        Raises:
            CorpusError: no such corpus, or a damaged one.
            RetrieverError: the server is away, or speaks another form.
        """
        self._settings.check(self._topk)

    def check_tasks(self, tasks: Sequence[Task]) -> None:
        """Raise ValueError for tasks that were made for another corpus than the one in this process."""
        if isinstance(self._settings.where, str):
            with suppress(CorpusError):  # told by :meth:`check`
                self._check_corpus_of(tasks, check_corpus(self._settings.where).digest)

    @classmethod
    def demonstration(cls, task: Task) -> Sequence[str]:
        """The searches that lead to the answer, and the answer; empty for questions that come without searches."""
        searches, answers = task.data.get("searches") or (), task.data.get("answers") or ()
        if not searches or not answers:
            return ()
        return [*(f"search: {words}" for words in searches), f"answer: {answers[0]}"]

    def reset(self, task: Task) -> Step:
        """Start the question of ``task``.

        Raises:
            ValueError: the task is not one of this environment, or was made for another corpus.
            RetrieverError: the latest search of this process failed, and the server is still away. So a server that is
                gone for good stops a run; one that comes back has cost an episode.
        """
        self._last = None
        answers = task.data.get("answers")
        if not isinstance(answers, list | tuple) or not answers or not all(isinstance(a, str) for a in answers):
            raise ValueError(
                f"task {task.task_id!r} of environment {task.env!r} has no golden answers, so it is not a Search-QA "
                "task; make Search-QA panels with `sdar-verl prepare search --out DIR`"
            )
        retriever = get_retriever(self._settings)
        if isinstance(retriever, Bm25Retriever):
            self._check_corpus_of([task], retriever.digest)
        if isinstance(retriever, HttpRetriever) and retriever.failed:
            retriever.search(task.description, 1)
        self._golden = tuple(answers)
        self._last = Step(NOTHING_YET)
        return self._last

    def step(self, action: str) -> Step:
        """Carry out ``search: words`` or ``answer: text``; anything else does nothing.

        Raises:
            RuntimeError: no question was started.
            RetrieverError: no server answered within all attempts.
        """
        if self._last is None:
            raise RuntimeError("step before reset: no question was started")
        if self._last.done:
            self._last = replace(self._last, reward=0.0)
            return self._last
        tag, _, content = action.partition(": ")
        if tag == "search" and content.strip():
            content = content[:MAX_QUERY_CHARACTERS]  # what a server takes: the embedded corpus is no other game
            hits = get_retriever(self._settings).search(content, self._topk)
            info = {"query": content, "passages": [hit.passage.passage_id for hit in hits]}
            self._last = Step(self._shown(hits), info=info)
        elif tag == "answer":
            correct = exact_match(content, self._golden)
            reward = self._success_reward if correct else 0.0
            self._last = Step(ANSWERED, reward=reward, done=True, success=correct, info={"answer": content})
        else:
            self._last = Step(NO_ACTION)
        return self._last

    def _shown(self, hits: Sequence[Hit]) -> str:
        lines = []
        for rank, hit in enumerate(hits, 1):
            cut = first_words(hit.passage.text, self._max_words)
            text = " ".join(hit.passage.text.split()) if cut is None else f"{cut} [cut here]"
            lines.append(f"[{rank}] {hit.passage.title}: {text}" if hit.passage.title else f"[{rank}] {text}")
        return "\n".join(lines) or NOTHING_FOUND

    def _check_corpus_of(self, tasks: Sequence[Task], digest: str) -> None:
        others = [task.task_id for task in tasks if task.data.get("corpus") not in (None, digest)]
        if others:
            more = f" (and {len(others) - 1} more of {len(tasks)})" if len(others) > 1 else ""
            raise ValueError(
                f"task {others[0]!r}{more} was made for another corpus than {self._settings.where}, which does not "
                "hold its answer; use the corpus.jsonl that lies beside the panel"
            )
