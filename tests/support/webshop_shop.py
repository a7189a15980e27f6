"""A generated shop for tests, made once per process."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

from sdar_verl.envs.webshop.catalogue import DataFiles, Product, read_products
from sdar_verl.envs.webshop.generate import CatalogueConfig, generate_catalogue
from sdar_verl.envs.webshop.store import Catalogue, write_catalogue


@functools.lru_cache(maxsize=2)
def shop(seed: int = 0, products: int = 1200) -> tuple[DataFiles, Catalogue]:
    """Files and catalogue; in the system's folder for temporary files, for as long as the process."""
    folder = tempfile.TemporaryDirectory(prefix="sdar_webshop_")
    _folders.append(folder)
    root = Path(folder.name)
    files = generate_catalogue(CatalogueConfig(seed=seed, products=products), root)
    return files, write_catalogue(read_products(files), root / "catalogue")


_folders: list[tempfile.TemporaryDirectory[str]] = []


def product(**fields: object) -> Product:
    """A product with these fields, for the others something plain."""
    plain: dict[str, object] = {
        "asin": "B000000001",
        "title": "Acme Desk Lamp",
        "category": "garden",
        "query": "lamps",
        "product_category": "Home › Lighting › Lamps",
        "description": "",
        "bullets": ("bright",),
        "prices": (20.0,),
        "options": {},
        "attributes": ("easy install",),
    }
    return Product(**{**plain, **fields})  # type: ignore[arg-type]
