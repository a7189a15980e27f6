"""Cards and the efficiencies that the time estimate assumes."""

from __future__ import annotations

from dataclasses import dataclass

from sdar_verl.errors import ConfigError

GIB = 1024**3


@dataclass(frozen=True)
class Gpu:
    """One card, by its data sheet.

    Attributes:
        name: as ``--gpu`` takes it.
        memory: bytes.
        flops: dense bf16 operations per second.
        bandwidth: memory bytes per second.
    """

    name: str
    memory: float
    flops: float
    bandwidth: float


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100-40gb", 40 * GIB, 312e12, 1.555e12),
        Gpu("a100-80gb", 80 * GIB, 312e12, 2.039e12),
        Gpu("h100-80gb", 80 * GIB, 989e12, 3.35e12),
        Gpu("h200-141gb", 141e9, 989e12, 4.8e12),
        Gpu("b200-180gb", 180e9, 2250e12, 7.7e12),
    )
}
DEFAULT_GPU = "h100-80gb"


def find_gpu(name: str) -> Gpu:
    """The card called ``name``. Raises ConfigError that lists the known ones."""
    if name.lower() not in GPUS:
        raise ConfigError(f"--gpu {name}: unknown card; known: {', '.join(GPUS)}")
    return GPUS[name.lower()]


def recognised(name: str) -> Gpu | None:
    """The card that a driver calls ``name``, such as ``NVIDIA A100-SXM4-80GB``; None when it is not listed."""
    words = name.lower().replace("-", " ").split()
    found = [gpu for gpu in GPUS.values() if gpu.name.split("-")[0] in words]
    sized = [gpu for gpu in found if gpu.name.split("-")[1] in words]
    return (sized or found)[0] if sized or len(found) == 1 else None


@dataclass(frozen=True)
class Efficiency:
    """Shares of the data sheet's figures that real runs reach; estimates, to be set from a measured step.

    Attributes:
        training: of the FLOP/s, forward and backward under FSDP.
        forward: of the FLOP/s, log-prob passes.
        prefill: of the FLOP/s, the rollout engine reading prompts.
        decode: of the memory bandwidth, the rollout engine writing tokens.
        token_latency: seconds per decoding step that are not memory traffic (kernel launches, scheduling).
        env_latency: seconds that an environment takes for a turn.
    """

    training: float = 0.35
    forward: float = 0.4
    prefill: float = 0.4
    decode: float = 0.6
    token_latency: float = 0.01
    env_latency: float = 0.05
