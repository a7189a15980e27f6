"""Generates a catalogue in WebShop's own files, for those who do not have its download.

What is sold lies in ``goods.yaml``. Brands are made up. A product has some of its kind's attributes: one or two in the
title, the rest in features and description, where only those who open the page see all of them; its options, price
and instructions come from the same draw. Other attributes of a kind belong to other products of it, so a search for
the kind alone finds many that do not fit.
"""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import yaml

from sdar_verl.envs.webshop.catalogue import ATTRIBUTES_FILES, HUMAN_FILE, PRODUCTS_FILES, DataFiles
from sdar_verl.envs.webshop.words import words

GOODS_FILE = Path(__file__).with_name("goods.yaml")
_ALPHABET = "0123456789ABCDEFGHJKLMNPQRSTUVWXYZ"

_DESCRIPTIONS = (
    "{brand} for {use}: {first} and {second}. A small workshop that answers every letter.",
    "Chosen by people who buy {query} for {use}. They asked for {first}, and most of them for {second} as well.",
    "Made with {first} in mind, for {use} or as a present. Day after day {brand} does its work. Also: {second}.",
    "",
)
_FEATURES = (
    "{Attribute}: what buyers of {query} ask for first.",
    "{Attribute}, checked by hand before it leaves {brand}.",
    "With {attribute}, so that it suits {use}.",
    "You get {attribute} without paying extra.",
)
_CARE = (
    "If something is wrong, write to us and we will send another one.",
    "Please compare the measures in the list before you order.",
    "Colors may look different on your screen.",
)
_ASKED = (
    "i am looking for {query} with {attributes}{options}.",
    "i need {query} for {use}. {attributes} would be good{options}.",
    "find me some {query} that have {attributes}{options}.",
    "show me {query} from any brand, but with {attributes}{options}.",
)


@dataclass(frozen=True)
class CatalogueConfig:
    """How a catalogue is drawn.

    Attributes:
        seed: a product is a function of (seed, its number), on any machine.
        products: how many; more products of a kind make the right one harder to find.

    Raises:
        ValueError: a value is out of range.
    """

    seed: int = 0
    products: int = 1200

    def __post_init__(self) -> None:
        if not 100 <= self.products <= 1_000_000:
            raise ValueError(f"CatalogueConfig.products = {self.products}: choose 100 to 1,000,000")


