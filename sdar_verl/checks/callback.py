"""Checks a run before Ray starts, through Hydra's callbacks (the recipes name this one under ``hydra.callbacks``)."""

from __future__ import annotations

import sys
import traceback
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from sdar_verl.checks.notes import run_notes
from sdar_verl.checks.run import check_run
from sdar_verl.cloud.driver import before_ray
from sdar_verl.config import load_config
from sdar_verl.errors import SdarError
from sdar_verl.quiet import be_quiet


class CheckBeforeStart(Callback):
    """Stops with exit code 2 and the faults in plain words."""

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Hydra's hook, in the driver, with the composed config."""
        be_quiet()
        try:
            sdar = load_config(config.get("sdar"))
            check_run(config, sdar)
            for note in run_notes(config, sdar):
                print(f"sdar note: {note}", file=sys.stderr, flush=True)
            stopped = before_ray(config)
        except Exception as error:
            reason = str(error) if isinstance(error, SdarError) else traceback.format_exc()
            print(f"\nThis run cannot start:\n{reason}\n", file=sys.stderr, flush=True)
            # Hydra turns a callback's exception into a warning; only this ends the program.
            raise SystemExit(2) from None
        if stopped is not None:
            print(f"\nThis run does not start, it was asked to stop: {stopped}\nThe next start goes on.\n", flush=True)
            raise SystemExit(0)
