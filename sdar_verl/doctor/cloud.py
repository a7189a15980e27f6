"""What a run on rented machines needs before it starts; ``sdar-verl doctor --cloud``, on the nodes themselves."""

from __future__ import annotations

import os
import platform
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig

from sdar_verl.cloud.store import Store, StoreError
from sdar_verl.config import SdarConfig
from sdar_verl.doctor.findings import Finding
from sdar_verl.doctor.nodes import Node, all_reduce, cluster, look_at_nodes
from sdar_verl.errors import ConfigError

GIB = 1024**3
SHM_LEAST, SHM_GOOD = 1 * GIB, 16 * GIB
CLOCK_WARN_S, CLOCK_FAIL_S = 2.0, 300.0
"""S3 refuses requests whose clock is a quarter of an hour off."""
SLOW_BYTES = 1e9
"""Per second and rank: slower is a network, not the link between cards of a node."""
_PROBE_BYTES = 64_000_000


def check_cloud(config: DictConfig, sdar: SdarConfig) -> list[Finding]:
    """All checks of a run's nodes and bucket, in the running cluster where ``RAY_ADDRESS`` names one."""
    ranks = int(config.trainer.nnodes * config.trainer.n_gpus_per_node)
    folder = Path(str(config.trainer.default_local_dir)).expanduser().absolute()
    findings = [bucket(sdar.cloud.mirror)]
    with cluster(ranks):
        nodes = look_at_nodes(folder)
        on_cards = any(node.cards for node in nodes)
        findings += [
            enough_nodes(nodes, config),
            room(nodes, checkpoint_size(config, sdar), folder),
            shared_memory(nodes),
            clocks(nodes),
            same_versions(nodes),
            reduce_over_all(ranks, on_cards),
        ]
    return findings


def bucket(place: str | None) -> Finding:
    """Write, read and delete a file of 64 MB."""
    if place is None:
        return Finding(
            "warn",
            "mirror",
            "sdar.cloud.mirror is not set: a machine that is taken away takes the checkpoints with it",
            "sdar.cloud.mirror=s3://BUCKET/RUN",
        )
    name = ".sdar_doctor"
    try:
        with tempfile.TemporaryDirectory() as folder:
            file, back = Path(folder) / "there", Path(folder) / "back"
            file.write_bytes(os.urandom(_PROBE_BYTES))
            store = Store(place)
            began = time.monotonic()
            sent = store.upload(file, name)
            up = time.monotonic()
            got = store.download(name, back)
            down = time.monotonic()
            store.delete(name)
    except StoreError as error:
        return Finding("fail", "mirror", str(error), "look at the bucket's name, region and permissions")
    if sent != got:
        return Finding("fail", "mirror", f"{place} does not give back what was written to it")
    rates = f"{_PROBE_BYTES / 1e6 / (up - began):.0f} MB/s up, {_PROBE_BYTES / 1e6 / (down - up):.0f} MB/s down"
    return Finding("ok", "mirror", f"{place}: written, read and deleted, one stream {rates} (a checkpoint has four)")


def checkpoint_size(config: DictConfig, sdar: SdarConfig) -> float | None:
    """Bytes of a checkpoint by the planner; None for a model that it does not know."""
    from sdar_verl.planner.cloud import checkpoint_bytes
    from sdar_verl.planner.layout import Layout

    try:
        return checkpoint_bytes(Layout.from_config(config, sdar))
    except ConfigError:
        return None


def enough_nodes(nodes: Sequence[Node], config: DictConfig) -> Finding:
    """Nodes and cards against those that the run asks for."""
    wanted, each = int(config.trainer.nnodes), int(config.trainer.n_gpus_per_node)
    text = ", ".join(f"{node.name}: {node.cards}" for node in nodes)
    if not any(node.cards for node in nodes):
        return Finding("warn", "cards", f"no node has a card ({text}); on a CPU, a run is for trying", "")
    short = [node.name for node in nodes if 0 < node.cards < each]
    if len(nodes) < wanted or short:
        return Finding(
            "fail",
            "cards",
            f"trainer.nnodes={wanted} with trainer.n_gpus_per_node={each}, but there are {text}",
            "wait until all nodes have joined, or lower the numbers",
        )
    return Finding("ok", "cards", text)


