"""Keeps a game file from running Python.

A ``game.tw-pddl`` holds a grammar, whose expressions (``{o.indefinite + ' ' + o.name}``) TextWorld gives to Python's
``eval``: a game from elsewhere could run anything. :func:`install` makes TextWorld evaluate them here instead, by the
few operations that ALFWorld's grammar uses; same words, nothing else can be said.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Mapping
from typing import Any

from sdar_verl.errors import SdarError

MAX_LENGTH = 200
"""Characters of an expression; ALFWorld's longest has thirty."""


class ForbiddenExpression(SdarError):
    """A game's grammar wants to compute what no game needs. No ValueError: the engine takes those for bad commands."""


def evaluate(expression: str, variables: Mapping[str, Any]) -> Any:
    """Value of ``expression``: variables, their attributes, texts and numbers, ``+``, ``and``, ``or``.

    Args:
        expression: of a grammar.
        variables: name -> what the game says of an object.

    Raises:
        ForbiddenExpression: it holds anything else, such as a call, or a name that begins with an underscore.
    """
    try:
        return _value(_parse(expression), variables)
    except (KeyError, AttributeError, TypeError) as error:
        raise ForbiddenExpression(
            f"the game's grammar has an expression without a value, {expression!r} ({type(error).__name__}: {error})"
        ) from error


def install() -> None:
    """Let TextWorld evaluate by :func:`evaluate` in this process; a second call does nothing."""
    from textworld.envs.pddl import textgen

    def derive(self: Any, context: Mapping[str, Any] | None = None) -> list[Any]:
        return [textgen.TerminalSymbol(evaluate(self.expression, (context or self.context)["variables"]))]

    textgen.EvalSymbol.derive = derive


@functools.lru_cache(maxsize=1024)
def _parse(expression: str) -> ast.expr:
    if len(expression) > MAX_LENGTH:
        raise ForbiddenExpression(f"the game's grammar has an expression of {len(expression)} characters; {_REMEDY}")
    try:
        tree = ast.parse(expression.strip(), mode="eval").body
    except (SyntaxError, ValueError) as error:
        raise ForbiddenExpression(
            f"the game's grammar has an expression that is none, {expression!r} ({error}); {_REMEDY}"
        ) from error
    for node in ast.walk(tree):
        name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
        plain = not isinstance(node, ast.Constant) or isinstance(node.value, (str, int))
        if not isinstance(node, _ALLOWED) or name.startswith("_") or not plain:
            raise ForbiddenExpression(
                f"the game's grammar wants to compute {expression!r}, which is more than ALFWorld's games do "
                f"({type(node).__name__}) and could run any code; {_REMEDY}"
            )
    return tree


def _value(node: ast.expr, variables: Mapping[str, Any]) -> Any:
    if isinstance(node, ast.Name):
        return variables[node.id]
    if isinstance(node, ast.Attribute):
        return getattr(_value(node.value, variables), node.attr)
    if isinstance(node, ast.BinOp):
        return _value(node.left, variables) + _value(node.right, variables)
    if isinstance(node, ast.BoolOp):
        value = None
        for operand in node.values:
            value = _value(operand, variables)
            if bool(value) is isinstance(node.op, ast.Or):
                break
        return value
    assert isinstance(node, ast.Constant)
    return node.value


_ALLOWED = (ast.Name, ast.Attribute, ast.Constant, ast.BinOp, ast.Add, ast.BoolOp, ast.And, ast.Or, ast.Load)
_REMEDY = "use games from a source you trust: alfworld-download, or sdar-verl prepare alfworld --generate"
