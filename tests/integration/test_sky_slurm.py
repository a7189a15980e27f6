"""A managed job of SkyPilot's on a Slurm cluster of this machine: pre-empted in the middle of a run, it recovers.

As root, with Debian's slurm-wlm, munge, openssh-server and rsync, and an environment that other users can come to:

    /usr/bin/python3 -m venv /opt/sky && /opt/sky/bin/pip install "skypilot[slurm]==0.14.1" ray "setuptools<70"
    SDAR_SKY_PYTHON=/opt/sky/bin/python bash scripts/test.sh --all tests/integration/test_sky_slurm.py
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from sdar_verl.cloud import ledger
from sdar_verl.cloud.store import Store
from tests.support.slurm import missing_programs, readable_by_all, skypilot, slurm_cluster, wait_for
from tests.support.toy_run import toy_arguments
from tests.support.verl_run import main_ppo

ROOT = Path(__file__).resolve().parents[2]
SKY = os.environ.get("SDAR_SKY_PYTHON")
STEPS = 8


def why_not() -> str:
    """What this machine lacks; empty where the test can run."""
    if SKY is None:
        return "SDAR_SKY_PYTHON names no Python with SkyPilot in it"
    if os.geteuid() != 0:
        return "needs root: it makes a user"
    if missing := missing_programs():
        return f"without {', '.join(missing)}"
    closed = [path for path in (SKY, sys.executable, ROOT) if not readable_by_all(path)]
    return f"other users cannot come to {closed[0]}" if closed else ""


pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.skipif(bool(why_not()), reason=why_not())]


@pytest.fixture
def folder() -> Iterator[Path]:
    """One that other users can come to, unlike pytest's."""
    made = Path(tempfile.mkdtemp(prefix="sdar-sky-"))
    made.chmod(0o755)
    yield made
    shutil.rmtree(made, ignore_errors=True)


def test_a_job_that_is_pre_empted_goes_on_from_the_mirror(folder: Path) -> None:
    """The job is cancelled in Slurm after some steps: its node's folder is gone, the bucket (here a folder) is not."""
    mirror = folder / "mirror"
    mirror.mkdir()
    mirror.chmod(0o777)
    arguments, _ = toy_arguments(
        folder / "data", "trainer.save_freq=1", f"sdar.cloud.mirror=file://{mirror}", steps=STEPS
    )
    command, env = main_ppo(folder / "data", arguments)
    command = [word.replace(str(folder / "data" / "checkpoints"), "run/checkpoints") for word in command]
    command = [word.replace(str(folder / "data" / "hydra"), "run/hydra") for word in command]
    guard = [sys.executable, "-m", "sdar_verl.cli", "guard", "--spot", "--", *command]
    env |= {"VERL_FILE_LOGGER_PATH": "metrics.jsonl", "PATH": f"{Path(sys.executable).parent}:$PATH"}
    recipe = yaml.safe_load((ROOT / "recipes" / "cloud" / "sky.yaml").read_text())
    recovery = recipe["resources"]["job_recovery"] | {"strategy": "FAILOVER"}
    exports = "".join(f'export {name}="{value}"\n' for name, value in env.items())
    task = {
        "name": "sdar",
        "resources": {"infra": "slurm/local", "cpus": "2", "memory": "8", "job_recovery": recovery},
        "run": f"mkdir -p run\n{exports}{shlex.join(guard)}\n",
    }
    file = folder / "task.yaml"
    file.write_text(yaml.safe_dump(task))
    with slurm_cluster(folder / "slurm", Path(str(SKY)).parents[1]) as slurm:
        with skypilot(Path(str(SKY)), folder / "sky", slurm) as sky:
            sky.run("jobs", "launch", "-y", "-d", str(file))
            store = Store(f"file://{mirror}")
            wait_for(lambda: any(line.step >= 2 for line in ledger.read(store)), 900, "no step was made")
            slurm.command("scancel", *slurm.jobs())
            wait_for(lambda: str(sky.job()["status"]).endswith("SUCCEEDED"), 1200, "the job has not recovered")
            assert sky.job()["recovery_count"] == 1
        first, second = ledger.read(store)
        assert 2 <= first.step < STEPS and first.spot
        assert second.first >= first.step - 1 >= 1, "what was in the mirror counts"
        assert second.step == STEPS and second.ended == "finished"
