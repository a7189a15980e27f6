"""Writes contexts at an OpenAI-compatible chat endpoint: ``POST <url>/chat/completions``."""

from __future__ import annotations

import math
import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

from sdar_verl.config.context import WriterConfig
from sdar_verl.errors import ConfigError
from sdar_verl.report.layout import WRITTEN_FILE
from sdar_verl.rollout.actions import without_thought
from sdar_verl.rollout.uids import request_seed
from sdar_verl.table import LOST_LIMIT
from sdar_verl.untrusted import http_address, parse_json, shorten, whole_characters
from sdar_verl.writer.base import LEAST, NOT_PAID, Answer
from sdar_verl.writer.cache import AnswerCache

if TYPE_CHECKING:
    from urllib3 import BaseHTTPResponse, PoolManager

PROMPT_TOKENS = 8192
ANSWER_TOKENS = 1024
MAX_ANSWER_BYTES = 4 << 20
"""A longer answer is no text of some thousand tokens."""

PAUSE_S = 1.0
LONGEST_PAUSE_S = 60.0

# Worth another attempt: too slow, too many requests, and a server or proxy (520 and up) that is down or starting.
_TRANSIENT = (408, 409, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524, 529)


class _Again(Exception):
    """An attempt failed in a way that another one may mend; ``pause`` is what the server asked for, seconds."""

    def __init__(self, why: str, pause: float | None = None):
        super().__init__(why)
        self.pause = pause


class _Refused(Exception):
    """An attempt failed as every further one would."""


