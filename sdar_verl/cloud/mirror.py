"""Checkpoints in object storage: what is there, how it gets there, how an empty folder is filled from it.

The mirror is laid out as the run's own folder (``trainer.default_local_dir``), plus ``global_step_N/manifest.json``
with names, sizes and hashes. The manifest is written last and alone makes a checkpoint count.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

from sdar_verl.atomic import write_text_atomically
from sdar_verl.checks.resume import TRACKER
from sdar_verl.cloud.nodes import on_every_node, with_newest
from sdar_verl.cloud.store import DamagedError, Store
from sdar_verl.errors import SdarError
from sdar_verl.report import layout

MANIFEST = "manifest.json"
RUN_FILE = "sdar_run.json"
_NOTES = (RUN_FILE, layout.WRITTEN_FILE)
_FOLDERS = (layout.RECORD, layout.SKILLS)
_SCHEMA = 1
_FOLDER = re.compile(r"global_step_(\d+)/")
_STREAMS = 4


class MirrorError(SdarError):
    """A checkpoint could not be mirrored, or the mirror holds none that can be used."""


class Mirror:
    """One run's mirror.

    Args:
        place: see :class:`~sdar_verl.cloud.store.Store`.
        say: prints a line.
    """

    def __init__(self, place: str, say: Callable[[str], None] | None = None):
        self.store = Store(place)
        self._synced: dict[str, tuple[int, int]] = {}
        self._say = say or (lambda text: print(f"sdar mirror: {text}", flush=True))

    # ---------------------------------------------------------------- what is there

    def steps(self) -> dict[int, bool]:
        """Step -> whether its manifest is there, in the order of steps."""
        found: dict[int, bool] = {}
        for name in self.store.names(unfinished=True):
            if match := _FOLDER.match(name):
                step = int(match[1])
                found[step] = found.get(step, False) or name == _manifest(step)
        return dict(sorted(found.items()))

    def newest(self) -> int:
        """Step of the newest checkpoint with a manifest; 0 when there is none."""
        return max((step for step, whole in self.steps().items() if whole), default=0)

    # ---------------------------------------------------------------- up

    def upload(self, folder: Path, step: int) -> dict[str, dict[str, Any]]:
        """Copy a checkpoint's files, each node those on its own disk; returns name -> size, hash and when written.

        Of several copies the newest counts: ranks that change places leave the shards of an attempt before behind.

        Raises:
            StoreError, OSError: it did not work.
        """
        self.store.delete(_manifest(step))  # of another attempt at this step, whose files are about to change
        name = f"global_step_{step}"
        holders = on_every_node(_list_files, folder / name)
        jobs = [(folder, self.store.place, name, own) for own in with_newest(holders)]
        parts = on_every_node(_upload_files, each=jobs)
        return {file: facts for part in parts for file, facts in part.items()}

    def sync(self, folder: Path) -> None:
        """Copy what changed of the run's record and learned skills, and its notes: of the experiment, of answers paid
        for."""
        paths = [folder / note for note in _NOTES]
        paths += [path for name in _FOLDERS for path in (folder / name).rglob("*")]
        paths = [path for path in paths if path.is_file()]
        here = {path.relative_to(folder).as_posix(): (path.stat().st_size, path.stat().st_mtime_ns) for path in paths}
        for name, state in here.items():
            if self._synced.get(name) != state:
                self.store.upload(folder / name, name)
                self._synced[name] = state
        for name in set(self._stored()) - here.keys():  # traces that were thinned out, versions taken back
            self.store.delete(name)

    def _stored(self) -> list[str]:
        return [name for folder in _FOLDERS for name in self.store.names(folder)]

    def seal(self, step: int, files: Mapping[str, Mapping[str, Any]], attempt: str) -> None:
        """Write the manifest of a checkpoint whose files are there: from now on it counts."""
        self.store.write_json(
            _manifest(step), {"schema": _SCHEMA, "step": step, "attempt": attempt, "files": dict(files)}
        )
        self.store.write(TRACKER, str(step).encode())

    def keep(self, number: int, newest: int) -> None:
        """Delete all but the last ``number`` whole checkpoints up to step ``newest``, and what uploads left that never
        ended; later steps are of a branch that the run has left."""
        steps = self.steps()
        kept = [step for step, sealed in steps.items() if sealed and step <= newest][-number:]
        for step in steps.keys() - kept:
            self.store.delete(_manifest(step))  # first: what is half deleted must not count
            self.store.delete_folder(f"global_step_{step}")

    # ---------------------------------------------------------------- down

    def fill(self, folder: Path) -> int:
        """Bring what ``folder`` lacks of the newest whole checkpoint, with the record, when what is there is not newer.

        verl's tracker in the folder tells what is there, but not that all shards are: it is on the trainer's node
        alone, and ranks change places when a node is replaced. A file is there when its size is right and it is not
        older than what was uploaded; one that is older is of another attempt at the step.

        Returns:
            Its step; 0 when the folder has all of it, or a newer one, already, or when the mirror holds none.

        Raises:
            MirrorError: it does not fit on the disk, or there are checkpoints and none of them can be used.
            StoreError: the mirror cannot be read, or the folder not written.
        """
        have, damaged = local_step(folder), []
        for step, whole in reversed(self.steps().items()):
            if step < have or (step == have and not whole):
                break
            name = f"{self.store.place}/global_step_{step}"
            if not whole:
                self._say(f"{name} has no {MANIFEST}, its upload never ended: passed over")
                continue
            try:
                files = _lacking(folder / f"global_step_{step}", self._files(step))
                if step == have and not files:
                    break
                self._check_room(folder, step, files)
                self._download(folder, step, files)
            except DamagedError as error:
                self._say(f"{name}: {error}: passed over")
                damaged.append(step)
                continue
            if step > have:  # else the record here is the run's own, and may be ahead
                for note in (*_NOTES, *self._stored()):
                    self.store.download(_inside(note), folder / note)
                write_text_atomically(folder / TRACKER, str(step))  # last: only now verl sees the checkpoint
            self._say(
                f"global_step_{step} came from {self.store.place}, {_size(files) / 1e6:.1f} MB in {len(files)} files"
            )
            return step
        if damaged and have == 0:
            raise MirrorError(
                f"{self.store.place} has checkpoints of the steps {', '.join(map(str, damaged))}, and none is as "
                "it was uploaded (see above): put one back, or start over with an sdar.cloud.mirror of its own"
            )
        return 0

    def _files(self, step: int) -> dict[str, dict[str, Any]]:
        manifest = self.store.read_json(_manifest(step)) or {}
        files = manifest.get("files")
        sound = isinstance(files, dict) and all(
            isinstance(facts, dict)
            and isinstance(facts.get("size"), int)
            and isinstance(facts.get("sha256"), str)
            and isinstance(facts.get("written", 0), int)
            for facts in files.values()
        )
        if manifest.get("schema") != _SCHEMA or not isinstance(files, dict) or not sound:
            raise DamagedError(f"{_manifest(step)} is damaged, or of another version")
        return {_inside(name): facts for name, facts in files.items()}

    def _check_room(self, folder: Path, step: int, files: Mapping[str, Mapping[str, Any]]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        free, need = shutil.disk_usage(folder).free, _size(files)
        if free < need:
            raise MirrorError(
                f"{need / 1e9:.1f} GB of global_step_{step} are to come from {self.store.place}, and trainer."
                f"default_local_dir={folder} has room for {free / 1e9:.1f}: put the folder on a larger disk"
            )

    def _download(self, folder: Path, step: int, files: Mapping[str, Mapping[str, Any]]) -> None:
        def one(name: str) -> None:
            path = folder / f"global_step_{step}" / name
            found = self.store.download(f"global_step_{step}/{name}", path)
            if found is None:
                raise DamagedError(f"{name} is not there")
            if not found.items() <= files[name].items():
                path.unlink()  # its size may be right: the next start would take it
                raise DamagedError(f"{name} is not what was uploaded (size or hash differ)")

        with ThreadPoolExecutor(_STREAMS) as pool:
            list(pool.map(one, files))


def local_step(folder: Path) -> int:
    """The step that verl's tracker file in ``folder`` names; 0 without one, or with one that names none."""
    try:
        return int((folder / TRACKER).read_text())
    except (OSError, ValueError):
        return 0


