"""One training run of a sweep or of an evaluation plan: its command, checked before anything starts."""

from __future__ import annotations

import itertools
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdar_verl.config_folders import ConfigFolders
from sdar_verl.errors import ConfigError, SdarError

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from sdar_verl.cloud.ledger import Attempt

FINISHED = "finished"
"""File in the folder of a run that has made its last step."""

_ENDS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
_OF_SIGNALS = 128
_PLAIN = re.compile(r"[\w./+-]+", re.ASCII)


def run_command(
    config: str,
    name: str,
    seed: int,
    folder: Path,
    own: Sequence[str],
    overrides: Sequence[str],
    folders: Sequence[str] = (),
) -> list[str]:
    """What starts one run called ``name``: its ``own`` words, then the ``overrides`` of all runs, since in Hydra later
    words win; ``folders`` are the words of ConfigFolders."""
    of_it = [f"{option}={value}" for option, value in _of_a_run(name, seed, folder).items()]
    main = [sys.executable, "-m", "verl.trainer.main_ppo", *folders, "--config-name", config]
    return [*main, *own, *of_it, *overrides]


def _of_a_run(name: str, seed: int, folder: Path) -> dict[str, str]:
    """Option -> value of what no two runs share."""
    return {
        "data.seed": f"{seed}",
        "sdar.rollout.seed": f"{seed}",
        "actor_rollout_ref.actor.data_loader_seed": f"{42 + seed}",
        "trainer.experiment_name": f"{name}-{seed}",
        "trainer.default_local_dir": quoted(folder / "checkpoints"),
        "hydra.run.dir": quoted(folder / "hydra"),
    }


def check_overrides(
    arms: Mapping[str, Sequence[str]], overrides: Sequence[str], place: str, first: Sequence[str] = ()
) -> None:
    """No override undoes what makes the runs different.

    Args:
        arms: the own overrides of each arm's runs.
        overrides: of all runs, after those.
        place: where somebody changes the arms, for messages.
        first: of all runs, before those; an arm may change them.

    Raises:
        ConfigError: names each such override and what to do instead.
    """
    faults = []
    for word in dict.fromkeys([*first, *itertools.chain(*arms.values()), *overrides]):
        for option in sorted(_options([word]) & _of_a_run("", 0, Path()).keys()):
            faults.append(
                f"{word}: each run has a {option} of its own, by its name, seed and folder; leave it out (seeds: "
                "--seeds, or the plan's seeds; folders: --out)"
            )
    for word in overrides:
        names = [arm for arm, own in arms.items() if _options([word]) & _options(own)]
        if names:
            faults.append(f"{word}: that is what makes {', '.join(names)} different; leave it out and change {place}")
    if faults:
        raise ConfigError("\n".join(faults))


def _options(words: Sequence[str]) -> set[str]:
    """The options that overrides set, but for what Hydra cannot read: it tells that itself."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    from sdar_verl.checks.options import flat

    parser, found = OverridesParser.create(), set[str]()
    for word in words:
        with suppress(HydraException):
            override = parser.parse_override(word)
            found |= flat({override.key_or_group: override.value()}).keys()
    return found


def quoted(path: Path) -> str:
    """A path as the value of an override; Hydra's grammar reads few characters without quotes."""
    from hydra.core.override_parser.types import Quote, QuotedString

    text = str(path)
    if _PLAIN.fullmatch(text):
        return text
    return QuotedString(text, Quote.single).with_quotes()


def check(words: list[str], *, whole: bool) -> DictConfig:
    """Compose the config of a run's command; with ``whole`` make the checks that the run makes before Ray starts, too.

    Returns:
        The config.

    Raises:
        ConfigError: names the run and its faults.
    """
    from sdar_verl.checks.run import check_run
    from sdar_verl.compose import compose_config
    from sdar_verl.config import load_config
    from sdar_verl.quiet import be_quiet

    be_quiet()
    at = words.index("--config-name")
    name = next(word.split("=", 1)[1] for word in words if word.startswith("trainer.experiment_name="))
    try:
        given = dict(itertools.pairwise(words[:at]))
        folders = ConfigFolders(given.get("--config-dir"), given.get("--config-path"))
        config = compose_config(words[at + 1], words[at + 2 :], folders)
        sdar = load_config(config.get("sdar"))
        if whole:
            check_run(config, sdar)
        return config
    except SdarError as error:
        raise ConfigError(f"{name} cannot start, so nothing was started:\n{error}") from error