class EndpointWriter:
    """The model behind ``sdar.context.writer.url``.

    Answers are kept in the run's folder (:class:`AnswerCache`), so that a resumed run, or the same text at a later
    step, costs nothing; ``budget`` counts what was paid for. With ``sdar.rollout.seed`` every request carries a seed of
    its own.

    Args:
        settings: the ``sdar.context.writer`` node; url and model are set.
        folder: of the run.
        count_tokens: of a text, by the policy's tokenizer.
        seed: ``sdar.rollout.seed``.
        pause_s: before the second attempt; it doubles with each, up to :data:`LONGEST_PAUSE_S`.

    Raises:
        ConfigError: the address is none, or the key's variable is not set.
    """

    during_rollout = False

    def __init__(
        self,
        settings: WriterConfig,
        folder: Path,
        count_tokens: Callable[[str], int],
        seed: int | None = None,
        pause_s: float = PAUSE_S,
    ) -> None:
        import urllib3

        assert settings.url is not None and settings.model is not None, "checked before the start"
        self.limit = settings.max_prompt_length or PROMPT_TOKENS
        self.tokens = count_tokens
        self._settings = settings
        self._seed = seed
        self._pause_s = pause_s
        self._url = endpoint_address(settings.url)
        self._key = endpoint_key(settings.key_variable)
        self._cache = AnswerCache(folder / WRITTEN_FILE)
        self._enough, self._failed = 0.0, 0
        timeout = urllib3.Timeout(total=settings.timeout_s)
        self._pool = _pool(self._url, maxsize=settings.in_flight, retries=False, timeout=timeout)

    def write(self, texts: Sequence[str], step: int) -> list[Answer]:
        """Of :class:`~sdar_verl.writer.base.Writer`; at most ``in_flight`` requests at a time."""
        bodies = [self._body(text) for text in texts]
        answers = [self._cache.get(body) for body in bodies]
        unknown = [number for number, answer in enumerate(answers) if answer is None]
        if self._settings.budget is not None:
            left = max(0, self._settings.budget - len(self._cache))
            for number in unknown[left:]:
                answers[number] = NOT_PAID
            unknown = unknown[:left]
        # A step of few prompts does not stop at its own failures (writer/base.py).
        self._enough, self._failed = LOST_LIMIT * len(unknown) if len(unknown) >= LEAST else math.inf, 0
        if unknown:
            with ThreadPoolExecutor(max_workers=self._settings.in_flight) as pool:
                for number, answer in zip(unknown, pool.map(self._ask, [bodies[i] for i in unknown]), strict=True):
                    answers[number] = answer
        return [answer for answer in answers if answer is not None]

    def __str__(self) -> str:
        return f"the endpoint sdar.context.writer.url={self._settings.url}"

    def _body(self, text: str) -> dict[str, Any]:
        settings = self._settings
        body = {
            "model": settings.model,
            "messages": [{"role": "user", "content": text}],
            "max_tokens": settings.max_tokens or ANSWER_TOKENS,
            "temperature": settings.temperature,
            "seed": request_seed(self._seed, "writer", text),
            **settings.body,
        }
        return {name: value for name, value in body.items() if value is not None}

    def _ask(self, body: Mapping[str, Any]) -> Answer:
        if self._failed > self._enough:  # so many that the step stops: a dead server shall not cost hours
            return Answer(failure="not asked, for too many others had failed")
        answer = self._try(body)
        self._failed += answer.failure is not None
        return answer

    def _try(self, body: Mapping[str, Any]) -> Answer:
        for attempt in range(self._settings.retries + 1):
            try:
                answer = self._attempt(body)
            except _Again as error:
                why = str(error)
                if attempt < self._settings.retries:
                    pause = min(self._pause_s * 2**attempt, LONGEST_PAUSE_S) * random.uniform(0.5, 1.0)
                    time.sleep(max(pause, min(error.pause or 0.0, LONGEST_PAUSE_S)))
            except _Refused as error:
                return Answer(failure=self._without_key(str(error)))
            else:
                self._cache.put(body, answer)
                return answer
        return Answer(failure=self._without_key(f"{why}, in {self._settings.retries + 1} attempts"))

    def _attempt(self, body: Mapping[str, Any]) -> Answer:
        import urllib3

        started, late = time.monotonic(), f"no answer within timeout_s={self._settings.timeout_s:g}"
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        try:
            # Neither redirected to another server, nor unpacked: a small compressed answer could fill the memory.
            response = self._pool.request(
                "POST", self._url, json=dict(body), headers=headers, preload_content=False, decode_content=False
            )
            data = self._read(response, started)
        except urllib3.exceptions.NewConnectionError as error:  # refused; called a time-out by descent only
            raise _Again(f"it cannot be reached ({type(error).__name__})") from None
        except (urllib3.exceptions.TimeoutError, TimeoutError):
            raise _Again(late) from None
        except (urllib3.exceptions.HTTPError, OSError) as error:
            if "certificate verify failed" in str(error).lower():
                raise _Refused(
                    f"its certificate is not trusted ({error}); name the file of its authority in the environment "
                    "variable SSL_CERT_FILE"
                ) from None
            raise _Again(f"the connection broke ({type(error).__name__})") from None
        if response.status in _TRANSIENT:
            raise _Again(f"status {response.status} ({_start_of(data)})", _seconds(response.headers.get("Retry-After")))
        if response.status != 200:
            raise _Refused(f"status {response.status} ({_start_of(data)}){_HINTS.get(response.status, '')}")
        return _answer(data)

    def _read(self, response: BaseHTTPResponse, started: float) -> bytes:
        """The whole answer; one that comes drop by drop is a TimeoutError."""
        pieces: list[bytes] = []
        size = 0
        while piece := response.read1(1 << 16):
            pieces.append(piece)
            size += len(piece)
            late = time.monotonic() - started > self._settings.timeout_s
            if size > MAX_ANSWER_BYTES or late:
                response.close()  # and the connection with it: the rest is not wanted
                if late:
                    raise TimeoutError
                raise _Refused(f"an answer of more than {MAX_ANSWER_BYTES >> 20} MiB; check the address")
        response.release_conn()
        return b"".join(pieces)

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text


_HINTS = {
    400: "; check model, max_tokens and body",
    401: "; check the key in key_variable",
    403: "; check the key in key_variable",
    404: "; check url (it ends in /v1 with most servers) and model",
}


