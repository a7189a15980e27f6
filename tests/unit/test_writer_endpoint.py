"""The endpoint writer against a local HTTP server: what is sent, what comes of it, what is paid for."""

from __future__ import annotations

import json
import os
from base64 import b64encode
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime

import pytest

from sdar_verl.config.context import WriterConfig
from sdar_verl.errors import ConfigError, RolloutError
from sdar_verl.report.layout import WRITTEN_FILE
from sdar_verl.writer.base import NOT_PAID, Answer, FailureWatch, WriterCounts
from sdar_verl.writer.endpoint import EndpointWriter, _seconds, endpoint_address, endpoint_key
from tests.support.chat_server import Reply, chat_server, says


def writer(server, folder, *, seed=None, **settings) -> EndpointWriter:
    given = {"source": "endpoint", "url": server.url, "model": "m", "timeout_s": 5.0, "retries": 2, **settings}
    return EndpointWriter(WriterConfig(**given), folder, lambda text: len(text.split()), seed, pause_s=0.01)


def test_prompts_go_out_together_and_answers_come_back_in_order(tmp_path):
    with chat_server(lambda _, prompt: says(prompt.upper(), seconds=0.05 if prompt == "a" else 0.0)) as server:
        answers = writer(server, tmp_path, in_flight=3).write(list("abcdefgh"), step=1)
    assert [answer.text for answer in answers] == list("ABCDEFGH")
    assert all(answer.tokens == 7 and not answer.cached for answer in answers)
    assert 2 <= server.most <= 3
    assert set(server.paths) == {"/v1/chat/completions"}


