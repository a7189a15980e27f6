"""The WebShop environment: what can be done on which page, what a purchase earns, what bad tasks and options say."""

from __future__ import annotations

import pickle
from dataclasses import replace

import pytest

from sdar_verl.envs.base import Task
from sdar_verl.envs.registry import check_env, demonstration_of, make_env
from sdar_verl.envs.webshop.goals import Goal
from sdar_verl.envs.webshop.store import CatalogueError, write_catalogue
from sdar_verl.rollout.actions import match_admissible
from tests.support.webshop_shop import product

LAMP = product(
    asin="B0LAMP0001",
    title="Acme Desk Lamp Brass",
    options={"color": ("black", "[2 pack] white"), "size": ("small", "large")},
    description="Stands well.",
    bullets=("easy install", "warm light"),
    prices=(20.0, 30.0),
)
CHAIR = product(asin="b0Chair001", title="Wooden Chair", query="chairs", product_category="Home › Seats › Chairs")
GOAL = Goal(
    asin=LAMP.asin,
    title=LAMP.title,
    query=LAMP.query,
    category=LAMP.category,
    product_category=LAMP.product_category,
    instruction="Find me easy install lamps with color: black, and price lower than 40.00 dollars",
    attributes=("easy install",),
    options={"color": "black"},
    price_cap=40.0,
)


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory):
    many = [product(asin=f"B0SPARE{i:03d}", title=f"Spare Bulb {i}", query="bulbs") for i in range(60)]
    return write_catalogue([LAMP, CHAIR, *many], tmp_path_factory.mktemp("shop"))


@pytest.fixture
def task(catalogue):
    data = {"catalogue": str(catalogue.folder), "digest": catalogue.digest, "price_seed": 0, "goal": GOAL.as_dict()}
    return Task("webshop", "t", "garden", GOAL.instruction, data)


@pytest.fixture
def env():
    return make_env("webshop")


def play(env, task, *actions):
    steps = [env.reset(task)]
    for action in actions:
        steps.append(env.step(action))
    return steps


def test_the_perfect_purchase_is_a_success(env, task):
    *_, item, chosen, end = play(
        env, task, "search[desk lamp]", "click[b0lamp0001]", "click[black]", "Click[ Buy  Now ]"
    )
    assert "click[black]" in item.admissible_actions
    assert chosen.observation == item.observation
    assert (end.done, end.success, end.reward, end.score) == (True, True, 10.0, 1.0)
    assert env.step("click[buy now]").reward == 0.0


def test_a_partial_purchase_earns_its_score_and_no_reward(env, task):
    end = play(env, task, "search[desk lamp]", "click[b0lamp0001]", "click[buy now]")[-1]
    assert end.score == pytest.approx(2 / 3)  # attribute and price, not the option
    assert (end.done, end.success, end.reward) == (True, False, 0.0)
    graded = make_env("webshop", graded_reward=True, success_reward=3.0)
    assert play(graded, task, "search[desk lamp]", "click[b0lamp0001]", "click[buy now]")[-1].reward == pytest.approx(2)


def test_the_wrong_kind_of_product_earns_nothing(env, task):
    end = play(env, task, "search[wooden chair]", "click[b0chair001]", "click[buy now]")[-1]
    assert (end.score, end.done) == (0.0, True)


def test_a_product_is_opened_whatever_the_case_of_its_id(env, task):
    item = play(env, task, "search[wooden chair]", "click[B0CHAIR001]")[-1]
    assert "Wooden Chair" in item.observation and "click[buy now]" in item.admissible_actions


def test_only_the_search_page_offers_a_search(env, task):
    start, results, item = play(env, task, "search[lamp]", "click[b0lamp0001]")
    assert (start.admissible_actions, start.action_forms) == ((), ("search[<query>]",))
    assert results.action_forms == item.action_forms == ()
    assert match_admissible("search[a b]", start.admissible_actions, start.action_forms) == "search[a b]"
    assert results.admissible_actions == ("click[back to search]", "click[next >]", "click[b0lamp0001]")
    assert item.admissible_actions[-4:] == ("click[black]", "click[[2 pack] white]", "click[small]", "click[large]")


def test_a_search_from_another_page_works_as_in_webshop(env, task):
    assert "Wooden Chair" in play(env, task, "search[lamp]", "search[chair]")[-1].observation


@pytest.mark.parametrize(
    "action", ["", "none", "search[]", "search[  ]", "click[no]", "buy[it]", "click[search]", "search[a"]
)
def test_what_the_page_does_not_offer_does_nothing(env, task, action):
    start, after = play(env, task, action)
    assert after == start


def test_back_keeps_options_and_leaving_forgets_them(env, task):
    path = ["search[desk lamp]", "click[b0lamp0001]", "click[black]", "click[features]", "click[< prev]"]
    assert play(env, task, *path, "click[buy now]")[-1].success
    assert not play(env, task, *path, "click[< prev]", "click[b0lamp0001]", "click[buy now]")[-1].success
    assert play(env, task, *path, "click[back to search]")[-1].action_forms


