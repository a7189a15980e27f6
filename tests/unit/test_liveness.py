"""Who is asked whether it lives, what a death becomes, and when; without Ray's processes."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
import transfer_queue.interface
from omegaconf import OmegaConf
from ray.exceptions import ActorDiedError, ActorUnavailableError
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer, ReplayBufferAsync

from sdar_verl.errors import ConfigError, ProcessDiedError
from sdar_verl.verl import liveness
from sdar_verl.verl.liveness import Liveness, check_queue_is_ours, queue_processes, run_processes, watched


class Actor:
    """Answers when told to; ``state`` is ``alive``, ``busy`` or an exception."""

    def __init__(self, state: Any = "alive"):
        self.state, self.asked = state, 0
        self.__ray_ready__ = SimpleNamespace(remote=self._ask)

    def _ask(self) -> tuple[Actor, int]:
        self.asked += 1
        return self, self.asked


class FakeRay:
    def __init__(self) -> None:
        self.timeouts: list[float] = []

    def wait(self, answers: Any, num_returns: int, timeout: float) -> tuple[list[Any], list[Any]]:
        self.timeouts.append(timeout)
        done = [answer for answer in answers if answer[0].state != "busy"]
        return done, [answer for answer in answers if answer not in done]

    @staticmethod
    def get(answer: Any) -> None:
        if isinstance(answer[0].state, Exception):
            raise answer[0].state


@pytest.fixture(autouse=True)
def ray(monkeypatch):
    fake = FakeRay()
    monkeypatch.setattr(liveness, "ray", fake)
    return fake


@pytest.fixture
def liveness_of():
    """Makes a watch; its thread ends with the test, so that it ends nothing else."""
    made = []

    def make(processes: Any, **kwargs: float) -> Liveness:
        made.append(Liveness(lambda: processes, **kwargs))
        return made[-1]

    yield make
    for watch in made:
        watch._over.set()


def round_of(watch: Liveness) -> None:
    watch._death = watch._look(0.0)
    watch.check()


def test_the_living_and_the_busy_are_left_alone(liveness_of, ray):
    alive, busy = Actor(), Actor("busy")
    watch = liveness_of({"a": alive, "b": busy})
    for _ in range(3):
        round_of(watch)
    assert alive.asked == 3
    assert busy.asked == 1, "one question at a time: a busy process must not find a queue of them"
    assert ray.timeouts == [0.0] * 3


def test_a_dead_process_is_named_with_rays_reason(liveness_of):
    watch = liveness_of({"agent-loop worker 1": Actor(ActorDiedError())})
    said = "agent-loop worker 1 of this run is dead: The actor died unexpectedly"
    with pytest.raises(ProcessDiedError, match=said) as error:
        round_of(watch)
    assert "trainer.resume_mode=auto" in str(error.value)


def test_a_lost_connection_is_no_death(liveness_of):
    actor = Actor(ActorUnavailableError("net", None))
    watch = liveness_of({"a": actor})
    round_of(watch)
    actor.state = "alive"
    round_of(watch)
    assert actor.asked == 2


def test_the_thread_finds_out_and_the_trainer_is_told_at_its_next_look(liveness_of):
    actor = Actor()
    watch = liveness_of({"rollout server 0": actor}, every_s=0.01)
    with pytest.raises(ProcessDiedError, match="rollout server 0"), watch.watching():
        wait_until(lambda: actor.asked > 2)
        watch.check()
        actor.state = ActorDiedError()
        wait_until(lambda: watch._death is not None)
        watch.check()


def test_a_run_that_ends_is_not_watched_any_longer(liveness_of):
    actor, others = Actor(), set(threading.enumerate())
    watch = liveness_of({"a": actor}, every_s=0.01, grace_s=0.0)
    with watch.watching():
        wait_until(lambda: actor.asked > 0)
        assert set(threading.enumerate()) - others
    wait_until(lambda: not set(threading.enumerate()) - others)


def test_an_error_gets_the_name_of_the_dead(liveness_of, ray, exits):
    actor = Actor()
    watch = liveness_of({"rollout server 0": actor}, every_s=1000.0)
    with pytest.raises(KeyError, match="mine"), watch.watching():
        raise KeyError("mine")
    assert ray.timeouts == [liveness.ANSWER_S]
    actor.state = ActorDiedError()
    watch = liveness_of({"rollout server 0": actor}, every_s=1000.0)
    with pytest.raises(ProcessDiedError, match="rollout server 0") as error, watch.watching():
        raise KeyError("no episodes")
    assert isinstance(error.value.__cause__, KeyError)


def test_a_trainer_that_hangs_is_ended_from_outside(liveness_of, exits, capsys):
    """It waits for a queue that is dead; nothing can be raised there."""
    watch = liveness_of({"TransferQueue's controller": Actor(ActorDiedError())}, every_s=0.01, grace_s=0.05)
    with watch.watching():
        wait_until(lambda: exits == [1])
    assert "TransferQueue's controller of this run is dead" in capsys.readouterr().err


def test_a_trainer_that_hangs_while_it_closes_is_ended_too(liveness_of, exits):
    watch = liveness_of({"a": Actor(ActorDiedError())}, every_s=0.01, grace_s=0.3)
    with pytest.raises(ProcessDiedError), watch.watching():
        wait_until(lambda: watch._death is not None)
        watch.check()
    assert exits == []
    wait_until(lambda: exits == [1])


def wait_until(happened) -> None:
    deadline = time.monotonic() + 20.0
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def exits(monkeypatch):
    """Exit codes that this process would have ended with."""
    codes: list[int] = []
    monkeypatch.setattr(liveness.os, "_exit", codes.append)
    monkeypatch.setattr(liveness, "PRINTED_S", 0.0)
    return codes


def test_processes_are_found_by_verls_names_for_them():
    loops, servers, workers = [object(), object()], [object()], [object()]
    trainer = SimpleNamespace(teacher=None)
    trainer.actor_rollout_wg = trainer.ref_policy_wg = SimpleNamespace(workers=workers)  # verl: one group, two names
    trainer.llm_server_manager = SimpleNamespace(rollout_replicas=[SimpleNamespace(servers=servers)])
    with pytest.raises(AttributeError, match="agent_loop_manager"):
        run_processes(trainer)  # a verl that calls it otherwise: watching nothing would be worse
    trainer.agent_loop_manager = SimpleNamespace(agent_loop_workers=loops)
    least = ["agent-loop worker 0", "agent-loop worker 1", "rollout server 0", "training worker 0"]
    assert list(run_processes(trainer)) == least
    trainer.standalone_server_manager = SimpleNamespace(rollout_replicas=[SimpleNamespace(servers=[object(), 1])])
    trainer.teacher = SimpleNamespace(pool=None)  # colocated
    assert "teacher worker 0" not in run_processes(trainer)
    trainer.teacher = SimpleNamespace(pool=SimpleNamespace(workers=[object()]))
    found = run_processes(trainer)
    assert list(found) == [
        *["agent-loop worker 0", "agent-loop worker 1"],
        *["rollout server 0", "rollout server 1", "rollout server 1 (part 1)"],
        *["training worker 0", "teacher worker 0"],
    ]
    assert found["training worker 0"] is workers[0]


def test_the_queue_is_found_by_its_names(ray):
    there = {("TransferQueueController", "transfer_queue"): 1, ("TransferQueueStorageUnit#0", None): 2}

    def get_actor(name, namespace):
        try:
            return there[name, namespace]
        except KeyError:
            raise ValueError(name) from None

    ray.get_actor = get_actor
    assert queue_processes(2) == {"TransferQueue's controller": 1, "TransferQueue's storage unit 0": 2}


def test_a_second_run_of_a_cluster_is_refused_and_leaves_the_firsts_queue_alone(ray, monkeypatch):
    monkeypatch.setattr("transfer_queue.interface._TQ_CONTROLLER", "the other run's")
    held = {("TransferQueueController", "transfer_queue")}

    def get_actor(name, namespace=None):
        if (name, namespace) not in held:
            raise ValueError(name)
        return name

    ray.get_actor = get_actor
    check_queue_is_ours(OmegaConf.create({"transfer_queue": {"backend": {"storage_backend": "MooncakeStore"}}}))
    with pytest.raises(ConfigError, match="another run of this Ray cluster"):
        check_queue_is_ours(OmegaConf.create({}))
    assert transfer_queue.interface._TQ_CONTROLLER is None, "verl's last act kills what stands here"
    held.add(("TransferQueueStorageUnit#0", None))
    check_queue_is_ours(OmegaConf.create({}))


@pytest.mark.parametrize("kind", [ReplayBuffer, ReplayBufferAsync])
def test_verls_buffer_looks_at_the_processes_whenever_it_looks_into_the_queue(kind, monkeypatch):
    looks = []
    monkeypatch.setattr(kind, "_sync_metadata_from_transfer_queue", lambda self: looks.append("queue"))
    buffer = kind("sync", {}, 1, "drop", {})
    assert watched(buffer, SimpleNamespace(check=lambda: looks.append("processes"))) is buffer
    assert isinstance(buffer, kind)
    buffer._sync_metadata_from_transfer_queue()
    assert looks == ["processes", "queue"]
    other = kind("sync", {}, 1, "drop", {})
    other._sync_metadata_from_transfer_queue()
    assert looks[2:] == ["queue"], "only the trainer's own buffer is watched"


def test_a_buffer_that_is_not_verls_is_left_as_it_is():
    buffer = object()
    assert watched(buffer, SimpleNamespace()) is buffer
