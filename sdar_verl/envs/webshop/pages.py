"""The shop's pages as text: what is written on them and what can be clicked.

Texts, their order and the separator are those of WebShop's text mode; the parts that stand on every page (its name, the
instruction) are left out, since the prompt says the task anyway.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from sdar_verl.envs.webshop.catalogue import Product

SEPARATOR = " [SEP] "
PAGE_SIZE = 10

SEARCH = "Search"
BACK, NEXT, PREVIOUS, BUY = "Back to Search", "Next >", "< Prev", "Buy Now"
SUB_PAGES = ("Description", "Features", "Reviews")


@dataclass(frozen=True)
class Page:
    """One page.

    Attributes:
        parts: its texts, in order.
        clickables: what can be clicked, lower case, in the page's order.
        products: among them, lower-case product ids -> the ids as they are.
        options: among them, values of options -> name of the option.
        has_search: whether there is a search bar.
    """

    parts: tuple[str, ...]
    clickables: tuple[str, ...] = ()
    products: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, str] = field(default_factory=dict)
    has_search: bool = False

    @property
    def text(self) -> str:
        """The page as the agent sees it."""
        return SEPARATOR.join(self.parts)


def search_page() -> Page:
    """Where every episode begins. WebShop lists its search button among what can be clicked, but refuses the click."""
    return Page(parts=(SEARCH,), has_search=True)


def results_page(products: Sequence[Product], number: int, total: int) -> Page:
    """Page ``number`` (from 1) of ``total`` search results, of which it shows ``products``."""
    buttons = [BACK, *([PREVIOUS] if number > 1 else []), NEXT]
    listed = [text for product in products for text in (product.asin, product.title, product.price_tag)]
    ids = {product.asin.lower(): product.asin for product in products}
    return Page(
        parts=_visible([BACK, f"Page {number} (Total results: {total})", *buttons[1:], *listed]),
        clickables=_unique(buttons, ids),
        products=ids,
    )


def item_page(product: Product) -> Page:
    """A product with its options."""
    buttons = [BACK, PREVIOUS, *SUB_PAGES, BUY]
    choices = [text for name, values in product.options.items() for text in (name, *values)]
    # A value that two options share belongs to the later one, as in WebShop.
    owners = {value: name for name, values in product.options.items() for value in values}
    return Page(
        parts=_visible(
            [BACK, PREVIOUS, *choices, product.title, f"Price: {product.price_tag}", "Rating: N.A.", *SUB_PAGES, BUY]
        ),
        clickables=_unique(buttons, owners),
        options=owners,
    )


def sub_page(product: Product, name: str) -> Page:
    """Description, features or reviews of a product; WebShop loads no reviews, so that page is empty."""
    # Its template sets a space before each feature.
    features = [f" {bullet}" for bullet in product.bullets]
    content = {"Description": [product.description], "Features": features, "Reviews": []}[name]
    return Page(parts=_visible([BACK, PREVIOUS, *content]), clickables=_unique([BACK, PREVIOUS]))


def end_page(score: float) -> Page:
    """After the purchase."""
    return Page(parts=("Thank you for shopping with us!", f"Your score (min 0.0, max 1.0): {score}"))


def _unique(buttons: Sequence[str], others: Iterable[str] = ()) -> tuple[str, ...]:
    return tuple(dict.fromkeys([*(button.lower() for button in buttons), *others]))


def _visible(texts: Iterable[str]) -> tuple[str, ...]:
    """What a reader of the page's HTML finds: an empty text or blank lines leave nothing, blanks an empty one."""
    return tuple(text.strip() for text in texts if text and (text.strip(_BLANK) or "\n" not in text))


_BLANK = " \t\n\f\r"