def check_finished(words: list[str], folder: Path) -> None:
    """A run that is finished is the one that ``words`` would start.

    Raises:
        ConfigError: it had other settings, or fewer steps.
    """
    from sdar_verl.config import load_config
    from sdar_verl.verl.resume import TRACKER, experiment_faults

    config = check(words, whole=False)
    faults = experiment_faults(config, load_config(config.get("sdar")))
    tracker, wanted = folder / "checkpoints" / TRACKER, config.trainer.total_training_steps
    ended = int(tracker.read_text()) if tracker.is_file() else None
    if ended is not None and wanted is not None and ended < wanted:
        faults.append(
            f"remove {folder / FINISHED} to let it go on from step {ended} to trainer.total_training_steps={wanted}"
        )
    if faults:
        raise ConfigError(
            f"{folder} is finished, and not with this command's settings; give those that it was run with, or another "
            "--out:\n" + "\n".join(faults)
        )


class OneByOne:
    """Starts the processes of runs, one after the other, and never leaves one behind.

    A context manager, for the main thread. SIGTERM, SIGHUP and Ctrl-C are handed on to the run under way as SIGTERM: it
    ends in order, after its step, and at a second one at once. An exception ends it in order, too.

    Attributes:
        status: exit status by the first signal that came, 128 and its number: no further run is to start. 0: none came.
    """

    def __init__(self) -> None:
        self.status = 0
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> OneByOne:
        # What is ignored stays so: SIGHUP below nohup.
        heard = [number for number in _ENDS if signal.getsignal(number) is not signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._hand_on) for number in heard}
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            self._process.wait()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def start(self, words: Sequence[str], folder: Path) -> subprocess.Popen[bytes]:
        """Start the run in ``folder``, which is made; it writes ``train.log`` and ``metrics.jsonl`` there."""
        folder.mkdir(parents=True, exist_ok=True)
        print(f"{folder} (log: train.log)", flush=True)
        env = {**os.environ, "VERL_FILE_LOGGER_PATH": str(folder / "metrics.jsonl")}
        with (folder / "train.log").open("a") as log:
            # In a session of its own a terminal's Ctrl-C or end reaches it once: from here, as SIGTERM.
            self._process = subprocess.Popen(
                list(words), stdout=log, stderr=subprocess.STDOUT, env=env, start_new_session=True
            )
        if self.status:  # the signal came before there was a process to hand it to
            self._process.terminate()
        return self._process

    def _hand_on(self, number: int, frame: Any) -> None:
        self.status = self.status or _OF_SIGNALS + number
        if self._process is not None:
            self._process.terminate()
        text = f"{signal.Signals(number).name}: ending the run under way after its step (again: at once)\n"
        with suppress(OSError):  # os.write, since print may be at work; there may be no terminal any more
            os.write(2, text.encode())


def attempts(folder: Path) -> list[Attempt]:
    """The ledger of the run in ``folder``; one that cannot be read is told, and counts as empty."""
    from sdar_verl.cloud import ledger
    from sdar_verl.cloud.store import Store, StoreError

    try:
        return ledger.read(Store(folder / "checkpoints"), lambda text: print(f"  {text}"))
    except StoreError as error:
        print(f"  {error}")
        return []


def finish(folder: Path) -> bool:
    """Mark a run whose process ended with status 0 as finished; or tell why it ended before its last step.

    A run that is stopped in order ends with status 0, too: its ledger alone knows.
    """
    made = attempts(folder)
    ended = made[-1].ended if made else None
    if ended == "finished":
        (folder / FINISHED).touch()
        return True
    print(f"  ended before its last step: {ended or 'its ledger does not say why'}", flush=True)
    return False


def tail(path: Path, lines: int = 12) -> list[str]:
    """The end of a log."""
    return path.read_text(errors="replace").splitlines()[-lines:]
