"""What runs cost, by their ledgers (docs/cloud.md)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sdar_verl.cloud.ledger import Attempt, total
from sdar_verl.report.compare import Group

UNKNOWN = "unknown"


@dataclass(frozen=True)
class Cost:
    """Means over a method's runs.

    Attributes:
        card_hours: accelerators times hours, all attempts; None when a run has no ledger.
        usd: None when the price of any attempt is unknown.
        per_point: USD for a percentage point of success gained, from the first to the last validation; None when the
            cost is unknown or nothing was gained.
    """

    card_hours: float | None
    usd: float | None
    per_point: float | None


def cost(group: Group) -> Cost:
    """Of one method."""
    totals = [total(run.attempts) for run in group.runs if run.attempts]
    if len(totals) < len(group.runs):
        return Cost(None, None, None)
    hours = sum(one.card_hours for one in totals) / len(totals)
    known = [one.cost for one in totals if one.cost is not None and not one.unpriced]
    usd = sum(known) / len(known) if len(known) == len(totals) else None
    curve = group.success.mean(axis=(0, 2))
    points = 100 * float(curve[-1] - curve[0])
    return Cost(hours, usd, usd / points if usd is not None and points > 0 else None)


def rows_of_cost(costs: Sequence[tuple[str, int, Cost]], columns: int) -> list[list[str]]:
    """Lines of a table: a block per quantity, a line per (method, runs, cost); none where no run has a ledger."""
    if all(one.card_hours is None for _, _, one in costs):
        return []
    blocks = (("GPU-hours a run", "card_hours"), ("USD a run", "usd"), ("USD per point gained", "per_point"))
    lines = []
    for title, name in blocks:
        for number, (method, runs, one) in enumerate(costs):
            value = getattr(one, name)
            text = UNKNOWN if value is None else f"{value:,.2f}"
            if name == "per_point" and value is None and one.usd is not None:
                text = "nothing gained"
            line = ["" if number else title, method, str(runs), text]
            lines.append([*line, *[""] * (columns - len(line))])
    return lines


def cards(found: Sequence[Attempt]) -> list[tuple[str, str, str]]:
    """Name, value and small print of what a report says of a run's cost."""
    if not found:
        return []
    sums = total(found)
    tries = f"{sums.attempts} attempt{'s' if sums.attempts > 1 else ''}"
    redone = f", {sums.redone:.0%} of the steps trained again" if sums.attempts > 1 else ""
    money = UNKNOWN if sums.cost is None else f"{sums.cost:,.2f} USD" + (" and more" if sums.unpriced else "")
    small = f"{sums.unpriced} of {tries} without a price" if sums.unpriced else tries
    return [("GPU-hours", f"{sums.card_hours:,.2f}", tries + redone), ("cost", money, small)]


def as_json(one: Cost) -> dict[str, Any]:
    """Plain values; what is unknown is null."""
    return {"gpu_hours": one.card_hours, "usd": one.usd, "usd_per_point": one.per_point}
