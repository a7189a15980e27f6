"""What all unit tests have in common."""

from __future__ import annotations

import pickle
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf


@pytest.fixture(scope="session", autouse=True)
def configs_are_parsed_once() -> Iterator[None]:
    """Hydra reads some forty YAML files for every composition, most of its time: here each text is parsed once, and
    everybody gets a copy of his own."""
    load, parsed = OmegaConf.load, dict[str, bytes]()

    def from_text(file: Any) -> Any:
        if hasattr(file, "read"):
            text = file.read()
            file.seek(0)
        else:
            text = Path(file).read_text(encoding="utf-8")
        if text not in parsed:
            parsed[text] = pickle.dumps(load(file))
        return pickle.loads(parsed[text])  # a quarter of what deepcopy takes

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OmegaConf, "load", from_text)
        yield


@pytest.fixture
def handled() -> Iterator[Callable[[int], None]]:
    """Signals that would end this process are caught; calling it with a number shows that the test left that so."""
    caught: list[int] = []
    numbers = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
    before = {number: signal.signal(number, lambda number, _: caught.append(number)) for number in numbers}

    def again(number: int) -> None:
        assert caught == []
        signal.raise_signal(number)
        assert caught == [number]

    yield again
    for number, handler in before.items():
        signal.signal(number, handler)
