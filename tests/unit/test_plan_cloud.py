"""What a run costs on rented machines."""

from __future__ import annotations

import datetime
import json
import math
import random
from dataclasses import replace

import pytest

from sdar_verl.cli import main
from sdar_verl.errors import ConfigError
from sdar_verl.planner.cloud import Assumptions, checkpoint_bytes, offers, saving
from sdar_verl.planner.layout import Layout
from sdar_verl.planner.prices import Node, choose, nodes, rates, stale

TODAY = datetime.date(2026, 11, 28)
HEAD = "provider,node,region,gpu,cards,on_demand,spot_low,spot_high,read,source\n"
ROW = "here,box,north,h100-80gb,8,40,10,12,2026-11-01,a list\n"


def simulated(step_s: float, steps: int, every: int, given: Assumptions, save_s: float, upload_s: float) -> float:
    """Seconds of one run with interruptions at random times, step by step."""
    clock, done, counts, pending = 0.0, 0, 0, None
    due = random.expovariate(1 / (3600 * given.interruption_h))
    while done < steps:
        clock += step_s
        done += 1
        if pending is not None and clock >= pending[1]:
            counts, pending = pending[0], None
        if done % every == 0:
            clock += save_s
            pending = (done, clock + upload_s)
        if clock >= due:
            if pending is not None and pending[1] <= due:
                counts = pending[0]
            done, pending = counts, None
            clock = due + given.restart_s
            due = clock + random.expovariate(1 / (3600 * given.interruption_h))
    return clock


@pytest.mark.parametrize(("step_s", "size"), [(200.0, 91e9), (60.0, 20e9), (400.0, 40e9)])
def test_the_expected_time_is_that_of_simulated_interruptions(step_s, size):
    given = Assumptions()
    found = saving(step_s, 150, 150 * step_s / 3600, size, 1, given)
    random.seed(0)
    times = [simulated(step_s, 150, found.every, given, found.save_s, found.upload_s) for _ in range(2000)]
    assert step_s * 150 * found.stretch == pytest.approx(sum(times) / len(times), rel=0.1)


def test_the_interval_is_youngs_and_near_the_best():
    given = Assumptions(disk=1e9, upload=1e12)
    found = saving(100.0, 1000, 100 * 1000 / 3600, 60e9, 1, given)
    assert found.every * 100 == pytest.approx(math.sqrt(2 * 60 * 4 * 3600), abs=50)
    stretches = {}
    for every in range(1, 60):
        interval, between = every * 100.0, 14400.0
        stretches[every] = between * math.expm1((interval + 60) / between) / interval
    assert stretches[found.every] <= 1.01 * min(stretches.values())


def test_a_checkpoint_that_takes_long_to_upload_is_not_followed_before_it_counts():
    found = saving(60.0, 150, 2.5, 91e9, 1, Assumptions(upload=3e7))
    assert found.every * 60 >= found.upload_s == pytest.approx(91e9 / 3e7)


def test_weights_moments_and_an_own_teacher_are_in_a_checkpoint():
    layout = Layout(architecture=_architecture(), gpus=8)
    size = checkpoint_bytes(layout)
    assert size == 12 * layout.architecture.parameters
    assert checkpoint_bytes(replace(layout, teacher="ema")) == size * 16 / 12


def test_offers_fit_and_stand_in_the_order_of_their_price():
    found = offers(Layout(architecture=_architecture(), gpus=8), nodes(), Assumptions())
    prices = [offer.on_demand for offer in found]
    assert prices == sorted(prices) and len(found) >= 8
    assert all(offer.plan.fits for offer in found)
    for offer in found:
        assert offer.weekend == pytest.approx(63 * offer.node.on_demand * offer.nodes)
        assert (offer.spot is None) == (offer.node.spot_low is None)
        if offer.spot is not None:
            assert offer.spot[0] == pytest.approx(
                offer.hours * offer.saving.stretch * offer.node.spot_low * offer.nodes
            )


