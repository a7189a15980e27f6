"""The guard's decisions, around small scripts that write a ledger as a run does. No Ray, no verl."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from sdar_verl.cli import main
from sdar_verl.cloud import driver, ledger, stop
from sdar_verl.cloud import guard as guards
from sdar_verl.cloud.driver import planned_step_s
from sdar_verl.cloud.guard import Guard, Limits
from sdar_verl.cloud.notice import Ec2Notice
from sdar_verl.cloud.store import Store, StoreError
from sdar_verl.compose import compose_config
from tests.support.metadata_server import metadata_server

RUN = """
import os, sys, time
from sdar_verl.cloud import ledger, stop
from sdar_verl.cloud.driver import tell_guard
from sdar_verl.cloud.store import Store
folder, steps, first, status = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
store = Store(folder)
known = [name for name in [ledger.newest(store)] if name]
tell_guard([store], known, 1, 8, float(os.environ.get("STEP_S", 0)) or None)
if steps < 0:
    sys.exit(status)
own, step, ended = ledger.open_id(store), first, None
def say(ended=None, again=False):
    ledger.write(store, own, {"first": first, "step": step, "cards": 8, "beats": step + 1, "seconds": 1.0,
                              "slowest": 0.05, "again": again, "ended": ended})
say()
while step < steps:
    time.sleep(0.05)
    step += 1
    say()
    wish = stop.asked(store, own)
    if wish is not None:
        stop.forget([store], wish)
        say(f"stopped: {wish.reason}", wish.again)
        sys.exit(0)
if status == 99:
    open(folder + "/asleep", "w").close()
    time.sleep(600)
say("finished" if status == 0 else f"Broken: status {status}")
sys.exit(status)
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(guards, "EVERY_S", 0.05)
    monkeypatch.setattr(guards, "NOTICE_EVERY_S", 0.05)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


def guard(
    folder: Path, steps: int = 3, first: int = 0, status: int = 0, notice: Ec2Notice | None = None, **limits: float
) -> Guard:
    command = [sys.executable, "-c", RUN, str(folder), str(steps), str(first), str(status)]
    return Guard(command, Limits(**limits), notice or Ec2Notice())


def attempts(folder: Path) -> list[ledger.Attempt]:
    return ledger.read(Store(folder))


def test_a_run_that_ends_well_is_done(tmp_path):
    assert guard(tmp_path, price=7.2).run() == 0
    (line,) = attempts(tmp_path)
    assert line.ended == "finished" and line.step == 3 and line.cards == 8
    assert line.cost == pytest.approx(7.2 * line.seconds / 3600)


@pytest.mark.parametrize(("status", "expected"), [(1, 75), (134, 75), (2, 2)])
def test_exit_statuses(tmp_path, status, expected):
    assert guard(tmp_path, status=status).run() == expected


def test_a_run_that_dies_before_it_begins_has_a_line_too(tmp_path):
    assert guard(tmp_path, steps=-1, status=1, price=10.0).run() == 75
    (line,) = attempts(tmp_path)
    assert line.step == 0 and line.cards == 8 and line.ended == "the command ended with status 1"
    assert line.cost is not None and line.cost > 0


@pytest.mark.parametrize(
    ("code", "expected"), [("sys.exit(1)", 2), ("sys.exit(137)", 75), ("os.kill(os.getpid(), 9)", 75)]
)
def test_a_command_that_begins_no_run_is_not_tried_again_unless_it_was_killed(code, expected):
    assert Guard([sys.executable, "-c", f"import os, sys; {code}"], Limits()).run() == expected


def test_three_attempts_without_a_step_are_enough(tmp_path):
    statuses = [guard(tmp_path, steps=5, first=5, status=1).run() for _ in range(3)]
    assert statuses == [75, 75, 2]
    assert guard(tmp_path, steps=6, first=5, status=1).run() == 75, "one that made a step may try again"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_the_run_after_its_step(tmp_path, number, request):
    before = signal.signal(number, signal.default_int_handler)  # whatever nohup or a shell has ignored
    request.addfinalizer(lambda: signal.signal(number, before))
    signalled = threading.Thread(
        daemon=True, target=_signal_when, args=(lambda: attempts(tmp_path)[0].step > 2, number)
    )
    signalled.start()
    assert guard(tmp_path, steps=100000).run() == 75
    signalled.join()
    (line,) = attempts(tmp_path)
    assert line.ended == f"stopped: {number.name}" and line.step > 2


