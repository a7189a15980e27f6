"""Settings and strategies of the property tests on hostile input: the same examples in every run, and few enough."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st


def quick(examples: int) -> Any:
    """Decorator: ``examples`` cases, always the same ones."""
    return settings(
        derandomize=True,
        database=None,
        deadline=None,
        max_examples=examples,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    )


LONE = "\ud800"
"""Half of a surrogate pair: JSON carries it, but it is no text."""

NASTY = st.sampled_from(
    [
        *("<script>alert(1)</script>", "</script>", "<!--", "'\"><img src=x onerror=alert(1)>", "&lt;think&gt;"),
        *("{{ 7*7 }}", "{% raw %}", "{#", "${env:HOME}", "\x00", "\x1b[31m", "\r\n", "\u2028", "\u202e", LONE),
        *("../../etc/passwd", "/dev/zero", "=cmd()", "[/red]", "%s%n", "😀", "ﬁ", "İ", "ſ"),
    ]
)
TEXTS = st.lists(NASTY | st.text(st.characters(), max_size=6), max_size=6).map("".join)
"""Texts with what breaks HTML, templates, terminals, paths and encodings; halves of surrogate pairs among them."""

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | TEXTS
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3), max_leaves=8
)
"""Any JSON value, NaN and infinity included."""


def mutated(draw: st.DrawFn, value: Any) -> Any:
    """``value`` with one of its parts, at any depth, replaced by any value or taken out."""
    if isinstance(value, dict) and value and draw(st.integers(0, 3)):
        key = draw(st.sampled_from(sorted(value)))
        if not draw(st.integers(0, 5)):
            return {name: item for name, item in value.items() if name != key}
        return {**value, key: mutated(draw, value[key])}
    if isinstance(value, list) and value and draw(st.integers(0, 3)):
        index = draw(st.integers(0, len(value) - 1))
        return [*value[:index], mutated(draw, value[index]), *value[index + 1 :]]
    return draw(VALUES)


@st.composite
def mutations(draw: st.DrawFn, value: Any, most: int = 2) -> Any:
    """Copies of a JSON value with one or a few parts gone wrong."""
    changed = json.loads(json.dumps(value))
    for _ in range(draw(st.integers(1, most))):
        changed = mutated(draw, changed)
    return changed


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Bytes cut off, with a piece replaced, or with a piece put in."""
    at, length = draw(st.integers(0, len(content))), draw(st.integers(0, 8))
    piece = draw(st.binary(max_size=8) | NASTY.map(lambda text: text.encode("utf-8", "surrogatepass")))
    return content[:at] + draw(st.sampled_from([piece, piece + content[at:], piece + content[at + length :]]))
