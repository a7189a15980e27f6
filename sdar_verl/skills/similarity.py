"""The rule ``embedding``: the skills whose text is most like the task's description."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from importlib import util
from typing import Annotated, Any

from pydantic import Field

from sdar_verl.envs.base import Task
from sdar_verl.skills.bank import SkillBank
from sdar_verl.skills.registry import RetrievalError, register_retriever
from sdar_verl.skills.rules import general_skills
from sdar_verl.skills.skill import Skill
from sdar_verl.words import REQUIRED, search_words

BM25 = "bm25"

KEPT = 8
"""Indexes of banks in a process."""

Scorer = Callable[[str], Sequence[float]]
_scorers: dict[tuple[str, str], Scorer] = {}
_lock = threading.Lock()


@register_retriever("embedding")
def embedding(
    bank: SkillBank,
    task: Task,
    seed: int,
    *,
    model: str = BM25,
    top: Annotated[int, Field(ge=1)] = 3,
    min_score: float | None = None,
) -> list[Skill]:
    """The specific skills nearest to the task's description, best first, and the general ones.

    Args:
        bank: its skills are indexed once per process by name, description, keywords and text.
        task: its description is read.
        seed: not used; ties fall by the skills' names.
        model: ``bm25`` (word overlap, library bm25s), or the name or folder of a sentence-transformers model, whose
            cosine is the score.
        top: how many skills.
        min_score: skills below this score are left out; None leaves out those that share no word (``bm25``), or none
            (models).

    Raises:
        RetrievalError: the library or the model is not there.
    """
    if not bank.specific:
        return general_skills(bank)
    scores = _scorer(bank, model)(task.description)
    ranked = sorted(range(len(scores)), key=lambda index: (-scores[index], bank.specific[index].name))
    if min_score is not None:
        ranked = [index for index in ranked if scores[index] >= min_score]
    elif model == BM25:
        ranked = [index for index in ranked if scores[index] > 0]
    return [bank.specific[index] for index in ranked[:top]] + general_skills(bank)


def _scorer(bank: SkillBank, model: str) -> Scorer:
    key = (bank.digest, model)
    with _lock:
        if key not in _scorers:
            texts = [
                "\n".join([skill.name.replace("-", " "), skill.description, " ".join(skill.keywords), skill.text])
                for skill in bank.specific
            ]
            if len(_scorers) >= KEPT:  # a run that learns skills has one bank after the other
                del _scorers[next(iter(_scorers))]
            _scorers[key] = _bm25(texts) if model == BM25 else _sentence_transformer(texts, model)
        return _scorers[key]


def _bm25(texts: Sequence[str]) -> Scorer:
    for module in REQUIRED:
        _require(module)
    import bm25s

    index = bm25s.BM25()
    index.index([search_words(text) for text in texts], show_progress=False)

    def score(query: str) -> Sequence[float]:
        known = [word for word in search_words(query) if word in index.vocab_dict]
        return [float(value) for value in index.get_scores(known)] if known else [0.0] * len(texts)

    return score


def _sentence_transformer(texts: Sequence[str], model: str) -> Scorer:
    _require("sentence_transformers")
    try:
        encoder = _encoder(model)
    except Exception as error:  # the library raises what its back-ends raise
        raise RetrievalError(
            f"sdar.skills.options.embedding.model={model}: sentence-transformers cannot load it ({error}); give a "
            f"model's name or folder, or {BM25}"
        ) from error
    vectors = encoder.encode(list(texts), normalize_embeddings=True, show_progress_bar=False)

    def score(query: str) -> Sequence[float]:
        return [float(value) for value in vectors @ encoder.encode(query, normalize_embeddings=True)]

    return score


@functools.cache
def _encoder(model: str) -> Any:
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(model, device="cpu")


def _require(module: str) -> None:
    if util.find_spec(module) is None:
        raise RetrievalError(
            f"retrieval rule 'embedding' needs {module}, which is not installed: pip install \"sdar-verl[embedding]\""
        )
