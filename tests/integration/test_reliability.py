"""What happens when a process of a run is killed, and when its numbers are broken; through verl's own main_ppo."""

from __future__ import annotations

import math
import shutil
import subprocess

import pytest
import torch

from sdar_verl.checks.resume import TRACKER
from tests.support.faults import FAULTS
from tests.support.killing import LiveRun
from tests.support.toy_run import SAME, train

pytestmark = [pytest.mark.integration, pytest.mark.slow]

# Everything that a run keeps from step to step: an average of weights, statistics of retrieval, schedules of lambda and
# of the learning rate, Adam's moments, a place in the shuffled panel.
KEEPS = (
    "sdar.teacher.source=ema",
    "sdar.teacher.ema_decay=0.5",
    "sdar.skills.retrieval=[ucb]",
    "sdar.loss.coef_schedule.name=linear_decay",
    "+sdar.loss.coef_schedule.options.steps=10",
    "actor_rollout_ref.actor.optim.lr_warmup_steps=4",
    "data.train_batch_size=2",
    "actor_rollout_ref.actor.ppo_mini_batch_size=2",
    "sdar.update.mini_batch_rows=24",
    "trainer.save_freq=2",
)
POOL = (
    "sdar.teacher.source=reference",
    "sdar.teacher.placement=pool",
    "sdar.teacher.pool_gpus_per_node=1",
    "ray_kwargs.ray_init.num_gpus=2",
)
STEPS = 6  # the panel has 8 tasks: an epoch ends at step 4


def test_a_killed_run_goes_on_as_if_never_stopped(tmp_path):
    """Killed while the checkpoint of step 4 is half written: step 3 again, from the checkpoint of step 2."""
    whole = train(tmp_path / "whole", *KEEPS, steps=STEPS)
    folder, marker = tmp_path / "killed", tmp_path / "half written"
    faults = {"VERL_USE_EXTERNAL_MODULES": FAULTS, "SDAR_STOP_SAVE": f"4:{marker}"}
    killed = LiveRun(folder, *KEEPS, steps=STEPS, mode="sdar_faults", env=faults)
    try:
        killed.wait_for(marker.exists)
    finally:
        killed.kill_all()
    half = folder / "checkpoints" / "global_step_4"
    assert (half / "actor" / "optim_world_size_1_rank_0.pt").is_file() and not (half / "data.pt").exists()
    assert (folder / "checkpoints" / TRACKER).read_text() == "2"

    resumed = train(
        folder, *KEEPS, "trainer.resume_mode=auto", steps=STEPS, mode="sdar_faults", VERL_USE_EXTERNAL_MODULES=FAULTS
    )
    assert sorted(resumed.metrics) == [3, 4, 5, 6]
    assert "global_step_2" in resumed.output
    for step in (3, 4, 5, 6):
        expected, found = ({k: v for k, v in run.metrics[step].items() if compared(k)} for run in (whole, resumed))
        assert found.keys() == expected.keys()
        assert any(name.startswith("sdar/skill_episodes/") for name in found), "retrieval chose nothing"
        for name, value in expected.items():
            assert found[name] == pytest.approx(value, nan_ok=True, **SAME), (step, name)
    rates, lambdas = (whole.column(name) for name in ("actor/lr", "sdar/lambda"))
    assert len(set(rates.values())) > 1 and len(set(lambdas.values())) == STEPS, "nothing was scheduled"
    queries = [sum(v for k, v in whole.metrics[s].items() if k.startswith("sdar/skill_queries/")) for s in (1, 3, 6)]
    assert queries == [2, 6, 12]
    teachers = [
        torch.load(
            run.folder / "checkpoints/global_step_6/actor/sdar_teacher_world_size_1_rank_0.pt", weights_only=True
        )
        for run in (whole, resumed)
    ]
    assert teachers[0]["record"] == teachers[1]["record"] == {"source": "ema", "step": 6, "updates": 6}
    for name, value in teachers[0]["weights"].items():
        torch.testing.assert_close(teachers[1]["weights"][name], value, rtol=1e-4, atol=1e-6)


