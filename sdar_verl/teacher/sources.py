"""Where the teacher's weights come from: a registry of sources; ``sdar.teacher.source`` names one.

A source lives in each training worker (:mod:`sdar_verl.verl.worker`), next to the actor, and answers for
one thing: that a forward pass within :meth:`WeightSource.scoring` runs through the teacher's weights. A source of your
own is a subclass, registered from a module that ``sdar.modules`` names::

    @register_source("halfway")
    class Halfway(Ema):
        ...

This module is read by the checks before Ray starts, so it imports neither verl nor Ray.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch

from sdar_verl.algorithm.registry import Registry
from sdar_verl.config import TeacherConfig

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from sdar_verl.teacher.weights import ShadowWeights

EMA_DECAY = 0.99
UPDATE_EVERY = {"ema": 1, "snapshot": 10}


class Host(Protocol):
    """What a source sees of its worker; each is one of verl's ``TrainingWorker`` or None."""

    @property
    def actor(self) -> Any:
        """The model that is trained."""

    @property
    def ref(self) -> Any:
        """verl's reference, when the run has one."""

    @property
    def other(self) -> Any:
        """Frozen weights from ``sdar.teacher.path``."""


class WeightSource:
    """Base: the actor's own weights as they are.

    Class attributes:
        options: optional ``sdar.teacher`` options that this source reads; setting another one is an error.
        placements: where it can run.
        own_weights: it keeps weights of its own, which belong into the checkpoint.
        own_engine: the pass runs through another engine than the actor's, or through its frozen base alone.
        follows: its weights change as the actor is trained.
        per_update: the teacher is scored inside each optimizer update, not once per step.
        equals_student: ``always``, ``start`` (at the first step of a fresh run) or ``never``.

    Args:
        settings: the ``sdar.teacher`` node.
        host: the worker.
    """

    options: ClassVar[frozenset[str]] = frozenset()
    placements: ClassVar[tuple[str, ...]] = ("colocated",)
    own_weights: ClassVar[bool] = False
    own_engine: ClassVar[bool] = False
    follows: ClassVar[bool] = True
    per_update: ClassVar[bool] = False
    equals_student: ClassVar[str] = "start"

    def __init__(self, settings: TeacherConfig, host: Host):
        self.settings = settings
        self.host = host

    @classmethod
    def faults(cls, config: DictConfig, settings: TeacherConfig) -> list[str]:
        """Why this source cannot be had in this run, one message each; called before Ray starts."""
        return []

    @classmethod
    def staleness(cls, settings: TeacherConfig, steps_done: int) -> int | None:
        """Training steps since the teacher took weights from the actor; None when it never does.

        Args:
            settings: the ``sdar.teacher`` node.
            steps_done: training steps whose update is done.
        """
        return 0

    @property
    def worker(self) -> Any:
        """The ``TrainingWorker`` through which the pass runs."""
        return self.host.actor

    @contextmanager
    def scoring(self) -> Iterator[dict[str, Any]]:
        """The teacher's weights are in place; yields options of the worker's ``score``: ``no_lora_adapter``,
        ``on_device``."""
        yield {}

    def updated(self, step: int) -> None:
        """The update of training step ``step`` is done."""

    def save(self, file: Path, step: int) -> None:
        """Write this rank's weights; called before verl writes the actor's."""

    def load(self, file: Path) -> None:
        """Read them back; called after verl has read the actor's."""


_SOURCES: Registry[Callable[..., WeightSource]] = Registry("teacher source")


def register_source(name: str) -> Callable[[type[WeightSource]], type[WeightSource]]:
    """Class decorator: make a source selectable as ``name``. Raises ValueError when the name is taken."""
    return _SOURCES.register(name)  # type: ignore[return-value]


def get_source(name: str) -> type[WeightSource]:
    """The class registered as ``name``. Raises ValueError that lists the known names."""
    return _SOURCES.get(name)  # type: ignore[return-value]


def list_sources() -> list[str]:
    """Names of all sources, sorted; without ``none``, which is the absence of one."""
    return _SOURCES.names()


@register_source("actor")
class Actor(WeightSource):
    """The weights of the start of the step: one pass before the updates, no second copy (the paper's teacher)."""

    placements = ("colocated", "rollout_server")
    equals_student = "always"


@register_source("actor_fresh")
class ActorFresh(WeightSource):
    """The weights of the moment: scored again before each optimizer update of the step, never one update old.

    With one update per step this is ``actor``. Weights do not change within an update, so one pass over its rows gives
    what a pass in each micro-batch would.
    """

    equals_student = "always"
    per_update = True


