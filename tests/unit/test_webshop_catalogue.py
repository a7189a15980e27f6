"""WebShop's files: read as its engine reads them, and every missing or damaged piece named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sdar_verl.envs.webshop import catalogue
from sdar_verl.envs.webshop.catalogue import CatalogueError, find_data_files, read_products, stream_array
from sdar_verl.envs.webshop.generate import CatalogueConfig, draw_product, generate_catalogue
from sdar_verl.envs.webshop.goals import count_goals, make_goal
from sdar_verl.envs.webshop.prepare import CATEGORIES
from sdar_verl.envs.webshop.store import Catalogue
from sdar_verl.skills.bank import SkillBank
from tests.support.webshop_shop import product, shop

RAW = {
    "asin": "B000000001",
    "name": "Acme Lamp",
    "category": "garden",
    "query": " Table Lamps ",
    "product_category": "Home › Lamps",
    "full_description": "",
    "small_description": ["a", "b"],
    "pricing": "$1,012.50$1,099.00$3.00",
    "customization_options": {"Color": [{"value": " Red/Blue "}], "Size": None},
    "images": ["x"],
}


def write(folder: Path, products: list[dict], size: str = "", **annotation: object) -> Path:
    (folder / f"items_shuffle{size}.json").write_text(json.dumps(products))
    attributes = {"attributes": ["a b"], "instruction": "Find me a b lamps", "instruction_attributes": ["a b"]}
    (folder / f"items_ins_v2{size}.json").write_text(json.dumps({"B000000001": {**attributes, **annotation}}))
    return folder


def read(folder: Path, **options):
    return list(read_products(find_data_files(folder, **options)))


def test_fields_are_cleaned_as_webshop_cleans_them(tmp_path):
    (one,) = read(write(tmp_path, [RAW]))
    assert one.query == "table lamps"
    assert one.prices == (1012.5, 1099.0)
    assert one.price_tag == "$1012.5 to $1099.0"
    assert one.options == {"color": ("red | blue",)}
    assert one.search_text == "acme lamp  a color: red | blue"


def test_products_without_price_options_or_annotation(tmp_path):
    raw = {**RAW, "asin": "B000000002", "pricing": "", "customization_options": "", "small_description": "one"}
    (one,) = read(write(tmp_path, [raw]))
    assert (one.prices, one.price_tag, one.options) == ((100.0,), "$100.0", {})
    assert one.bullets == ("one",)
    assert one.attributes == ("DUMMY_ATTR",)
    assert count_goals(one, "synthetic") == 0


def test_doubles_and_impossible_ids_are_left_out(tmp_path):
    ids = ["B000000001", "nan", "B0000000012345", "B000000001"]
    assert [one.asin for one in read(write(tmp_path, [{**RAW, "asin": i} for i in ids]))] == ["B000000001"]


def test_instructions_of_people(tmp_path):
    folder = write(tmp_path, [RAW])
    said = [
        {"instruction": "a lamp.", "instruction_attributes": ["a b"], "instruction_options": ["red"]},
        {"instruction": "another", "instruction_attributes": [], "instruction_options": []},
    ]
    (folder / "items_human_ins.json").write_text(json.dumps({"B000000001": said}))
    (one,) = read(folder, human=True)
    assert count_goals(one, "human") == 1
    goal = make_goal(one, "human", 0, seed=0)
    assert goal.instruction == "a lamp"  # too dear for any cap
    assert goal.options == ("red",)


def test_goals_survive_json():
    named = product(options={"b": ("x", "y"), "a": ("z",)}, instruction="Find me", instruction_attributes=("q",))
    asked = product(human_instructions=(("say", ("q",), ("z",)),))
    for kind, one, count in (("synthetic", named, 2), ("human", asked, 1)):
        assert count_goals(one, kind) == count
        for number in range(count):
            goal = make_goal(one, kind, number, seed=0)
            assert goal.from_dict(json.loads(json.dumps(goal.as_dict(), sort_keys=True))) == goal


@pytest.mark.parametrize("chunk", [7, 64, 1 << 20])
def test_arrays_are_read_whatever_the_pieces(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(catalogue, "_CHUNK", chunk)
    content = [{"a": "x" * n, "b": [n, {"c": None}]} for n in range(30)]
    for indent in (None, 2):
        (tmp_path / "a.json").write_text(json.dumps(content, indent=indent))
        assert list(stream_array(tmp_path / "a.json")) == content


@pytest.mark.parametrize(("cut", "told"), [(-1, "cut off"), (-5, "cut off"), (0, "not a JSON array")])
def test_a_file_cut_short_is_named(tmp_path, cut, told):
    write(tmp_path, [RAW])
    file = tmp_path / "items_shuffle.json"
    file.write_text(file.read_text()[: cut or None] if cut else '{"a": 1}')
    with pytest.raises(CatalogueError, match=told):
        read(tmp_path)


def test_a_product_without_a_field_is_named(tmp_path):
    raw = {key: value for key, value in RAW.items() if key != "query"}
    with pytest.raises(CatalogueError, match=r"product number 0 \(asin \w+\) is damaged \(KeyError: 'query'\)"):
        read(write(tmp_path, [raw]))


def test_missing_files_are_named(tmp_path):
    with pytest.raises(CatalogueError, match=r"holds none of WebShop's files.*--generate"):
        find_data_files(tmp_path)
    with pytest.raises(CatalogueError, match="is not a folder"):
        find_data_files(tmp_path / "none")
    write(tmp_path, [RAW])
    with pytest.raises(CatalogueError, match=r"lacks items_human_ins.json"):
        find_data_files(tmp_path, human=True)
    write(tmp_path, [RAW], "_1000")
    with pytest.raises(CatalogueError, match="--size full or --size 1000"):
        find_data_files(tmp_path)
    assert find_data_files(tmp_path, "1000").products.name == "items_shuffle_1000.json"
    (tmp_path / "items_ins_v2.json").unlink()
    with pytest.raises(CatalogueError, match=r"lacks items_ins_v2.json"):
        find_data_files(tmp_path, "full")


def test_the_data_folder_of_a_checkout_is_found(tmp_path):
    (tmp_path / "data").mkdir()
    write(tmp_path / "data", [RAW])
    assert len(read(tmp_path)) == 1


def test_the_generated_catalogue_is_the_same_in_every_process(tmp_path):
    script = (
        "import sys; from sdar_verl.envs.webshop.generate import *; "
        "generate_catalogue(CatalogueConfig(seed=3, products=200), sys.argv[1])"
    )
    for name, hash_seed in (("a", "0"), ("b", "77")):
        env = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(Path(__file__).parents[2])}
        subprocess.run([sys.executable, "-c", script, str(tmp_path / name)], env=env, check=True)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()
    assert draw_product(3, 5) != draw_product(4, 5)


def test_the_generated_catalogue_is_worth_shopping_in():
    files, found = shop()
    products = list(found)
    assert len(products) == 1200
    assert {p.category for p in products} == set(CATEGORIES)
    assert len({p.query for p in products}) == 45
    assert sum(count_goals(p, "synthetic") for p in products) > 5000
    assert sum(len(p.prices) > 1 for p in products) > 100
    # No phrase of a kind's products is told of all of them: attributes tell products apart.
    kind = [p for p in products if p.query == "coffee"]
    assert 0 < sum("fair trade" in p.attributes for p in kind) < len(kind)
    assert files.human is not None


def test_what_is_stored_is_what_was_read(tmp_path):
    files, found = shop()
    assert list(Catalogue(found.folder)) == list(read_products(files))
    with pytest.raises(KeyError):
        found.product("NONE")


def test_a_catalogue_half_made_is_refused(tmp_path):
    with pytest.raises(CatalogueError, match="holds no finished WebShop catalogue"):
        Catalogue(tmp_path)
    (tmp_path / "catalogue.json").write_text('{"format": 99}')
    with pytest.raises(CatalogueError, match="format 99"):
        Catalogue(tmp_path)
    (tmp_path / "catalogue.json").write_text('{"format": 2, "digest": "x", "products": 1, "nouns": "rules"}')
    with pytest.raises(CatalogueError, match="is damaged"):
        Catalogue(tmp_path)


@pytest.mark.parametrize("products", [0, 99, 2_000_000])
def test_impossible_sizes_are_refused(products):
    with pytest.raises(ValueError, match="choose 100 to"):
        CatalogueConfig(products=products)


def test_the_skill_bank_speaks_of_every_category_and_no_other():
    bank = SkillBank.load("webshop", CATEGORIES)
    assert {t for skill in bank for t in skill.task_types} == set(CATEGORIES)


def test_generating_twice_gives_the_same_files(tmp_path):
    first = generate_catalogue(CatalogueConfig(products=100), tmp_path / "a")
    again = generate_catalogue(CatalogueConfig(products=100), tmp_path / "b")
    assert first.products.read_bytes() == again.products.read_bytes()
