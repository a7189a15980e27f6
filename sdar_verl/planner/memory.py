"""Bytes per GPU in each phase of a step, under FSDP (full sharding), with the rollout engine beside it where one is.

    weights     training_bytes * P / N           sharded over N ranks
    moments     8 * P / N                        Adam, float32
    gradients   training_bytes * P / N           from the first backward pass to the optimizer's step
    gathered    2 layers in bf16, and the root's embedding and head       unsharded while they compute
    activations T * [2 h L + one layer's]        checkpointing; without: T * L * one layer's
    logits      T * V * bytes of the phase       bf16 logits, their gradient, and what the objective adds

P weights, N GPUs that they are dealt out over (all, or ``fsdp_size``), T tokens of a micro-batch. The allocator's
fragmentation, the CUDA context and NCCL's buffers are a flat ``OVERHEAD``.
"""

from __future__ import annotations

from dataclasses import dataclass

from sdar_verl.algorithm.divergences import DIVERGENCES
from sdar_verl.planner.hardware import GIB
from sdar_verl.planner.layout import Layout

OVERHEAD = 4.0 * GIB
"""CUDA context, NCCL buffers, fragmentation: an allowance, not a measurement."""

SLEEPING_ENGINE = 1.5 * GIB
"""What a rollout engine keeps while it sleeps: an allowance."""


@dataclass(frozen=True)
class Phase:
    """One phase's memory on one GPU: part -> bytes."""

    name: str
    parts: dict[str, float]

    @property
    def total(self) -> float:
        """Bytes."""
        return sum(self.parts.values())


def trainable(layout: Layout) -> float:
    """Weights that the optimizer updates: all, or LoRA's two factors on every matrix of every layer."""
    if layout.lora_rank == 0:
        return float(layout.architecture.parameters)
    return float(layout.lora_rank * layout.architecture.lora_sides)


def sharded(layout: Layout) -> dict[str, float]:
    """Bytes on a GPU of everything that FSDP deals out, while it is there."""
    weights, updated, shards = layout.architecture.parameters, trainable(layout), layout.shards
    return {
        "actor weights": layout.training_bytes * weights / shards,
        "optimizer moments": 8.0 * updated / shards,
        "gradients": layout.training_bytes * updated / shards,
        "reference weights": 2.0 * weights / layout.reference_shards,
        "teacher weights": layout.training_bytes * weights / shards,
    }


def resident(layout: Layout) -> dict[str, float]:
    """What of actor, reference and teacher stays on a GPU through all phases, sharded."""
    own_teacher = layout.teacher in ("ema", "snapshot") and layout.teacher_placement == "colocated"
    stays = {
        "actor weights": not layout.actor_offload,
        "optimizer moments": not layout.optimizer_offload,
        "reference weights": layout.reference and layout.lora_rank == 0 and not layout.reference_offload,
        "teacher weights": own_teacher and not layout.teacher_offload,
    }
    parts = {name: size for name, size in sharded(layout).items() if stays.get(name)}
    return {"CUDA, NCCL, fragments": OVERHEAD, **parts}


def gathered_bytes(layout: Layout) -> float:
    """Unsharded bf16 weights: the layer at work, the one that is fetched meanwhile, embedding and head."""
    a = layout.architecture
    root = a.vocabulary * a.hidden * (1 if a.tied else 2)
    return 2.0 * (2 * a.layer_parameters + root)


def activation_bytes(layout: Layout, tokens: float) -> float:
    """Of one micro-batch's backward pass."""
    a = layout.architecture
    if layout.checkpointing:
        return tokens * (2.0 * a.hidden * a.layers + a.layer_activation_bytes())
    return float(tokens * a.activation_bytes())


def logits_bytes(layout: Layout, tokens: float, *, backward: bool, entropy: bool) -> float:
    """Logits and what is made of them, for ``tokens`` of a micro-batch.

    bf16 logits, their gradient in place (flash-attn's cross entropy), and for the entropy a softmax and its product
    with them; float32 where a gradient is kept.
    """
    per_logit = 2.0 + ((8.0 if backward else 4.0) if entropy else 0.0)
    return tokens * layout.architecture.vocabulary * per_logit


