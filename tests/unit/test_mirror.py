"""The mirror: what counts, what is passed over, what is kept; in a folder, and on an S3 server over HTTP. No Ray."""

from __future__ import annotations

import json
import os
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import ray

from sdar_verl.checks.resume import TRACKER
from sdar_verl.cloud.mirror import MANIFEST, Mirror, MirrorError, fill_every_node, local_step
from sdar_verl.cloud.nodes import with_newest
from sdar_verl.cloud.store import Store, StoreError
from sdar_verl.report.layout import WRITTEN_FILE
from tests.support.s3 import BUCKET, s3_server


@pytest.fixture(scope="module")
def s3():
    with s3_server() as server, mock.patch.dict("os.environ", server.env):
        yield server


@pytest.fixture(params=["file", "s3"])
def place(request, tmp_path):
    if request.param == "file":
        return f"file://{tmp_path / 'mirror'}"
    request.getfixturevalue("s3")
    return f"s3://{BUCKET}/{tmp_path.name}"


def checkpoint(folder: Path, step: int, text: str = "weights") -> Path:
    """A run's folder as it is after the save of ``step``."""
    files = {
        f"global_step_{step}/actor/model_world_size_1_rank_0.pt": f"{text} of {step}" * 100,
        f"global_step_{step}/data.pt": str(step),
        "record/run.json": "{}",
        "record/metrics.jsonl": "".join(f'{{"step": {i}}}\n' for i in range(1, step + 1)),
        f"record/traces/step_{step:08d}.parquet": "trace",
        "sdar_run.json": '{"lr": 1}',
        TRACKER: str(step),
    }
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return folder


def put(mirror: Mirror, folder: Path, step: int, **kwargs: str) -> None:
    checkpoint(folder, step, **kwargs)
    files = mirror.upload(folder, step)
    mirror.sync(folder)
    mirror.seal(step, files, "0001-aaaaaa")


def lines() -> tuple[list[str], dict]:
    said: list[str] = []
    return said, {"say": said.append}


def shard(rank: int) -> str:
    return f"actor/model_world_size_2_rank_{rank}.pt"


def write_shard(folder: Path, step: int, rank: int, text: str) -> None:
    """A rank's shard, last written at a time that ``text``, the name of an attempt, stands for."""
    path = folder / f"global_step_{step}" / shard(rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    at = {"first": 1_000, "again": 2_000, "cut": 3_000}[text]
    os.utime(path, (at, at))


class Nodes:
    """Folders that stand for the disks of a cluster's nodes: "here", which is this process's own, and others.

    Args:
        patch: pytest's.
        root: where the folders are.
        **cards: node -> its devices, which are called ``GPU`` as in verl's own clusters.
    """

    def __init__(self, patch: pytest.MonkeyPatch, root: Path, **cards: int):
        self._root = root
        nodes = [{"NodeID": node, "Alive": True, "Resources": {"GPU": n} if n else {}} for node, n in cards.items()]
        patch.setattr(ray, "is_initialized", lambda: True)
        patch.setattr(ray, "nodes", lambda: nodes)
        patch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "here"))
        patch.setattr(ray, "remote", lambda **_: lambda function: SimpleNamespace(options=self._options(function)))
        patch.setattr(ray, "get", lambda results: results)
        patch.setattr("ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy", lambda node, soft: node)
        self.use(patch, "cuda")

    @staticmethod
    def use(patch: pytest.MonkeyPatch, device: str) -> None:
        patch.setattr("verl.utils.device.get_device_name", lambda: device)
        patch.setattr("verl.utils.device.get_resource_name", lambda: "GPU")

    def __getitem__(self, node: str) -> Path:
        return self._root / node

    def _options(self, function):
        def there(node, argument):
            inside = isinstance(argument, Path) and argument.is_relative_to(self["here"])
            return self[node] / argument.relative_to(self["here"]) if inside else argument

        return lambda scheduling_strategy: SimpleNamespace(
            remote=lambda *given: function(*(there(scheduling_strategy, one) for one in given))
        )


