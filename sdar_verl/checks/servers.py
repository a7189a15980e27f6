"""verl's rollout servers: the devices that they share, and what they make of the requests of an agent loop."""

from __future__ import annotations

import math
from collections.abc import Iterator

from omegaconf import DictConfig, OmegaConf

from sdar_verl.checks.engine import trained_devices
from sdar_verl.checks.modes import verl_mode
from sdar_verl.config import SdarConfig

_DETERMINISTIC = "engine_kwargs.sglang.enable_deterministic_inference"


def server_faults(config: DictConfig, sdar: SdarConfig) -> list[str]:
    """Devices that do not divide, and parameters of requests that the chosen server does not obey."""
    rollout, seed = config.actor_rollout_ref.rollout, sdar.rollout.seed
    faults = [*device_faults(config)]
    if rollout.name == "sglang" and seed is not None and not OmegaConf.select(rollout, _DETERMINISTIC):
        faults.append(
            f"sdar.rollout.seed={seed}: SGLang obeys the seed of a request only with "
            f"++actor_rollout_ref.rollout.{_DETERMINISTIC}=True; set it, or sdar.rollout.seed=null"
        )
    if rollout.get("full_determinism", False) and seed is None:
        faults.append(
            "actor_rollout_ref.rollout.full_determinism=True gives all requests of a server one seed, so that the "
            "rollouts of a prompt are copies of each other; set sdar.rollout.seed, which gives each its own"
        )
    if rollout.name == "trtllm" and sdar.rollout.turn_length is not None:
        faults.append(
            f"sdar.rollout.turn_length={sdar.rollout.turn_length}: verl's server of TensorRT-LLM gives every answer "
            "data.max_response_length tokens; set actor_rollout_ref.rollout.name=vllm or sglang, or "
            "sdar.rollout.rows=per_turn"
        )
    return faults


def device_faults(config: DictConfig) -> Iterator[str]:
    """Devices that do not divide among rollout servers: verl asserts it on those that train, and of a rollout's own it
    makes as many servers as there are whole ones, or none."""
    node, rollout = config.actor_rollout_ref, config.actor_rollout_ref.rollout
    sizes = {name: rollout[f"{name}_parallel_size"] for name in ("tensor_model", "data", "pipeline_model")}
    server, separate = math.prod(sizes.values()), verl_mode(config.trainer.v1.trainer_mode) == "separate_async"
    named = " * ".join(f"{name}_parallel_size={size}" for name, size in sizes.items() if size > 1)
    fault, (devices, where) = f"actor_rollout_ref.rollout.{named} does not divide the", trained_devices(config)
    if devices % server and (node.hybrid_engine or not separate):
        yield (
            f"{fault} {devices} devices ({where}), which the rollout shares; choose a divisor"
            + (", or actor_rollout_ref.hybrid_engine=False" if separate else "")
        )
    per_node, nodes = rollout.n_gpus_per_node, rollout.nnodes
    if not separate or not per_node * nodes:
        return
    # A server lies on one node, or on whole ones.
    small, large = sorted((server, per_node))
    if large % small or per_node * nodes % server:
        yield (
            f"{fault} devices of the rollout, actor_rollout_ref.rollout.n_gpus_per_node={per_node} on each of "
            f"nnodes={nodes}; choose a divisor of the devices of a node, or whole nodes"
        )
