"""WebShop in text: search a catalogue, choose options, buy; the purchase is scored against the instruction."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, replace

from sdar_verl.envs.base import Step, Task, TextEnv
from sdar_verl.envs.fields import success_reward_of
from sdar_verl.envs.registry import register_env
from sdar_verl.envs.webshop import pages
from sdar_verl.envs.webshop.goals import Goal, product_price
from sdar_verl.envs.webshop.nouns import RULES, nouns_by_rules
from sdar_verl.envs.webshop.reward import score_purchase
from sdar_verl.envs.webshop.solution import find_solution
from sdar_verl.envs.webshop.store import open_catalogue
from sdar_verl.envs.webshop.visit import Visit

SEARCH_FORM = "search[<query>]"
_ACTION = re.compile(r"\s*(search|click)\s*\[(.*)\]\s*", re.IGNORECASE | re.DOTALL)
_NEEDED = ("catalogue", "digest", "price_seed", "goal")


@register_env("webshop")
class WebShopEnv(TextEnv):
    """One shopping trip at a time; the task names a goal and the catalogue that ``sdar-verl prepare webshop`` wrote.

    Actions are ``search[words]`` and ``click[what the page offers]``, whatever their letter case. A click on anything
    else does nothing. A search works from every page, as in WebShop, but only where the page has a search bar is it
    offered, and admissible. Buying ends the episode; the score goes into ``Step.score``.

    Args:
        success_reward: reward of a purchase with the full score of 1; every other step gets 0 (paper: 10).
        graded_reward: pay ``success_reward`` times the score for any purchase.
        nouns: ``catalogue``: the nouns of titles are those that ``sdar-verl prepare`` kept with it; ``rules``: the
            stand-in, whatever it kept; ``spacy``: it must have kept spaCy's, see :mod:`sdar_verl.envs.webshop.nouns`.
        max_characters: longer observations are cut there, and say so; long enough for nearly all pages.

    Raises:
        ValueError: an option has a wrong type or value.
    """

    def __init__(
        self,
        success_reward: float = 10.0,
        graded_reward: bool = False,
        nouns: str = "catalogue",
        max_characters: int = 6000,
    ) -> None:
        if not isinstance(graded_reward, bool):
            raise ValueError(f"webshop option graded_reward={graded_reward!r}: give true or false")
        if nouns not in ("catalogue", "rules", "spacy"):
            raise ValueError(f"webshop option nouns={nouns!r}: choose catalogue, rules or spacy")
        if isinstance(max_characters, bool) or not isinstance(max_characters, int) or max_characters < 500:
            raise ValueError(f"webshop option max_characters={max_characters!r}: give a whole number of at least 500")
        self._success_reward = success_reward_of("webshop", success_reward)
        self._graded = graded_reward
        self._rule = nouns
        self._max_characters = max_characters
        self._last: Step | None = None

    def reset(self, task: Task) -> Step:
        """Open the shop for ``task``.

        Raises:
            ValueError: the task is not one of WebShop's, or its catalogue is another one than it was made with.
            CatalogueError: the catalogue is not there.
        """
        self._last = None
        missing = [key for key in _NEEDED if key not in task.data]
        if missing:
            raise ValueError(
                f"task {task.task_id!r} of environment {task.env!r} has no {', '.join(missing)}, so it is not one of "
                "WebShop; make WebShop panels with `sdar-verl prepare webshop --out DIR`"
            )
        catalogue = open_catalogue(str(task.data["catalogue"]))
        if catalogue.digest != task.data["digest"]:
            raise ValueError(
                f"the catalogue in {catalogue.folder} is not the one that task {task.task_id!r} was made with "
                f"({catalogue.digest[:16]} there, {str(task.data['digest'])[:16]} in the panel); make the panels again "
                "with `sdar-verl prepare webshop --out DIR --force`"
            )
        if self._rule == "spacy" and catalogue.tagger == RULES:
            raise ValueError(
                f"webshop option nouns=spacy, but the catalogue in {catalogue.folder} keeps none of spaCy's nouns; "
                "make it again with `sdar-verl prepare webshop --nouns spacy --force`"
            )
        self._nouns = nouns_by_rules if self._rule == RULES else catalogue.nouns
        self._goal = Goal.from_dict(task.data["goal"])
        self._price_seed = int(task.data["price_seed"])
        self._visit = Visit(catalogue)
        self._last = self._shown()
        return self._last

    def step(self, action: str) -> Step:
        """Carry out ``action``; what the page does not offer does nothing.

        Raises:
            RuntimeError: no episode was started.
        """
        if self._last is None:
            raise RuntimeError("step before reset: no episode was started")
        if self._last.done:
            self._last = replace(self._last, reward=0.0)
            return self._last
        match = _ACTION.fullmatch(action)
        name, argument = (match[1].lower(), match[2]) if match else ("", "")
        bought = False
        if name == "search":
            self._visit.search(argument)
        elif name == "click":
            bought = self._visit.click(argument)
        self._last = self._buy() if bought else self._shown()
        return self._last

    @classmethod
    def demonstration(cls, task: Task) -> Sequence[str]:
        """A way to the full score, found by trying; empty when none was found, see :func:`find_solution`."""
        if any(key not in task.data for key in _NEEDED):
            return ()
        catalogue = open_catalogue(str(task.data["catalogue"]))
        return find_solution(catalogue, Goal.from_dict(task.data["goal"]), int(task.data["price_seed"]))

    def _buy(self) -> Step:
        visit = self._visit
        assert visit.product is not None  # only its page has the button
        price = product_price(visit.product, self._price_seed)
        outcome = score_purchase(visit.product, self._goal, price, visit.chosen, self._nouns)
        success = outcome.total == 1.0
        return Step(
            pages.end_page(outcome.total).text,
            reward=self._success_reward * (outcome.total if self._graded else success),
            done=True,
            success=success,
            score=outcome.total,
            info={**asdict(outcome), "bought": visit.product.asin},
        )

    def _shown(self) -> Step:
        page = self._visit.page
        return Step(
            self._cut(page.text),
            admissible_actions=tuple(f"click[{text}]" for text in page.clickables),
            action_forms=(SEARCH_FORM,) if page.has_search else (),
            score=0.0,
        )

    def _cut(self, text: str) -> str:
        beyond = len(text) - self._max_characters
        return text if beyond <= 0 else f"{text[: self._max_characters]} [{beyond} more characters are not shown]"