def room(nodes: Sequence[Node], size: float | None, folder: Path) -> Finding:
    """Two checkpoints on each disk that holds some: of the nodes with cards and of this one; without cards, of all."""
    cards = any(node.cards for node in nodes)
    holding = [node for node in nodes if node.cards or not cards or node.name == platform.node()]
    least = min(holding, key=lambda node: node.free)
    text = f"{folder} has {least.free / 1e9:.0f} GB free on {least.name}"
    if size is None:
        return Finding("warn", "disk", f"{text}; the planner does not know this model's checkpoint", "")
    if least.free < 2 * size:
        return Finding(
            "fail",
            "disk",
            f"{text}, and two checkpoints have {2 * size / 1e9:.0f} GB",
            "a larger disk, or another trainer.default_local_dir",
        )
    return Finding("ok", "disk", f"{text}; two checkpoints have {2 * size / 1e9:.0f} GB")


def shared_memory(nodes: Sequence[Node]) -> Finding:
    """``/dev/shm``: a container has 64 MB of it, unless it is told otherwise."""
    least = min(nodes, key=lambda node: node.shm)
    text = f"/dev/shm has {least.shm / GIB:.1f} GiB on {least.name}"
    remedy = "Docker: --shm-size; Kubernetes: an emptyDir with medium: Memory (recipes/cloud/rayjob.yaml)"
    if least.shm < SHM_LEAST:
        return Finding("fail", "shared memory", text, remedy)
    return Finding(
        "warn" if least.shm < SHM_GOOD else "ok", "shared memory", text, remedy if least.shm < SHM_GOOD else ""
    )


def clocks(nodes: Sequence[Node]) -> Finding:
    """Clocks of all nodes against this process's."""
    worst = max(nodes, key=lambda node: abs(node.clock))
    text = f"{worst.name} is {worst.clock:+.1f} s off" if abs(worst.clock) > CLOCK_WARN_S else "all within 2 s"
    level = "fail" if abs(worst.clock) > CLOCK_FAIL_S else "warn" if abs(worst.clock) > CLOCK_WARN_S else "ok"
    remedy = "" if level == "ok" else "start a time service (chrony) on the nodes; S3 refuses requests of a wrong time"
    return Finding(level, "clocks", text, remedy)  # type: ignore[arg-type]


def same_versions(nodes: Sequence[Node]) -> Finding:
    """Packages must be the same everywhere: Ray and torch send each other objects."""
    apart = []
    for package in nodes[0].versions:
        found = {node.versions.get(package) for node in nodes}
        if len(found) > 1:
            where = ", ".join(f"{node.versions.get(package)} on {node.name}" for node in nodes)
            apart.append(f"{package}: {where}")
    if apart:
        return Finding("fail", "versions", "; ".join(apart), "one image, or one set-up script, for all nodes")
    return Finding("ok", "versions", f"the same on {len(nodes)} node{'s' if len(nodes) > 1 else ''}")


def reduce_over_all(ranks: int, cards: bool) -> Finding:
    """An all-reduce over all ranks."""
    if ranks < 2:
        return Finding("ok", "all-reduce", "one rank: nothing to reduce")
    try:
        rate = all_reduce(ranks, cards)
    except Exception as error:  # Ray's, torch's or NCCL's
        lines = str(error).strip().splitlines() or [""]
        return Finding(
            "fail",
            "all-reduce",
            f"{ranks} ranks did not get through: {type(error).__name__}: {lines[-1]}",
            "NCCL_DEBUG=INFO says more; security groups must let nodes talk on all ports, NCCL_SOCKET_IFNAME names the "
            "interface",
        )
    text = f"{ranks} ranks over {'NCCL' if cards else 'gloo'}: {rate / 1e9:.2f} GB/s a rank"
    if cards and rate < SLOW_BYTES:
        return Finding("warn", "all-reduce", text, "slower than a PCIe link: is NCCL on the right interface (EFA)?")
    return Finding("ok", "all-reduce", text)
