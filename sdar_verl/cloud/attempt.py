"""What a run does for its life on rented machines: fills an empty folder, mirrors, writes its ledger, ends when asked.

The trainer's process holds one :class:`CloudRun`, which is an observer of the run and a context around its training.
"""

from __future__ import annotations

import fcntl
import platform
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from omegaconf import DictConfig, open_dict

from sdar_verl.cloud import ledger, stop
from sdar_verl.cloud.mirror import Mirror, MirrorError, fill_every_node, local_step
from sdar_verl.cloud.store import Store, StoreError
from sdar_verl.config import SdarConfig
from sdar_verl.errors import ConfigError
from sdar_verl.observe.base import Observer
from sdar_verl.untrusted import shorten

_ALONE_S = 60.0
"""Seconds that a run waits for the one before in its folder, whose processes may still be ending."""
_ANSWER_S = 5.0
"""Seconds that a step waits for the mirror's word on whether to stop; else the next step asks again."""


class CloudRun(Observer):
    """One attempt at a run; a context manager around the training loop.

    Args:
        config: verl's whole config.
        settings: the ``sdar`` node.
        trainer: verl's, whose last step an orderly stop sets.

    On construction, before anything is read from the run's folder, the mirror's newest checkpoint is brought there if
    it is newer (``trainer.resume_mode=auto``).

    Raises:
        ConfigError: another process trains in the folder.
        MirrorError, StoreError: the mirror cannot be read, or does not fit on the disk; on leaving the context, the
            last checkpoint could not be mirrored.
    """

    name = "cloud"

    def __init__(self, config: DictConfig, settings: SdarConfig, trainer: Any):
        self._config, self._trainer = config, trainer
        self._folder = Path(str(config.trainer.default_local_dir)).expanduser().absolute()
        place = settings.cloud.mirror
        self._keep = settings.cloud.keep
        self._mirror = Mirror(place) if place else None
        self._lock = _alone(self._folder)
        try:
            if self._mirror is not None and config.trainer.resume_mode == "auto":
                fill_every_node(self._mirror.store.place, self._folder)
        except BaseException:
            self._lock.close()
            raise
        self._stores = [Store(self._folder), *([self._mirror.store] if self._mirror else [])]
        self._uploads = ThreadPoolExecutor(1, "sdar-mirror")
        self._notes = ThreadPoolExecutor(1, "sdar-notes")
        self._upload: tuple[int, Future[None]] | None = None
        self._failed: tuple[int, BaseException] | None = None
        self._wish: Future[stop.Wish | None] | None = None
        self._stopped: stop.Wish | None = None
        self._line: dict[str, Any] = {}

    # ---------------------------------------------------------------- around the training

    def __enter__(self) -> CloudRun:
        if self._mirror is not None:
            ledger.copy(self._mirror.store, self._stores[0])
        self._id = ledger.open_id(self._stores[0])
        self._began = self._step_began = time.monotonic()
        trainer = self._config.trainer
        first = local_step(self._folder) if trainer.resume_mode == "auto" else 0
        self._line = {
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "host": platform.node(),
            "nodes": int(trainer.nnodes),
            "cards": int(trainer.nnodes * trainer.n_gpus_per_node),
            "first": first,
            "step": first,
            "total": 0,
            "tokens": 0.0,
            "slowest": 0.0,
            "beats": 0,
            "again": False,
            "ended": None,
        }
        self._note()
        self._seen = local_step(self._folder)
        if self._mirror is not None:
            self._mirror.sync(self._folder)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        lost: MirrorError | None = None
        try:
            self._mirror_new()  # an error between the save and the end of its step
            self._uploads.shutdown(wait=True)
            self._take_results()
        except TakenOver as other:
            lost = other
        if lost is None and self._failed is not None:
            step, reason = self._failed
            lost = MirrorError(
                f"the last checkpoint, global_step_{step}, is not in the mirror: {reason}\nIt is whole in "
                f"{self._folder}; start the run again with the same command to mirror what follows"
            )
        if error is not None:
            self._line["ended"] = f"{type(error).__name__}: {shorten(str(error))}"
        elif lost is not None:
            self._line["ended"] = f"{type(lost).__name__}: {shorten(str(lost))}"
        else:
            self._line["ended"] = f"stopped: {self._stopped.reason}" if self._stopped else "finished"
            self._line["again"] = self._stopped is not None and self._stopped.again
            if self._mirror is not None:
                self._told(self._mirror.sync, self._folder)
        self._note()
        self._notes.shutdown(wait=True)
        self._lock.close()
        if lost is not None and error is None:
            raise lost

    # ---------------------------------------------------------------- the trainer's calls

    def before_validation(self, panel: Any) -> None:
        self._beat()

    def after_validation(self, step: int, metrics: Mapping[str, float], outcomes: dict[str, list[Any]]) -> None:
        self._beat()

    def before_rollout(self, prompts: Any) -> None:
        self._beat()
        if self._mirror is not None and (self._wish is None or self._wish.done()):
            self._wish = self._notes.submit(_quietly, stop.asked, self._mirror.store, self._id)

    def after_updates(self, table: Any, metrics: Mapping[str, Any]) -> Mapping[str, float]:
        """Look whether to stop: then this step is the last one, and verl saves it in its own place."""
        self._beat()
        step = self._trainer.global_steps
        if self._line["step"] == self._line["first"]:  # this attempt's first
            self._line["first"] = self._line["step"] = step - 1
        wish = _quietly(stop.asked, self._stores[0], self._id)
        if wish is None and self._wish is not None:
            with suppress(TimeoutError):
                wish = self._wish.result(_ANSWER_S)
        if wish is None:
            return {}
        print(f"sdar: stopping after step {step}: {wish.reason}", flush=True)
        self._stopped = wish
        with open_dict(self._config):
            self._config.trainer.save_freq = 1
        self._trainer.total_training_steps = step
        self._told(stop.forget, self._stores, wish)
        return {}

    def after_step(self, step: int, metrics: Mapping[str, Any]) -> None:
        now = time.monotonic()
        self._line["step"] = step
        self._line["total"] = int(self._trainer.total_training_steps)
        self._line["tokens"] += float(metrics.get("perf/total_num_tokens", 0.0))
        self._line["slowest"] = max(self._line["slowest"], now - self._step_began)
        self._step_began = now
        self._beat()
        self._mirror_new()

    # ---------------------------------------------------------------- in the background

    def _mirror_new(self) -> None:
        """Begin to copy a checkpoint that verl has written since the last look, with the record up to its step.

        Waits only while the one before is still on its way.
        """
        step = local_step(self._folder)
        if self._mirror is None or step in (0, self._seen):
            return
        self._seen = step
        if self._upload is not None and not self._upload[1].done():
            began = time.monotonic()
            print(f"sdar mirror: step {step} waits for the upload of the checkpoint before", flush=True)
            self._upload[1].exception()
            print(f"sdar mirror: waited {time.monotonic() - began:.0f} s", flush=True)
        self._take_results()
        self._upload = (step, self._uploads.submit(self._copy, self._mirror, step))

    def _copy(self, mirror: Mirror, step: int) -> None:
        self._check_owner(mirror)
        files = mirror.upload(self._folder, step)
        self._check_owner(mirror)  # an upload takes minutes
        mirror.sync(self._folder)
        mirror.seal(step, files, self._id)
        mirror.keep(self._keep, step)

    def _check_owner(self, mirror: Mirror) -> None:
        owner = ledger.newest(mirror.store)
        if owner is not None and ledger.later(owner, self._id):
            raise TakenOver(
                f"attempt {owner} of this run has begun to write to {mirror.store.place}, so this one "
                f"({self._id}) ends: two runs on one mirror would mix their checkpoints. Give each run an "
                "sdar.cloud.mirror of its own"
            )

    def _take_results(self) -> None:
        """Read what the last upload came to. TakenOver ends the run; other failures are told."""
        if self._upload is None:
            return
        step, upload = self._upload
        self._upload, self._failed = None, None
        error = upload.exception()
        if isinstance(error, TakenOver):
            raise error
        if error is not None:
            self._failed = (step, error)
            print(f"sdar mirror: global_step_{step} could not be mirrored: {error}", flush=True)

    def _beat(self) -> None:
        if self._line:
            self._line["beats"] += 1
            self._note()

    def _note(self) -> None:
        self._line["seconds"] = round(time.monotonic() - self._began, 3)
        line = dict(self._line)
        self._told(ledger.write, self._stores[0], self._id, line)
        for store in self._stores[1:]:
            self._notes.submit(_quietly, ledger.write, store, self._id, line)

    def _told(self, act: Any, *arguments: Any) -> None:
        try:
            act(*arguments)
        except StoreError as error:
            print(f"sdar cloud: {error}", flush=True)


def _alone(folder: Path) -> IO[str]:
    """A lock on the run's folder, until the file is closed or this process ends, however it ends."""
    folder.mkdir(parents=True, exist_ok=True)
    file, until = (folder / ".sdar_run.lock").open("a"), time.monotonic() + _ALONE_S
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() < until:
                time.sleep(0.5)
                continue
            file.close()
            raise ConfigError(
                f"trainer.default_local_dir={folder}: another process trains there, and two would mix their "
                "checkpoints; wait for its end, or give this run a trainer.experiment_name of its own"
            ) from None
        except OSError:  # a file system without locks: nobody is kept out
            pass
        return file


class TakenOver(MirrorError):
    """Another attempt has taken over this run's mirror."""


def _quietly(act: Any, *arguments: Any) -> Any:
    """A note that does not reach the mirror costs nothing but itself; the next one follows soon."""
    try:
        return act(*arguments)
    except StoreError:
        return None
