"""Environments by name: errors that say what is known and what to install, third-party registration."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from importlib import util
from typing import Any

import pytest

import sdar_verl.envs.alfworld.env  # noqa: F401  registers itself once, before the fixture below copies the table
from sdar_verl.algorithm.gates import register_gate
from sdar_verl.algorithm.objectives import register_objective
from sdar_verl.algorithm.schedules import register_schedule
from sdar_verl.algorithm.signals import register_signal
from sdar_verl.context.registry import register_context
from sdar_verl.envs import registry
from sdar_verl.envs.base import Step, Task, TextEnv
from sdar_verl.envs.registry import check_env, known_envs, make_env, register_env
from sdar_verl.skills.registry import register_retriever
from sdar_verl.teacher.sources import register_source


class Countdown(TextEnv):
    """Three steps, then done."""

    def __init__(self, start: int = 3, *, word: str = "left") -> None:
        self.left, self.word, self.closed = start, word, False

    def reset(self, task: Task) -> Step:
        return self.step("")

    def step(self, action: str) -> Step:
        self.left -= 1
        return Step(f"{self.left} {self.word}", done=self.left == 0)


@pytest.fixture(autouse=True)
def registered_here_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    yield


def test_a_registered_environment_is_made_with_its_options() -> None:
    register_env("countdown")(Countdown)
    assert {"alfworld", "countdown"} <= set(known_envs())
    assert list(known_envs()) == sorted(known_envs())
    env = make_env("countdown", start=2, word="to go")
    assert env.reset(Task("countdown", "t", "", "")) == Step("1 to go")
    assert env.step("").done


def test_unknown_names_list_the_known_ones() -> None:
    register_env("countdown")(Countdown)
    with pytest.raises(ValueError, match=r"unknown environment 'alfword'; known: alfworld, countdown.*sdar.modules"):
        make_env("alfword")


@pytest.mark.parametrize("name", ["alfworld", "countdown"])
def test_unknown_options_list_the_known_ones(name: str) -> None:
    register_env("countdown")(Countdown)
    known = "hide_actions, success_reward, speedups" if name == "alfworld" else "start, word"
    with pytest.raises(ValueError, match=f"environment '{name}' has no option 'color', 'size'; known: {known}"):
        check_env(name, {"size": 1, "color": 2})


def test_a_missing_option_is_named() -> None:
    @register_env("needy")
    def needy(level: str) -> TextEnv:
        return Countdown(len(level))

    with pytest.raises(ValueError, match="environment 'needy' needs the option 'level'"):
        check_env("needy", {})
    check_env("needy", {"level": "abc"})


def test_open_ended_options_are_passed_on() -> None:
    @register_env("open")
    def open_(**options: Any) -> TextEnv:
        return Countdown(**options)

    assert make_env("open", word="x").reset(Task("open", "t", "", "")).observation == "2 x"


def test_a_taken_name_is_refused_and_a_second_import_is_not() -> None:
    register_env("countdown")(Countdown)
    register_env("countdown")(Countdown)
    with pytest.raises(ValueError, match=r"'countdown' is already registered by .*Countdown; choose another name"):
        register_env("countdown")(TextEnv)
    with pytest.raises(ValueError, match=r"'alfworld' is already registered by sdar_verl\.envs\.alfworld\.env"):
        register_env("alfworld")(Countdown)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hide_actions": "help"}, "hide_actions='help': give a list of words"),
        ({"hide_actions": ["help", ""]}, "hide_actions"),
        ({"success_reward": 0}, "success_reward=0: give a number above 0"),
        ({"success_reward": "ten"}, "success_reward='ten'"),
        ({"success_reward": True}, "success_reward=True"),
        ({"success_reward": float("nan")}, "success_reward=nan"),
        ({"success_reward": float("inf")}, "success_reward=inf"),
        ({"speedups": "no"}, "speedups='no': give true or false"),
    ],
)
def test_alfworld_refuses_wrong_values(options: dict[str, Any], message: str) -> None:
    pytest.importorskip("alfworld")
    with pytest.raises(ValueError, match=message):
        check_env("alfworld", options)


def test_a_missing_extra_names_the_pip_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(registry._registered, "alfworld", raising=False)
    find_spec = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name: None if name == "alfworld" else find_spec(name))
    with pytest.raises(ImportError, match=r'needs alfworld, not installed here: pip install "sdar-verl\[alfworld\]"'):
        make_env("alfworld")


def test_checking_alfworld_loads_no_engine_and_no_training_stack() -> None:
    program = (
        "import sys; from sdar_verl.envs.registry import check_env; check_env('alfworld', {'hide_actions': ['help']});"
        "import sdar_verl.envs.pool;"
        "print(sorted({'textworld', 'alfworld', 'torch', 'verl', 'ray', 'numpy'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    assert found.strip() == "[]"


@pytest.mark.parametrize(
    "decorator",
    [
        register_env,
        register_context,
        register_retriever,
        register_gate,
        register_objective,
        register_signal,
        register_schedule,
        register_source,
    ],
)
def test_a_decorator_without_a_name_is_told_at_once(decorator: Any) -> None:
    with pytest.raises(
        TypeError, match=rf'@{decorator.__name__} needs a name, and got Countdown: write @.*\("a_name"\)'
    ):
        decorator(Countdown)
    with pytest.raises(TypeError, match="and got ''"):
        decorator("")