def fill_every_node(place: str, folder: Path) -> None:
    """:meth:`Mirror.fill` on the disks of this node and of those that train: not on a head's without devices.

    Args:
        place, folder: the mirror's, and the run's, on each node.

    Raises:
        MirrorError, StoreError: as there, on any of them.
    """
    fill_here(place, folder)  # first: on a shared disk the others find it done
    on_every_node(fill_here, place, folder, training=True)


def fill_here(place: str, folder: Path) -> int:
    """:meth:`Mirror.fill` on this node."""
    return Mirror(place).fill(folder)


def _manifest(step: int) -> str:
    return f"global_step_{step}/{MANIFEST}"


def _inside(name: str) -> str:
    """``name``, if it stays in the folder that it is written to."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name or not path.parts:
        raise DamagedError(f"the mirror names a file {name!r}, which lies outside of a run's folder")
    return name


def _size(files: Mapping[str, Mapping[str, Any]]) -> int:
    return sum(int(facts["size"]) for facts in files.values())


def _lacking(folder: Path, files: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Those of a manifest's ``files`` that are not in ``folder``, or are of another size, or older."""
    here = _list_files(folder)

    def lacks(name: str) -> bool:
        written, size = here.get(name, (0, -1))
        return size != files[name]["size"] or written < files[name].get("written", 0)  # unknown in older manifests

    return {name: facts for name, facts in files.items() if lacks(name)}


def _list_files(folder: Path) -> dict[str, tuple[int, int]]:
    """Name -> when it was last written (ns) and bytes, of all files below ``folder`` on this node."""
    found = {path.relative_to(folder).as_posix(): path.stat() for path in folder.rglob("*") if path.is_file()}
    return {name: (stat.st_mtime_ns, stat.st_size) for name, stat in found.items()}


def _upload_files(folder: Path, place: str, below: str, names: list[str]) -> dict[str, dict[str, Any]]:
    store = Store(place)

    def one(name: str) -> dict[str, Any]:
        path = folder / below / name
        return {"written": path.stat().st_mtime_ns, **store.upload(path, f"{below}/{name}")}

    with ThreadPoolExecutor(_STREAMS) as pool:
        return dict(zip(names, pool.map(one, names), strict=True))