def divergence_bytes(layout: Layout, tokens: float) -> float:
    """What a distribution-level objective adds to an update (docs/divergences.md).

    The chunk's logits and three tensors made of them, and the gradient of the head's weights while it is summed up, in
    float32, with a chunk's part of it in bf16. Over the full vocabulary also a copy of the teacher's head and its
    hidden states, in bf16.
    """
    if layout.support is None:
        return 0.0
    a = layout.architecture
    head = float(a.vocabulary * a.hidden)
    total = 16.0 * min(tokens, layout.chunk_tokens) * a.vocabulary
    if layout.objective in DIVERGENCES:  # what an anchored target says of the sampled token has no gradient
        total += 6.0 * head
    if layout.support == "full":
        total += 2.0 * head + 2.0 * tokens * a.hidden
    return total


def prompt_scores_bytes(layout: Layout) -> float:
    """What vLLM makes of a request for a prompt's log-probs, outside its share of the card: the logits of the tokens of
    it that are computed at a time, in bf16, and their log-probs in float32, which its memory profile does not know."""
    return 6.0 * min(layout.rollout_tokens, layout.longest) * layout.architecture.vocabulary


def phases(layout: Layout, gpu_memory: float) -> list[Phase]:
    """Memory of every phase on one training GPU; the rollout's on one of its own where no engine shares these.

    Args:
        layout: the run.
        gpu_memory: bytes of the card; the rollout engine takes its share of it.
    """
    a, base, parts = layout.architecture, resident(layout), sharded(layout)

    def at_work(*names: str) -> dict[str, float]:
        asleep = {"sleeping rollout engine": SLEEPING_ENGINE} if layout.shares_rollout else {}
        return {**base, **asleep, **{name: parts[name] for name in names}}

    # A row is never split: the longest one is a micro-batch even when the budget is smaller.
    forward_tokens = max(layout.forward_tokens, layout.longest)
    update_tokens = max(layout.micro_tokens, layout.longest)
    passes = {
        "gathered weights": gathered_bytes(layout),
        "activations": forward_tokens * a.layer_activation_bytes(),
    }

    def logits(entropy: bool) -> dict[str, float]:
        return {"logits": logits_bytes(layout, forward_tokens, backward=False, entropy=entropy)}

    beside = base if layout.shares_rollout else {"CUDA, NCCL, fragments": OVERHEAD}
    rollout = {**beside, "rollout engine": layout.rollout_share * gpu_memory}
    if layout.teacher_placement == "rollout_server":
        rollout["log-probs of the teacher's rows"] = prompt_scores_bytes(layout)
    found = [
        Phase("rollout", rollout),
        Phase("old log-probs", {**at_work("actor weights"), **passes, **logits(True)}),  # verl logs the entropy
    ]
    if layout.reference_pass or layout.teacher == "reference":
        read = "actor weights" if layout.lora_rank else "reference weights"  # the base under the actor's adapter
        found.append(Phase("reference", {**at_work(read), **passes, **logits(layout.teacher == "reference")}))
    if layout.teacher not in ("none", "reference") and layout.teacher_placement == "colocated":
        own = ["teacher weights"] if layout.teacher in ("ema", "snapshot") else []
        found.append(Phase("teacher", {**at_work("actor weights", *own), **passes, **logits(True)}))
    fresh = 2.0 if layout.teacher == "actor_fresh" else 1.0  # the teacher's rows ride in the student's micro-batch
    found.append(
        Phase(
            "update",
            {
                **at_work("actor weights", "optimizer moments", "gradients"),
                "gathered weights": gathered_bytes(layout),
                "activations": activation_bytes(layout, update_tokens),
                "logits": logits_bytes(layout, update_tokens, backward=True, entropy=layout.entropy) * fresh,
                **({"divergence": divergence_bytes(layout, update_tokens)} if layout.support else {}),
            },
        )
    )
    return found


def rollout_need(layout: Layout) -> tuple[float, float]:
    """Bytes per GPU of the rollout engine's weights, and of the cache of one episode's longest prompt and answer."""
    a = layout.architecture
    weights = 2.0 * a.parameters / layout.tensor_parallel
    cache = a.kv_bytes_per_token() * layout.longest / layout.tensor_parallel
    return weights, cache