@pytest.mark.parametrize(("device", "filled"), [("cuda", ["cards", "here"]), ("cpu", ["cards", "head", "here"])])
def test_nodes_that_train_are_filled_and_this_one(tmp_path, monkeypatch, device, filled):
    place = f"file://{tmp_path / 'mirror'}"
    put(Mirror(place), tmp_path / "run", 2)
    nodes = Nodes(monkeypatch, tmp_path / "nodes", here=0, cards=8, head=0)
    nodes.use(monkeypatch, device)
    fill_every_node(place, nodes["here"])
    assert sorted(path.name for path in (tmp_path / "nodes").iterdir()) == filled
    assert all(local_step(nodes[node]) == 2 for node in filled)


def put_from_two(nodes: Nodes, place: str) -> Mirror:
    """Step 2 of two ranks, each on a node; the trainer's task was here."""
    checkpoint(nodes["here"], 2)
    for rank, node in enumerate(("here", "other")):
        write_shard(nodes[node], 2, rank, "first")
    mirror = Mirror(place)
    mirror.seal(2, mirror.upload(nodes["here"], 2), "0001-aaaaaa")
    mirror.sync(nodes["here"])
    return mirror


def test_shards_that_a_node_lacks_come_where_the_tracker_names_their_step_too(tmp_path, monkeypatch, capsys):
    nodes, place = Nodes(monkeypatch, tmp_path / "nodes", here=1, other=1), f"file://{tmp_path / 'mirror'}"
    put_from_two(nodes, place)
    (nodes["here"] / "record/metrics.jsonl").write_text("ahead")
    shutil.rmtree(nodes["other"])  # another machine takes its place, and the ranks change theirs
    capsys.readouterr()
    fill_every_node(place, nodes["here"])
    for node in ("here", "other"):
        assert [(nodes[node] / "global_step_2" / shard(rank)).read_text() for rank in (0, 1)] == ["first", "first"]
        assert local_step(nodes[node]) == 2
    assert (nodes["here"] / "record/metrics.jsonl").read_text() == "ahead"
    here, _ = capsys.readouterr().out.splitlines()
    assert here.endswith("in 1 files")
    fill_every_node(place, nodes["here"])
    assert capsys.readouterr().out == "", "nothing is missing any more"


def test_shards_that_lie_on_a_node_without_a_tracker_are_not_fetched_again(tmp_path, monkeypatch):
    nodes, place = Nodes(monkeypatch, tmp_path / "nodes", here=1, other=1), f"file://{tmp_path / 'mirror'}"
    mirror = put_from_two(nodes, place)
    mirror.store.delete(f"global_step_2/{shard(1)}")
    said, say = lines()
    assert Mirror(place, **say).fill(nodes["other"]) == 2 and local_step(nodes["other"]) == 2
    assert said[-1].endswith("in 3 files"), "of four"


@pytest.mark.parametrize("left", ["first", "cut"])
def test_a_shard_of_an_attempt_before_or_cut_off_is_fetched_again(place, tmp_path, left):
    write_shard(tmp_path / "run", 2, 0, "again")
    put(Mirror(place), tmp_path / "run", 2)
    write_shard(tmp_path / "node", 2, 0, left)
    assert Mirror(place).fill(tmp_path / "node") == 2
    assert (tmp_path / "node/global_step_2" / shard(0)).read_text() == "again"


def test_an_empty_folder_is_filled_with_all_that_a_run_needs(place, tmp_path):
    put(Mirror(place), tmp_path / "run", 2)
    put(Mirror(place), tmp_path / "run", 4)
    said, say = lines()
    assert Mirror(place, **say).fill(tmp_path / "new") == 4
    new, old = tmp_path / "new", tmp_path / "run"
    for name in ("global_step_4/actor/model_world_size_1_rank_0.pt", "record/metrics.jsonl", "sdar_run.json", TRACKER):
        assert (new / name).read_bytes() == (old / name).read_bytes()
    assert not (new / "global_step_2").exists() and local_step(new) == 4
    assert "global_step_4 came from" in said[-1]


def test_answers_that_were_paid_for_come_along(place, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / WRITTEN_FILE).write_text('{"request": "a"}\n')
    put(Mirror(place), tmp_path / "run", 2)
    assert Mirror(place).fill(tmp_path / "new") == 2
    assert (tmp_path / "new" / WRITTEN_FILE).read_text() == '{"request": "a"}\n'


def test_a_checkpoint_without_its_manifest_is_passed_over_by_name(place, tmp_path):
    mirror = Mirror(place)
    put(mirror, tmp_path / "run", 2)
    mirror.upload(checkpoint(tmp_path / "run", 4), 4)
    said, say = lines()
    assert Mirror(place, **say).fill(tmp_path / "new") == 2
    assert f"{place}/global_step_4 has no {MANIFEST}" in said[0]


