"""What an environment of a user's returns: every field is checked where it arrives, and its author is told."""

from __future__ import annotations

import asyncio
from argparse import ArgumentParser
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from enum import Enum
from typing import Any

import numpy as np
import pytest
import torch
from ray import cloudpickle

from sdar_verl.envs import registry
from sdar_verl.envs.base import Step, Task, TextEnv
from sdar_verl.envs.fields import StepError
from sdar_verl.envs.host import EnvHost, EnvRaised
from sdar_verl.envs.registry import check_env, demonstration_of, register_env
from sdar_verl.errors import RolloutError
from sdar_verl.rollout.rows import RowInfo
from sdar_verl.table import stop_on_lost_episodes
from tests.support.table import make_table

TASK = Task("theirs", "t", "", "")


@pytest.fixture(autouse=True)
def registered_here_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    yield


@pytest.mark.parametrize(
    ("field", "value", "right"),
    [
        ("observation", None, "must be text"),
        ("observation", b"bytes", "must be text"),
        ("observation", ["a"], "must be text"),
        *(("reward", value, "must be a number") for value in (None, "1", [1.0], np.ones(1), 1j, Decimal(1))),
        *(("reward", value, "must be a finite number") for value in (float("nan"), float("-inf"), 1e39, 10**400)),
        *(("reward", value, "must be a finite number") for value in (np.float32("nan"), torch.tensor(float("inf")))),
        *(("done", value, "must be True or False") for value in (None, "false", 2, 0.5, [], float("nan"))),
        *(("success", value, "must be True or False") for value in (None, "no", -1, (), torch.zeros(2))),
        *(("score", value, "from 0 to 1") for value in (85, -0.1, 1.001)),
        *(("score", value, "must be a") for value in ("1", float("nan"), [0.5])),
        *(("admissible_actions", value, "tuple of texts, \\(\\) for none") for value in (None, "look", b"look", 3)),
        *(("admissible_actions", value, "tuple of texts") for value in ((1,), {"look"}, {"look": 1}, [None])),
        ("admissible_actions", np.array("look"), "tuple of texts"),
        ("admissible_actions", ("look", " "), "holds an empty text"),
        ("action_forms", None, "tuple of texts"),
        ("action_forms", ("search[query]",), r"one free part, in angle brackets, such as 'search\[<query>\]'"),
        ("action_forms", ("move <x> to <y>",), "one free part"),
        ("info", None, "must be a dict"),
        ("info", [("a", 1)], "must be a dict"),
    ],
)
def test_a_wrong_field_is_named_with_its_value_and_the_right_form(field: str, value: Any, right: str) -> None:
    with pytest.raises(StepError, match=f"a step's {field} .*{right}") as caught:
        Step(**{"observation": "o", field: value})
    # Both promises of the docstring, and of those who caught one of them.
    assert isinstance(caught.value, TypeError) and isinstance(caught.value, ValueError)


def test_numbers_of_numpy_and_torch_become_pythons() -> None:
    step = Step(
        np.str_("o"),
        reward=torch.tensor(0.5, requires_grad=True),
        done=np.bool_(True),
        success=torch.tensor(True),
        score=np.float32(1.0) + np.float32(1e-7),
        admissible_actions=(letter for letter in "ab"),
    )
    assert step == Step("o", reward=0.5, done=True, success=True, score=1.0, admissible_actions=("a", "b"))
    kinds = [type(value) for value in (step.observation, step.reward, step.done, step.success, step.score)]
    assert kinds == [str, float, bool, bool, float]
    assert type(Step("o", reward=True, done=1, success=0.0).reward) is float
    assert Step("o", admissible_actions=np.array(["a", "b"])).admissible_actions == ("a", "b")


class Move(str, Enum):
    """Its members are texts, whose str() is another."""

    LOOK = "look around"


def test_a_member_of_an_enumeration_is_the_text_that_it_stands_for() -> None:
    step = Step(Move.LOOK, admissible_actions=[*Move])
    assert (step.observation, step.admissible_actions) == ("look around", ("look around",))
    assert {type(text) for text in (step.observation, *step.admissible_actions)} == {str}


@dataclass(frozen=True)
class Theirs(Step):
    lives: int = 3

    def __post_init__(self) -> None:
        """Does not check what it inherits."""


