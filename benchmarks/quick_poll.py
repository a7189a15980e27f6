"""verl's own trainer looks for finished episodes every .02 s in place of 2; loaded by VERL_USE_EXTERNAL_MODULES."""

from __future__ import annotations

from typing import Any

import wrapt


def _soon(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    wrapped(*args, **kwargs)
    instance.poll_interval = 0.02


def _wrap(module: Any) -> None:
    wrapt.wrap_function_wrapper(module, "ReplayBuffer.__init__", _soon)


wrapt.register_post_import_hook(_wrap, "verl.trainer.ppo.v1.replay_buffer")