@pytest.fixture
def disk(tmp_path):
    """A disk of its own, of 64 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(place)], capture_output=True)
    if made.returncode:
        pytest.skip(f"no disk can be mounted here: {made.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_in_mid_save_keeps_the_checkpoint_before(tmp_path, disk):
    folder, marker, ballast = tmp_path / "run", tmp_path / "half written", disk / "ballast"
    words = (f"trainer.default_local_dir={disk / 'checkpoints'}", "trainer.save_freq=1")
    faults = {"VERL_USE_EXTERNAL_MODULES": FAULTS, "SDAR_STOP_SAVE": f"3:{marker}"}
    first = LiveRun(folder, *words, steps=3, mode="sdar_faults", env=faults)
    try:
        first.wait_for(marker.exists)
    finally:
        first.kill_all()
    saved = disk / "checkpoints" / "global_step_2"
    size = sum(path.stat().st_size for path in saved.rglob("*"))
    shutil.rmtree(disk / "checkpoints" / "global_step_3")
    ballast.write_bytes(b"\0" * (shutil.disk_usage(disk).free - size // 2))

    common = {"steps": 3, "mode": "sdar_faults", "VERL_USE_EXTERNAL_MODULES": FAULTS}
    full = train(folder, *words, check=False, **common)
    assert full.returncode not in (0, 2), "the next start may have room"
    assert "No space left on device" in full.output or "PytorchStreamWriter failed" in full.output
    assert (disk / "checkpoints" / TRACKER).read_text() == "2"

    ballast.unlink()
    rest = train(folder, *words, **common)
    assert sorted(rest.metrics) == [3] and (disk / "checkpoints" / TRACKER).read_text() == "3"
    assert (disk / "checkpoints" / "global_step_3" / "data.pt").is_file()


def compared(name: str) -> bool:
    """Metrics of the training itself: no times, no memory, no count of a process's life."""
    return name.startswith(("actor/", "critic/", "sdar/", "response_length/", "prompt_length/")) and not (
        name.startswith("actor/perf") or "mfu" in name
    )


@pytest.mark.parametrize(
    ("title", "name"),
    [
        ("ray::AgentLoopWorkerTQ", "agent-loop worker 0"),
        ("ray::TransformersServer", "rollout server 0"),
        ("ray::WorkerDict", "training worker 0"),
        ("ray::TransferQueueController", "TransferQueue's controller"),
        ("ray::PoolTeacherWorker", "teacher worker 0"),
        ("ray::TaskRunnerV1", None),
    ],
)
def test_a_killed_process_ends_the_run_and_is_named(tmp_path, title, name):
    """While episodes are under way: their environment waits, so that the step cannot end before the process is dead."""
    hold = tmp_path / "hold"
    overrides = ["~sdar.env.options", f"+sdar.env.options={{hold: {hold}}}"]
    if "Teacher" in title:
        overrides += POOL
    run = LiveRun(tmp_path / "run", *overrides, steps=1000)
    try:
        run.wait_for(lambda: "sdar step 1/" in run.output)
        hold.touch()
        run.wait_for(lambda: "EnvHost.step" in " ".join(run.processes().values()))
        run.kill(title)
        ended = run.end(timeout_s=240)
    finally:
        run.kill_all()
    assert ended.returncode not in (0, None)
    if name is None:
        assert "ActorDiedError" in ended.output  # Ray's own words: nobody is left to say more
    else:
        assert f"{name} of this run is dead" in ended.output
        assert "trainer.resume_mode=auto" in ended.output


def test_rows_of_nan_are_left_out_and_counted(tmp_path):
    overrides = ("sdar.teacher.source=actor", "sdar.teacher.sanity_check=False")
    env = {"VERL_USE_EXTERNAL_MODULES": FAULTS, "SDAR_POISON": "1"}
    run = train(tmp_path, *overrides, "sdar.on_nonfinite=drop", steps=2, mode="sdar_faults", **env)
    assert run.column("sdar/nonfinite_rows") == {1: 1, 2: 0}
    assert run.column("sdar/nonfinite_teacher_rows") == {1: 1, 2: 0}
    for step in (1, 2):
        for name in ("actor/loss", "actor/grad_norm", "sdar/loss", "sdar/gap_mean", "actor/pg_loss"):
            assert math.isfinite(run.metrics[step][name]), (step, name)
    assert run.metrics[1]["actor/grad_norm"] > 0


def test_weights_that_overflow_are_told_by_the_gradient(tmp_path):
    """Nothing is injected: a learning rate of 1e30 does it. The norms make a uniform policy of it, whose log-probs are
    finite; the gradient is not, and verl leaves every update out."""
    run = train(
        tmp_path,
        "sdar.teacher.source=actor",
        "actor_rollout_ref.actor.optim.lr=1e30",
        "actor_rollout_ref.actor.optim.clip_grad=1e30",
        steps=3,
    )
    assert run.column("sdar/warnings/update_skipped") == {2: 1, 3: 2}
    assert "sdar warning at step 2, update_skipped" in run.output