@pytest.mark.parametrize(("again", "status"), [(False, 0), (True, 75)])
def test_the_runs_own_word_says_whether_another_start_goes_on(tmp_path, again, status):
    """Asked by hand, or by an engine's hook, without the guard."""

    def ask() -> None:
        (line,) = attempts(tmp_path)
        stop.ask([Store(tmp_path)], stop.Wish("enough", line.id if again else None, again))

    threading.Thread(daemon=True, target=_when, args=(lambda: attempts(tmp_path)[0].step > 2, ask)).start()
    assert guard(tmp_path, steps=100000).run() == status
    assert attempts(tmp_path)[0].ended == "stopped: enough"


def test_a_stop_by_hand_outlives_a_signal(tmp_path):
    def both() -> None:
        stop.ask([Store(tmp_path)], stop.Wish("enough"))
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(daemon=True, target=_when, args=((tmp_path / "asleep").exists, both)).start()
    assert guard(tmp_path, status=99, grace_s=0.3).run() == 75
    assert stop.asked(Store(tmp_path)) == stop.Wish("enough"), "the next start answers it"


def test_a_run_that_nohup_protects_from_a_hangup_goes_on(tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        hung_up = (lambda: attempts(tmp_path)[0].step > 1, signal.SIGHUP)
        threading.Thread(daemon=True, target=_signal_when, args=hung_up).start()
        assert guard(tmp_path, steps=20).run() == 0
    finally:
        signal.signal(signal.SIGHUP, before)
    assert attempts(tmp_path)[0].ended == "finished"


def test_a_step_that_does_not_end_in_the_grace_is_cut_off(tmp_path):
    signalled = threading.Thread(
        daemon=True, target=_signal_when, args=(lambda: attempts(tmp_path)[0].step == 3, signal.SIGTERM)
    )
    signalled.start()
    assert guard(tmp_path, status=99, grace_s=0.3).run() == 75
    signalled.join()
    assert "did not end in time, what was saved is kept" in (attempts(tmp_path)[0].ended or "")


def test_a_run_without_a_step_hangs(tmp_path, capfd):
    watch = guard(tmp_path, status=99)
    # From its last step on: how long a run takes to begin is the machine's affair.
    impatient = (lambda: attempts(tmp_path)[0].step == 3, lambda: setattr(watch, "limits", Limits(hang_s=0.01)))
    threading.Thread(daemon=True, target=_when, args=impatient).start()
    assert watch.run() == 75
    assert "hung: no step for" in (attempts(tmp_path)[0].ended or "")
    assert "<module> (<string>:" in capfd.readouterr().out.split("where its processes stand")[1]


def test_a_slow_step_is_no_hang(tmp_path):
    """Four times the slowest step, where that is more than the limit."""
    watch = guard(tmp_path, hang_s=0.01)
    assert watch.run() == 75, "no step within .01 s"
    watch = guard(tmp_path, hang_s=120.0)
    assert watch.run() == 0


def test_the_slowest_step_may_be_an_earlier_attempts(tmp_path):
    ledger.write(Store(tmp_path), "0001-aaaaaa", {"first": 0, "step": 3, "seconds": 9.0, "slowest": 100.0})
    watch = guard(tmp_path, steps=6, first=3, hang_s=120.0)
    assert watch.run() == 0 and watch.allowed_s == 400.0


def test_before_the_first_step_the_planner_says_what_is_slow(tmp_path, monkeypatch):
    monkeypatch.setenv("STEP_S", "100")
    watch = guard(tmp_path, hang_s=120.0)
    assert watch.run() == 0 and watch.allowed_s == 400.0


def test_a_damaged_line_of_an_earlier_attempt_is_told_and_hides_nothing(tmp_path, capfd):
    ledger.write(Store(tmp_path), "0001-aaaaaa", {"first": 0, "step": 3, "seconds": 3600.0, "price": 5.0})
    (tmp_path / "attempts" / "0002-bbbbbb.json").write_text("")
    assert guard(tmp_path, steps=6, first=3, price=5.0, budget=100.0).run() == 0
    told = capfd.readouterr().out
    assert "0002-bbbbbb.json is damaged" in told and "5.00 of 100 USD are spent" in told


def test_the_budget_counts_what_the_mirror_knows_too(tmp_path, monkeypatch):
    here, mirror = Store(tmp_path / "run"), Store(tmp_path / "mirror")
    for number, name in enumerate(("0001-aaaaaa", "0002-bbbbbb")):
        for store in (here, mirror)[number:]:
            ledger.write(store, name, {"first": 0, "step": 3, "seconds": 3600.0, "price": 5.0})
    watch = guard(tmp_path / "run", steps=100000, price=5.0, budget=8.0)
    program = RUN.replace("[ledger.newest(store)]", '["0002-bbbbbb"]').replace("ledger.open_id(store)", '"0003-cccccc"')
    program = program.replace("tell_guard([store]", f"tell_guard([store, Store({mirror.place!r})]")
    watch.command = [word if word != RUN else program for word in watch.command]
    read, failures = ledger.read, iter([True, True, False])

    def flaky(store, say=None):
        if store.place == mirror.place and next(failures, False):
            raise StoreError("cannot be reached")
        return read(store, say)

    monkeypatch.setattr(ledger, "read", flaky)
    assert watch.run() == 0
    assert "is spent" in (read(mirror)[-1].ended or "")


def test_the_budget_counts_all_attempts(tmp_path):
    ledger.write(Store(tmp_path), "0001-aaaaaa", {"first": 0, "step": 9, "seconds": 1800.0, "slowest": 1.0})
    ledger.write(Store(tmp_path), "0001-aaaaaa", {"price": 10.0, "seconds": 3600.0}, guard=True)
    assert guard(tmp_path, steps=12, first=9, price=10.0, budget=12.0).run() == 0
    assert attempts(tmp_path)[1].ended == "finished"
    assert guard(tmp_path, steps=100000, first=12, price=10.0, budget=10.0).run() == 0
    assert "budget of 10 USD over all attempts is spent" in (attempts(tmp_path)[2].ended or "")


def test_a_budget_that_does_not_pay_for_a_step_starts_none(tmp_path):
    ledger.write(Store(tmp_path), "0001-aaaaaa", {"first": 0, "step": 9, "seconds": 3600.0, "slowest": 900.0})
    ledger.write(Store(tmp_path), "0001-aaaaaa", {"price": 10.0, "seconds": 3600.0}, guard=True)
    assert guard(tmp_path, steps=100000, first=9, price=10.0, budget=12.0).run() == 0
    assert "does not pay for one step" in (attempts(tmp_path)[1].ended or "")


def test_a_budget_that_does_not_pay_for_the_planned_first_step_starts_none(tmp_path, monkeypatch):
    monkeypatch.setenv("STEP_S", "720000")
    price = 0.01  # a minute of a busy machine is nothing
    assert guard(tmp_path, steps=100000, price=price, budget=1.5).run() == 0
    (attempt,) = attempts(tmp_path)
    assert "1.50 USD, does not pay for one step (2.00, by the planner)" in (attempt.ended or "")
    assert guard(tmp_path / "other", price=price, budget=2.5).run() == 0
    assert attempts(tmp_path / "other")[0].ended == "finished"


def test_a_run_whose_guard_was_killed_asks_itself_to_end(monkeypatch):
    guard, sent, kill = subprocess.Popen(["sleep", "600"]), [], os.kill
    monkeypatch.setenv("SDAR_GUARD_PROCESS", str(guard.pid))
    monkeypatch.setattr(driver, "GUARD_EVERY_S", 0.01)
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr(os, "kill", lambda pid, n: sent.append(n) if pid == os.getpid() else kill(pid, n))
    waiting = threading.Thread(daemon=True, target=driver._wake, args=(driver._guard(),))
    waiting.start()
    time.sleep(0.1)
    assert sent == [signal.SIGUSR2]
    guard.kill()
    guard.wait()
    waiting.join(60)
    assert sent == [signal.SIGUSR2, signal.SIGTERM]
    assert driver._guard() is None, "and without one nobody is missed"


def test_a_run_without_a_guard_needs_no_package_of_the_guards(monkeypatch):
    monkeypatch.delenv("SDAR_GUARD_PROCESS", raising=False)
    monkeypatch.setitem(sys.modules, "psutil", None)  # an import of it fails
    assert driver._guard() is None


def test_what_a_step_takes_is_planned_for_cards_that_are_known():
    config = compose_config("sdar_alfworld", ["model=qwen2.5-7b"])
    a100, h100 = (planned_step_s(config, f"NVIDIA {name}") for name in ("A100-SXM4-80GB", "H100 80GB HBM3"))
    assert a100 is not None and h100 is not None and 60 < h100 < a100 < 10000
    for card in (None, "NVIDIA GeForce RTX 3090", "NVIDIA A100"):
        assert planned_step_s(config, card) is None
    assert planned_step_s(compose_config("sdar_alfworld", ["hardware=cpu"]), "NVIDIA H200") is not None
    unknown = compose_config("sdar_alfworld", ["actor_rollout_ref.model.path=nobodys/model"])
    assert planned_step_s(unknown, "NVIDIA H200") is None


def test_attempts_without_a_price_count_at_this_ones(tmp_path):
    ledger.write(Store(tmp_path), "0001-aaaaaa", {"first": 0, "step": 9, "seconds": 3600.0, "slowest": 1.0})
    assert guard(tmp_path, steps=100000, first=9, price=10.0, budget=9.0).run() == 0
    assert attempts(tmp_path)[0].cost is None and "is spent" in (attempts(tmp_path)[1].ended or "")


def test_a_spot_notice_is_read_with_a_token(tmp_path):
    with metadata_server() as server:
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv("AWS_EC2_METADATA_DISABLED")
            notice = Ec2Notice(f"http://127.0.0.1:{server.server_port}")
        assert notice.there and notice.asked() is None
        told = threading.Thread(
            daemon=True,
            target=_when,
            args=(
                lambda: attempts(tmp_path)[0].step > 2,
                lambda: setattr(server, "notice", {"action": "stop", "time": "soon"}),
            ),
        )
        told.start()
        assert guard(tmp_path, steps=100000, notice=notice).run() == 75
        told.join()
    assert "spot notice" in (attempts(tmp_path)[0].ended or "")


def test_elsewhere_nobody_is_asked(monkeypatch):
    monkeypatch.delenv("AWS_EC2_METADATA_DISABLED")
    assert not Ec2Notice("http://127.0.0.1:9").there


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["guard"], "guard needs a command after --"),
        (["guard", "--"], "guard needs a command after --"),
        (["guard", "--", "no-such-program"], "no-such-program is no program"),
        (["guard", "--budget", "10", "--", "true"], "--budget 10 has no effect without a price"),
        (["guard", "--price", "-1", "--", "true"], "--price -1: must be above 0"),
        (["guard", "--hang", "0", "--", "true"], "--hang 0: must be above 0"),
    ],
)
def test_bad_options_are_told(capsys, words, told):
    assert main(words) == 2
    assert told in capsys.readouterr().err


def test_options_behind_the_dashes_are_the_commands(capfd):
    assert (
        main(["guard", "--price", "2", "--", sys.executable, "-c", "import sys; print(sys.argv)", "--price", "x"]) == 0
    )
    assert "['-c', '--price', 'x']" in capfd.readouterr().out


def _when(happened, act) -> None:
    while True:
        try:
            if happened():
                act()
                return
        except (IndexError, OSError):
            pass
        time.sleep(0.01)


def _signal_when(happened, number: int) -> None:
    _when(happened, lambda: os.kill(os.getpid(), number))
