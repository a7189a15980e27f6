"""A Ray cluster of several nodes on this machine, and who ran where on it."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from tests.support.verl_run import RAY_IS_LATE, STARTS

CPUS = 16
"""Virtual, per node: verl reserves three per training worker and one per helper."""


def add_node(cluster: Any, **arguments: Any) -> None:
    """``cluster.add_node``, again where a loaded machine needs more than Ray's 30 s to start one."""
    for left in reversed(range(STARTS)):
        try:
            cluster.add_node(**arguments)
            return
        except Exception as error:
            if not left or (RAY_IS_LATE not in str(error) and not isinstance(error, TimeoutError)):
                raise


@contextmanager
def ray_cluster(nodes: int, gpus: int = 1) -> Iterator[Any]:
    """Start ``nodes`` raylets with ``gpus`` virtual GPUs each, and stop them after use; nothing here connects to them.

    Yields:
        Ray's ``Cluster``; its ``address`` goes into a run's ``RAY_ADDRESS``.
    """
    from ray.cluster_utils import Cluster

    resources = {"num_cpus": CPUS, "num_gpus": gpus}
    # Of its own: a head node leaves its address in Ray's folder, and any later ray.init of this machine would join it.
    # Short, because sockets lie in there.
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")
    with mock.patch.dict(os.environ, RAY_TMPDIR=folder):
        cluster = Cluster(shutdown_at_exit=True)
        try:
            add_node(cluster, **resources, include_dashboard=False)
            for _ in range(nodes - 1):
                add_node(cluster, **resources)
            yield cluster
        finally:
            cluster.shutdown()
            shutil.rmtree(folder, ignore_errors=True)


def actor_nodes(address: str) -> dict[str, list[tuple[str, str]]]:
    """Class of every actor that the cluster has seen -> (its name, the node it ran on), from Ray's actor table."""
    from ray._private.state import GlobalState
    from ray._raylet import GcsClientOptions

    state = GlobalState()
    state._initialize_global_state(
        GcsClientOptions.create(address, None, allow_cluster_id_nil=True, fetch_cluster_id_if_nil=False)
    )
    found: dict[str, list[tuple[str, str]]] = {}
    try:
        for actor in state.actor_table(None).values():
            found.setdefault(actor["ActorClassName"], []).append((actor["Name"], actor["Address"]["NodeID"]))
    finally:
        state.disconnect()
    return found
