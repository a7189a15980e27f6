"""Tells, before Ray starts, a run that names our trainer and has no ``sdar`` node.

:mod:`sdar_verl.checks.callback` comes with the node. This one is part of Hydra's own config in every process that has
loaded the plugin (:mod:`sdar_verl.hydra_search_path`), and imports nothing.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

NO_NODE = (
    "the config has no `sdar:` node: use --config-name sdar_ppo for a recipe of verl's, and say what the teacher sees, "
    "for instance sdar.context.sources=[answer]; or use a recipe of our own (--config-name sdar_alfworld), or add "
    "`- sdar_node` and `- method: sdar` to the defaults of your YAML"
)


class NeedsNode(Callback):
    """Stops with exit code 2."""

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Hydra's hook, in the driver, with the composed config."""
        mode: object = None
        with suppress(OmegaConfBaseException):  # another program's config
            mode = OmegaConf.select(config, "trainer.v1.trainer_mode")
        if str(mode).startswith("sdar") and "sdar" not in config:
            print(f"\nThis run cannot start:\ntrainer.v1.trainer_mode={mode}: {NO_NODE}\n", file=sys.stderr, flush=True)
            raise SystemExit(2)