@register_source("reference")
class Reference(WeightSource):
    """Frozen weights: those of ``model.path``, through verl's reference; or those of ``sdar.teacher.path``. An adapter
    that training starts from is not in them."""

    options = frozenset({"path"})
    placements = ("colocated", "pool")
    own_engine = True
    follows = False

    @classmethod
    def faults(cls, config: DictConfig, settings: TeacherConfig) -> list[str]:
        own_copy = settings.path is not None or settings.placement == "pool"
        if own_copy or uses_lora(config) or has_reference(config):
            return []
        return [
            "sdar.teacher.source=reference uses verl's reference worker, which this run does not start; set "
            "actor_rollout_ref.actor.use_kl_loss=True (kl_loss_coef may be 0)"
        ]

    @classmethod
    def staleness(cls, settings: TeacherConfig, steps_done: int) -> int | None:
        return None if settings.path is not None else steps_done

    @property
    def worker(self) -> Any:
        return self.host.other or self.host.ref or self.host.actor

    @contextmanager
    def scoring(self) -> Iterator[dict[str, Any]]:
        # Without an engine of its own, the frozen weights are the base under the adapter.
        yield {"no_lora_adapter": True} if self.worker is self.host.actor else {}


@register_source("lora_base")
class LoraBase(WeightSource):
    """The model under the LoRA adapter: frozen weights without a second copy, those training starts from unless it
    starts from an adapter (``model.lora_adapter_path``)."""

    follows = False

    @classmethod
    def faults(cls, config: DictConfig, settings: TeacherConfig) -> list[str]:
        if uses_lora(config):
            return []
        return [
            "sdar.teacher.source=lora_base switches the LoRA adapter off, and this run trains none; set "
            "actor_rollout_ref.model.lora_rank, or use sdar.teacher.source=reference"
        ]

    @classmethod
    def staleness(cls, settings: TeacherConfig, steps_done: int) -> int | None:
        return steps_done

    @contextmanager
    def scoring(self) -> Iterator[dict[str, Any]]:
        yield {"no_lora_adapter": True}


class _OwnWeights(WeightSource):
    """A second set of the trainable weights in the actor's worker, swapped in for the pass."""

    own_weights = True
    name: ClassVar[str]

    def __init__(self, settings: TeacherConfig, host: Host):
        super().__init__(settings, host)
        self.weights = self._copy_of_actor()
        self.updates = 0

    @classmethod
    def faults(cls, config: DictConfig, settings: TeacherConfig) -> list[str]:
        fsdp = config.actor_rollout_ref.actor.get("fsdp_config", None) or {}
        faults = []
        if (fsdp.get("qat", None) or {}).get("enable", False):
            faults.append(
                f"sdar.teacher.source={settings.source} cannot swap weights under quantization-aware training, whose "
                "scales are not parameters; set actor_rollout_ref.actor.fsdp_config.qat.enable=False or use "
                "source=actor"
            )
        for option in ("param_offload", "offload_policy"):
            if settings.offload is False and fsdp.get(option, False):
                faults.append(
                    "sdar.teacher.offload=False has no effect with "
                    f"actor_rollout_ref.actor.fsdp_config.{option}=True: the actor's own weights wait in CPU memory, "
                    "and they change places there; leave sdar.teacher.offload null"
                )
        return faults

    @classmethod
    def staleness(cls, settings: TeacherConfig, steps_done: int) -> int | None:
        return steps_done % cls._period(settings)

    @classmethod
    def _period(cls, settings: TeacherConfig) -> int:
        return settings.update_every if settings.update_every is not None else UPDATE_EVERY[cls.name]

    @contextmanager
    def scoring(self) -> Iterator[dict[str, Any]]:
        with self.weights.swapped_in():
            yield {}

    def updated(self, step: int) -> None:
        if step % self._period(self.settings) == 0:
            self.weights.blend(self._decay())
            self.updates += 1

    def save(self, file: Path, step: int) -> None:
        self.weights.save(file, source=self.settings.source, step=step, updates=self.updates)

    def load(self, file: Path) -> None:
        self.updates = self.weights.load(file)["updates"]

    def _decay(self) -> float:
        return 0.0

    def _copy_of_actor(self) -> ShadowWeights:
        from sdar_verl.teacher.weights import ShadowWeights

        return ShadowWeights(
            self.host.actor.engine.module, dtype=self._dtype(), on_cpu=self.settings.offload is not False
        )

    def _dtype(self) -> Any:
        return None


@register_source("snapshot")
class Snapshot(_OwnWeights):
    """A copy of the actor, renewed every ``update_every`` steps."""

    name = "snapshot"
    options = frozenset({"update_every", "offload"})


@register_source("ema")
class Ema(_OwnWeights):
    """theta_T <- decay * theta_T + (1 - decay) * theta, every ``update_every`` steps; kept in float32."""

    name = "ema"
    options = frozenset({"ema_decay", "update_every", "offload"})

    def _decay(self) -> float:
        return EMA_DECAY if self.settings.ema_decay is None else self.settings.ema_decay

    def _dtype(self) -> Any:
        return torch.float32


def uses_lora(config: DictConfig) -> bool:
    """Whether verl trains a LoRA adapter; its base then serves as the reference, too. A path to one is not enough."""
    return bool(config.actor_rollout_ref.model.get("lora_rank", 0) > 0)


def has_reference(config: DictConfig) -> bool:
    """Whether verl starts a reference model."""
    return bool(config.actor_rollout_ref.actor.use_kl_loss or config.algorithm.use_kl_in_reward)
