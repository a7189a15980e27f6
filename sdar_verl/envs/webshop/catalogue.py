"""Products as WebShop's files describe them, cleaned the way its engine cleans them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdar_verl.errors import SdarError
from sdar_verl.text_files import open_text
from sdar_verl.untrusted import parse_json, shorten, whole_characters

PRODUCTS_FILES = {"full": "items_shuffle.json", "1000": "items_shuffle_1000.json"}
ATTRIBUTES_FILES = {"full": "items_ins_v2.json", "1000": "items_ins_v2_1000.json"}
HUMAN_FILE = "items_human_ins.json"

NO_PRICE = 100.0
"""What a product without a price costs, in WebShop and here."""

MAX_PRODUCT_CHARACTERS = 16 << 20
"""Of one product in its file; WebShop's have some thousands. A file that never ends one is not read into memory."""

_CHUNK = 1 << 20
_BETWEEN = re.compile(r"[\s,]*")
_REMEDY = (
    "download WebShop's data (its setup.sh lists the files) and point to the folder with --data, or make a catalogue "
    "without a download with --generate"
)


class CatalogueError(SdarError):
    """WebShop's files are missing, incomplete or damaged; the message names the file and the remedy."""


@dataclass(frozen=True)
class DataFiles:
    """WebShop's data files.

    Attributes:
        products: ``items_shuffle*.json``.
        attributes: ``items_ins_v2*.json``: attributes per product, and synthetic instructions.
        human: ``items_human_ins.json``, instructions written by people; None when it is not asked for.
    """

    products: Path
    attributes: Path
    human: Path | None = None


@dataclass(frozen=True)
class Product:
    """One product.

    Attributes:
        asin: id, at most ten characters.
        title: as listed.
        category: ``beauty``, ``electronics``, ``fashion``, ``garden`` or ``grocery`` in WebShop's data.
        query: kind of product, lower case: the search that it was found with.
        product_category: path of the shop's own categories, joined by ``›``.
        description: running text, may be empty.
        bullets: feature lines.
        prices: one price, or the ends of a range, in dollars.
        options: name -> values to choose from, lower case, in the page's order.
        attributes: phrases such as ``machine wash``.
        instruction: synthetic instruction, without options and price; None when there is none.
        instruction_attributes: attributes that the synthetic instruction names.
        human_instructions: (instruction, attributes, options) of people.
    """

    asin: str
    title: str
    category: str
    query: str
    product_category: str
    description: str
    bullets: tuple[str, ...]
    prices: tuple[float, ...]
    options: Mapping[str, tuple[str, ...]]
    attributes: tuple[str, ...]
    instruction: str | None = None
    instruction_attributes: tuple[str, ...] = ()
    human_instructions: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = ()

    @property
    def price_tag(self) -> str:
        """Price as the pages show it, such as ``$9.5 to $12.0``."""
        return " to ".join(f"${price}" for price in self.prices)

    @property
    def search_text(self) -> str:
        """What the search engine indexes: title, description, first feature and options, in lower case."""
        options = ", and ".join(f"{name}: {', '.join(values)}" for name, values in self.options.items())
        first = self.bullets[0] if self.bullets else ""
        return " ".join([self.title, self.description, first, options]).lower()


