"""BM25, the HTTP clients and the server: they agree, and what goes wrong is told apart."""

from __future__ import annotations

import json
import math
import re
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("bm25s")

import bm25s

from sdar_verl.envs.search.bm25 import K1, B, Bm25Retriever
from sdar_verl.envs.search.client import HttpRetriever, RetrieverError
from sdar_verl.envs.search.passages import CorpusError, Passage, write_corpus
from sdar_verl.envs.search.retrievers import RetrieverSettings, get_retriever
from sdar_verl.envs.search.server import MAX_TOPK, make_app
from sdar_verl.words import first_words, search_words
from tests.support.retrieval_server import ScriptedServer, good, serving

TEXTS = (
    "red apples and green apples",
    "green pears",
    "red bricks make red walls red",
    "nothing here belongs",
    "green pears",
)
PASSAGES = [Passage(f"p{i}", "", text) for i, text in enumerate(TEXTS)]


@pytest.fixture(scope="module")
def retriever() -> Bm25Retriever:
    return Bm25Retriever(PASSAGES)


# ---------------------------------------------------------------- BM25


def brute_force(query: str) -> list[tuple[int, float]]:
    """Lucene's formula, straight from its definition; stop words do not occur in the queries of the test."""
    documents = [[w for w in re.findall(r"\w\w+", text) if w not in ("and", "make")] for text in TEXTS]
    mean = sum(map(len, documents)) / len(documents)
    scores = []
    for index, words in enumerate(documents):
        score = 0.0
        for word in query.split():
            count = words.count(word)
            containing = sum(word in other for other in documents)
            idf = math.log(1 + (len(documents) - containing + 0.5) / (containing + 0.5))
            score += idf * count / (count + K1 * (1 - B + B * len(words) / mean))
        scores.append((index, score))
    return sorted([item for item in scores if item[1] > 0], key=lambda item: (-item[1], item[0]))


@pytest.mark.parametrize("query", ["red", "green apples", "pears", "red green", "walls bricks red"])
def test_the_ranking_is_bm25_with_ties_in_the_corpuss_order(query):
    passages = [Passage(p.passage_id, "", p.text.replace(" make", "")) for p in PASSAGES]
    hits = Bm25Retriever(passages).search(query, 5)
    expected = brute_force(query)
    assert [hit.passage.passage_id for hit in hits] == [f"p{index}" for index, _ in expected]
    assert [hit.score for hit in hits] == pytest.approx([score for _, score in expected], rel=1e-5)


def test_fewer_are_given_when_fewer_share_a_word(retriever):
    assert [hit.passage.passage_id for hit in retriever.search("pears", 1)] == ["p1"]
    assert len(retriever.search("pears", 3)) == 2
    for query in ("zebra", "", "the and", "?!", "x"):
        assert retriever.search(query, 3) == []


def test_titles_are_searched_too():
    hits = Bm25Retriever([Passage("a", "Oslo", "A city."), Passage("b", "Rome", "A city.")]).search("rome", 2)
    assert [hit.passage.passage_id for hit in hits] == ["b"]


def test_threads_may_search_at_once(retriever):
    queries = ["red", "green apples", "pears", "walls"] * 20
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(lambda q: retriever.search(q, 3), queries)) == [retriever.search(q, 3) for q in queries]


def test_a_kept_index_is_read_and_gives_the_same(retriever, tmp_path, monkeypatch):
    import bm25s

    made = Bm25Retriever(PASSAGES, keep=tmp_path / "index")
    monkeypatch.setattr(bm25s.BM25, "index", lambda *_, **__: pytest.fail("indexed again"))
    read = Bm25Retriever(PASSAGES, keep=tmp_path / "index")
    for query in ("red", "green apples", "pears", "zebra"):
        assert read.search(query, 3) == made.search(query, 3) == retriever.search(query, 3)


