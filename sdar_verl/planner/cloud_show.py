"""Offers of rented machines as text and as JSON."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from typing import Any

from sdar_verl.planner.cloud import NOTICE_S, WEEKEND_H, Assumptions, Offer, storage_usd
from sdar_verl.planner.prices import Rate, stale


def as_text(offers: Sequence[Offer], given: Assumptions, rates: dict[str, Rate], today: datetime.date) -> str:
    """A table, the cheapest offer in detail, and what all of it assumes."""
    if not offers:
        return "on no machine of the table does this recipe fit; sdar-verl plan --recommend says what would help"
    head = ("provider", "machine", "n", "hours", "on demand", "on spot", "save_freq", "weekend", "price read")
    rows = [head, *(_row(offer, today) for offer in offers)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = ["USD of the whole run, cheapest on demand first"]
    for row in rows:
        lines.append("  " + "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())
    lines += ["", "overrides of the recipe there"]
    lines += [f"  {offer.nodes} x {_machine(offer)}: {' '.join(offer.overrides)}" for offer in offers]
    best = offers[0]
    return "\n".join(
        [*lines, "", *_detail(best, given, rates), "", *_assumptions(best, given), *_warnings(offers, today)]
    )


def as_dict(
    offers: Sequence[Offer], given: Assumptions, rates: dict[str, Rate], today: datetime.date
) -> dict[str, Any]:
    """The same as plain values: USD, hours, seconds, bytes."""
    return {
        "offers": [
            {
                "provider": offer.node.provider,
                "node": offer.node.node,
                "region": offer.node.region or None,
                "nodes": offer.nodes,
                "cards": offer.node.cards * offer.nodes,
                "overrides": offer.overrides,
                "price": offer.node.on_demand,
                "price_read": offer.node.read.isoformat(),
                "source": offer.node.source,
                "hours": offer.hours,
                "on_demand": offer.on_demand,
                "spot": offer.spot,
                "weekend": offer.weekend,
                "save_freq": offer.saving.every,
                "save_seconds": offer.saving.save_s,
                "upload_seconds": offer.saving.upload_s,
                "interruptions": offer.saving.interruptions,
                "lost_seconds_per_interruption": offer.saving.lost_s,
                "spot_stretch": offer.saving.stretch,
                "step_fits_notice": offer.step_fits_notice,
                "checkpoint_bytes": offer.checkpoint,
                "storage": storage_usd(offer, given, rates),
            }
            for offer in offers
        ],
        "assumptions": vars(given),
        "warnings": stale([offer.node for offer in offers], today),
    }


def _machine(offer: Offer) -> str:
    return offer.node.node + (f" ({offer.node.region})" if offer.node.region else "")


def _row(offer: Offer, today: datetime.date) -> tuple[str, ...]:
    spot = offer.spot
    return (
        offer.node.provider,
        _machine(offer),
        str(offer.nodes),
        f"{offer.hours:.1f}",
        f"{offer.on_demand:,.0f}",
        "-" if spot is None else f"{spot[0]:,.0f}" + (f" to {spot[1]:,.0f}" if spot[1] > spot[0] else ""),
        str(offer.saving.every),
        f"{offer.weekend:,.0f}",
        offer.node.read.isoformat(),
    )


def _detail(offer: Offer, given: Assumptions, rates: dict[str, Rate]) -> list[str]:
    saving, step, storage = offer.saving, offer.plan.step, storage_usd(offer, given, rates)
    fits = "fits" if offer.step_fits_notice else "does not fit"
    return [
        f"{offer.node.node}, {offer.nodes} of it: a step takes {step:.0f} s; a checkpoint has "
        f"{offer.checkpoint / 1e9:.0f} GB, {saving.save_s:.0f} s to save, {saving.upload_s:.0f} s more until it counts",
        f"  trainer.save_freq={saving.every}: an interruption loses {saving.lost_s / 60:.0f} min of work on average, "
        f"and {given.restart_s / 60:.0f} min to start again; {saving.interruptions:.1f} expected, the run takes "
        f"{saving.stretch:.2f} times as long",
        f"  a step with its save {fits} into a notice of {NOTICE_S:.0f} s",
        f"  a weekend in which nobody looks ({WEEKEND_H:.0f} h): {offer.weekend:,.0f} USD, "
        f"{offer.weekend / offer.on_demand:.1f} times the run"
        if offer.on_demand
        else "",
        f"  storage: {storage['object storage']:.2f} for {given.kept} checkpoints and {given.months:g} month, "
        f"{storage['disk']:.2f} for the node's disk, {storage['egress']:.2f} to take one checkpoint home",
    ]


def _assumptions(offer: Offer, given: Assumptions) -> list[str]:
    layout = offer.plan.layout
    return [
        "assumed:",
        f"  {layout.turns:.0f} turns of {layout.prompt:.0f} + {layout.context:.0f} + {layout.response:.0f} tokens "
        "(--turns, --prompt, --context, --response); the time of a step is right within a factor of two",
        f"  {given.interruption_h:g} h between interruptions of a spot machine (--interruption), none on demand; "
        f"{given.restart_s / 60:g} min to start again (--restart)",
        f"  a node writes {given.disk / 1e6:g} MB/s to its disk and {given.upload / 1e6:g} MB/s to the mirror "
        "(--disk-rate, --upload-rate): measure them with sdar-verl doctor --cloud",
        "  the first start and the traffic between nodes are not in it; prices are the source's, without discounts and "
        "taxes",
    ]


def _warnings(offers: Sequence[Offer], today: datetime.date) -> list[str]:
    return ["", *(f"warning: {text}" for text in stale([offer.node for offer in offers], today))]
