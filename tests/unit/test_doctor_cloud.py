"""The checks of nodes, on nodes that are made up."""

from __future__ import annotations

import platform
from dataclasses import replace
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from sdar_verl.cli import main
from sdar_verl.doctor.cloud import bucket, clocks, enough_nodes, room, same_versions, shared_memory
from sdar_verl.doctor.nodes import Node

NODE = Node("one", {"ray": "2.60.0", "torch": "2.13.0"}, 500 * 10**9, 32 * 2**30, 8, 0.1)
CONFIG = OmegaConf.create({"trainer": {"nnodes": 2, "n_gpus_per_node": 8}})


@pytest.mark.parametrize(
    ("nodes", "level"), [([NODE, NODE], "ok"), ([NODE], "fail"), ([NODE, replace(NODE, cards=4)], "fail")]
)
def test_cards(nodes, level):
    assert enough_nodes(nodes, CONFIG).level == level


def test_nodes_without_a_card_are_for_trying():
    assert enough_nodes([replace(NODE, cards=0)], CONFIG).level == "warn"


@pytest.mark.parametrize(("size", "level"), [(91e9, "ok"), (260e9, "fail"), (None, "warn")])
def test_the_fullest_disk_counts(size, level):
    found = room([replace(NODE, free=10**12), NODE], size, Path("/scratch"))
    assert found.level == level and "500 GB free on one" in found.text


@pytest.mark.parametrize(
    ("small", "cards", "level"), [("head", 8, "ok"), (platform.node(), 8, "fail"), ("head", 0, "fail")]
)
def test_a_disk_that_no_checkpoint_comes_to_does_not_count(small, cards, level):
    nodes = [replace(NODE, cards=cards), replace(NODE, name=small, cards=0, free=10**10)]
    assert room(nodes, 91e9, Path("/scratch")).level == level


@pytest.mark.parametrize(("shm", "level"), [(64 * 2**20, "fail"), (8 * 2**30, "warn"), (32 * 2**30, "ok")])
def test_shared_memory(shm, level):
    assert shared_memory([NODE, replace(NODE, shm=shm)]).level == level


@pytest.mark.parametrize(("clock", "level"), [(0.5, "ok"), (-30.0, "warn"), (900.0, "fail")])
def test_clocks(clock, level):
    assert clocks([NODE, replace(NODE, name="two", clock=clock)]).level == level


def test_versions_that_differ_are_named_with_their_nodes():
    other = replace(NODE, name="two", versions={**NODE.versions, "ray": "2.59.0"})
    assert same_versions([NODE, NODE]).level == "ok"
    found = same_versions([NODE, other])
    assert found.level == "fail" and found.text == "ray: 2.60.0 on one, 2.59.0 on two"


def test_a_mirror_is_written_read_and_left_as_it_was(tmp_path):
    found = bucket(f"file://{tmp_path / 'mirror'}")
    assert found.level == "ok" and "MB/s up" in found.text
    assert list((tmp_path / "mirror").iterdir()) == []
    assert bucket(None).level == "warn"
    assert bucket("az://container/x").level == "fail"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--cloud"], "name its recipe with --config-name"),
        (["--cloud", "--no-ray", "--config-name", "x"], "--no-ray out"),
    ],
)
def test_bad_options_are_told(capsys, words, told):
    assert main(["doctor", *words]) == 2
    assert told in capsys.readouterr().err