@pytest.mark.parametrize("damage", ["cut", "changed", "gone", "manifest", "escapes"])
def test_a_damaged_checkpoint_is_passed_over_by_name(place, tmp_path, damage):
    mirror = Mirror(place)
    put(mirror, tmp_path / "run", 2)
    put(mirror, tmp_path / "run", 4)
    name = "global_step_4/actor/model_world_size_1_rank_0.pt"
    content = mirror.store.read(name)
    assert content is not None
    if damage == "cut":
        mirror.store.write(name, content[:-1])
    elif damage == "changed":
        mirror.store.write(name, b"X" + content[1:])
    elif damage == "gone":
        mirror.store.delete(name)
    elif damage == "manifest":
        mirror.store.write(f"global_step_4/{MANIFEST}", b"{")
    else:
        manifest = mirror.store.read_json(f"global_step_4/{MANIFEST}")
        assert manifest is not None
        manifest["files"]["../../escaped"] = {"size": 1, "sha256": "0"}
        mirror.store.write_json(f"global_step_4/{MANIFEST}", manifest)
    said, say = lines()
    assert Mirror(place, **say).fill(tmp_path / "new") == 2
    assert "passed over" in said[0] and ("global_step_4" in said[0])
    assert not (tmp_path / "escaped").exists() and local_step(tmp_path / "new") == 2
    assert Mirror(place).fill(tmp_path / "new") == 0 and local_step(tmp_path / "new") == 2, "nor does the next start"


def test_a_folder_that_is_ahead_is_left_alone_and_one_that_is_behind_is_not(place, tmp_path):
    put(Mirror(place), tmp_path / "run", 4)
    ahead, behind = checkpoint(tmp_path / "ahead", 6), checkpoint(tmp_path / "behind", 2)
    assert Mirror(place).fill(ahead) == 0 and local_step(ahead) == 6
    assert Mirror(place).fill(behind) == 4 and local_step(behind) == 4
    assert Mirror(place).fill(tmp_path / "run") == 0


def test_only_the_newest_are_kept_and_unfinished_uploads_go(place, tmp_path):
    mirror = Mirror(place)
    for step in (2, 4, 8):
        put(mirror, tmp_path / "run", step)
    mirror.upload(checkpoint(tmp_path / "run", 6), 6)
    mirror.upload(checkpoint(tmp_path / "run", 10), 10)
    partial = mirror.store.folder and mirror.store.folder / "global_step_5" / "model.pt.0123.partial"
    if partial:  # a write that was broken off; a bucket shows none
        partial.parent.mkdir()
        partial.write_text("half")
        assert mirror.steps()[5] is False
    mirror.keep(2, 8)
    assert mirror.steps() == {4: True, 8: True}
    mirror.keep(2, 4)
    assert mirror.steps() == {4: True}, "the run went on from 2, and 8 is of the branch that it left"


def test_a_second_upload_of_a_step_does_not_count_before_it_is_whole(place, tmp_path):
    mirror = Mirror(place)
    put(mirror, tmp_path / "run", 2)
    checkpoint(tmp_path / "run", 2, text="other weights")
    files = mirror.upload(tmp_path / "run", 2)
    assert mirror.steps() == {2: False}
    mirror.seal(2, files, "0002-aaaaaa")
    assert Mirror(place).fill(tmp_path / "new") == 2
    assert "other" in (tmp_path / "new/global_step_2/actor/model_world_size_1_rank_0.pt").read_text()


def test_banks_of_a_run_that_learns_skills_come_along_and_one_taken_back_goes(place, tmp_path):
    run = tmp_path / "run"
    for version in (1, 2):
        (run / f"skills/version_{version}/a").mkdir(parents=True)
        (run / f"skills/version_{version}/a/SKILL.md").write_text(f"version {version}")
    put(Mirror(place), run, 2)
    assert Mirror(place).fill(tmp_path / "new") == 2
    assert (tmp_path / "new/skills/version_2/a/SKILL.md").read_text() == "version 2"
    (run / "skills/version_2/a/SKILL.md").unlink()
    Mirror(place).sync(run)
    assert set(Mirror(place).store.names("skills")) == {"skills/version_1/a/SKILL.md"}