def find_data_files(folder: str | Path, size: str | None = None, human: bool = False) -> DataFiles:
    """The data files in ``folder`` or in its sub-folder ``data``.

    Args:
        folder: where WebShop's ``setup.sh`` put them.
        size: ``full`` or ``1000``; None takes the one that is there.
        human: whether instructions written by people are needed.

    Raises:
        CatalogueError: a file is missing, or both sizes are there and none was chosen.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise CatalogueError(f"--data {folder} is not a folder; {_REMEDY}")
    names = [name for both in (PRODUCTS_FILES, ATTRIBUTES_FILES) for name in both.values()]
    if not any((root / name).is_file() for name in names) and (root / "data").is_dir():
        root = root / "data"
    if not any((root / name).is_file() for name in names):
        raise CatalogueError(f"--data {folder} holds none of WebShop's files ({', '.join(names)}); {_REMEDY}")
    if size is None:
        sizes = [size for size, name in PRODUCTS_FILES.items() if (root / name).is_file()]
        if len(sizes) != 1:
            found = f"{' and '.join(PRODUCTS_FILES[size] for size in sizes)}" if sizes else "no items_shuffle*.json"
            remedy = "choose one with --size full or --size 1000" if sizes else _REMEDY
            raise CatalogueError(f"{root} holds {found}; {remedy}")
        (size,) = sizes
    files = DataFiles(root / PRODUCTS_FILES[size], root / ATTRIBUTES_FILES[size], root / HUMAN_FILE if human else None)
    needed = [files.products, files.attributes, *([files.human] if files.human else [])]
    missing = [file.name for file in needed if not file.is_file()]
    if missing:
        raise CatalogueError(f"{root} lacks {', '.join(missing)}, so the download is not complete; {_REMEDY}")
    return files


def read_products(files: DataFiles) -> Iterator[Product]:
    """Products in file order, without duplicates and without those that WebShop leaves out (an id that is ``nan`` or
    longer than ten characters). The product file is read piece by piece: the full one has several gigabytes.

    Raises:
        CatalogueError: a file is not JSON, is cut off, or a product lacks a field.
    """
    attributes = _read_mapping(files.attributes)
    human = _read_mapping(files.human) if files.human else {}
    seen: set[str] = set()
    for number, raw in enumerate(stream_array(files.products)):
        try:
            raw = _whole(raw)
            asin = raw["asin"]
            if asin == "nan" or len(asin) > 10 or asin in seen:
                continue
            seen.add(asin)
            product = _clean(raw, _whole(attributes.get(asin, {})), _whole(human.get(asin, ())))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CatalogueError(
                f"{files.products}: product number {number}{_named(raw)} is damaged ({type(error).__name__}: {error}); "
                "download the file again"
            ) from error
        yield product


def _named(raw: Any) -> str:
    return f" (asin {raw['asin']})" if isinstance(raw, dict) and "asin" in raw else ""


def stream_array(path: Path) -> Iterator[Any]:
    """Elements of a JSON file that is one array, without holding all of it in memory.

    Raises:
        CatalogueError: not a JSON array, or cut off.
    """
    try:
        yield from _elements(path)
    except UnicodeDecodeError as error:
        raise CatalogueError(f"{path} is not UTF-8 ({error}); download it again") from error


def _elements(path: Path) -> Iterator[Any]:
    decode = json.JSONDecoder().raw_decode
    with open_text(path) as stream:
        text = stream.read(_CHUNK).lstrip()
        if not text.startswith("["):
            raise CatalogueError(f"{path} is not a JSON array: it begins with {text[:20]!r}; download it again")
        at = 1
        while True:
            at = _BETWEEN.match(text, at).end()  # type: ignore[union-attr]  # it matches nothing, too
            if text.startswith("]", at):
                return
            try:
                element, at = decode(text, at)
            except RecursionError:
                raise CatalogueError(f"{path} is nested too deeply to be WebShop's; download it again") from None
            except ValueError as error:
                piece = stream.read(_CHUNK)
                if not piece or len(text) - at > MAX_PRODUCT_CHARACTERS:
                    raise CatalogueError(f"{path} is cut off or damaged ({error}); download it again") from error
                text, at = text[at:] + piece, 0
            else:
                yield element


def _read_mapping(path: Path) -> dict[str, Any]:
    try:
        content = parse_json(path.read_bytes())
    except ValueError as error:
        raise CatalogueError(f"{path} is cut off or damaged ({error}); download it again") from error
    if not isinstance(content, dict):
        raise CatalogueError(f"{path} must be a JSON object with one entry per product; download it again")
    return content


def _whole(value: Any) -> Any:
    """A JSON value whose texts hold no halves of surrogate pairs: neither SQLite nor a tokenizer takes those."""
    if isinstance(value, str):
        return whole_characters(value)
    if isinstance(value, list):
        return [_whole(item) for item in value]
    if isinstance(value, dict):
        return {whole_characters(name): _whole(item) for name, item in value.items()}
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{shorten(value)} should be text")
    return value


def _texts(values: Any) -> tuple[str, ...]:
    if not isinstance(values, list | tuple | dict):
        raise TypeError(f"{shorten(values)} should be a list of texts")
    return tuple(map(str, values))  # a number is shown as one


def _clean(raw: Mapping[str, Any], annotation: Mapping[str, Any], human: Any) -> Product:
    bullets = raw["small_description"]
    return Product(
        asin=_text(raw["asin"]),
        title=_text(raw["name"]),
        category=_text(raw["category"]),
        query=raw["query"].lower().strip(),
        product_category=_text(raw["product_category"]),
        description=_text(raw["full_description"] or ""),
        bullets=_texts(bullets if isinstance(bullets, list) else [bullets]),
        prices=_prices(raw.get("pricing")),
        options=_options(raw["customization_options"]),
        attributes=_texts(annotation.get("attributes", ("DUMMY_ATTR",))),
        instruction=None if annotation.get("instruction") is None else _text(annotation["instruction"]),
        instruction_attributes=_texts(annotation.get("instruction_attributes") or ()),
        human_instructions=tuple(
            (_text(one["instruction"]), _texts(one["instruction_attributes"]), _texts(one["instruction_options"]))
            for one in human
        ),
    )


def _prices(pricing: str | None) -> tuple[float, ...]:
    if not pricing:
        return (NO_PRICE,)
    prices = tuple(float(re.sub(r"[^\d.]", "", price)) for price in pricing.split("$")[1:])
    if not all(map(math.isfinite, prices)):
        raise ValueError(f"the price {shorten(pricing)} is no number")
    return prices[:2] or (NO_PRICE,)


def _options(raw: Mapping[str, Any] | str | None) -> dict[str, tuple[str, ...]]:
    if not raw:
        return {}
    if isinstance(raw, str):
        raise ValueError(f"customization_options is text: {raw[:40]!r}")
    return {
        name.lower(): tuple(choice["value"].strip().replace("/", " | ").lower() for choice in choices)
        for name, choices in raw.items()
        if choices is not None
    }