def test_the_last_value_of_an_option_counts(env, task):
    path = ["search[desk lamp]", "click[b0lamp0001]", "click[black]", "click[[2 pack] white]"]
    assert not play(env, task, *path, "click[buy now]")[-1].success
    assert play(env, task, *path, "click[black]", "click[buy now]")[-1].success


def test_pages_of_results(env, task):
    steps = play(env, task, "search[spare bulb]", *["click[next >]"] * 5, "click[< prev]")
    assert "click[< prev]" not in steps[1].admissible_actions
    totals = [step.observation.split(" [SEP] ")[1] for step in steps[1:]]
    assert totals == [f"Page {n} (Total results: 50)" for n in (1, 2, 3, 4, 5, 6, 5)]
    assert sum(action.startswith("click[b0spare") for action in steps[5].admissible_actions) == 10
    assert sum(action.startswith("click[b0spare") for action in steps[6].admissible_actions) == 0


def test_sub_pages_show_what_they_say(env, task):
    path = ["search[desk lamp]", "click[b0lamp0001]"]
    told = [play(env, task, *path, f"click[{name}]")[-1].observation for name in ("description", "features", "reviews")]
    assert [text.removeprefix("Back to Search [SEP] < Prev") for text in told] == [
        " [SEP] Stands well.",
        " [SEP] easy install [SEP] warm light",
        "",
    ]


def test_long_pages_are_cut_and_say_so(task):
    short = make_env("webshop", max_characters=500)
    step = play(short, task, "search[spare bulb]")[-1]
    assert len(step.observation) < 600
    assert "more characters are not shown]" in step.observation


def test_steps_can_travel_between_processes(env, task):
    step = play(env, task, "search[desk lamp]", "click[b0lamp0001]")[-1]
    assert pickle.loads(pickle.dumps(step)) == step


def test_a_task_of_another_environment_is_refused(env):
    with pytest.raises(ValueError, match="sdar-verl prepare webshop"):
        env.reset(Task("webshop", "t", "garden", "buy", {}))


def test_another_catalogue_is_refused(env, task):
    with pytest.raises(ValueError, match="is not the one that task 't' was made with"):
        env.reset(Task("webshop", "t", "garden", "buy", {**task.data, "digest": "other"}))


def test_a_missing_catalogue_is_named(env, task, tmp_path):
    with pytest.raises(CatalogueError, match="holds no finished WebShop catalogue"):
        env.reset(Task("webshop", "t", "garden", "buy", {**task.data, "catalogue": str(tmp_path)}))


@pytest.mark.parametrize(
    "option",
    [
        {"success_reward": 0},
        {"success_reward": float("nan")},
        {"graded_reward": 1},
        {"nouns": "nltk"},
        {"max_characters": 10},
        {"no_such": 1},
    ],
    ids=str,
)
def test_bad_options_are_named(option):
    with pytest.raises(ValueError, match=next(iter(option))):
        check_env("webshop", option)


def test_a_catalogue_without_spacys_nouns_is_told_apart(task):
    with pytest.raises(ValueError, match=r"keeps none of spaCy's nouns; make it again .*--nouns spacy"):
        make_env("webshop", nouns="spacy").reset(task)
    for rule in ("catalogue", "rules"):
        make_env("webshop", nouns=rule).reset(task)


def test_step_before_reset_is_an_error(env):
    with pytest.raises(RuntimeError, match="before reset"):
        env.step("search[x]")


@pytest.mark.parametrize(
    "options", [{"color": "black", "size": "large"}, ("[2 pack] white",)], ids=["named", "people's"]
)
def test_a_demonstration_wins(env, task, options):
    goal = replace(GOAL, options=options)
    task = replace(task, data={**task.data, "goal": goal.as_dict()})
    actions = demonstration_of(task)
    assert actions[0] == "search[acme desk lamp brass]" and actions[-1] == "click[buy now]"
    *_, end = play(env, task, *actions)
    assert end.success


def test_a_demonstration_turns_pages(env, task, catalogue):
    """The goal's title fits sixty bulbs alike; the one to buy is on the third page of results."""
    bulb = catalogue[catalogue.search("spare bulb")[25]]
    fields = {"asin": bulb.asin, "query": bulb.query, "product_category": bulb.product_category, "options": {}}
    goal = replace(GOAL, title="Spare Bulb", attributes=("bright",), **fields)
    task = replace(task, data={**task.data, "goal": goal.as_dict()})
    actions = demonstration_of(task)
    assert actions[1:3] == ["click[next >]"] * 2
    assert play(env, task, *actions)[-1].success


def test_there_is_no_demonstration_for_what_nobody_can_buy(task):
    goal = replace(GOAL, price_cap=1.0)
    assert demonstration_of(replace(task, data={**task.data, "goal": goal.as_dict()})) == []
    assert demonstration_of(Task("webshop", "t", "garden", "a lamp", {})) == []
