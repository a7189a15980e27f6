"""The cloud's tools on real Ray: the doctor on two local nodes, a guarded run by ``ray job submit``, its stop."""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sdar_verl.cloud import ledger
from sdar_verl.cloud.mirror import Mirror
from sdar_verl.cloud.store import Store
from tests.integration.test_reliability import KEEPS
from tests.support.toy_run import toy_arguments, train
from tests.support.two_nodes import ray_cluster
from tests.support.verl_run import Run, main_ppo

pytestmark = [pytest.mark.integration, pytest.mark.slow]

ROOT = str(Path(__file__).parents[2])


def test_the_doctor_looks_at_both_nodes(tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([ROOT, os.environ.get("PYTHONPATH", "")]))
        with ray_cluster(nodes=2, gpus=0) as cluster:
            words = toy_arguments(tmp_path, "trainer.nnodes=2", f"sdar.cloud.mirror=file://{tmp_path}/mirror")[0]
            command = [sys.executable, "-m", "sdar_verl.cli", "doctor", "--cloud", "--json", "--resets", "0"]
            done = subprocess.run(
                [*command, "--config-name", "sdar_quickstart", f"trainer.default_local_dir={tmp_path}/run", *words],
                env={**os.environ, "RAY_ADDRESS": cluster.address, "VERL_PLATFORM": "cpu"},
                capture_output=True,
                text=True,
                timeout=500,
            )
    found = {one["check"]: one for one in json.loads(done.stdout[done.stdout.index("{") :])["findings"]}
    assert found["versions"]["text"] == "the same on 2 nodes", done.stderr
    assert found["mirror"]["level"] == found["clocks"]["level"] == found["disk"]["level"] == "ok"
    assert found["all-reduce"]["level"] == "ok" and "2 ranks over gloo" in found["all-reduce"]["text"]
    assert found["cards"]["level"] == "warn" and found["cards"]["text"].count(": 0") == 2


def test_two_nodes_mirror_their_shards_and_are_filled(tmp_path):
    """Both raylets share this machine's disk: what both see is sent once, and the second finds the folder filled."""
    place = f"file://{tmp_path}/mirror"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([ROOT, os.environ.get("PYTHONPATH", "")]))
        with ray_cluster(nodes=2) as cluster:

            def run(name: str, steps: int) -> Run:
                folder = tmp_path / name
                return train(
                    folder,
                    "sdar.teacher.source=actor",
                    "trainer.nnodes=2",
                    "trainer.n_gpus_per_node=1",
                    f"sdar.cloud.mirror={place}",
                    f"+ray_kwargs.ray_init.runtime_env.env_vars.VERL_FILE_LOGGER_PATH={folder / 'metrics.jsonl'}",
                    steps=steps,
                    timeout=560,
                    RAY_ADDRESS=cluster.address,
                )

            run("first", 2)
            files = (Mirror(place).store.read_json("global_step_2/manifest.json") or {})["files"]
            assert {f"actor/model_world_size_2_rank_{rank}.pt" for rank in (0, 1)} <= files.keys()
            second = run("second", 3)
    assert sorted(second.metrics) == [3]
    (first, last) = ledger.read(Store(place))
    assert (first.nodes, first.cards, last.first, last.step) == (2, 2, 2, 3)


@pytest.fixture(scope="module")
def head() -> Iterator[dict[str, str]]:
    """A Ray cluster that exists, with a dashboard, which takes jobs; environment variables to reach it."""
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")
    ports = [_free_port() for _ in range(3)]
    binaries = str(Path(sys.executable).parent)
    env = {
        **os.environ,
        "PATH": os.pathsep.join([binaries, os.environ["PATH"]]),
        "PYTHONPATH": os.pathsep.join([ROOT, os.environ.get("PYTHONPATH", "")]),
        "RAY_TMPDIR": folder,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_JOB_STOP_WAIT_TIME_S": "120",
        "VERL_PLATFORM": "cpu",
        "AWS_EC2_METADATA_DISABLED": "true",
        # Ray's dashboard takes jobs from those alone who know it.
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
    }
    command = ["ray", "start", "--head", "--block", "--num-cpus=16", "--num-gpus=1", f"--port={ports[0]}"]
    command += [f"--dashboard-port={ports[1]}", f"--dashboard-agent-listen-port={ports[2]}", f"--temp-dir={folder}"]
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{ports[1]}"
    env |= {"RAY_API_SERVER_ADDRESS": address, "RAY_ADDRESS": address}
    try:
        deadline = time.monotonic() + 240
        while subprocess.run(["ray", "job", "list"], env=env, capture_output=True).returncode:
            assert process.poll() is None and time.monotonic() < deadline, "no dashboard"
            time.sleep(1)
        yield env
    finally:
        process.terminate()
        process.wait(60)


def job(env: dict[str, str], folder: Path, steps: int, name: str) -> subprocess.Popen[str]:
    """``recipes/cloud/ray_job.sh`` with a small run."""
    words, _ = toy_arguments(folder, *KEEPS, f"sdar.cloud.mirror=file://{folder}/mirror", steps=steps)
    command, settings = main_ppo(folder, words)
    variables = {key: settings[key] for key in ("VERL_FILE_LOGGER_PATH", "PYTHONPATH", "OMP_NUM_THREADS")}
    with (folder / f"{name}.txt").open("w") as log:
        return subprocess.Popen(
            ["bash", f"{ROOT}/recipes/cloud/ray_job.sh", *command[3:]],
            env={**env, "PRICE": "2", "BUDGET": "50", "GUARD": "--spot", "ENV_VARS": json.dumps(variables)},
            cwd=folder,
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
        )


def test_a_job_that_is_stopped_ends_in_order_and_the_next_goes_on(head, tmp_path):
    first = job(head, tmp_path, 1000, "first")
    log = tmp_path / "first.txt"
    deadline = time.monotonic() + 400
    while "sdar step 1/" not in log.read_text():
        assert first.poll() is None and time.monotonic() < deadline, log.read_text()[-6000:]
        time.sleep(0.5)
    (line,) = [line for line in log.read_text().splitlines() if "submitted successfully" in line]
    name = line.split("'")[1]
    subprocess.run(["ray", "job", "stop", name], env=head, check=True, capture_output=True, timeout=300)
    first.wait(300)
    store = Store(tmp_path / "checkpoints")
    (attempt,) = ledger.read(store)
    assert attempt.ended == "stopped: SIGTERM" and attempt.price == 2 and attempt.spot
    assert Mirror(f"file://{tmp_path}/mirror").newest() == attempt.step >= 1
    second = job(head, tmp_path, attempt.step + 1, "second")
    assert second.wait(500) == 0, (tmp_path / "second.txt").read_text()[-6000:]
    assert [(one.first, one.step) for one in ledger.read(store)] == [
        (0, attempt.step),
        (attempt.step, attempt.step + 1),
    ]


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