def generate_catalogue(config: CatalogueConfig, folder: str | Path) -> DataFiles:
    """Write ``items_shuffle.json``, ``items_ins_v2.json`` and ``items_human_ins.json`` to ``folder``.

    Returns:
        Where they are.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = DataFiles(folder / PRODUCTS_FILES["full"], folder / ATTRIBUTES_FILES["full"], folder / HUMAN_FILE)
    products: list[dict[str, Any]] = []
    attributes: dict[str, Any] = {}
    human: dict[str, Any] = {}
    for number in range(config.products):
        product, annotation, asked = draw_product(config.seed, number)
        if product["asin"] in attributes:  # two numbers may have one id, if very seldom
            continue
        products.append(product)
        attributes[product["asin"]] = annotation
        human[product["asin"]] = asked
    for path, content in ((files.products, products), (files.attributes, attributes), (files.human, human)):
        assert path is not None
        path.write_text(json.dumps(content, indent=None), encoding="utf-8")
    return files


def draw_product(seed: int, number: int) -> tuple[dict[str, Any], dict[str, Any], list[dict[str, Any]]]:
    """Entries of one product in the three files: what is listed, its attributes and synthetic instruction, and the
    instructions of people.

    Kinds take turns, so that all are equally frequent.
    """
    kinds = _kinds()
    kind = kinds[number % len(kinds)]
    rng = random.Random(f"catalogue/{seed}/{number}")
    attributes = rng.sample(kind["attributes"], rng.randint(3, 5))
    options = {
        name: rng.sample(values, rng.randint(2, min(5, len(values))))
        for name, values in kind["options"].items()
        if rng.random() < 0.85
    }
    brand = "".join(rng.choices(words("syllables"), k=rng.randint(2, 3))).capitalize()
    name, uses = rng.choice(kind["names"]), rng.sample(kind["for"], 2)
    asin = _asin(seed, number)
    listed = _listing(rng, kind, attributes, options, brand, name, uses)
    product = {"asin": asin, "category": kind["category"], "query": kind["query"].capitalize(), **listed}

    annotation: dict[str, Any] = {"attributes": attributes}
    if rng.random() < 0.9:  # the others are for sale, but nobody is sent for them
        named = rng.sample(attributes, rng.randint(1, min(3, len(attributes))))
        annotation |= {"instruction": f"Find me {', '.join(named)} {kind['query']}", "instruction_attributes": named}
    else:
        annotation |= {"instruction": None, "instruction_attributes": []}
    asked = [_ask(rng, asin, kind, attributes, options, rng.choice(uses)) for _ in range(rng.choice((1, 2, 2, 3)))]
    return product, annotation, asked


def _listing(
    rng: random.Random,
    kind: Mapping[str, Any],
    attributes: Sequence[str],
    options: Mapping[str, Sequence[str]],
    brand: str,
    name: str,
    uses: Sequence[str],
) -> dict[str, Any]:
    audience = kind["query"].split(" ")[0].capitalize() + " " if "'s " in kind["query"] else ""
    told = attributes[: rng.randint(1, 2)]
    title = f"{brand} {audience}{name} {' '.join(map(str.title, told))} for {uses[0].title()} {uses[1].title()}"
    if options and rng.random() < 0.5:
        title += f" ({', '.join(values[0].title() for values in options.values())})"
    slots = {"brand": brand, "query": kind["query"], "use": uses[0], "first": attributes[0], "second": attributes[1]}
    features = [
        rng.choice(_FEATURES).format(attribute=attribute, Attribute=attribute.capitalize(), **slots)
        for attribute in attributes[1:]
    ]
    rng.shuffle(features)
    features.append(rng.choice(_CARE))
    return {
        "name": title,
        "full_description": rng.choice(_DESCRIPTIONS).format(**slots),
        "small_description": features,
        "pricing": _pricing(rng, *kind["price"]),
        "customization_options": {
            option: [{"value": value.title(), "image": None} for value in values] for option, values in options.items()
        }
        or "",
        "product_category": f"{kind['root']} › {kind['path']}",
        "brand": f"Brand: {brand}",
        "images": ["none.jpg"],
        "average_rating": "",
        **_UNUSED,
    }


# In WebShop's files, but of no use to it.
_UNUSED: dict[str, Any] = {
    "product_information": {},
    "brand_url": "",
    "list_price": "",
    "availability_status": "",
    "total_reviews": "",
    "total_answered_questions": "",
    "seller_id": "",
    "seller_name": "",
    "fulfilled_by_amazon": "",
    "fast_track_message": "",
    "aplus_present": "",
    "page": 0,
    "small_description_old": "",
}


def _pricing(rng: random.Random, low: int, high: int) -> str:
    """One price, now and then a range, seldom none; low prices are the more frequent ones."""
    price = low + (high - low) * rng.random() ** 2
    shape = rng.random()
    if shape < 0.04:
        return ""
    first = f"${int(price)}.{rng.choice(('00', '49', '95', '99'))}"
    return first if shape < 0.85 else f"{first}${int(price * 1.4) + 1}.99"


def _ask(
    rng: random.Random,
    asin: str,
    kind: Mapping[str, Any],
    attributes: Sequence[str],
    options: Mapping[str, Sequence[str]],
    use: str,
) -> dict[str, Any]:
    """What a person asks for: some of the attributes, and a value of every option."""
    named = rng.sample(attributes, rng.randint(1, 2))
    chosen = [rng.choice(values) for values in options.values()]
    told = f". please choose {' and '.join(chosen)}" if chosen else ""
    pattern = rng.choice(_ASKED)
    return {
        "asin": asin,
        "instruction": pattern.format(query=kind["query"], attributes=" and ".join(named), options=told, use=use),
        "attributes": list(attributes),
        "options": [f"{name.lower()}: {value}" for name, value in zip(options, chosen, strict=True)] or [""],
        "instruction_attributes": named,
        "instruction_options": chosen,
    }


def _asin(seed: int, number: int) -> str:
    digest = int.from_bytes(sha256(f"asin/{seed}/{number}".encode()).digest()[:8], "big")
    letters = []
    for _ in range(8):
        digest, place = divmod(digest, len(_ALPHABET))
        letters.append(_ALPHABET[place])
    return "B0" + "".join(letters)


@functools.lru_cache(maxsize=1)
def _kinds() -> tuple[dict[str, Any], ...]:
    """All kinds, with their category, its path, and pools in place of their names; categories take turns."""
    goods = yaml.safe_load(GOODS_FILE.read_text(encoding="utf-8"))
    by_category = [
        [
            {
                **kind,
                "category": category,
                "root": described["path"],
                "options": {
                    name: goods["pools"][pool] if isinstance(pool, str) else pool
                    for name, pool in kind["options"].items()
                },
            }
            for kind in described["kinds"]
        ]
        for category, described in goods["categories"].items()
    ]
    return tuple(kind for kinds in zip(*by_category, strict=True) for kind in kinds)
