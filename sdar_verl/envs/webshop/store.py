"""The catalogue as environment processes use it: cleaned products in an SQLite file, and the search index beside it.

Written once by ``sdar-verl prepare webshop``. Both are opened read-only in a moment and mapped from the page cache, so
the processes of a node share one copy, whatever the size of the catalogue.
"""

from __future__ import annotations

import functools
import itertools
import json
import shutil
import sqlite3
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

from sdar_verl.envs.webshop.catalogue import CatalogueError, Product
from sdar_verl.envs.webshop.nouns import RULES, NounRule, nouns_by_rules, nouns_by_spacy, tagger
from sdar_verl.envs.webshop.reward import Nouns
from sdar_verl.envs.webshop.search import SearchIndex
from sdar_verl.untrusted import shorten

PRODUCTS_FILE = "products.sqlite"
INDEX_FOLDER = "index"
META_FILE = "catalogue.json"
FORMAT = 2

_REMEDY = "make it again with `sdar-verl prepare webshop --out DIR`"


class Catalogue:
    """Products by id and by search; read-only. Not thread-safe, as environments of a process take turns.

    Args:
        folder: what :func:`write_catalogue` filled.

    Attributes:
        digest: SHA-256 of the products.
        tagger: what found the nouns of their titles, see :func:`~sdar_verl.envs.webshop.nouns.tagger`.
        nouns: the nouns of a product's title.

    Raises:
        CatalogueError: the folder is missing or not finished.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        meta = read_meta(self.folder)
        self.digest: str = meta["digest"]
        self._count: int = meta["products"]
        self.tagger: str = meta["nouns"]
        # immutable: SQLite locks nothing, so read-only and network file systems will do.
        uri = f"{(self.folder / PRODUCTS_FILE).resolve().as_uri()}?mode=ro&immutable=1"
        try:
            # Environments of a process take turns, if not always on one thread.
            self._products = sqlite3.connect(uri, uri=True, check_same_thread=False)
            self._index = SearchIndex.open(self.folder / INDEX_FOLDER)
        except (sqlite3.Error, OSError, ValueError) as error:
            raise CatalogueError(f"{self.folder} is damaged ({error}); {_REMEDY}") from error
        self._read = functools.lru_cache(maxsize=4096)(self._read_row)
        self._found = functools.lru_cache(maxsize=4096)(self._search)
        self.nouns: Nouns = nouns_by_rules if self.tagger == RULES else functools.lru_cache(maxsize=4096)(self._nouns)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, row: int) -> Product:
        """The product in this row, from 0, in the order of the data file."""
        if not 0 <= row < self._count:
            raise IndexError(row)
        return self._read("row", row)

    def product(self, asin: str) -> Product:
        """The product with this id.

        Raises:
            KeyError: there is none.
        """
        return self._read("asin", asin)

    def search(self, query: str) -> tuple[int, ...]:
        """Rows of the products that fit ``query``, best first, at most 50."""
        return self._found(query)

    def _search(self, query: str) -> tuple[int, ...]:
        return tuple(self._index.search(query))

    def _nouns(self, title: str) -> tuple[str, ...]:
        found = self._products.execute("SELECT nouns FROM nouns WHERE title = ?", (title,)).fetchone()
        if found is None:
            raise CatalogueError(f"{self.folder} has no product with the title {shorten(title)}; {_REMEDY}")
        return tuple(json.loads(found[0]))

    def _read_row(self, column: str, key: int | str) -> Product:
        found = self._products.execute(f"SELECT data FROM products WHERE {column} = ?", (key,)).fetchone()
        if found is None:
            raise KeyError(key)
        return _unpack(json.loads(found[0]))


@functools.lru_cache(maxsize=4)
def open_catalogue(folder: str) -> Catalogue:
    """The catalogue in ``folder``, one per process.

    Raises:
        CatalogueError: see :class:`Catalogue`.
    """
    return Catalogue(folder)


def write_catalogue(products: Iterable[Product], folder: str | Path, nouns: NounRule = RULES) -> Catalogue:
    """Write ``products`` and their index to ``folder``, in place of what is there; :data:`META_FILE` comes last.

    Args:
        products: all of them, in the order of the data.
        folder: made when missing.
        nouns: how the nouns of their titles are found; with ``spacy`` they are kept with the products.

    Raises:
        CatalogueError: there is no product.
        ImportError: ``nouns="spacy"`` without spaCy or its model.
    """
    used = tagger(nouns)  # now, and not after a large file was read
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / META_FILE).unlink(missing_ok=True)
    (folder / PRODUCTS_FILE).unlink(missing_ok=True)
    shutil.rmtree(folder / INDEX_FOLDER, ignore_errors=True)

    digest, count = sha256(), 0
    connection = sqlite3.connect(folder / PRODUCTS_FILE)

    def stored() -> Iterator[str]:
        nonlocal count
        for product in products:
            data = json.dumps(asdict(product), ensure_ascii=False)
            digest.update(data.encode() + b"\n")
            connection.execute("INSERT INTO products VALUES (?, ?, ?)", (count, product.asin, data))
            count += 1
            yield product.search_text

    with connection:
        connection.execute("CREATE TABLE products (row INTEGER PRIMARY KEY, asin TEXT UNIQUE NOT NULL, data TEXT)")
        texts = stored()
        first = next(texts, None)
        if first is None:
            raise CatalogueError("the data files hold no product")
        SearchIndex.build(_chain(first, texts), folder / INDEX_FOLDER)
        if nouns != RULES:
            _write_nouns(connection)
    connection.close()
    meta = {"format": FORMAT, "digest": digest.hexdigest(), "products": count, "nouns": used}
    (folder / META_FILE).write_text(json.dumps(meta, indent=2) + "\n")
    return Catalogue(folder)


def _write_nouns(connection: sqlite3.Connection) -> None:
    connection.execute("CREATE TABLE nouns (title TEXT PRIMARY KEY, nouns TEXT NOT NULL) WITHOUT ROWID")
    stored = connection.execute("SELECT data FROM products ORDER BY row")
    titles, again = itertools.tee(json.loads(data)["title"] for (data,) in stored)
    rows = ((title, json.dumps(found)) for title, found in zip(again, nouns_by_spacy(titles), strict=True))
    connection.executemany("INSERT OR IGNORE INTO nouns VALUES (?, ?)", rows)


def read_meta(folder: str | Path) -> dict[str, Any]:
    """``format``, ``digest`` (SHA-256 of the products), ``products`` (their number) and ``nouns`` (what found them).

    Raises:
        CatalogueError: the folder is missing, not finished, or of another version.
    """
    path = Path(folder) / META_FILE
    if not path.is_file():
        raise CatalogueError(
            f"{folder} holds no finished WebShop catalogue ({META_FILE} is not there: moved, deleted, not visible on "
            f"this node, or the call that made it stopped half-way); {_REMEDY}"
        )
    try:
        meta = json.loads(path.read_text())
        found = meta["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise CatalogueError(f"{path} is damaged ({error}); {_REMEDY}") from error
    if found != FORMAT:
        raise CatalogueError(f"{path} has format {found}, this version reads {FORMAT}; {_REMEDY}")
    return meta


def _chain(first: str, rest: Iterator[str]) -> Iterator[str]:
    yield first
    yield from rest


def _unpack(fields: dict[str, Any]) -> Product:
    lists = ("bullets", "prices", "attributes", "instruction_attributes")
    return Product(
        **{
            **fields,
            **{name: tuple(fields[name]) for name in lists},
            "options": {name: tuple(values) for name, values in fields["options"].items()},
            "human_instructions": tuple(
                (text, tuple(attributes), tuple(options)) for text, attributes, options in fields["human_instructions"]
            ),
        }
    )
