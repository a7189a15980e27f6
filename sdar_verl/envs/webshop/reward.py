"""WebShop's reward: how much of what was asked for has been bought.

    r = r_type * (matched attributes + matched options + [price <= cap]) / (attributes + options + 1)

Arithmetic and thresholds are those of princeton-nlp/WebShop (its goal.py; `Yao et al. 2022`_, equation 1 and appendix),
oddities included, because published scores depend on them. ``tests/data/webshop_original.json`` holds numbers computed
with the original code; docs/fidelity.md lists what differs.

.. _Yao et al. 2022: https://arxiv.org/abs/2207.01206
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from sdar_verl.envs.webshop.catalogue import Product
from sdar_verl.envs.webshop.goals import Goal
from sdar_verl.envs.webshop.matching import alike, colour_of

Nouns = Callable[[str], tuple[str, ...]]
"""A title's nouns in lower case, as often as they occur."""


@dataclass(frozen=True)
class Reward:
    """A purchase's score and its parts.

    Attributes:
        total: the score, 0 to 1.
        type: r_type: 1, .5, .1 or 0 by how much the product is of the kind asked for.
        attributes: goal attributes that the product has.
        options: goal options that were chosen.
        price: whether the price is within the cap.
        title: share of the goal title's nouns that the product's title has.
    """

    total: float
    type: float
    attributes: int
    options: int
    price: bool
    title: float


def score_purchase(product: Product, goal: Goal, price: float, options: Mapping[str, str], nouns: Nouns) -> Reward:
    """Score of buying ``product`` at ``price`` with ``options`` chosen.

    Args:
        product: what was bought.
        goal: what was asked for.
        price: of the product, in dollars.
        options: option name -> chosen value.
        nouns: finds the nouns of a title, see :mod:`sdar_verl.envs.webshop.nouns`.
    """
    type_, title = type_reward(product, goal, nouns)
    attributes = sum(has_attribute(product, attribute) for attribute in goal.attributes)
    chosen = count_options(tuple(options.values()), goal.option_texts)
    affordable = price <= goal.price_cap
    wanted = len(goal.attributes) + len(goal.options) + 1
    total = type_ * ((attributes + chosen + affordable) / wanted)
    return Reward(total, type_, attributes, chosen, affordable, title)


def options_can_count(goal: Goal) -> bool:
    """Whether choosing the goal's very options satisfies it.

    In WebShop it may not: a chosen ``rectangular`` is taken for the colour ``tan``, while of a named option the goal
    keeps ``('shape', 'rectangular')``.
    """
    values = tuple(goal.options.values()) if isinstance(goal.options, Mapping) else goal.options
    return count_options(values, goal.option_texts) == len(goal.options)


def type_reward(product: Product, goal: Goal, nouns: Nouns) -> tuple[float, float]:
    """(r_type, title score): is it the kind of product that was asked for?"""
    wanted, bought = nouns(goal.title), nouns(product.title)
    # A noun that the goal's title says twice counts twice below the line and once above, as in WebShop.
    title = len({*wanted} & {*bought}) / len(wanted) if wanted else 0.2
    if title == 0.0:
        return 0.0, title
    if title < 0.1:
        return 0.1, title
    shared = _levels(product.product_category) & _levels(goal.product_category)
    alike = product.query == goal.query or len(shared) >= 2 or title > 0.2
    return (1.0 if alike else 0.5), title


def has_attribute(product: Product, attribute: str) -> bool:
    """A close match among the product's attributes, or the very words in title, features or description."""
    if any(alike(own, attribute) for own in product.attributes):
        return True
    texts = (product.title, " ".join(product.bullets), product.description)
    return any(attribute in text.lower() for text in texts)


def count_options(chosen: Sequence[str], wanted: Sequence[str]) -> int:
    """Wanted options that some chosen one matches."""
    values = [colour_of(value) for value in chosen]
    return sum(any(alike(value, want) for value in values) for want in wanted)


def _levels(product_category: str) -> set[str]:
    return {level.strip() for level in product_category.split("›")}
