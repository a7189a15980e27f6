"""A way to buy what a goal asks for, found by trying: for a teacher that may see it."""

from __future__ import annotations

from collections.abc import Mapping

from sdar_verl.envs.webshop import pages
from sdar_verl.envs.webshop.goals import Goal, product_price
from sdar_verl.envs.webshop.reward import score_purchase
from sdar_verl.envs.webshop.store import Catalogue
from sdar_verl.envs.webshop.visit import Visit


def find_solution(catalogue: Catalogue, goal: Goal, price_seed: int) -> list[str]:
    """Actions that buy the goal's own product with its options, for the full score.

    Args:
        catalogue: that the goal was made from.
        goal: what to buy.
        price_seed: of the task.

    Returns:
        A search, pages of results, clicks and the purchase; empty when no search tried here finds the product, or when
        buying it does not earn 1 (a goal of people's may ask for what its product does not have).
    """
    product = catalogue.product(goal.asin)
    price = product_price(product, price_seed)
    options = goal.options.values() if isinstance(goal.options, Mapping) else goal.options
    for query in (goal.title, f"{goal.query} {' '.join(goal.attributes)}", goal.instruction):
        words = " ".join(query.lower().replace("[", " ").replace("]", " ").split())
        rank = next((i for i, row in enumerate(catalogue.search(words)) if catalogue[row].asin == goal.asin), None)
        if rank is None:
            continue
        visit = Visit(catalogue)
        visit.search(words)
        actions = [f"search[{words}]"]
        for click in [*[pages.NEXT.lower()] * (rank // pages.PAGE_SIZE), goal.asin.lower(), *options]:
            if click in visit.page.clickables:
                visit.click(click)
                actions.append(f"click[{click}]")
        if visit.product != product:
            continue
        if score_purchase(product, goal, price, visit.chosen, catalogue.nouns).total == 1.0:
            return [*actions, f"click[{pages.BUY.lower()}]"]
    return []
