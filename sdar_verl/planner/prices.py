"""What machines and storage cost: a dated table of the package, a file of the user's, SkyPilot's catalogue."""

from __future__ import annotations

import csv
import datetime
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path

from sdar_verl.errors import ConfigError
from sdar_verl.planner.hardware import GPUS
from sdar_verl.text_files import TextFileError, read_text

STALE_DAYS = 90
_SKY = {"A100-80GB": "a100-80gb", "A100": "a100-40gb", "H100": "h100-80gb", "H200": "h200-141gb", "B200": "b200-180gb"}


@dataclass(frozen=True)
class Node:
    """A machine for rent.

    Attributes:
        provider, node: who rents it, and under which name.
        region: where; empty when the source does not say.
        gpu: card, as ``--gpu`` takes it.
        cards: how many.
        on_demand: USD an hour.
        spot_low, spot_high: the range of its spot price; None when it has none.
        read: when the source was read.
        source: whose word it is.
    """

    provider: str
    node: str
    region: str
    gpu: str
    cards: int
    on_demand: float
    spot_low: float | None
    spot_high: float | None
    read: datetime.date
    source: str

    def age(self, today: datetime.date) -> int:
        """Days since the source was read."""
        return (today - self.read).days


@dataclass(frozen=True)
class Rate:
    """What something else costs: ``usd`` per ``unit``."""

    what: str
    usd: float
    unit: str
    read: datetime.date
    source: str


def nodes(file: Path | None = None, sky: Path | None = None) -> list[Node]:
    """All machines that have a price.

    Args:
        file: instead of the package's table.
        sky: SkyPilot's folder; its catalogue, where there is one, stands before the table for the machines it knows.

    Raises:
        ConfigError: a file cannot be read; names it, its line and its column.
    """
    text = _package("prices.csv") if file is None else _text(file)
    listed = [_node(row, where) for row, where in _rows(text, str(file or "prices.csv"), _NODE)]
    catalogue = list(_catalogue(sky)) if sky is not None else []
    known = {(node.provider, node.node) for node in catalogue}
    return catalogue + [node for node in listed if (node.provider, node.node) not in known]


def rates() -> dict[str, Rate]:
    """Storage and traffic, by name."""
    found = {}
    for row, where in _rows(_package("rates.csv"), "rates.csv", ("what", "usd", "unit", "read", "source")):
        found[row["what"]] = Rate(
            row["what"], _number(row, "usd", where), row["unit"], _date(row, where), row["source"]
        )
    return found


def choose(listed: Sequence[Node], node: str | None, region: str | None) -> list[Node]:
    """Those called ``node`` in ``region``; None takes any.

    Raises:
        ConfigError: there is none; lists the known.
    """
    if node is not None:
        found = [one for one in listed if one.node == node]
        if not found:
            known = ", ".join(sorted({one.node for one in listed}))
            raise ConfigError(f"--node {node}: unknown; known: {known} (a file of your own: --prices FILE)")
        listed = found
    if region is not None:
        found = [one for one in listed if one.region == region]
        if not found:
            known = ", ".join(sorted({one.region for one in listed if one.region})) or "none, the table has no regions"
            raise ConfigError(f"--region {region}: unknown; known: {known} (a file of your own: --prices FILE)")
        listed = found
    return list(listed)


def stale(listed: Iterable[Node], today: datetime.date) -> list[str]:
    """A warning for each machine whose price is older than 90 days."""
    return [
        f"the price of {node.node} ({node.provider}) was read {node.age(today)} days ago, on {node.read}: look it up, "
        "or give --prices FILE"
        for node in listed
        if node.age(today) > STALE_DAYS
    ]


_NODE = ("provider", "node", "region", "gpu", "cards", "on_demand", "spot_low", "spot_high", "read", "source")


def _rows(text: str, file: str, columns: Sequence[str]) -> Iterator[tuple[dict[str, str], str]]:
    reader = csv.DictReader(io.StringIO(text))
    missing = [name for name in columns if name not in (reader.fieldnames or [])]
    if missing:
        raise ConfigError(f"{file} lacks the column {', '.join(missing)}; it needs {', '.join(columns)}")
    for row in reader:
        where = f"{file}, line {reader.line_num}"
        if None in row.values() or None in row:
            raise ConfigError(f"{where}: it has not one value for each of {', '.join(columns)}")
        yield row, where


def _node(row: dict[str, str], where: str) -> Node:
    if row["gpu"] not in GPUS:
        raise ConfigError(f"{where}: gpu={row['gpu']} is unknown; known: {', '.join(GPUS)}")
    spot = [_number(row, name, where) if row[name] else None for name in ("spot_low", "spot_high")]
    return Node(
        row["provider"],
        row["node"],
        row["region"],
        row["gpu"],
        _whole(row, "cards", where),
        _number(row, "on_demand", where),
        spot[0],
        spot[1] if spot[1] is not None else spot[0],
        _date(row, where),
        row["source"],
    )


def _number(row: dict[str, str], column: str, where: str) -> float:
    try:
        value = float(row[column])
    except ValueError:
        value = -1.0
    if not 0 < value < 1e6:
        raise ConfigError(f"{where}: {column}={row[column]!r} is no price or number above 0")
    return value


def _whole(row: dict[str, str], column: str, where: str) -> int:
    value = _number(row, column, where)
    if value != int(value):
        raise ConfigError(f"{where}: {column}={row[column]!r} is no whole number")
    return int(value)


def _date(row: dict[str, str], where: str) -> datetime.date:
    try:
        return datetime.date.fromisoformat(row["read"])
    except ValueError as error:
        raise ConfigError(f"{where}: read={row['read']!r} is no date such as 2026-11-28") from error


def _package(name: str) -> str:
    return (resources.files("sdar_verl.planner") / name).read_text(encoding="utf-8")


def _text(file: Path) -> str:
    try:
        return read_text(file)
    except TextFileError as error:
        raise ConfigError(f"--prices {file}: {error}") from error


def _catalogue(sky: Path) -> Iterator[Node]:
    """One machine per provider, name and region of SkyPilot's newest catalogue."""
    versions = sorted((sky / "catalogs").glob("v*"), key=lambda path: (len(path.name), path.name))
    for file in sorted(versions[-1].glob("*/vms.csv")) if versions else []:
        read = datetime.date.fromtimestamp(file.stat().st_mtime)
        found: dict[tuple[str, str], Node] = {}
        with file.open(encoding="utf-8", newline="") as stream:
            for row in csv.DictReader(stream):
                gpu, price = _SKY.get(row.get("AcceleratorName") or ""), row.get("Price")
                if gpu is None or not price:
                    continue
                spot = float(row["SpotPrice"]) if row.get("SpotPrice") else None
                name, region = row["InstanceType"], row.get("Region") or ""
                cards, source = int(float(row["AcceleratorCount"])), f"SkyPilot catalogue {versions[-1].name}"
                node = Node(file.parent.name, name, region, gpu, cards, float(price), spot, spot, read, source)
                other = found.get((name, region))
                found[name, region] = node if other is None else _merged(other, node)
        yield from found.values()


def _merged(one: Node, other: Node) -> Node:
    """Two zones of a region."""
    spots = [price for node in (one, other) for price in (node.spot_low, node.spot_high) if price is not None]
    return replace(
        one,
        on_demand=min(one.on_demand, other.on_demand),
        spot_low=min(spots, default=None),
        spot_high=max(spots, default=None),
    )
