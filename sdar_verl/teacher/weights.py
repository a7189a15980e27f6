"""Weights that the teacher owns: a second set of this rank's shards, blended, swapped in for a pass, saved.

Everything here works on shards. A module may be plain, FSDP2 (DTensor parameters) or FSDP1 (flat parameters);
elementwise arithmetic and copies need no communication, and no rank ever holds more than its own part.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.tensor import DTensor

from sdar_verl.atomic import write_atomically
from sdar_verl.errors import TeacherError

FORMAT = 1


@torch.no_grad()
def trainable_shards(module: nn.Module) -> dict[str, torch.Tensor]:
    """This rank's part of every trainable parameter: name -> tensor that shares the parameter's storage.

    Parameters that a forward pass left gathered are sharded again first, so that the next pass gathers what is in the
    shards then. Copies that the device has not finished are waited for: verl offloads with asynchronous ones, which
    fill the CPU's side, or overwrite what was written there, long after the call. Frozen parameters (the base under a
    LoRA adapter) are left out: they never differ.

    Args:
        module: plain, FSDP1 or FSDP2; its parameters may be on the CPU or on the device.
    """
    _synchronize()
    if isinstance(module, FSDP):
        return _flat_shards(module)
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
    shards = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            data = parameter.detach()
            shards[name] = data.to_local() if isinstance(data, DTensor) else data
    return shards


def _flat_shards(module: FSDP) -> dict[str, torch.Tensor]:
    from torch.distributed.fsdp._runtime_utils import _lazy_init

    _lazy_init(module, module)  # as verl does before it moves the shards; a second call does nothing
    names = {id(part): name for name, part in module.named_modules()}
    shards = {}
    for part in FSDP.fsdp_modules(module):
        handle = part._handle
        if handle is None or not handle.flat_param.requires_grad:
            continue
        handle.reshard(handle.uses_sharded_strategy)
        shards[names[id(part)] or "root"] = handle.flat_param.data
    return shards


class ShadowWeights:
    """A second set of a module's trainable weights, this rank's part of them.

    Args:
        module: whose weights are copied.
        dtype: of the copy; None keeps the parameters' own. An average needs float32: in bf16 a step of
            ``1 - decay`` rounds to nothing.
        on_cpu: keep the copy in CPU memory; else beside the parameters.
    """

    def __init__(self, module: nn.Module, *, dtype: torch.dtype | None = None, on_cpu: bool = True):
        self._module = module
        self._on_cpu = on_cpu
        self._weights = {name: self._copy(shard, dtype) for name, shard in trainable_shards(module).items()}

    @torch.no_grad()
    def blend(self, decay: float) -> None:
        """``theta_T <- decay * theta_T + (1 - decay) * theta``; with decay 0 a copy.

        Computed as theta_T + (1 - decay) * (theta - theta_T), so that equal weights stay equal to the bit.
        """
        for name, shard in trainable_shards(self._module).items():
            mine = self._weights[name]
            theirs = shard.to(mine.device, mine.dtype)
            if decay == 0.0:
                mine.copy_(theirs)
            else:
                mine.lerp_(theirs, 1.0 - decay)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Within the context the module has these weights; after it, its own, to the bit, also after an exception."""
        shards = trainable_shards(self._module)
        if shards.keys() != self._weights.keys():
            raise TeacherError(
                f"the module's trainable parameters have changed: {shards.keys() ^ self._weights.keys()}"
            )
        own = {name: self._copy(shard) for name, shard in shards.items()}
        try:
            self._write(shards, self._weights)
            yield
        finally:
            # Looked up again: verl may have moved the module to its device and back in between.
            self._write(trainable_shards(self._module), own)

    def save(self, file: Path, **record: Any) -> None:
        """Write this rank's weights; the file is complete or absent, never half written."""
        content = {"format": FORMAT, "record": record, "weights": self._weights}
        write_atomically(file, lambda stream: torch.save(content, stream))

    @torch.no_grad()
    def load(self, file: Path) -> dict[str, Any]:
        """Read back what :meth:`save` wrote and return its record.

        Raises:
            TeacherError: no such file, a damaged one, one that holds code, or weights of another model or sharding.
        """
        if not file.is_file():
            raise TeacherError(
                f"the checkpoint has no weights of the teacher ({file} does not exist): it is of a run with another "
                "sdar.teacher.source or another number of ranks. Resume with the settings it was written with, or "
                "start a new run from its model (actor_rollout_ref.model.path)"
            )
        try:
            # weights_only: a file from elsewhere may hold numbers, and no code.
            content = torch.load(file, map_location="cpu", weights_only=True)
            weights, record = content["weights"], content["record"]
            if not all(isinstance(value, torch.Tensor) for value in weights.values()):
                raise TypeError("its weights are not tensors")
        except Exception as error:  # torch raises what its readers raise
            first = (str(error).splitlines() or [""])[0]
            raise TeacherError(
                f"{file} is damaged, or no file of the teacher's weights ({type(error).__name__}: {first}); resume "
                "from an earlier checkpoint"
            ) from error
        mine = {name: (tuple(value.shape), value.dtype) for name, value in self._weights.items()}
        theirs = {name: (tuple(value.shape), value.dtype) for name, value in weights.items()}
        if mine != theirs:
            different = sorted(name for name in {*mine, *theirs} if mine.get(name) != theirs.get(name))
            raise TeacherError(
                f"{file} holds the teacher of another model or of another sharding; {len(different)} parameters "
                f"differ, the first is {different[0]}: {theirs.get(different[0])} there, {mine.get(different[0])} here"
            )
        for name, value in weights.items():
            self._weights[name].copy_(value)
        return record

    def _copy(self, shard: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        return shard.to("cpu" if self._on_cpu else shard.device, dtype or shard.dtype, copy=True)

    @staticmethod
    @torch.no_grad()
    def _write(shards: Mapping[str, torch.Tensor], values: Mapping[str, torch.Tensor]) -> None:
        for name, shard in shards.items():
            shard.copy_(values[name])
        _synchronize()


def _synchronize() -> None:
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is not None:
        torch.accelerator.synchronize()
