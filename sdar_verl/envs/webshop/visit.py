"""One visit to the shop: which page the visitor is on, and where a search or a click leads."""

from __future__ import annotations

from sdar_verl.envs.webshop import pages
from sdar_verl.envs.webshop.catalogue import Product
from sdar_verl.envs.webshop.store import Catalogue

_BACK, _NEXT, _PREVIOUS, _BUY = (name.lower() for name in (pages.BACK, pages.NEXT, pages.PREVIOUS, pages.BUY))
_SUB_PAGES = {name.lower(): name for name in pages.SUB_PAGES}


class Visit:
    """Begins at the search page.

    Attributes:
        page: what the visitor sees.
        product: the product looked at; None before one was opened.
        chosen: option name -> value chosen for it; leaving the product's pages for the results forgets them.
    """

    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue
        self._query, self._number = "", 1
        self.page = pages.search_page()
        self.product: Product | None = None
        self.chosen: dict[str, str] = {}

    @property
    def _on_item_page(self) -> bool:
        return _BUY in self.page.clickables

    def search(self, query: str) -> None:
        """Go to the first results for ``query``; a blank one leads nowhere."""
        words = query.lower().split()
        if words:
            self._to_results(" ".join(words), 1)

    def click(self, text: str) -> bool:
        """Click what the page offers under ``text``, whatever its case and spacing; anything else does nothing.

        Returns:
            True when this bought the product.
        """
        wanted = _squeeze(text.lower())
        clicked = next((one for one in self.page.clickables if _squeeze(one) == wanted), "")
        if clicked == _BUY:
            return True
        if clicked == _BACK:
            self.page, self.product, self.chosen = pages.search_page(), None, {}
        elif clicked == _NEXT:
            self._to_results(self._query, self._number + 1)
        elif clicked == _PREVIOUS:
            self._to_previous()
        elif clicked in self.page.products:
            self.product = self._catalogue.product(self.page.products[clicked])
            self.page = pages.item_page(self.product)
        elif clicked and self.product is not None:
            if clicked in _SUB_PAGES:
                self.page = pages.sub_page(self.product, _SUB_PAGES[clicked])
            else:
                self.chosen[self.page.options[clicked]] = clicked
        return False

    def _to_previous(self) -> None:
        if self.product is None:
            self._to_results(self._query, self._number - 1)
        elif self._on_item_page:
            self._to_results(self._query, self._number)
        else:
            self.page = pages.item_page(self.product)

    def _to_results(self, query: str, number: int) -> None:
        rows = self._catalogue.search(query)
        shown = rows[(number - 1) * pages.PAGE_SIZE : number * pages.PAGE_SIZE]
        self.page = pages.results_page([self._catalogue[row] for row in shown], number, len(rows))
        self._query, self._number = query, number
        self.product, self.chosen = None, {}


def _squeeze(text: str) -> str:
    return " ".join(text.split())