@pytest.mark.parametrize(("rollout", "teacher"), [(8, 0), (0, 8), (4, 0), (8, 8)])
def test_cards_of_a_rollout_and_a_teacher_of_their_own_are_paid(rollout, teacher):
    wished = Layout(architecture=_architecture(), gpus=8, rollout_gpus=rollout, teacher="reference")
    wished = replace(wished, teacher_gpus=teacher, teacher_placement="pool" if teacher else "colocated")
    (node,) = (node for node in nodes() if node.node == "p5.48xlarge")
    (offer,) = offers(wished, [node], Assumptions())
    training = offer.plan.layout.gpus
    assert training >= 1 and training + rollout + teacher == offer.plan.cards == 8 * offer.nodes
    assert offer.on_demand == pytest.approx(offer.hours * node.on_demand * offer.nodes)
    writers = -(-training // 8)
    assert offer.saving.save_s == pytest.approx(offer.checkpoint / writers / 1e9)


def test_what_a_machine_changes_of_the_recipe_is_said(tmp_path, capsys):
    """Of 8 H100, half and one of them: the trainer's cards, and an engine that they can be dealt out to."""
    cards = (8, 4, 1)
    rows = [ROW.replace(",box,", f",box-{number},").replace(",8,", f",{number},") for number in cards]
    (tmp_path / "mine.csv").write_text(HEAD + "".join(rows))
    command = ["plan", "--cloud", "model=qwen2.5-3b", "--prices", str(tmp_path / "mine.csv")]
    command.append("actor_rollout_ref.rollout.tensor_model_parallel_size=8")
    assert main([*command, "--json"]) == 0
    for offer in json.loads(capsys.readouterr().out)["offers"]:
        at = [f"trainer.nnodes={offer['nodes']}", f"trainer.n_gpus_per_node={offer['cards'] // offer['nodes']}"]
        smaller = [f"actor_rollout_ref.rollout.tensor_model_parallel_size={offer['cards']}"]
        assert offer["overrides"] == at + (smaller if offer["cards"] < 8 else [])
    assert main(command) == 0
    said = "1 x box-4 (north): trainer.nnodes=1 trainer.n_gpus_per_node=4 actor_rollout_ref.rollout.tensor_model"
    assert said in capsys.readouterr().out


@pytest.mark.parametrize(
    ("pool", "found"),
    [(4, {(1, 4, 4)}), (3, set())],
    ids=["4 cards train", "neither 5 nor 13, 21 or 29 do: 256 rows, and as many cards on each machine"],
)
def test_cards_that_cannot_train_together_are_left_out(pool, found):
    node = Node("a", "b", "", "h100-80gb", 8, 1.0, None, None, TODAY, "s")
    wished = Layout(architecture=_architecture(), gpus=8, tensor_parallel=4, teacher="reference", mini_batch_rows=256)
    wished = replace(wished, teacher_placement="pool", teacher_gpus=pool, optimizer_offload=True)
    made = [(offer.nodes, offer.plan.layout) for offer in offers(wished, [node], Assumptions())]
    assert {(nodes, layout.gpus, layout.tensor_parallel) for nodes, layout in made} == found


def test_every_row_of_the_table_has_a_source_and_a_date():
    for node in nodes():
        assert node.source and node.read <= TODAY and node.on_demand > 0
        assert node.spot_low is None or node.spot_low <= node.spot_high <= node.on_demand
    assert all(rate.source and rate.usd > 0 for rate in rates().values())


def test_an_old_price_is_told():
    old = [node for node in nodes() if node.age(TODAY) > 90]
    assert len(stale(nodes(), TODAY)) == len(old) > 0
    assert "p5en.48xlarge" in stale(old, TODAY)[0] and "114 days" in stale(old, TODAY)[0]
    assert stale([node for node in nodes() if node not in old], TODAY) == []


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (HEAD.replace(",cards", "") + ROW, "lacks the column cards"),
        (HEAD + ROW.replace("h100-80gb", "h101"), "line 2: gpu=h101 is unknown; known: a100-40gb"),
        (HEAD + ROW + ROW.replace(",40,", ",free,"), "line 3: on_demand='free'"),
        (HEAD + ROW.replace(",8,", ",0.5,"), "line 2: cards='0.5' is no whole number"),
        (HEAD + ROW.replace("2026-11-01", "today"), "read='today' is no date"),
        (HEAD + "here,box\n", "line 2: it has not one value"),
    ],
)
def test_a_faulty_price_file_is_told_with_line_and_column(tmp_path, text, told):
    (tmp_path / "mine.csv").write_text(text)
    with pytest.raises(ConfigError, match=told.replace("'", ".")):
        nodes(tmp_path / "mine.csv")


