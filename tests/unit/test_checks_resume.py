"""A checkpoint is whole or it is not resumed from; what a crash between two writes leaves behind. No Ray."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from sdar_verl.atomic import write_atomically, write_text_atomically
from sdar_verl.checks.resume import TRACKER, missing_parts, resume_faults
from sdar_verl.config import load_config
from sdar_verl.observe.base import STATE_FILE, Observer, load_states, save_states

ORDER = ("sdar_teacher", "model", "optim", "extra_state")  # of TeacherWorker.save_checkpoint


def config(folder: Path, mode: str = "auto", ranks: int = 1, nodes: int = 1, **overrides: object):
    root = OmegaConf.create(
        {
            "trainer": {
                "default_local_dir": str(folder),
                "resume_mode": mode,
                "resume_from_path": None,
                "n_gpus_per_node": ranks // nodes,
                "nnodes": nodes,
            },
            "actor_rollout_ref": {"actor": {"strategy": "fsdp2", "checkpoint": {"load_contents": None}}},
        }
    )
    for option, value in overrides.items():
        OmegaConf.update(root, option, value)
    return root


EMA = load_config({"teacher": {"source": "ema"}})


def saved(content: object) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


def writes(folder: Path, step: int, ranks: int = 1) -> list[tuple[Path, bytes]]:
    """All files of a checkpoint in the order in which trainer and workers write them; the tracker is the last."""
    checkpoint = folder / f"global_step_{step}"
    files = [(checkpoint / STATE_FILE, json.dumps({"record": {"step": step}}).encode())]
    files += [
        (checkpoint / "actor" / f"{name}_world_size_{ranks}_rank_{rank}.pt", saved({"weights": torch.ones(64)}))
        for rank in range(ranks)
        for name in ORDER
    ]
    return [*files, (checkpoint / "data.pt", saved({"position": step})), (folder / TRACKER, str(step).encode())]


def write(files: list[tuple[Path, bytes]]) -> None:
    for path, content in files:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def test_nothing_to_resume_is_no_fault(tmp_path):
    assert resume_faults(config(tmp_path), EMA) == []
    assert resume_faults(config(tmp_path / "none", mode="disable"), EMA) == []


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_whole_checkpoint_is_resumed(tmp_path, ranks):
    write(writes(tmp_path, 2, ranks))
    assert resume_faults(config(tmp_path, ranks=ranks), EMA) == []


@pytest.mark.parametrize("cut", [False, True], ids=["between two files", "within a file"])
def test_a_crash_at_any_write_leaves_the_checkpoint_before(tmp_path, cut):
    """Killed after each write of the second checkpoint, or in the middle of it: the first is resumed."""
    files = writes(tmp_path, 4)
    for done in range(len(files) - 1):
        folder = tmp_path / str(done)
        write(writes(folder, 2))
        files = writes(folder, 4)
        write(files[:done])
        if cut:
            path, content = files[done]
            write([(path, content[: len(content) // 2])])
        assert resume_faults(config(folder), EMA) == []
        assert (folder / TRACKER).read_text() == "2"
        if cut or done < len(files) - 1:
            assert missing_parts(folder / "global_step_4", config(folder), EMA), f"{done} files pass for a checkpoint"


def test_a_crash_while_the_tracker_is_written_names_the_whole_checkpoint(tmp_path):
    write(writes(tmp_path, 2))
    write(writes(tmp_path, 4))
    (tmp_path / TRACKER).write_text("")
    (fault,) = resume_faults(config(tmp_path), EMA)
    assert "holds ''" in fault
    assert f"echo 4 > {tmp_path / TRACKER}" in fault and "resume_mode=disable" in fault


def test_a_tracker_that_another_systems_shell_wrote_is_told(tmp_path):
    write(writes(tmp_path, 2))
    for content in ("2".encode("utf-16"), "²".encode(), b"\xef\xbb\xbf2"):
        (tmp_path / TRACKER).write_bytes(content)
        (fault,) = resume_faults(config(tmp_path), EMA)
        assert "should hold the step of the newest checkpoint" in fault and f"echo 2 > {tmp_path / TRACKER}" in fault


def test_a_tracker_without_its_folder_is_no_new_start(tmp_path):
    write(writes(tmp_path, 2))
    (tmp_path / TRACKER).write_text("4")
    (fault,) = resume_faults(config(tmp_path), EMA)
    assert "global_step_4" in fault and "does not exist" in fault and "echo 2 >" in fault
    (tmp_path / "global_step_2" / "data.pt").unlink()
    (fault,) = resume_faults(config(tmp_path), EMA)
    assert "no other checkpoint" in fault and "echo" not in fault


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("data.pt", r"data\.pt \(where in the panel the run was\) is missing"),
        ("actor/model_world_size_1_rank_0.pt", r"model_world_size_1_rank_0\.pt is in actor/ missing"),
        ("actor/optim_world_size_1_rank_0.pt", r"optim_world_size_1_rank_0\.pt is in actor/ missing"),
        ("actor/sdar_teacher_world_size_1_rank_0.pt", r"sdar_teacher_world_size_1_rank_0\.pt is in actor/ missing"),
    ],
)
def test_what_is_missing_or_cut_off_is_named(tmp_path, file, said):
    write(writes(tmp_path, 2))
    write(writes(tmp_path, 4))
    path = tmp_path / "global_step_4" / file
    content = path.read_bytes()
    path.write_bytes(content[:-100])
    (fault,) = resume_faults(config(tmp_path), EMA)
    assert re.search(rf"{path.name} is (in actor/ )?cut off", fault) and "global_step_2 is whole" in fault
    path.unlink()
    (fault,) = resume_faults(config(tmp_path), EMA)
    assert re.search(said, fault)


def test_only_what_the_run_reads_must_be_there(tmp_path):
    write(writes(tmp_path, 2))
    actor = tmp_path / "global_step_2" / "actor"
    (actor / "sdar_teacher_world_size_1_rank_0.pt").unlink()
    assert resume_faults(config(tmp_path), load_config({})) == [], "source=actor has no weights of its own"
    (actor / "optim_world_size_1_rank_0.pt").unlink()
    contents = {"actor_rollout_ref.actor.checkpoint.load_contents": ["model", "extra"]}
    assert resume_faults(config(tmp_path, **contents), load_config({})) == []


def test_a_folder_that_checkpoints_cannot_be_written_to_is_told_before_the_start(tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert resume_faults(config(tmp_path / "not" / "yet"), EMA) == []
    (tmp_path / "file").write_text("")
    for mode in ("auto", "disable"):
        (fault,) = resume_faults(config(tmp_path / "file" / "run", mode), EMA)
        assert fault.startswith(f"trainer.default_local_dir={tmp_path}/file/run: {tmp_path}/file is no folder; name")
    assert resume_faults(config(tmp_path / "file" / "run", nodes=2, ranks=2), EMA) == [], "the nodes' own"
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # as of another user's
    (fault,) = resume_faults(config(tmp_path), EMA)
    assert f"{tmp_path} cannot be read and written by this user" in fault


def test_another_number_of_ranks_is_told_before_the_workers_fail(tmp_path):
    write(writes(tmp_path, 2, ranks=2))
    (fault,) = resume_faults(config(tmp_path, ranks=4), EMA)
    assert "actor/model_* is of 2 ranks, and this run has 4" in fault


def test_shards_on_the_disks_of_other_nodes_are_not_missed(tmp_path):
    write(writes(tmp_path, 2, ranks=2))
    for path in (tmp_path / "global_step_2" / "actor").glob("*_rank_1.pt"):
        path.unlink()
    assert resume_faults(config(tmp_path, ranks=2, nodes=2), EMA) == []
    assert "rank_1.pt is in actor/ missing" in resume_faults(config(tmp_path, ranks=2), EMA)[0]


def test_a_path_to_resume_from_is_looked_at_too(tmp_path):
    write(writes(tmp_path, 2))
    path = tmp_path / "global_step_2"

    def faults(text: object) -> list[str]:
        return resume_faults(config(tmp_path, "resume_path", **{"trainer.resume_from_path": str(text)}), EMA)

    assert faults(path) == []
    assert "end in global_step_N" in faults(tmp_path)[0]
    assert "end in global_step_N" in faults(f"{path}/")[0]
    assert "does not exist" in faults(tmp_path / "global_step_9")[0]
    (path / STATE_FILE).write_text('{"rec')
    assert f"{STATE_FILE} is cut off" in faults(path)[0]


class Counting(Observer):
    name = "counting"

    def __init__(self, count: int) -> None:
        self.count = count

    def state_dict(self) -> dict[str, int]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.count = state["count"]


def test_a_state_is_whole_or_the_one_before(tmp_path):
    """A process that kills itself in the middle of the second write."""
    save_states([Counting(1)], tmp_path)
    script = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from sdar_verl.atomic import write_atomically\n"
        "def write(stream):\n"
        '    stream.write(b\'{"counting": {"cou\')\n'
        "    stream.flush()\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "write_atomically(Path(sys.argv[1]), write)\n"
    )
    dead = subprocess.run([sys.executable, "-c", script, str(tmp_path / STATE_FILE)], check=False)
    assert dead.returncode == -signal.SIGKILL
    part = Counting(0)
    load_states([part], tmp_path)
    assert part.count == 1
    save_states([Counting(3)], tmp_path)
    assert sorted(os.listdir(tmp_path)) == [STATE_FILE], "what the dead process left is in nobody's way"


def test_a_file_takes_its_place_only_when_it_is_on_the_disk(tmp_path, monkeypatch):
    path = tmp_path / "new" / "state.json"
    order = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (order.append("sync"), fsync(handle)))
    monkeypatch.setattr(Path, "replace", lambda *paths: (order.append("rename"), replace(*paths)))
    write_text_atomically(path, "ä")
    assert order == ["sync", "rename", "sync"] and path.read_text() == "ä"

    def fails(stream) -> None:
        stream.write(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fails)
    assert path.read_text() == "ä" and os.listdir(path.parent) == ["state.json"]
    with pytest.raises(IsADirectoryError, match="new is a folder; give a file"):
        write_text_atomically(path.parent, "ä")
    assert os.listdir(tmp_path) == ["new"]


@pytest.mark.parametrize("named", [["hf_model"], []])
def test_a_resume_without_weights_is_no_resume(tmp_path, named):
    contents = {"actor_rollout_ref.actor.checkpoint.load_contents": named}
    assert resume_faults(config(tmp_path, **contents), EMA) == [], "nothing to go on from"
    write(writes(tmp_path, 2))
    (fault,) = resume_faults(config(tmp_path, **contents), EMA)
    assert f"load_contents={named} has no model" in fault and "weights that training started from" in fault
