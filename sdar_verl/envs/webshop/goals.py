"""Goals: what a shopper is asked to buy, and the prices that go with it.

WebShop draws prices within a range, and price caps, anew in every process. Here both are functions of a seed and the
product's id, so that a goal means the same everywhere.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from sdar_verl.envs.webshop.catalogue import Product
from sdar_verl.envs.webshop.matching import COLOURS, colour_of

Kind = Literal["synthetic", "human"]

NO_CAP = 1_000_000.0
CAPS = tuple(10.0 * step for step in range(1, 100))
"""Price caps are round; one of the four next above the price is drawn."""

SHUFFLE_SEED = 233
"""WebShop shuffles its goals with this seed; their place then decides which of them are tested."""


@dataclass(frozen=True)
class Goal:
    """What to buy.

    Attributes:
        asin: the product that the goal was made from; buying another one may earn as much.
        title: its title.
        query: its kind.
        category: its category, which is the task's type.
        product_category: its path of categories.
        instruction: what the shopper is told.
        attributes: phrases that the purchase should fit.
        options: what should be chosen: name -> value in synthetic goals, values alone in those of people.
        price_cap: dollars that the purchase may cost.
    """

    asin: str
    title: str
    query: str
    category: str
    product_category: str
    instruction: str
    attributes: tuple[str, ...]
    options: Mapping[str, str] | tuple[str, ...]
    price_cap: float

    @property
    def option_texts(self) -> tuple[str, ...]:
        """The options as the reward compares them.

        Of a named option WebShop compares name and value together, and it takes it for a colour only when one of the
        two is a colour's very name.
        """
        if not isinstance(self.options, Mapping):
            return tuple(colour_of(value) for value in self.options)
        pairs = self.options.items()
        return tuple(next((colour for colour in COLOURS if colour in pair), str(pair)) for pair in pairs)

    def as_dict(self) -> dict[str, Any]:
        """JSON-serialisable."""
        return {**asdict(self), "attributes": list(self.attributes), "options": _plain(self.options)}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Goal:
        """The inverse of :meth:`as_dict`."""
        options = fields["options"]
        return cls(
            **{
                **fields,
                "attributes": tuple(fields["attributes"]),
                "options": dict(options) if isinstance(options, Mapping) else tuple(options),
            }
        )


def product_price(product: Product, seed: int) -> float:
    """What ``product`` costs: its price, or one drawn within its range."""
    if len(product.prices) == 1:
        return product.prices[0]
    return random.Random(f"{seed}/price/{product.asin}").uniform(*product.prices)


def count_goals(product: Product, kind: Kind) -> int:
    """Goals that ``product`` gives: one per combination of options, or one per person who asked for attributes."""
    if kind == "human":
        return sum(bool(attributes) for _, attributes, _ in product.human_instructions)
    if not product.instruction or not product.instruction_attributes:
        return 0
    return math.prod(len(values) for values in product.options.values())


def make_goal(product: Product, kind: Kind, number: int, seed: int) -> Goal:
    """The goal of ``product`` with this number, in WebShop's order.

    Args:
        product: what to buy.
        kind: whose instruction.
        number: from 0, below :func:`count_goals`.
        seed: of prices and price caps.
    """
    options: Mapping[str, str] | tuple[str, ...]
    if kind == "human":
        asked = [one for one in product.human_instructions if one[1]]
        instruction, attributes, options = asked[number]
        cap, price_text = _price_cap(product, seed, f"{product.asin}/{number}")
        instruction = instruction.strip(".") + price_text
    else:
        options = _combination(product.options, number)
        attributes = product.instruction_attributes
        cap, price_text = _price_cap(product, seed, product.asin)
        option_text = ", and ".join(f"{name}: {value}" for name, value in options.items())
        instruction = f"{product.instruction}{' with ' + option_text if option_text else ''}{price_text}"
    return Goal(
        asin=product.asin,
        title=product.title,
        query=product.query,
        category=product.category,
        product_category=product.product_category,
        instruction=instruction,
        attributes=attributes,
        options=options,
        price_cap=cap,
    )


def shuffled(count: int) -> list[int]:
    """Goals' numbers in WebShop's shuffled order."""
    order = list(range(count))
    random.Random(SHUFFLE_SEED).shuffle(order)
    return order


def _price_cap(product: Product, seed: int, key: str) -> tuple[float, str]:
    price = product_price(product, seed)
    near = [cap for cap in CAPS if cap > price][:4]
    if len(near) < 2:
        return NO_CAP, ""
    cap = max(random.Random(f"{seed}/cap/{key}").sample(near, 2))
    return cap, f", and price lower than {cap:.2f} dollars"


def _combination(options: Mapping[str, Sequence[str]], number: int) -> dict[str, str]:
    """Combination ``number`` of the options by name, the last name's values going round fastest."""
    chosen: dict[str, str] = {}
    for name in sorted(options, reverse=True):
        number, place = divmod(number, len(options[name]))
        chosen[name] = options[name][place]
    return {name: chosen[name] for name in sorted(options)}


def _plain(options: Mapping[str, str] | tuple[str, ...]) -> dict[str, str] | list[str]:
    return dict(options) if isinstance(options, Mapping) else list(options)