def test_a_step_of_a_class_of_theirs_is_checked_and_travels_as_ours() -> None:
    step = host_of(lambda: Theirs("o", np.float32(0.5))).step(0, "look").step
    assert type(step) is Step and step == Step("o", 0.5)
    with pytest.raises(EnvRaised, match="reward must be a number, not None") as caught:
        host_of(lambda: Theirs("o", None)).step(0, "look")  # type: ignore[arg-type]
    assert caught.value.authors


def host_of(answer: Any) -> EnvHost:
    """A host of an environment whose methods return ``answer()``."""

    class Theirs(TextEnv):
        def reset(self, task: Task) -> Any:
            return answer()

        def step(self, action: str) -> Any:
            return answer()

    register_env("theirs")(Theirs)
    return EnvHost("theirs", {}, ())


METHODS = ("reset", "step", "check", "close")


async def coroutine_method(self: Any, given: Any = None) -> Step:
    return Step("o")


async def coroutine() -> Step:
    return Step("o")


def generator() -> Iterator[Step]:
    yield Step("o")


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (lambda: ("o", 1.0, False, False, {}), r"it returned \('o', 1.0, False, .*a tuple as gym's"),
        (lambda: None, "it returned None"),
        (lambda: "o", "it returned 'o'"),
        (lambda: {"observation": "o"}, r"it returned \{'observation'"),
        (coroutine, "must be a plain function"),
        (generator, "must be a plain function"),
        (lambda: Step, "which is no sdar_verl.envs.base.Step"),
        (lambda: Step("o", reward=None), "a step's reward must be a number, not None"),
        (lambda: Step(text="o"), "unexpected keyword argument 'text'. Return Step"),
        (lambda: Step("o", 0, False, False, (), (), None, {}, 1), "positional arguments .*Return Step"),
    ],
)
@pytest.mark.parametrize("method", ["reset", "step"])
@pytest.mark.filterwarnings("error")  # a coroutine that nobody awaited
def test_what_is_no_step_is_its_authors_fault(method: str, answer: Any, told: str) -> None:
    host = host_of(answer)
    host.start()
    with pytest.raises(EnvRaised, match=told) as caught:
        getattr(host, method)(0, TASK if method == "reset" else "look")
    assert caught.value.authors
    if answer not in (coroutine, generator) and "reward" not in told:
        assert "Return Step(observation, reward=0.0, done=False" in caught.value.text


@pytest.mark.parametrize("given", [{"done": True}, {"reward": 1.0}, {"success": True}, {"score": 0.5}])
def test_a_reset_that_ends_or_pays_is_told(given: dict[str, Any]) -> None:
    host = host_of(lambda: Step("o", **given))
    ((field, value),) = given.items()
    with pytest.raises(EnvRaised, match=f"reset returned {field}={value}: an episode begins without") as caught:
        host.reset(0, TASK)
    assert caught.value.authors
    assert getattr(host.step(0, "look").step, field) == value


class TwoParts(Exception):
    """Cannot be unpickled, as those of many libraries."""

    def __init__(self, code: int, what: str) -> None:
        super().__init__(f"{code} {what}")


