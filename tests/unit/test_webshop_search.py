"""Search: BM25 as its formula says, ties in the order of the products, analysis of words."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest

from sdar_verl.envs.webshop.search import K1, MAX_RESULTS, B, SearchIndex, analyse

WORDS = ["lamp", "chair", "table", "rug", "sofa", "bed", "desk", "shelf", "mirror", "vase"]


def scores_by_hand(texts: list[str], query: str) -> list[float]:
    """Lucene's BM25."""
    documents = [Counter(analyse(text)) for text in texts]
    lengths = [sum(document.values()) for document in documents]
    mean = sum(lengths) / len(lengths)
    scores = [0.0] * len(texts)
    for term in analyse(query):
        holding = sum(term in document for document in documents)
        idf = math.log(1 + (len(texts) - holding + 0.5) / (holding + 0.5))
        for i, document in enumerate(documents):
            frequency = document[term]
            scores[i] += idf * frequency / (frequency + K1 * (1 - B + B * lengths[i] / mean)) if frequency else 0.0
    return scores


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    rng = random.Random(0)
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(3, 12))) for _ in range(200)]
    folder = tmp_path_factory.mktemp("index")
    SearchIndex.build(texts, folder)
    return texts, SearchIndex.open(folder)


@pytest.mark.parametrize("query", ["lamp", "lamps and chairs", "desk desk sofa", "vase nothing"])
def test_results_are_those_of_the_formula(index, query):
    texts, search = index
    scores = scores_by_hand(texts, query)
    found = search.search(query)
    assert len(found) == min(MAX_RESULTS, sum(score > 0 for score in scores))
    got = [scores[row] for row in found]
    best = sorted(scores, reverse=True)[: len(found)]
    assert got == pytest.approx(best, rel=1e-5)


def test_equal_scores_keep_the_order_of_the_products(tmp_path):
    SearchIndex.build(["red lamp"] * 80 + ["red chair"], tmp_path)
    search = SearchIndex.open(tmp_path)
    assert search.search("lamp") == list(range(MAX_RESULTS))
    assert search.search("lamp", limit=3) == [0, 1, 2]


@pytest.mark.parametrize("query", ["", "unheardof", "the of and", "?!"])
def test_a_query_without_known_words_finds_nothing(index, query):
    assert index[1].search(query) == []


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("Women's Running SHOES", ["women", "run", "shoe"]),
        ("12.5 fl oz, pack-of-2", ["12.5", "fl", "oz", "pack", "2"]),
        ("the u.s.a and the lamps", ["u.s.a", "lamp"]),
        ("", []),
    ],
)
def test_analysis(text, terms):
    assert analyse(text) == terms
