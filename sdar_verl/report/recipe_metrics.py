"""Success in a recipe of verl's, whose validation has verl's own names: ``val-core/<data source>/acc/mean@N``."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Mapping
from typing import Any

from sdar_verl.config import played_arms
from sdar_verl.untrusted import shorten

_CORE = re.compile(r"val-core/(?P<source>.+)/(?P<name>acc|reward)/mean@\d+", re.DOTALL)
_SHOWN = 6


def arm_names(arms: Mapping[str, Any], environments: bool) -> list[str]:
    """What a run's validation arms are called in ``sdar-val/<arm>/success``, of a text environment or a recipe."""
    own = "verl" if "student" in (played := played_arms(arms, environments)) else "student"
    return [own if name is None else name for name in played]


def recipe_success(
    metrics: Mapping[int, Mapping[str, Any]], arms: Collection[str] | None = None
) -> tuple[dict[int, dict[str, float]], list[str]]:
    """Success per validation arm, under the name that it has with the text environments.

    verl's own validation is the arm ``student``, or ``verl`` where ``student`` is an arm that was set. An arm that was
    set stands behind the data source (:class:`sdar_verl.verl.validation.ArmLoader`), and a data source may hold slashes
    itself.

    Args:
        metrics: step -> metrics, those that are numbers.
        arms: names of the run's arms. None: the record does not tell them, and what stands behind every data source
            counts as one.

    Returns:
        step -> ``{"sdar-val/<arm>/success": value}``, the mean over data sources of verl's core metric: of ``acc``,
        or of ``reward`` where a source has no ``acc``; and what a reader must know. A step at which an arm lacks a
        data source is left out.
    """
    found: dict[int, dict[str, float]] = defaultdict(dict)
    names: dict[str, set[str]] = defaultdict(set)
    for step, data in metrics.items():
        for key, value in data.items():
            if match := _CORE.fullmatch(key):
                found[step][match["source"]] = float(value)
                names[match["source"]].add(match["name"])
    own, set_arms = _split(names, arms)
    success: dict[int, dict[str, float]] = {}
    lacking: set[int] = set()
    listed = {("verl" if "student" in set_arms else "student"): "", **{arm: f"/{arm}" for arm in set_arms}}
    for step, values in found.items():
        for arm, end in listed.items():
            those = [values[source + end] for source in own if source + end in values]
            if len(those) == len(own):
                success.setdefault(step, {})[f"sdar-val/{arm}/success"] = sum(those) / len(those)
            elif those:
                lacking.add(step)
    return success, _notes(own, names, lacking)


def _split(sources: Collection[str], arms: Collection[str] | None) -> tuple[list[str], list[str]]:
    """The data sources of the panel, and the arms that stand behind them."""
    ends = {source: source.rpartition("/") for source in sources}
    roots = [source for source, (base, _, _) in ends.items() if base not in sources]
    set_arms = {
        end
        for base, _, end in ends.values()
        if base in sources and (all(f"{root}/{end}" in sources for root in roots) if arms is None else end in arms)
    }
    own = sorted(source for source, (base, _, end) in ends.items() if base not in sources or end not in set_arms)
    return own, sorted(set_arms)


def _notes(own: Collection[str], names: Mapping[str, set[str]], lacking: Collection[int]) -> list[str]:
    if not own:
        return []
    accurate = [source for source in own if names[source] == {"acc"}]
    others = [source for source in own if names[source] != {"acc"}]
    parts = [f"acc of {_some(accurate)}"] if accurate else []
    parts += [f"reward of {_some(others)}, where there is no acc"] if others else []
    mean = "the mean over data sources of verl's core metric" if len(own) > 1 else "verl's core metric"
    notes = [f"Success is {mean} (val-core): {'; '.join(parts)}."]
    if lacking:
        notes.append(f"At steps {_some(sorted(lacking))} some data source was not validated; they are left out.")
    return notes


def _some(values: Collection[Any]) -> str:
    texts = [value if isinstance(value, str) and len(value) <= 80 else shorten(value) for value in values]
    return ", ".join(texts[:_SHOWN]) + (f" and {len(texts) - _SHOWN} more" if len(texts) > _SHOWN else "")