def _pool(url: str, **settings: Any) -> PoolManager:
    """Connections to ``url``, by way of the environment's proxy if it names one (HTTPS_PROXY, HTTP_PROXY, NO_PROXY)."""
    import urllib3

    parts = urlsplit(url)
    proxy = getproxies().get(parts.scheme)
    if proxy is None or proxy_bypass(parts.netloc):
        return urllib3.PoolManager(**settings)
    user = urllib3.util.parse_url(proxy).auth
    headers = urllib3.make_headers(proxy_basic_auth=unquote(user)) if user else None
    return urllib3.ProxyManager(proxy, proxy_headers=headers, **settings)


def endpoint_address(url: str) -> str:
    """Where requests go.

    Raises:
        ConfigError: ``url`` is no address, or holds a password.
    """
    try:
        parts = http_address(url.strip())
    except ValueError as error:
        raise ConfigError(
            f"sdar.context.writer.url: {error}; give one such as http://127.0.0.1:8000/v1, and a key by an environment "
            "variable that sdar.context.writer.key_variable names"
        ) from error
    path = parts.path.rstrip("/").removesuffix("/chat/completions")
    return parts._replace(path=f"{path}/chat/completions").geturl()


def endpoint_key(variable: str | None) -> str | None:
    """The key; None without a variable.

    Raises:
        ConfigError: the variable is not set, or holds what no header can.
    """
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key or not key.isascii() or not key.isprintable():
        raise ConfigError(
            f"sdar.context.writer.key_variable={variable}: that environment variable is "
            f"{'not set' if not key else 'no key (it holds letters that no header can)'} where the driver runs; "
            "export it before the run, or before `ray start` on a cluster that runs already"
        )
    return key


def _answer(data: bytes) -> Answer:
    """The text in a chat completion; a completion without one is a failure that was paid for.

    Raises:
        _Again: it is none, as a proxy's page or an answer that was cut off, or an error that another attempt may mend.
        _Refused: it is another error.
    """
    try:
        found = parse_json(data)
        error = found.get("error")
        choice = {} if error else found["choices"][0]
        text = None if error else _text(choice["message"])
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as fault:
        raise _Again(f"no chat completion but {_start_of(data)} ({type(fault).__name__}: {fault})") from None
    if error:
        code = str(error.get("code")) if isinstance(error, dict) else ""
        kind = _Again if code.isdecimal() and int(code) in _TRANSIENT else _Refused
        raise kind(f"an error ({shorten(error.get('message', error) if isinstance(error, dict) else error)})")
    usage = found.get("usage")
    tokens = usage.get("total_tokens") if isinstance(usage, dict) else None
    tokens = tokens if isinstance(tokens, int) and not isinstance(tokens, bool) and tokens > 0 else 0
    reason = choice.get("finish_reason")
    if text is None:
        said = choice["message"].get("refusal") or reason
        why = "max_tokens went before its first word" if reason == "length" else f"a refusal ({shorten(said)})"
        return Answer(None, tokens, failure=f"no text: {why}", length=reason == "length")
    return Answer(without_thought(whole_characters(text)), tokens, length=reason == "length")


def _text(message: dict[str, Any]) -> str | None:
    """What a message says: its content, or the text among its parts; None where it has none.

    Raises:
        TypeError: its content is something else.
    """
    content = message.get("content") or None
    if isinstance(content, list):  # thoughts are parts of a kind of their own
        content = "".join(part["text"] for part in content if part.get("type") == "text") or None
    if not isinstance(content, str | None):
        raise TypeError(f"the content is {shorten(content)}")
    return content


def _seconds(text: str | None) -> float | None:
    """How long a ``Retry-After`` asks to wait: it is a number of seconds, or a date."""
    for read in (float, lambda date: parsedate_to_datetime(date).timestamp() - time.time()):
        with suppress(ValueError):
            return max(0.0, read(text or ""))
    return None


def _start_of(data: bytes) -> str:
    return shorten(data[:300].decode("utf-8", "replace"))
