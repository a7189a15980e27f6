"""A guard around real runs: SIGTERM, a spot notice, a process that stands still, a spent budget."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from sdar_verl.cloud import ledger
from sdar_verl.cloud.mirror import local_step
from sdar_verl.cloud.processes import below, end
from sdar_verl.cloud.store import Store
from sdar_verl.report.layout import METRICS_FILE, RECORD, read_lines
from tests.integration.test_reliability import KEEPS, compared
from tests.support.killing import LiveRun
from tests.support.metadata_server import metadata_server
from tests.support.toy_run import SAME, toy_arguments, train
from tests.support.verl_run import main_ppo

pytestmark = [pytest.mark.integration, pytest.mark.slow]

RARELY = ("trainer.save_freq=1000",)


class Guarded:
    """``sdar-verl guard OPTIONS -- python -m verl.trainer.main_ppo ...`` in the background."""

    def __init__(self, folder: Path, options: list[str], *overrides: str, steps: int, **env: str):
        arguments, _ = toy_arguments(folder, *KEEPS, *overrides, steps=steps)
        command, settings = main_ppo(folder, arguments)
        self.folder, self.log = folder, folder / "guard.txt"
        with self.log.open("a") as stream:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "sdar_verl.cli", "guard", *options, "--", *command],
                cwd=folder,
                env={**os.environ, "AWS_EC2_METADATA_DISABLED": "true", **settings, **env},
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        return self.log.read_text()

    def wait_for(self, text: str, timeout_s: float = 400) -> None:
        deadline = time.monotonic() + timeout_s
        while text not in self.output:
            assert self.process.poll() is None and time.monotonic() < deadline, self.output[-6000:]
            time.sleep(0.1)

    def status(self, timeout_s: float = 300) -> int:
        return self.process.wait(timeout_s)

    @property
    def attempts(self) -> list[ledger.Attempt]:
        return ledger.read(Store(self.folder / "checkpoints"))


@contextmanager
def guarded(*arguments: object, **options: object) -> Iterator[Guarded]:
    run = Guarded(*arguments, **options)  # type: ignore[arg-type]
    try:
        yield run
    finally:
        for process in below(run.process.pid)[1:]:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        end(run.process)


def test_sigterm_ends_the_run_in_order_and_the_next_start_goes_on(tmp_path):
    with guarded(tmp_path, ["--price", "3.5", "--spot"], *RARELY, steps=1000) as run:
        run.wait_for("sdar step 1/")
        run.process.send_signal(signal.SIGTERM)
        assert run.status() == 75, run.output[-6000:]
    (first,) = run.attempts
    assert first.ended == "stopped: SIGTERM" and first.spot and first.cost is not None and first.cost > 0
    assert local_step(tmp_path / "checkpoints") == first.step >= 1
    with guarded(tmp_path, ["--price", "3.5"], *RARELY, steps=first.step + 1) as run:
        assert run.status() == 0, run.output[-6000:]
    assert [(line.first, line.step) for line in run.attempts] == [(0, first.step), (first.step, first.step + 1)]
    assert run.attempts[1].ended == "finished"


def test_a_spot_notice_ends_the_run_in_order(tmp_path):
    with metadata_server() as server:
        env = {
            "AWS_EC2_METADATA_DISABLED": "false",
            "AWS_EC2_METADATA_SERVICE_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        }
        with guarded(tmp_path, [], *RARELY, steps=1000, **env) as run:
            run.wait_for("sdar step 1/")
            assert server.asked > 0
            server.notice = {"action": "terminate", "time": "2026-11-28T15:02:00Z"}
            assert run.status() == 75, run.output[-6000:]
    (attempt,) = run.attempts
    assert attempt.ended is not None and "spot notice" in attempt.ended and "terminate" in attempt.ended
    assert attempt.cost is None, "an unknown price is not 0"
    assert local_step(tmp_path / "checkpoints") == attempt.step >= 1


def test_a_run_that_stands_still_is_ended_with_its_stacks(tmp_path):
    with guarded(tmp_path, ["--hang", "0.75"], *RARELY, steps=1000) as run:
        run.wait_for("sdar step 2/")
        (trainer,) = [p for p in below(run.process.pid) if "TaskRunnerV1" in " ".join(p.cmdline())]
        trainer.suspend()
        assert run.status() == 75, run.output[-6000:]
        assert not trainer.is_running() or trainer.status() == psutil.STATUS_ZOMBIE
    assert "hung: no step for" in (run.attempts[0].ended or "")
    stacks = run.output.split("where its processes stand:")[1]
    assert "TaskRunnerV1" in stacks and "main_ppo" in stacks and "(verl/trainer/main_ppo.py:" in stacks


def test_a_spent_budget_ends_the_run_in_order_and_forbids_the_next(tmp_path):
    price, budget = 3600.0, 150.0  # a dollar a second: enough to start, on a busy machine, too
    options = ["--price", str(price), "--budget", str(budget)]
    with guarded(tmp_path, options, *RARELY, steps=4000) as run:
        assert run.status() == 0, run.output[-6000:]
    (first,) = run.attempts
    assert first.ended is not None and "budget of 150 USD over all attempts is spent" in first.ended
    assert first.cost is not None and first.cost >= budget
    assert local_step(tmp_path / "checkpoints") == first.step >= 1
    with guarded(tmp_path, options, *RARELY, steps=4000) as run:
        assert run.status() == 0
    second = run.attempts[1]
    later = run.output.rsplit("spent by earlier attempts and until here", 1)[1]
    assert second.step == first.step and "sdar step" not in later


def test_sigterm_to_the_driver_alone_ends_the_run_in_order(tmp_path):
    run = LiveRun(tmp_path, *KEEPS, *RARELY, steps=1000)
    try:
        run.wait_for(lambda: "sdar step 1/" in run.output)
        run.process.send_signal(signal.SIGTERM)
        ended = run.end(timeout_s=240)
    finally:
        run.kill_all()
    assert ended.returncode == 0, ended.output[-6000:]
    (attempt,) = ledger.read(Store(tmp_path / "checkpoints"))
    assert attempt.ended == "stopped: SIGTERM"
    assert local_step(tmp_path / "checkpoints") == attempt.step >= 1


def test_killed_three_times_at_random_it_ends_with_the_digits_of_the_run_that_was_not(tmp_path):
    """Driver, trainer, a worker or a raylet: whichever is hit, guard asks for another start, which goes on."""
    steps, often = 8, ("trainer.save_freq=1",)
    whole = train(tmp_path / "whole", *KEEPS, *often, steps=steps)
    folder, chance = tmp_path / "killed", random.Random(0)
    statuses = []
    for kill in (2, 4, 6, None):
        with guarded(folder, ["--spot"], *often, steps=steps) as run:
            if kill is not None:
                run.wait_for(f"sdar step {kill}/")
                time.sleep(chance.uniform(0, 2))
                titles = ("main_ppo", "TaskRunnerV1", "WorkerDict", "AgentLoopWorker", "raylet")
                found = [p for p in below(run.process.pid)[1:] if any(name in " ".join(p.cmdline()) for name in titles)]
                chance.choice(found).kill()
            statuses.append(run.status())
    assert statuses == [75, 75, 75, 0]
    record = {line["step"]: line["data"] for line in read_lines(folder / "checkpoints" / RECORD / METRICS_FILE)}
    assert sorted(record) == list(range(1, steps + 1))
    for step in record:
        for name, value in whole.metrics[step].items():
            if compared(name):
                assert record[step][name] == pytest.approx(value, nan_ok=True, **SAME), (step, name)
    found = ledger.total(run.attempts)
    assert found.attempts == 4 and 0 <= found.redone < 0.5
