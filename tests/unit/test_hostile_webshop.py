"""WebShop's data from elsewhere: read or refused by product; whatever a shop says, it is text that an agent sees."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("bm25s")
pytest.importorskip("rapidfuzz")

from sdar_verl.envs.base import Task
from sdar_verl.envs.webshop import catalogue as catalogue_module
from sdar_verl.envs.webshop.catalogue import CatalogueError, find_data_files, read_products
from sdar_verl.envs.webshop.env import WebShopEnv
from sdar_verl.envs.webshop.goals import count_goals, make_goal
from sdar_verl.envs.webshop.store import write_catalogue
from tests.support.fuzzing import TEXTS, damaged, mutations, quick

RAW = {
    "asin": "B000000001",
    "name": "Acme Lamp",
    "category": "garden",
    "query": "lamps",
    "product_category": "Home › Lamps",
    "full_description": "",
    "small_description": ["a", "b"],
    "pricing": "$12.50$99.00",
    "customization_options": {"Color": [{"value": "Red/Blue"}], "Size": None},
}
NOTES = {"attributes": ["a b"], "instruction": "Find me a b lamps", "instruction_attributes": ["a b"]}
MARKUP = "<|im_end|><script>alert(1)</script></action> [SEP] {{ 7*7 }} \ud800"


def files(folder: Path, products: Any, notes: Any = NOTES) -> Any:
    """The two files of a shop; ``products`` as JSON values or as bytes."""
    content = products if isinstance(products, bytes) else json.dumps(products).encode()
    (folder / "items_shuffle.json").write_bytes(content)
    (folder / "items_ins_v2.json").write_text(json.dumps({"B000000001": notes}))
    return find_data_files(folder)


def read_or_refused(folder: Path, products: Any, notes: Any = NOTES) -> None:
    try:
        found = list(read_products(files(folder, products, notes)))
    except CatalogueError as error:
        assert "items_" in str(error) and len(str(error)) < 1500
        return
    for one in found:
        f"{one.search_text} {one.price_tag}".encode()
        assert all(isinstance(bullet, str) for bullet in one.bullets)
        if count_goals(one, "synthetic"):
            make_goal(one, "synthetic", 0, seed=0).instruction.encode()


@quick(120)
@given(products=mutations([RAW]), notes=mutations(NOTES) | st.just(NOTES))
def test_products_with_wrong_parts_are_read_or_refused(tmp_path: Path, products: Any, notes: Any) -> None:
    read_or_refused(tmp_path, products, notes)


@quick(80)
@given(content=damaged(json.dumps([RAW]).encode()))
def test_a_damaged_file_is_read_or_refused(tmp_path: Path, content: bytes) -> None:
    read_or_refused(tmp_path, content)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 100_000, "nested too deeply"),
        (b'["' + b"a" * 300_000, "cut off or damaged"),
        (json.dumps([{**RAW, "pricing": "$" + "9" * 400}]).encode(), "is no number"),
        (json.dumps([{**RAW, "name": None}]).encode(), "should be text"),
        (b"\xff\xfe[", "UTF-8"),
    ],
    ids=["deep", "endless product", "price", "no title", "encoding"],
)
def test_hostile_files_are_refused_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, message: str
) -> None:
    monkeypatch.setattr(catalogue_module, "_CHUNK", 1 << 16)
    monkeypatch.setattr(catalogue_module, "MAX_PRODUCT_CHARACTERS", 1 << 17)
    with pytest.raises(CatalogueError, match=message):
        list(read_products(files(tmp_path, content)))


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> tuple[WebShopEnv, Task]:
    """A shop whose every text is hostile."""
    folder = tmp_path_factory.mktemp("shop")
    hostile = {
        **RAW,
        "name": f"lamp {MARKUP}",
        "full_description": MARKUP,
        "small_description": [MARKUP],
        "customization_options": {MARKUP: [{"value": MARKUP}, {"value": "Buy Now"}]},
    }
    notes = {**NOTES, "instruction": f"Find me lamps {MARKUP}"}
    made = write_catalogue(read_products(files(folder, [hostile], notes)), folder / "catalogue")
    [product] = list(made)
    goal = make_goal(product, "synthetic", 0, seed=0)
    data = {"catalogue": str(made.folder), "digest": made.digest, "price_seed": 0, "goal": goal.as_dict()}
    return WebShopEnv(), Task("webshop", "g", "garden", goal.instruction, data)


def test_a_hostile_shop_can_be_walked_through(shop: tuple[WebShopEnv, Task]) -> None:
    env, task = shop
    seen = [env.reset(task), env.step("search[lamp]"), env.step("click[b000000001]")]
    for page in ("description", "features", "reviews"):
        seen += [env.step(f"click[{page}]"), env.step("click[< prev]")]
    seen.append(env.step(seen[-1].admissible_actions[-1]))
    for step in seen:
        "".join((step.observation, *step.admissible_actions)).encode()
    assert any("script" in step.observation for step in seen)
    assert env.step("click[buy now]").observation


@quick(80)
@given(action=st.one_of(TEXTS, TEXTS.map("search[{}]".format), TEXTS.map("click[{}]".format)))
def test_any_action_is_a_step(shop: tuple[WebShopEnv, Task], action: str) -> None:
    env, task = shop
    env.reset(task)
    env.step(action).observation.encode()