def test_a_request_holds_what_the_options_say_and_nothing_that_is_null(tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_KEY", "abc-123")
    settings = {
        "key_variable": "SOME_KEY",
        "temperature": 0.2,
        "max_tokens": 33,
        "body": {"reasoning_effort": "low", "max_tokens": None},
    }
    with chat_server(lambda *_: says("x")) as server:
        writer(server, tmp_path, **settings).write(["hello"], step=1)
        writer(server, tmp_path / "other").write(["hello"], step=1)
        writer(server, tmp_path / "seeded", seed=5).write(["hello", "world"], step=1)
        writer(server, tmp_path / "again", seed=5).write(["hello"], step=9)
    first, plain, *seeded = server.requests
    message = [{"role": "user", "content": "hello"}]
    assert first == {"model": "m", "messages": message, "temperature": 0.2, "reasoning_effort": "low"}
    assert plain == {"model": "m", "messages": message, "max_tokens": 1024}
    assert server.headers[0]["Authorization"] == "Bearer abc-123" and "Authorization" not in server.headers[1]
    by_text = {request["messages"][0]["content"]: request["seed"] for request in seeded[:2]}
    assert by_text["hello"] != by_text["world"], "one seed for all would make answers alike"
    assert seeded[2]["seed"] == by_text["hello"], "the same text at a later step is the same request"


@pytest.mark.parametrize(
    "bad",
    [
        Reply("down", status=500),
        Reply("slow down", status=429, headers={"Retry-After": "0"}),
        Reply('{"choices": [{"message"'),
        Reply("<html>a proxy's page</html>"),
        Reply('{"choices": []}'),
        Reply('{"choices": [{"message": {"content": 5}}]}'),
        Reply("[" * 100_000),
        says("never arrives", cut=True),
        says("too late", seconds=1.0),
        Reply("a proxy's", status=522),
        Reply('{"error": {"code": 429, "message": "busy"}}'),
    ],
)
def test_what_another_attempt_may_mend_is_tried_again(bad, tmp_path):
    with chat_server(lambda number, _: bad if number == 0 else says("there")) as server:
        (answer,) = writer(server, tmp_path, timeout_s=0.5).write(["a"], step=1)
    assert answer.text == "there" and len(server.requests) == 2


def test_after_the_last_attempt_the_cause_is_told_and_nothing_is_kept(tmp_path):
    with chat_server(lambda *_: Reply('{"error": "out of order"}', status=503)) as server:
        (answer,) = writer(server, tmp_path).write(["a"], step=1)
        assert answer.text is None and not (tmp_path / WRITTEN_FILE).exists()
        assert "status 503" in answer.failure and "out of order" in answer.failure and "3 attempts" in answer.failure
        assert len(server.requests) == 3


@pytest.mark.parametrize(
    ("status", "hint"), [(401, "key_variable"), (403, "key_variable"), (404, "/v1"), (400, "body"), (302, "302")]
)
def test_a_refusal_is_not_tried_again_and_says_what_to_look_at(status, hint, tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_KEY", "sk-very-secret")
    reply = Reply("no: sk-very-secret", status=status, headers={"Location": "http://127.0.0.1:9/elsewhere"})
    with chat_server(lambda *_: reply) as server:
        (answer,) = writer(server, tmp_path, key_variable="SOME_KEY").write(["a"], step=1)
    assert len(server.requests) == 1
    assert f"status {status}" in answer.failure and hint in answer.failure
    assert "sk-very-secret" not in answer.failure


def test_an_endpoint_that_is_not_there_is_a_failure_per_prompt_and_stops_asking(tmp_path):
    with chat_server(lambda *_: says("x")) as server:
        pass
    answers = writer(server, tmp_path, retries=0, in_flight=1).write(list("abcdefghij"), step=1)
    assert all(answer.failure for answer in answers)
    assert "cannot be reached" in answers[0].failure and "not asked" in answers[-1].failure


def test_a_step_of_few_prompts_asks_for_all_of_them(tmp_path):
    with chat_server(lambda _, prompt: Reply("no", status=400) if "bad" in prompt else says("x")) as server:
        answers = writer(server, tmp_path, in_flight=1).write(["bad 1", "bad 2", "bad 3", "good 1", "good 2"], step=1)
    assert [answer.text for answer in answers] == [None, None, None, "x", "x"]


def test_known_answers_cost_nothing_also_in_the_next_process(tmp_path):
    with chat_server(lambda number, _: says(f"answer {number}")) as server:
        first = writer(server, tmp_path)
        assert [a.text for a in first.write(["a"], step=1)] == ["answer 0"]
        (again,) = first.write(["a"], step=2)
        assert (again.text, again.cached, again.tokens) == ("answer 0", True, 0)
        resumed = writer(server, tmp_path).write(["b", "a"], step=2)
        assert [(a.text, a.cached) for a in resumed] == [("answer 1", False), ("answer 0", True)]
        moved = writer(server, tmp_path, url=server.url + "/", timeout_s=9.0).write(["a"], step=2)
        assert moved[0].cached
        other = writer(server, tmp_path, temperature=0.5).write(["a"], step=2)
        assert not other[0].cached, "another temperature is another request"
    assert len(server.requests) == 3


def test_a_line_that_a_killed_run_left_unfinished_is_dropped_and_another_damage_is_told(tmp_path):
    file = tmp_path / WRITTEN_FILE
    with chat_server(lambda number, _: says(f"answer {number}")) as server:
        writer(server, tmp_path).write(["a", "b"], step=1)
        file.write_bytes(file.read_bytes()[:-9])
        assert sorted(a.cached for a in writer(server, tmp_path).write(["a", "b"], step=1)) == [False, True]
        assert len(file.read_text().splitlines()) == 2 and len(server.requests) == 3
        assert all(json.loads(line)["text"].startswith("answer") for line in file.read_text().splitlines())
        file.write_text("{}\n" + file.read_text())
        with pytest.raises(ConfigError, match=r"sdar_written.jsonl, line 1, is damaged .* remove the line"):
            writer(server, tmp_path).write(["a"], step=1)


def test_the_budget_counts_what_was_paid_for_in_the_folder(tmp_path):
    with chat_server(lambda *_: says("x")) as server:
        first = writer(server, tmp_path, budget=3)
        assert [a == NOT_PAID for a in first.write(["a", "b"], step=1)] == [False, False]
        # Known ones are free, the others come in their order.
        assert [a == NOT_PAID for a in first.write(["c", "a", "d"], step=2)] == [False, False, True]
        resumed = writer(server, tmp_path, budget=3)
        assert [a == NOT_PAID for a in resumed.write(["c", "a", "d"], step=2)] == [False, False, True]
        assert writer(server, tmp_path, budget=0).write(["z"], step=1) == [NOT_PAID]
    assert len(server.requests) == 3


def test_what_was_paid_for_and_is_of_no_use_counts_and_is_not_kept(tmp_path):
    whole, cut, refused = says("whole"), says("cut o"), says(None)
    cut.body = cut.body.replace('"stop"', '"length"')
    thought = Reply(refused.body.replace('"stop"', '"length"'))
    refused.body = refused.body.replace('"content": null', '"refusal": "I will not"')
    by_text = {"a": whole, "b": cut, "c": refused, "d": thought}
    with chat_server(lambda _, prompt: by_text[prompt]) as server:
        answers = writer(server, tmp_path, budget=7).write(list(by_text), step=1)
        assert len(server.requests) == 4, "none is tried again"
        assert [answer.text for answer in answers] == ["whole", "cut o", None, None]
        assert [answer.length for answer in answers] == [False, True, False, True]
        assert all(answer.tokens == 7 for answer in answers)
        assert "I will not" in answers[2].failure and "max_tokens" in answers[3].failure
        again = writer(server, tmp_path, budget=7).write(list(by_text), step=2)
        assert [answer.cached for answer in again] == [True, False, False, False]
        assert writer(server, tmp_path, budget=7).write(["b"], step=3) == [NOT_PAID]
    counts = WriterCounts()
    counts.add(answers)
    assert counts.metrics()["sdar/writer/length"] == 2 and counts.metrics()["sdar/writer/failed"] == 2


def test_an_error_in_the_place_of_a_completion_is_told(tmp_path):
    with chat_server(lambda *_: Reply('{"error": {"code": "model_not_found", "message": "no model m"}}')) as server:
        (answer,) = writer(server, tmp_path).write(["a"], step=1)
    assert "no model m" in answer.failure and len(server.requests) == 1 and not (tmp_path / WRITTEN_FILE).exists()


def test_a_certificate_that_is_not_trusted_is_told_at_once(tmp_path, monkeypatch):
    import urllib3

    def request(*_, **__):
        asked.append(1)
        raise urllib3.exceptions.SSLError("[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: self-signed")

    asked: list[int] = []
    with chat_server(lambda *_: says("x")) as server:
        one = writer(server, tmp_path)
    monkeypatch.setattr(one._pool, "request", request)
    (answer,) = one.write(["a"], step=1)
    assert "SSL_CERT_FILE" in answer.failure and len(asked) == 1


def test_a_date_says_how_long_to_wait():
    assert _seconds("2.5") == 2.5 and _seconds(None) is None and _seconds("soon") is None
    assert 25 < _seconds(format_datetime(datetime.now(timezone.utc) + timedelta(seconds=30), usegmt=True)) <= 30
    assert _seconds("Wed, 21 Oct 2015 07:28:00 GMT") == 0.0


def test_the_environments_proxy_is_used(tmp_path, monkeypatch):
    with chat_server(lambda *_: says("x")) as server:
        proxy = server.url.removesuffix("/v1").replace("http://", "http://me:a%20word@")
        monkeypatch.setenv("http_proxy", proxy)
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        far = "http://no-such-host.invalid/v1"
        assert writer(server, tmp_path / "far", url=far).write(["a"], step=1)[0].text == "x"
        assert writer(server, tmp_path / "near").write(["a"], step=1)[0].text == "x"
    assert server.paths == [f"{far}/chat/completions", "/v1/chat/completions"]
    assert server.headers[0]["proxy-authorization"] == "Basic " + b64encode(b"me:a word").decode()


@pytest.mark.parametrize(
    ("said", "text"),
    [
        (
            [{"type": "thinking", "thinking": []}, {"type": "text", "text": "in "}, {"type": "text", "text": "parts"}],
            "in parts",
        ),
        ("<think>hm { } </think>\n\n{}", "{}"),
        ("<think>never ends", ""),
        ("  plain ", "plain"),
        ("a \ud800 half", "a \ufffd half"),
    ],
)
def test_thoughts_are_no_part_of_an_answer(said, text, tmp_path):
    with chat_server(lambda *_: says(said)) as server:
        assert writer(server, tmp_path).write(["a"], step=1)[0].text == text


def test_the_address_is_the_base_or_the_whole():
    for url in ("http://h:1/v1", " http://h:1/v1/ ", "http://h:1/v1/chat/completions"):
        assert endpoint_address(url) == "http://h:1/v1/chat/completions"
    assert endpoint_address("https://h") == "https://h/chat/completions"
    for url, word in (("h:1/v1", "no address"), ("ftp://h", "no address"), ("http://h:99999", "Port")):
        with pytest.raises(ConfigError, match=word):
            endpoint_address(url)
    with pytest.raises(ConfigError, match=r"key_variable") as error:
        endpoint_address("http://me:secret@h/v1")
    assert "secret" not in str(error.value)


def test_a_key_that_is_not_there_or_is_none_is_told(monkeypatch):
    assert endpoint_key(None) is None
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    with pytest.raises(ConfigError, match="NO_SUCH_KEY: that environment variable is not set"):
        endpoint_key("NO_SUCH_KEY")
    monkeypatch.setitem(os.environ, "ODD_KEY", "a\nb")
    with pytest.raises(ConfigError, match="no key") as error:
        endpoint_key("ODD_KEY")
    assert "a\nb" not in str(error.value)


def test_a_run_stops_when_more_than_half_of_what_was_sent_failed():
    fails, says_so, known = Answer(failure="status 500"), Answer("x"), Answer("y", cached=True)
    watch = FailureWatch("the endpoint")
    watch.add([fails] * 4 + [says_so] * 4 + [known] * 9 + [NOT_PAID] * 9)
    for _ in range(3):  # a prompt that is refused in a step without others
        watch.add([fails])
    watch.add([says_so] * 5)
    watch.add([Answer(failure="status 502"), *[fails] * 6])
    with pytest.raises(RolloutError, match=r"the endpoint left 8 of 8 prompts") as error:
        watch.add([fails])
    assert "7 times: status 500\n1 times: status 502" in str(error.value)
    counts = WriterCounts()
    counts.add([fails, says_so, known, NOT_PAID])
    metrics = counts.metrics()
    assert [metrics[f"sdar/writer/{name}"] for name in ("failed", "answered", "cached", "over_budget")] == [1, 2, 1, 1]
