"""verl's training worker that keeps the weights of a step's start, for the separate asynchronous trainer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from verl.experimental.separation.engine_workers import DetachActorWorker

from sdar_verl.teacher.weights import trainable_shards


class DetachWorker(DetachActorWorker):
    """verl's, whose saved weights are copies wherever they lie, and of the shards.

    verl saves weights by moving them to CPU memory. What is there already (the CPU default, parameters that are
    offloaded) is not moved but shared, and would follow every update. And it takes parameters as they are: FSDP1 leaves
    some gathered after a forward pass, and what is written into those is lost with the next; what is being offloaded
    has not arrived in CPU memory yet.
    """

    @property
    def copy_handler(self) -> Callable[[Any], Any]:
        """verl's, and no tensor of what it gives is shared with the module."""
        save = super().copy_handler

        def copy(module: torch.nn.Module) -> Any:
            trainable_shards(module)  # shards again what is gathered, and waits for what is on its way
            return _own_copies(save(module), _storages(module))

        return copy

    @property
    def restore_handler(self) -> Callable[..., None]:
        """verl's, into the shards."""
        load = super().restore_handler

        def restore(module: torch.nn.Module, *saved: Any) -> None:
            trainable_shards(module)  # shards again what is gathered, and waits for what is on its way
            load(module, *saved)

        return restore


def _storages(module: torch.nn.Module) -> set[int]:
    """Where the parameters of this rank lie."""
    return {
        (parameter.to_local() if isinstance(parameter, DTensor) else parameter).untyped_storage().data_ptr()
        for parameter in module.parameters()
    }


def _own_copies(saved: Any, shared: set[int]) -> Any:
    """The same nesting of dicts, tuples and lists; a tensor in one of the ``shared`` storages is copied."""
    if isinstance(saved, torch.Tensor):
        return saved.clone() if saved.untyped_storage().data_ptr() in shared else saved
    if isinstance(saved, dict):
        return {name: _own_copies(value, shared) for name, value in saved.items()}
    # verl's tuple of FSDP2 also holds a sharding specification, a plain object.
    if type(saved) in (tuple, list):
        return type(saved)(_own_copies(value, shared) for value in saved)
    return saved
