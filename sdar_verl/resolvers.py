"""OmegaConf resolvers that the recipes use."""

from __future__ import annotations

from typing import Any

from omegaconf import OmegaConf

from sdar_verl.local import joins_ray_cluster, start_policy


def devices(*, _root_: Any) -> int:
    """Devices of a run on one machine: those of the trainer, of a rollout of its own, of the teacher's pool."""
    pairs = (
        ("trainer.nnodes", "trainer.n_gpus_per_node"),
        ("actor_rollout_ref.rollout.nnodes", "actor_rollout_ref.rollout.n_gpus_per_node"),
        ("sdar.teacher.pool_nodes", "sdar.teacher.pool_gpus_per_node"),
    )
    total = 0
    for nodes, each in pairs:
        count, size = (OmegaConf.select(_root_, name) for name in (nodes, each))
        # A pool on one node needs no number of nodes.
        total += (1 if count is None else count) * (size or 0)
    return total


def own_ray(value: Any) -> Any:
    """``value`` for a Ray cluster that this process will start; None for one that runs, which has its own resources."""
    return None if joins_ray_cluster() else value


OmegaConf.register_new_resolver("sdar_devices", devices, replace=True)
OmegaConf.register_new_resolver("sdar_own_ray", own_ray, replace=True)
OmegaConf.register_new_resolver("sdar_start_policy", start_policy, replace=True)