def test_a_kept_index_of_something_else_is_refused_and_an_unfinished_one_made_again(tmp_path):
    keep = tmp_path / "index"
    Bm25Retriever(PASSAGES, keep=keep)
    with pytest.raises(ValueError, match="holds an index of another corpus; use another folder"):
        Bm25Retriever(PASSAGES[:2], keep=keep)
    with pytest.raises(ValueError, match="holds an index of another b, k1"):
        Bm25Retriever(PASSAGES, k1=1.2, b=0.7, keep=keep)
    for name, content in (
        ("sdar_index.json", b"{"),
        ("sdar_index.json", b"[]"),
        ("vocab.index.json", b"{}"),
        ("params.index.json", b""),
        ("data.csc.index.npy", b"cut off"),
    ):
        before = (keep / name).read_bytes()
        (keep / name).write_bytes(content)
        with pytest.raises(ValueError, match=r"is damaged .*remove the folder"):
            Bm25Retriever(PASSAGES, keep=keep)
        (keep / name).write_bytes(before)
    (keep / "sdar_index.json").unlink()
    (keep / "data.csc.index.npy").write_bytes(b"cut off")
    assert Bm25Retriever(PASSAGES, keep=keep).search("pears", 1)


# ---------------------------------------------------------------- client and server


@pytest.mark.parametrize("api", ["search_r1", "skyrl"])
def test_our_server_gives_our_client_what_the_index_gives(retriever, api):
    with serving(make_app(retriever)) as url:
        client = HttpRetriever([url], api=api)
        client.check(3)
        for query in ("red", "green pears", "zebra", 'say "red"\n☃'):
            assert client.search(query, 2) == retriever.search(query, 2)
        client.close()


def test_the_server_answers_each_api_in_its_own_words(retriever):
    def ask(url: str, **body) -> tuple[int, dict]:
        request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request) as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    with serving(make_app(retriever, topk=2)) as url:
        status, answer = ask(url, queries=["red", "pears"], topk=1, return_scores=True)
        assert status == 200
        assert [[item["document"]["id"] for item in items] for items in answer["result"]] == [["p2"], ["p1"]]
        assert answer["result"][1][0]["document"]["contents"] == "green pears"
        assert ask(url, query="green") == (
            200,
            {"result": [[d.passage.as_document() for d in retriever.search("green", 2)]]},
        )
        assert ask(url, queries=["red"])[1]["result"][0][0] == {"id": "p2", "contents": TEXTS[2]}
        for body in ({}, {"query": "a", "queries": ["a"]}, {"query": "a", "topk": 0}, {"queries": "a"}):
            assert ask(url, **body)[0] == 422, body
        with urllib.request.urlopen(url.replace("/retrieve", "/health")) as response:
            health = json.load(response)
    assert health == {"status": "ok", "passages": 5, "corpus": retriever.digest, "method": "bm25"}


def client_of(server: ScriptedServer, **settings) -> HttpRetriever:
    return HttpRetriever([server.url], **{"timeout_s": 5, "retries": 3, "backoff_s": 0.001, **settings})


def test_requests_have_the_form_of_their_api():
    with ScriptedServer(lambda number, body: good()) as server:
        client_of(server).search("q", 3)
        client_of(server, api="skyrl").search("q", 3)
    assert server.requests == [
        {"queries": ["q"], "topk": 3, "return_scores": True},
        {"query": "q", "topk": 3, "return_scores": True},
    ]


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_a_server_in_trouble_is_asked_again(status):
    with ScriptedServer(lambda number, body: good() if number == 2 else (status, b"busy", 0)) as server:
        client = client_of(server)
        [hit] = client.search("q", 3)
        assert (hit.passage, hit.score) == (Passage("1", "Vessaly", "A city."), 2.5)
        assert len(server.requests) == 3
        assert not client.failed


def test_a_slow_answer_is_given_up_and_asked_for_again():
    with ScriptedServer(lambda number, body: good(1.0 if number == 0 else 0.0)) as server:
        client = client_of(server, timeout_s=0.3)
        assert len(client.search("q", 3)) == 1
        assert len(server.requests) == 2


