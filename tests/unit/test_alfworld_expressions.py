"""Expressions of a game's grammar: ALFWorld's own have their values, anything else is refused and never run."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdar_verl.envs.alfworld.expressions import MAX_LENGTH, ForbiddenExpression, evaluate
from tests.support.fuzzing import TEXTS, quick

VARIABLES = {
    "o": SimpleNamespace(name="mug 1", indefinite="a", id="Mug_1"),
    "r": SimpleNamespace(name="", indefinite="a", id="Fridge_2"),
}


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("o.name", "mug 1"),
        (" o.indefinite + ' ' + o.name ", "a mug 1"),
        ("r.name or r.id", "Fridge_2"),
        ("o.name and r.name or o.id", "Mug_1"),
        ('"it\'s " + r.id', "it's Fridge_2"),
    ],
)
def test_what_alfworlds_grammar_computes(expression: str, value: str) -> None:
    assert evaluate(expression, VARIABLES) == value == eval(expression.strip(), {}, dict(VARIABLES))


@pytest.mark.parametrize(
    "expression",
    [
        "__import__('os').system('true')",
        "o.__class__",
        "_o",
        "o.name.format(o)",
        "(lambda: 1)()",
        "[c for c in o.name]",
        "o.name * 9999999",
        "f'{o}'",
        "o.name[0]",
        "o if o else r",
        "(o := r)",
        "b'x'",
        "1.5",
        "o.name % 3",
        "import os",
        "\x00",
        "",
        "+".join(["o.name"] * 100),
        "(" * 150,
    ],
)
def test_what_could_do_more_is_refused(expression: str) -> None:
    with pytest.raises(ForbiddenExpression) as caught:
        evaluate(expression, VARIABLES)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("expression", ["x", "o.nothing", "o.name + o", "1 + 'a'"])
def test_what_has_no_value_is_named(expression: str) -> None:
    with pytest.raises(ForbiddenExpression, match="without a value"):
        evaluate(expression, VARIABLES)


PIECES = st.sampled_from(["o", "r", ".name", "._x", "+", " or ", "(", ")", "'a'", "__import__", "print", ",", "[0]"])


@quick(150)
@given(expression=st.lists(PIECES | TEXTS, max_size=8).map("".join))
def test_any_text_has_a_value_or_is_refused(expression: str) -> None:
    try:
        value = evaluate(expression, VARIABLES)
    except ForbiddenExpression:
        return
    assert isinstance(value, (str, int, SimpleNamespace))
    assert len(expression) <= MAX_LENGTH
