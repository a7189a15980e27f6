"""Answers of an endpoint that were paid for, in a file of the run's folder: asked again, they cost nothing, but for
those that are of no use (cut off, refused), which only count."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdar_verl.errors import ConfigError
from sdar_verl.untrusted import parse_json, shorten
from sdar_verl.writer.base import Answer


class AnswerCache:
    """One JSON line per answer, appended as it comes, so that a run that is killed loses none but the last.

    A resumed run asks what it has asked before, and gets the same answers. May be used from several threads.

    Args:
        path: of the file; it is read when first needed.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._paid = 0
        self._known: dict[str, Answer] | None = None
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """All that were paid for."""
        self._read()
        return self._paid

    def get(self, request: Mapping[str, Any]) -> Answer | None:
        """What this request's body was answered with, if it ever was."""
        return self._read().get(_key(request))

    def put(self, request: Mapping[str, Any], answer: Answer) -> None:
        """Keep an answer; of one that is of no use, that it was paid for."""
        key, known = _key(request), self._read()
        text = None if answer.length else answer.text
        line = json.dumps({"request": key, "text": text, "tokens": answer.tokens})
        with self._lock:
            if key in known:
                return
            self._paid += 1
            if text is not None:
                known[key] = Answer(text, cached=True)
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as stream:
                stream.write(line + "\n")

    def _read(self) -> dict[str, Answer]:
        with self._lock:
            if self._known is None:
                self._known = self._load()
            return self._known

    def _load(self) -> dict[str, Answer]:
        if not self._path.is_file():
            return {}
        data = self._path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if whole != data:  # the run was killed while it wrote
            with self._path.open("r+b") as stream:
                stream.truncate(len(whole))
        known = {}
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                entry = parse_json(line)
                if not isinstance(entry, dict) or not isinstance(entry.get("request"), str):
                    raise ValueError(f"it holds {shorten(entry)}")
                if not isinstance(entry.get("text", 0), str | None):
                    raise ValueError(f"its text is {shorten(entry.get('text'))}")
            except ValueError as error:
                raise ConfigError(
                    f"{self._path}, line {number}, is damaged ({error}); remove the line, and the answer is asked for "
                    "again, or the file, and all are"
                ) from error
            self._paid += 1
            if entry["text"] is not None:
                known[entry["request"]] = Answer(entry["text"], cached=True)
        return known


def _key(request: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()