def test_after_the_last_attempt_the_error_names_server_and_remedy():
    with ScriptedServer(lambda number, body: (503, b"loading the index", 0)) as server:
        client = client_of(server)
        with pytest.raises(RetrieverError) as error:
            client.search("q", 3)
        assert len(server.requests) == 4
        assert client.failed
    for word in ("4 attempts", server.url, "503", "loading the index", "serve-retriever", "sdar.env.options.retriever"):
        assert word in str(error.value)


def test_no_server_at_all_is_an_error_that_says_so():
    with ScriptedServer(lambda number, body: good()) as server:
        url = server.url
    client = HttpRetriever([url], retries=1, backoff_s=0.001)
    for call in (lambda: client.check(3), lambda: client.search("q", 3)):
        with pytest.raises(RetrieverError, match=r"cannot be reached .*serve-retriever"):
            call()


@pytest.mark.parametrize(
    "body",
    [
        b"<html>welcome</html>",
        b"{}",
        b"[]",
        b'{"result": 3}',
        b'{"result": [[{"document": {"id": "1"}}]]}',
        b"\xff\xfe",
    ],
)
def test_garbage_is_told_apart_from_silence_and_not_asked_for_twice(body):
    with ScriptedServer(lambda number, _: (200, body, 0)) as server:
        client = client_of(server)
        for call in (lambda: client.check(3), lambda: client.search("q", 3)):
            with pytest.raises(RetrieverError, match="answered something else"):
                call()
        assert len(server.requests) == 2


def test_the_wrong_api_is_named():
    words = r"status 422 .*field required.*api=search_r1 rather than api=skyrl"
    script = lambda number, _: (422, b'{"detail": "field required: queries"}', 0)  # noqa: E731
    with ScriptedServer(script) as server, pytest.raises(RetrieverError, match=words):
        client_of(server, api="skyrl").check(3)


def test_passages_may_come_bare_and_the_list_empty():
    bare = json.dumps({"result": [[{"id": "1", "title": "Vessaly", "text": "A city."}]]}).encode()
    with ScriptedServer(lambda number, _: (200, bare if number == 0 else b'{"result": []}', 0)) as server:
        client = client_of(server)
        assert [(hit.passage, hit.score) for hit in client.search("q", 3)] == [
            (Passage("1", "Vessaly", "A city."), None)
        ]
        assert client.search("q", 3) == []


def test_connections_are_kept():
    with ScriptedServer(lambda number, _: good()) as server:
        client = client_of(server)
        for _ in range(10):
            client.search("q", 3)
        assert len(server.connections) == 1


def test_searches_of_several_threads_wait_at_the_same_time():
    """The server answers none before all eight have asked."""
    all_asked = threading.Barrier(8)

    def script(number, body):
        all_asked.wait(timeout=10)
        return good()

    with ScriptedServer(script) as server, ThreadPoolExecutor(8) as threads:
        client = client_of(server, retries=0)
        assert all(len(hits) == 1 for hits in threads.map(lambda _: client.search("q", 3), range(8)))


def test_several_servers_share_the_load_and_stand_in_for_each_other():
    with ScriptedServer(lambda n, b: good()) as first, ScriptedServer(lambda n, b: good()) as second:
        client = HttpRetriever([first.url, second.url], retries=1, backoff_s=0.001)
        for _ in range(10):
            client.search("q", 3)
        assert (len(first.requests), len(second.requests)) == (5, 5)
    with ScriptedServer(lambda n, b: good()) as first, ScriptedServer(lambda n, b: (500, b"", 0)) as second:
        client = HttpRetriever([first.url, second.url], retries=1, backoff_s=0.001)
        assert all(len(client.search("q", 3)) == 1 for _ in range(4))
        with pytest.raises(RetrieverError, match=re.escape(second.url)):
            client.check(3)