def test_unknown_names_list_the_known(tmp_path):
    (tmp_path / "mine.csv").write_text(HEAD + ROW)
    listed = nodes(tmp_path / "mine.csv")
    assert choose(listed, "box", "north") == listed
    with pytest.raises(ConfigError, match="--node p9: unknown; known: box"):
        choose(listed, "p9", None)
    with pytest.raises(ConfigError, match="--region south: unknown; known: north"):
        choose(listed, None, "south")
    with pytest.raises(ConfigError, match="known: none"):
        choose(nodes(), None, "south")


def test_skypilots_catalogue_is_read_where_it_is(tmp_path):
    folder = tmp_path / "catalogs" / "v8" / "aws"
    folder.mkdir(parents=True)
    (folder / "vms.csv").write_text(
        "InstanceType,AcceleratorName,AcceleratorCount,vCPUs,MemoryGiB,GpuInfo,Price,SpotPrice,Region,AvailabilityZone\n"
        "p5.48xlarge,H100,8.0,192,2048,,50.0,20.0,us-east-1,us-east-1a\n"
        "p5.48xlarge,H100,8.0,192,2048,,50.0,12.0,us-east-1,us-east-1b\n"
        "p5.48xlarge,H100,8.0,192,2048,,61.0,,eu-north-1,eu-north-1a\n"
        "m5.large,,,2,8,,0.096,0.04,us-east-1,us-east-1a\n"
    )
    found = choose(nodes(sky=tmp_path), "p5.48xlarge", None)
    assert [(n.region, n.on_demand, n.spot_low, n.spot_high) for n in found] == [
        ("us-east-1", 50.0, 12.0, 20.0),
        ("eu-north-1", 61.0, None, None),
    ]
    assert choose(nodes(sky=tmp_path), "p4de.24xlarge", None), "what the catalogue lacks comes from the table"


def test_the_command_prints_json(capsys, tmp_path):
    (tmp_path / "mine.csv").write_text(HEAD + ROW)
    command = ["plan", "--cloud", "model=qwen2.5-3b", "--prices", str(tmp_path / "mine.csv"), "--json"]
    assert main(command) == 0
    (offer,) = json.loads(capsys.readouterr().out)["offers"]
    assert offer["weekend"] == 63 * 40 and offer["save_freq"] >= 1 and offer["spot"][0] < offer["on_demand"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--node", "p5.48xlarge"], "--node: no effect without --cloud"),
        (["--cloud", "--recommend", "--price", "2"], "--price, --recommend: no effect with --cloud"),
        (["--cloud", "--gpu", "h200"], "--gpu: no effect with --cloud"),
        (["--cloud", "--interruption", "0"], "--interruption 0: must be above 0"),
        (["--cloud", "--prices", "nowhere.csv"], "--prices nowhere.csv: nowhere.csv cannot be read"),
        (["--cloud", "--node", "p9"], "--node p9: unknown"),
    ],
)
def test_bad_options_are_told(capsys, words, told):
    assert main(["plan", *words]) == 2
    assert told in capsys.readouterr().err


def _architecture():
    from sdar_verl.planner.families import find_architecture

    return find_architecture("Qwen/Qwen2.5-7B-Instruct")


def test_a_node_is_as_old_as_its_source():
    node = Node("a", "b", "", "h100-80gb", 1, 1.0, None, None, datetime.date(2026, 11, 1), "s")
    assert node.age(TODAY) == 27
