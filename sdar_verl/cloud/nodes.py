"""The same function on every node of the Ray cluster; without one, here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any


def on_every_node(
    function: Callable[..., Any], *arguments: Any, each: Sequence[tuple[Any, ...]] = (), training: bool = False
) -> list[Any]:
    """Call ``function`` once per node, this one first.

    Args:
        function: a function of a module.
        *arguments: the same for all.
        each: or arguments per node, in the order of an earlier call's results.
        training: only on this node, where the trainer's task is, and on those where its workers can be.
    """
    nodes = _nodes(training)
    given = list(each) or [arguments] * len(nodes)
    here, others = given[0], list(zip(nodes[1:], given[1:], strict=True))
    if others:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        task = ray.remote(num_cpus=0, max_retries=0)(function)
        asked = [
            task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(*own)
            for node, own in others
        ]
        return [function(*here), *ray.get(asked)]
    return [function(*here)]


def with_newest(holders: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Per node, the names whose newest copy it has; of equally new ones, as on a shared disk, the first is taken.

    Args:
        holders: per node, name -> when it was written; the nodes' clocks are compared.
    """
    newest: dict[str, int] = {}
    for node, names in enumerate(holders):
        for name, written in names.items():
            if name not in newest or written > holders[newest[name]][name]:
                newest[name] = node
    return [[name for name in names if newest[name] == node] for node, names in enumerate(holders)]


def _nodes(training: bool) -> list[str]:
    """Ids of the cluster's living nodes, this one first; one nameless node without Ray."""
    import ray

    if not ray.is_initialized():
        return [""]
    here = ray.get_runtime_context().get_node_id()
    alive = [node for node in ray.nodes() if node["Alive"]]
    if training:
        from verl.utils.device import get_device_name, get_resource_name

        if get_device_name() != "cpu":  # where a device is but a number that somebody gave Ray
            alive = [node for node in alive if node["Resources"].get(get_resource_name(), 0) > 0]
    return [here, *sorted(node["NodeID"] for node in alive if node["NodeID"] != here)]