def test_the_longest_search_is_bounded_as_promised():
    client = HttpRetriever(["http://127.0.0.1:1"], timeout_s=20, retries=4, backoff_s=0.5)
    assert client.urls == ("http://127.0.0.1:1/retrieve",)
    assert client.longest_s == pytest.approx(5 * 20 + 0.5 + 1 + 2 + 4)
    with ScriptedServer(lambda n, b: (500, b"", 0)) as server:
        client = client_of(server, retries=2, backoff_s=0.05)
        started = time.monotonic()
        with pytest.raises(RetrieverError):
            client.search("q", 3)
        assert time.monotonic() - started >= 0.5 * (0.05 + 0.1)  # it does pause


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("retriever", "client", "words"),
    [
        ("", {}, ["path of a JSONL corpus"]),
        ([], {}, ["path of a JSONL corpus"]),
        (["a.jsonl", "b.jsonl"], {}, ["one corpus"]),
        ("a.jsonl", {"timeout_s": 5}, ["timeout_s=5 has no effect", "a.jsonl"]),
        ("ftp://host/x", {}, ["'ftp://host/x' is no address"]),
        (["http://a", "b.jsonl"], {}, ["'b.jsonl' is no address"]),
        ("http://a", {"api": "serp"}, ["api='serp'", "search_r1, skyrl"]),
        ("http://a", {"retries": -1}, ["retries=-1"]),
        ("http://a", {"timeout_s": 0}, ["timeout_s=0"]),
        ("http://a", {"timeout_s": "long"}, ["timeout_s='long'"]),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(retriever, client, words):
    with pytest.raises(ValueError) as error:
        RetrieverSettings.of(retriever, **client)
    for word in words:
        assert word in str(error.value)


def test_a_process_makes_one_retriever_for_equal_settings(tmp_path, monkeypatch):
    write_corpus(PASSAGES, tmp_path / "corpus.jsonl")
    settings = [RetrieverSettings.of(str(tmp_path / "corpus.jsonl")) for _ in range(8)]
    settings[0].check(3)
    with ThreadPoolExecutor(8) as threads:
        made = list(threads.map(get_retriever, settings))
    assert all(retriever is made[0] for retriever in made)
    assert get_retriever(RetrieverSettings.of("http://127.0.0.1:1")) is get_retriever(
        RetrieverSettings.of(["http://127.0.0.1:1"])
    )


def test_a_corpus_that_is_missing_or_too_large_is_refused_before_the_start(tmp_path, monkeypatch):
    with pytest.raises(CorpusError, match=r"does not exist; .*sdar-verl prepare search --out DIR"):
        RetrieverSettings.of(str(tmp_path / "none.jsonl")).check(3)
    write_corpus(PASSAGES, tmp_path / "corpus.jsonl")
    monkeypatch.setattr("sdar_verl.envs.search.retrievers.MAX_EMBEDDED_BYTES", 10)
    with pytest.raises(CorpusError, match=r"more than the .*serve-retriever --corpus .*corpus.jsonl"):
        RetrieverSettings.of(str(tmp_path / "corpus.jsonl")).check(3)


# ---------------------------------------------------------------- scripts without spaces, passages without text

SCRIPTS = {
    "zh": ("北京大学的校长是蔡元培。", "上海是中国最大的城市之一。", "村上春树写了《挪威的森林》。"),
    "ja": ("東京都知事は小池百合子です。", "大阪は日本の都市で、たこ焼きが有名だ。", "宮崎駿監督の映画は人気がある。"),
    "th": ("กรุงเทพมหานครเป็นเมืองหลวงของประเทศไทย", "เชียงใหม่อยู่ทางภาคเหนือ", "ภาษาไทยมีวรรณยุกต์"),
    "ko": ("서울은 대한민국의 수도이다.", "부산은 항구 도시이다.", "한강은 도시를 흐르는 강이다."),
    "hi": ("दिल्ली भारत की राजधानी है।", "मुंबई एक बड़ा शहर है।", "गंगा एक नदी है।"),
}


@pytest.mark.parametrize(
    ("script", "query", "best"),
    [
        *(("zh", query, 0) for query in ("蔡元培", "北京大学校长是谁？", "大学", "校长")),
        *(("zh", query, 1) for query in ("上海", "最大的城市", "中国城市")),
        *(("zh", query, 2) for query in ("村上春树", "春树", "挪威的森林 的作者")),
        *(("ja", query, 0) for query in ("東京都知事", "小池百合子とは誰ですか", "百合子")),
        *(("ja", query, 1) for query in ("大阪", "たこ焼き")),
        *(("ja", query, 2) for query in ("宮崎駿", "映画の監督")),
        *(("ko", query, 0) for query in ("서울", "대한민국", "수도는 어디인가")),
        *(("ko", query, 1) for query in ("부산", "항구")),
        ("ko", "한강", 2),
        ("th", "เมืองหลวงของไทย", 0),
        ("th", "เชียงใหม่", 1),
        ("hi", "भारत की राजधानी", 0),
        ("hi", "नदी", 2),
    ],
)
def test_a_script_without_spaces_is_searched_by_its_words(script, query, best):
    retriever = Bm25Retriever([Passage(str(i), "", text) for i, text in enumerate(SCRIPTS[script])])
    assert [hit.passage.passage_id for hit in retriever.search(query, 1)] == [str(best)]


def test_words_of_spaced_scripts_are_bm25s_own():
    texts = [
        "Don’t stop: café-bar naïve I a é",
        "foo_bar x86 3.14 AT&T",
        "Привет, я мир",
        "Zürich Straße The of",
    ]
    [*ours] = map(search_words, texts)
    assert ours == bm25s.tokenize(texts, stopwords="en", return_ids=False, show_progress=False)
    assert search_words("ＡＢＣ ｶﾀｶﾅ") == search_words("abc カタカナ")


def test_a_long_passage_is_cut_at_words_in_any_script():
    assert first_words("one two  three", 2) == "one two"
    assert first_words("one two  three", 3) is None
    assert first_words("北京大学的校长是蔡元培。他是教育家。", 4) == "北京大学的校长"
    assert first_words("see 北京大学。 now", 3) == "see 北京大学。"
    assert first_words("서울은 수도이다", 2) is None


def test_a_corpus_without_a_word_is_refused():
    with pytest.raises(ValueError, match="none of the 2 passages holds a word to search for"):
        Bm25Retriever([Passage("1", "", "the of"), Passage("2", "", "a")])


def answering(*texts):
    documents = [{"document": {"id": str(i), "contents": text}, "score": 1.0} for i, text in enumerate(texts)]
    return 200, json.dumps({"result": [documents]}).encode(), 0.0


def test_a_server_of_empty_passages_is_refused_at_the_start():
    with ScriptedServer(lambda number, body: answering("", " ", '"Title"\n')) as server:
        with pytest.raises(RetrieverError, match=r"3 passages without a text.*mend the corpus"):
            HttpRetriever([server.url]).check(3)
        assert HttpRetriever([server.url]).search("x", 3) == []


def test_the_start_asks_for_as_many_passages_as_the_run(retriever):
    with serving(make_app(retriever)) as url:
        HttpRetriever([url]).check(MAX_TOPK)
        with pytest.raises(RetrieverError, match=r"less than or equal to 100.*sdar\.env\.options\.topk"):
            HttpRetriever([url]).check(MAX_TOPK + 1)


def test_an_empty_passage_is_not_among_a_servers_hits():
    with ScriptedServer(lambda number, body: answering("", "A city.", "\u200b")) as server:
        client = HttpRetriever([server.url])
        client.check(3)
        assert [hit.passage.text for hit in client.search("x", 3)] == ["A city."]


def test_the_start_asks_until_a_server_finds_something():
    empty = 200, b'{"result": [[]]}', 0.0
    script = lambda number, body: answering("") if number == 2 else empty  # noqa: E731
    with ScriptedServer(script) as server, pytest.raises(RetrieverError, match="without a text"):
        HttpRetriever([server.url]).check(3)
    with ScriptedServer(lambda number, body: empty) as server:
        HttpRetriever([server.url]).check(3)
