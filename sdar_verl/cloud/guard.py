"""``sdar-verl guard -- COMMAND``: runs a training command and ends it in order when it must not, or cannot, go on.

It watches the run through its ledger (in the run's folder, else in its mirror), so that it can stand around a script as
well as around ``python -m verl.trainer.main_ppo``; where the run lies it learns from the run's driver.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sdar_verl.cloud import ledger, processes, stop
from sdar_verl.cloud.driver import GUARD, GUARD_PROCESS, opened
from sdar_verl.cloud.notice import Ec2Notice
from sdar_verl.cloud.store import Store, StoreError

DONE, CONFIGURATION, AGAIN = 0, 2, 75
"""Exit statuses: finished, stopped by hand, or the budget is spent; a start cannot help; another start goes on."""

EVERY_S = 2.0
NOTICE_EVERY_S = 5.0
NOTE_EVERY_S = 30.0
_SIGNALS = 128
SLOWER = 4.0
"""A step may take this many times the slowest one so far."""
FRUITLESS = 3
"""Attempts in a row that end by themselves without a step: another start will not help."""


@dataclass
class Limits:
    """What a guard is told.

    Attributes:
        budget: USD for all attempts together; None: no limit.
        price: USD an hour of all nodes together; None: unknown.
        spot: whether the machines can be taken away; None: nobody said.
        hang_s: a run without a word for so long hangs.
        grace_s: from SIGTERM or a notice to the end of everything.
    """

    budget: float | None = None
    price: float | None = None
    spot: bool | None = None
    hang_s: float = 1800.0
    grace_s: float = 100.0


@dataclass
class Guard:
    """Runs one command.

    Args:
        command: program and arguments.
        limits: see :class:`Limits`.
        notice: asks whether the machine will be taken away.
    """

    command: Sequence[str]
    limits: Limits
    notice: Ec2Notice = field(default_factory=Ec2Notice)

    def run(self) -> int:
        """Run it to its end.

        Returns:
            0, 2 or 75, see above.
        """
        self._began = time.monotonic()
        self._stores: list[Store] = []
        self._facts: dict[str, Any] = {}
        self._id: str | None = None
        self._seen: tuple[int, float] = (-1, self._began)  # the run's last word, and when it was heard
        self._line = ledger.Attempt("")
        self._earlier: list[ledger.Attempt] = []
        self._all_known = False  # whether every place of the run has told of its earlier attempts
        self._asked: tuple[str, int, float] | None = None  # why the run is to end, with which status, since when
        self._refused: str | None = None
        self._signals: list[str] = []  # that came, by name
        self._noted = self._looked = float("-inf")
        with tempfile.TemporaryDirectory(prefix="sdar-guard-") as folder:
            self._note = Path(folder) / "run.json"
            ends = [signal.SIGTERM, signal.SIGINT]
            if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # else nohup wants it to live on
                ends.append(signal.SIGHUP)
            before = {number: signal.signal(number, self._on_signal) for number in ends}
            env = {**os.environ, GUARD: str(self._note), GUARD_PROCESS: str(os.getpid())}
            process = subprocess.Popen(list(self.command), env=env, start_new_session=True)
            try:
                status, why = self._watch(process)
            finally:
                if process.poll() is None:
                    processes.end(process)
                for number, handler in before.items():
                    signal.signal(number, handler)
            self._hear()
        self._write(why, status)
        _say(f"{why}; exit status {status}{self._sums()}")
        return status

    # ---------------------------------------------------------------- the loop

    def _watch(self, process: subprocess.Popen[bytes]) -> tuple[int, str]:
        while True:
            try:
                returned = process.wait(EVERY_S)
            except subprocess.TimeoutExpired:
                returned = None
            self._hear()
            if returned is not None:
                return self._ended(returned)
            verdict = self._must_end(process.pid)
            if verdict is not None:
                return verdict
            if time.monotonic() - self._noted > NOTE_EVERY_S:
                self._noted = time.monotonic()
                self._write(None, None)

    def _must_end(self, pid: int) -> tuple[int, str] | None:
        """A status and a reason when the command is to be killed now; asks for an orderly end on its way there."""
        now = time.monotonic()
        if self._refused is not None:
            return DONE, self._refused
        if self._signals:
            self._ask(self._signals[0], AGAIN)
        elif now - self._looked > NOTICE_EVERY_S:
            self._looked = now
            told = self.notice.asked()
            if told is not None:
                self._ask(f"spot notice {told.strip()}", AGAIN)
        spent, budget = self._spent(), self.limits.budget
        if self._asked is None and spent is not None and budget is not None and spent >= budget:
            self._ask(f"the budget of {budget:g} USD over all attempts is spent", DONE)
        if self._asked is not None:
            reason, status, since = self._asked
            if len(self._signals) > 1:
                return status, f"{reason}, twice: ended at once"
            if self._id is None:
                return status, f"{reason}: ended before its first step"
            if now - since > self._patience(status):
                return status, f"{reason}: the step did not end in time, what was saved is kept"
        quiet = now - self._seen[1]
        if quiet > self.allowed_s:
            _say(f"no step for {quiet:.0f} s (allowed: {self.allowed_s:.0f}); where its processes stand:")
            print(processes.stacks(processes.below(pid)), flush=True)
            return AGAIN, f"hung: no step for {quiet:.0f} s"
        return None

    def _patience(self, status: int) -> float:
        """Seconds from asking to killing: a machine that goes away sets it; a spent budget may pay for its step."""
        return self.limits.grace_s if status == AGAIN else max(self.limits.grace_s, 2 * self._slowest)

    @property
    def allowed_s(self) -> float:
        """Seconds without a word of the run, before it counts as hung."""
        return max(self.limits.hang_s, SLOWER * max(self._slowest, self._facts.get("step_s") or 0.0))

    @property
    def _slowest(self) -> float:
        """Seconds of the slowest step of all attempts; 0 before the first."""
        return max(line.slowest for line in (self._line, *self._earlier))

    def _ask(self, reason: str, status: int) -> None:
        if self._asked is not None and self._asked[1] == AGAIN:
            return
        if self._asked is None or status == AGAIN:
            self._asked = (reason, status, time.monotonic())
            _say(f"{reason}: asking the run to end after its step")
        self._pass_on()

    def _pass_on(self) -> None:
        """Tell the run what it is asked."""
        if self._id is None or self._asked is None:
            return
        reason, status, _ = self._asked
        try:
            stop.ask(self._stores, stop.Wish(reason, self._id, again=status == AGAIN))
        except StoreError as error:
            _say(str(error))

    def _ended(self, returned: int) -> tuple[int, str]:
        why = self._line.ended if self._id is not None else None
        if returned == 0 and why is not None:  # the run knows whose wish it has fulfilled, ours or another's
            return (AGAIN if self._line.again else DONE), why
        if returned == 0:
            return (self._asked[1], self._asked[0]) if self._asked is not None else (DONE, "the command has ended")
        if self._asked is not None:
            return self._asked[1], f"{self._asked[0]}: the command ended with status {returned}"
        if returned == CONFIGURATION:
            return CONFIGURATION, "the command refuses its configuration"
        if not self._stores and 0 < returned < _SIGNALS:  # Hydra could not compose, a package is missing, ...
            return CONFIGURATION, f"the command ended with status {returned} before a run began"
        if why is not None and why.startswith("TakenOver"):
            return CONFIGURATION, why
        if self._fruitless():
            reason = f"status {returned}, and {FRUITLESS} attempts in a row made no step"
            return CONFIGURATION, f"{reason}: {why or 'see its log'}"
        return AGAIN, why or f"the command ended with status {returned}"

    def _fruitless(self) -> bool:
        last = self._earlier[1 - FRUITLESS :]
        made = [attempt.step > attempt.first for attempt in last]
        return len(last) == FRUITLESS - 1 and not any(made) and self._line.step <= self._line.first

    def _on_signal(self, number: int, frame: Any) -> None:
        self._signals.append(signal.Signals(number).name)

    # ---------------------------------------------------------------- the run

    def _hear(self) -> None:
        try:
            self._find_run()
            self._look()
        except StoreError as error:  # the next look may work
            _say(str(error))

    def _find_run(self) -> None:
        """Where the run lies, from its driver; then which attempt this is, from the run's ledger."""
        if not self._stores and self._note.is_file():
            self._facts = json.loads(self._note.read_text())
            self._stores = [Store(place) for place in self._facts["places"]]
            self._seen = (-1, time.monotonic())
        if self._stores and not self._all_known:
            self._learn_earlier(self._facts["before"])
        if self._stores and self._id is None:
            self._id = opened(self._stores, self._facts["before"])
            self._pass_on()

    def _learn_earlier(self, before: Sequence[str]) -> None:
        """Attempts before this one, of all places: a folder that was elsewhere knows less than its mirror."""
        for store in self._stores:
            known = ledger.merge(self._earlier, ledger.read(store, _say))
            self._earlier = [line for line in known if not all(ledger.later(line.id, name) for name in before)]
        self._all_known = True
        self._refused = self._too_dear()

    def _look(self) -> None:
        """Hear the run's last word, in its folder, else in its mirror."""
        if self._id is None:
            return
        for store in self._stores:
            try:
                line = ledger.heard(store, self._id)
            except StoreError as error:
                _say(str(error))
                continue
            if line is not None:
                self._line = line
                if line.beats != self._seen[0]:
                    self._seen = (line.beats, time.monotonic())
                return

    def _spent(self) -> float | None:
        """USD over all attempts; one whose price nobody knows counts at this one's."""
        price = self.limits.price
        if price is None:
            return None
        earlier = sum(
            (attempt.price if attempt.price is not None else price) * attempt.seconds / 3600
            for attempt in self._earlier
        )
        return earlier + price * (time.monotonic() - self._began) / 3600

    def _too_dear(self) -> str | None:
        """Why the budget does not allow this attempt at all."""
        spent, budget = self._spent(), self.limits.budget
        if spent is None or budget is None:
            return None
        by = "by earlier attempts and " if self._earlier else ""
        _say(f"{spent:.2f} of {budget:g} USD are spent {by}until here")
        if spent >= budget:
            return f"the budget of {budget:g} USD over all attempts is spent"
        step = (self.limits.price or 0.0) * (self._slowest or self._facts.get("step_s") or 0.0) / 3600
        if budget - spent < step:
            planned = "" if self._slowest else ", by the planner"
            left = f"what is left of the budget, {budget - spent:.2f} USD, does not pay for one step"
            return f"{left} ({step:.2f}{planned})"
        return None

    def _write(self, why: str | None, status: int | None) -> None:
        """This attempt's line, as the guard knows it; an attempt that never opened one gets it here."""
        if not self._stores:
            return
        line = {
            "price": self.limits.price,
            "spot": self.limits.spot,
            "seconds": round(time.monotonic() - self._began, 3),
            "ended": why,
            "status": status,
        }
        try:
            attempt = self._id
            if attempt is None:
                if why is None:
                    return
                attempt = ledger.open_id(self._stores[-1])
                line |= {key: self._facts[key] for key in ("nodes", "cards")}
                last = self._earlier[-1].step if self._earlier else 0
                line |= {"first": last, "step": last, "started": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
            for store in self._stores:
                ledger.write(store, attempt, line, guard=True)
        except StoreError as error:
            _say(str(error))

    def _sums(self) -> str:
        spent = self._spent()
        if not self._stores:
            return ""
        cost = "unknown (no --price)" if spent is None else f"{spent:.2f} USD"
        return f"; all {len(self._earlier) + 1} attempts: {cost}"


def _say(text: str) -> None:
    print(f"sdar guard: {text}", flush=True)