def test_the_mirrored_record_is_that_of_the_folder(place, tmp_path):
    mirror, folder = Mirror(place), tmp_path / "run"
    put(mirror, folder, 2)
    (folder / "record/traces/step_00000002.parquet").unlink()
    put(mirror, folder, 4)
    names = set(mirror.store.names("record"))
    assert names == {"record/run.json", "record/metrics.jsonl", "record/traces/step_00000004.parquet"}
    # Another attempt plays the step again, to other numbers of the same length.
    (folder / "record/metrics.jsonl").write_text('{"step": 9}\n' * 4)
    Mirror(place).sync(folder)
    assert mirror.store.read("record/metrics.jsonl") == b'{"step": 9}\n' * 4


def test_a_disk_that_is_too_small_is_told_before_it_is_full(place, tmp_path):
    put(Mirror(place), tmp_path / "run", 2)
    with (
        mock.patch.object(shutil, "disk_usage", return_value=mock.Mock(free=1000)),
        pytest.raises(MirrorError, match=r"has room for 0\.0: put the folder on a larger disk"),
    ):
        Mirror(place).fill(tmp_path / "new")
    assert not (tmp_path / "new" / TRACKER).exists()


def test_files_on_a_shared_disk_are_sent_once():
    assert with_newest([{"a": 1, "b": 1}, {"a": 1, "b": 1}]) == [["a", "b"], []]
    assert with_newest([{"a": 1}, {"b": 1, "a": 1}]) == [["a"], ["b"]]


def test_the_newest_copy_of_a_shard_is_sent(tmp_path, monkeypatch):
    """An attempt saved step 2 on two nodes, and another again, with its ranks on swapped nodes."""
    nodes = Nodes(monkeypatch, tmp_path / "nodes", here=1, other=1)
    for attempt, at in (("first", {0: "here", 1: "other"}), ("again", {1: "here", 0: "other"})):
        for rank, node in at.items():
            write_shard(nodes[node], 2, rank, attempt)
    mirror = Mirror(f"file://{tmp_path / 'mirror'}")
    files = mirror.upload(nodes["here"], 2)
    assert {name: mirror.store.read(f"global_step_2/{name}") for name in files} == {
        shard(0): b"again",
        shard(1): b"again",
    }


def test_a_bucket_may_have_options_and_any_path(s3, tmp_path):
    mirror = Mirror(f"s3://{BUCKET}/my läuf?region=us-east-1")
    put(mirror, tmp_path / "run", 2)
    assert Mirror(f"s3://{BUCKET}/my läuf").fill(tmp_path / "new") == 2
    assert (tmp_path / "new/global_step_2/data.pt").read_text() == "2"


def test_an_upload_that_is_broken_off_leaves_no_object(s3, tmp_path):
    store = Store(f"s3://{BUCKET}/broken")
    (tmp_path / "big").write_bytes(b"x" * 30_000_000)
    s3.refuses = lambda method, path: method == "POST" and path.endswith("/broken/big") and len(s3.seen) > 0
    try:
        with pytest.raises(StoreError, match="no permission"):
            store.upload(tmp_path / "big", "big")
    finally:
        s3.refuses = lambda method, path: False
    assert store.read("big") is None


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        ("s3://no-such-bucket/run", "there is no such bucket"),
        ("s3://", "no bucket is named"),
        ("ftp://x/y", "unknown scheme ftp://; known: s3://"),
        ("file://x", "three slashes"),
    ],
)
def test_a_bad_place_is_told(s3, bad, told):
    with pytest.raises(StoreError, match=told):
        Store(bad).check()


def test_a_bucket_that_may_only_be_read_is_told(s3):
    s3.refuses = lambda method, path: method in ("PUT", "POST")
    try:
        with pytest.raises(StoreError, match=r"cannot write .*: no permission"):
            Store(f"s3://{BUCKET}/run").check()
    finally:
        s3.refuses = lambda method, path: False


def test_two_writers_leave_one_of_their_files(tmp_path):
    store = Store(tmp_path)
    texts = [json.dumps({"who": i, "pad": "x" * 10_000}).encode() for i in range(8)]
    threads = [threading.Thread(target=store.write, args=("one", text)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.read("one") in texts and store.names() == {"one": len(texts[0])}
