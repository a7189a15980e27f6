"""The quick start's last step: what a finished run left, read, probed with the real engine and summed up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sdar_verl.cli import main
from sdar_verl.local import start_policy, summary

ARMS = ("student", "student_t04", "teacher", "teacher_t04")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run whose last checkpoint is the policy that it began with."""
    pytest.importorskip("alfworld")
    counts = ("--train", "1", "--validation", "1", "--test", "2", "--processes", "1")
    assert main(["prepare", "alfworld", "--generate", "--out", str(tmp_path / "data"), *counts]) == 0
    lines = []
    for step, success in ((0, 0.25), (2, 0.75)):
        data = {f"sdar-val/{arm}/success": success for arm in ARMS}
        data |= {"sdar-val/student/invalid_share": 0.1, "sdar-val/student/episodes": 2}
        lines.append(json.dumps({"step": step, "data": data}))
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    weights = tmp_path / "checkpoints" / "global_step_2" / "actor" / "huggingface"
    weights.parent.mkdir(parents=True)
    weights.symlink_to(start_policy())
    return tmp_path


def test_a_finished_run_is_summed_up(run: Path, capsys) -> None:
    assert summary.main([str(run), "--seconds-train", "5"]) == 0
    told = json.loads((run / "summary.json").read_text())
    assert (told["success_before"], told["success_after"], told["steps"]) == (0.25, 0.75, 2)
    assert 0 < told["internalisation_before"] < 0.5, "a start policy knows few usual places"
    assert told["internalisation_after"] == told["internalisation_before"], "the same weights"
    assert (run / "summary.png").is_file()
    assert "success, T=1" in capsys.readouterr().out


def test_a_run_without_a_checkpoint_is_told(run: Path, capsys) -> None:
    (run / "checkpoints" / "global_step_2" / "actor" / "huggingface").unlink()
    assert summary.main([str(run)]) == 1
    assert "no checkpoint with Hugging Face weights" in capsys.readouterr().err