@pytest.mark.parametrize(
    "error", [TwoParts(503, "busy"), StopIteration("no more"), asyncio.TimeoutError("mine"), SystemExit(2)]
)
def test_whatever_an_environment_raises_travels_as_text(error: BaseException) -> None:
    def answer() -> Step:
        raise error

    with pytest.raises(EnvRaised) as caught:
        host_of(answer).step(0, "look")
    told = cloudpickle.loads(cloudpickle.dumps(caught.value))
    assert (told.text, told.authors) == (f"{type(error).__name__}: {error}", False)


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"action_tags": "action"}, r"action_tags must be a tuple of names, such as .* not 'action'"),
        ({"action_tags": ()}, "action_tags is empty"),
        ({"task_types": "pick"}, "task_types must be a tuple of names"),
        ({"longest_step_s": None}, "longest_step_s must be a number of seconds"),
        ({"reset": TextEnv.reset}, "cannot be made: TypeError: .*abstract"),
        ({"__init__": lambda self: {}["key"]}, "cannot be made: KeyError: 'key'"),
        ({"check": lambda self: 1 / 0}, "raised in its check: ZeroDivisionError"),
        ({"close": lambda self: {}["key"]}, "raised in its close: KeyError: 'key'"),
        # A class that reads the command line, as those that were scripts do.
        ({"__init__": lambda self: ArgumentParser().parse_args(["--no"])}, "cannot be made: SystemExit: 2"),
        ({"action_tags": ("<action>",)}, "action_tags holds '<action>'; a tag's name is in lower case and without"),
        ({"action_tags": ("Search", "answer")}, "action_tags holds 'Search'"),
        ({"thread_safe": lambda self: False}, "thread_safe must be True or False, not <bound method"),
        ({"task_type_aliases": ["pick"]}, r"task_type_aliases must be a dict .*not \['pick'\]"),
        ({"longest_step_s": float("nan")}, "longest_step_s must be a number of seconds"),
        ({"longest_step_s": property(lambda self: self.limit)}, "cannot be made: AttributeError: .*'limit'"),
        # As gym's are called.
        (
            {"reset": lambda self, *, seed=None, options=None: Step("o")},
            r"reset must be defined as reset\(self, task\) ",
        ),
        ({"step": lambda self, action, done: Step("o")}, r"step must be .* step\(self, action\) \(missing .*'done'"),
        *(({method: coroutine_method}, f"{method} must be a plain function .*not an async") for method in METHODS),
    ],
)
def test_a_class_that_says_something_wrong_about_itself_is_refused(attributes: dict[str, Any], message: str) -> None:
    methods = {"reset": lambda self, task: Step("o"), "step": lambda self, action: Step("o")}
    register_env("theirs")(type("Theirs", (TextEnv,), {**methods, **attributes}))
    with pytest.raises(ValueError, match=message):
        check_env("theirs", {})


def test_a_factory_must_make_an_environment() -> None:
    register_env("theirs")(lambda: object())
    with pytest.raises(ValueError, match=r"must be a sdar_verl\.envs\.base\.TextEnv"):
        check_env("theirs", {})


def test_a_demonstration_is_a_list_of_texts() -> None:
    class Theirs(TextEnv):
        said: Any = None

        @classmethod
        def demonstration(cls, task: Task) -> Any:
            return cls.said

        def reset(self, task: Task) -> Step:
            return Step("o")

        step = reset  # type: ignore[assignment]

    register_env("theirs")(Theirs)
    for Theirs.said, actions in (
        (None, []),
        ("go on", ["go on"]),
        (("a", "b"), ["a", "b"]),
        ([*Move], ["look around"]),
    ):
        assert demonstration_of(TASK) == actions
    for Theirs.said in ([("go", 1.0)], {"go": 1}, {"go", "on"}, 3, [""]):
        with pytest.raises(ValueError, match="demonstration of task 't': it must be a list of actions"):
            demonstration_of(TASK)


def test_an_environment_that_failed_is_closed_and_another_made() -> None:
    made: list[str] = []

    class Theirs(TextEnv):
        def __init__(self, name: str) -> None:
            made.append(name)

        def reset(self, task: Task) -> Step:
            return Step("o")

        def step(self, action: str) -> Step:
            raise KeyError(action)

        def close(self) -> None:
            made.append("closed")
            raise OSError("no such engine")

    register_env("theirs")(Theirs)
    host = EnvHost("theirs", {"name": "an option of theirs"}, ())
    for _ in range(2):
        host.reset(0, TASK)
        with pytest.raises(EnvRaised, match="KeyError"):
            host.step(0, "look")
    assert made == ["an option of theirs", "closed"] * 2
    host.close()
    assert len(made) == 4


# ---------------------------------------------------------------- runs that lose most of their episodes


def row(failure: str | None) -> RowInfo:
    return RowInfo(turn=0, task_type="", failed=failure is not None, failure=failure)


def test_a_run_that_loses_most_of_its_episodes_stops_and_says_why() -> None:
    keys = [f"p{i}_0_{turn}" for i in range(4) for turn in range(3)]
    infos = [row(None) if key < "p2" else row("KeyError: 'a bug'") for key in keys]
    failures = make_table([*keys, "pad_0_0"], [*infos, None]).failures()
    assert failures == [None, None, "KeyError: 'a bug'", "KeyError: 'a bug'"]
    stop_on_lost_episodes(failures, 4)  # half of them
    stop_on_lost_episodes([], 0)
    with pytest.raises(RolloutError, match=r"(?s)3 of 5 episodes .*2 times: KeyError.*1 times: nothing came back"):
        stop_on_lost_episodes(failures, 5)
    with pytest.raises(RolloutError, match="3 of 5 episodes"):
        stop_on_lost_episodes([*failures, "another"], 3)
