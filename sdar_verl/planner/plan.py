"""Puts memory and time together: does it fit, on how many cards, what to change when it does not."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from sdar_verl.planner.hardware import GIB, Efficiency, Gpu
from sdar_verl.planner.layout import Layout
from sdar_verl.planner.memory import Phase, phases, rollout_need
from sdar_verl.planner.timing import step_seconds, validation_seconds

MOST_GPUS = 64
GPUS_PER_NODE = 8
LORA_RANK = 32
"""Of the adapter that a plan suggests to a run without one."""


@dataclass(frozen=True)
class Plan:
    """One layout on one kind of card.

    Attributes:
        layout: the run.
        gpu: the card.
        phases: memory per phase on a training GPU.
        seconds: time per phase of a step.
        untaught: the same, of a step after the teacher's last.
        validating: seconds of all validations of the run.
    """

    layout: Layout
    gpu: Gpu
    phases: list[Phase]
    seconds: dict[str, float]
    untaught: dict[str, float]
    validating: float

    @property
    def peak(self) -> Phase:
        """The phase that needs most memory."""
        return max(self.phases, key=lambda phase: phase.total)

    @property
    def faults(self) -> list[str]:
        """Why it does not fit, and what to change; empty when it fits."""
        faults, layout = [], self.layout
        heads = f"attention heads of {layout.architecture.name}"
        for option, size, whole, what in (
            ("rollout.tensor_model_parallel_size", layout.tensor_parallel, layout.architecture.heads, heads),
            ("actor.fsdp_config.fsdp_size", layout.shards, layout.gpus, "training GPUs"),
            ("ref.fsdp_config.fsdp_size", layout.reference_shards, layout.gpus, "training GPUs"),
        ):
            if whole % size:
                faults.append(f"actor_rollout_ref.{option}={size} does not divide the {whole} {what}: choose a divisor")
        if layout.mini_batch_rows % layout.gpus:
            faults.append(
                f"sdar.update.mini_batch_rows={layout.mini_batch_rows} is no multiple of the {layout.gpus} training "
                "GPUs: choose one, or another number of GPUs"
            )
        for phase in self.phases:
            if phase.total > self.gpu.memory:
                largest = max(phase.parts, key=lambda part: phase.parts[part])
                faults.append(
                    f"{phase.name} needs {phase.total / GIB:.0f} GiB of {self.gpu.memory / GIB:.0f}, most of it "
                    f"{largest} ({phase.parts[largest] / GIB:.0f} GiB): {self._remedies(phase)}"
                )
        weights, cache = rollout_need(self.layout)
        given = self.layout.rollout_share * self.gpu.memory
        if weights + cache > given:
            faults.append(
                f"the rollout engine gets {given / GIB:.0f} GiB, but its weights take {weights / GIB:.0f} and one "
                f"episode's cache {cache / GIB:.1f}: raise actor_rollout_ref.rollout.gpu_memory_utilization or "
                "actor_rollout_ref.rollout.tensor_model_parallel_size"
            )
        if self.layout.teacher_placement == "pool" and self.layout.teacher_gpus < 1:
            faults.append("sdar.teacher.placement=pool needs sdar.teacher.pool_gpus_per_node")
        return faults

    def _remedies(self, phase: Phase) -> str:
        """What saves most of the phase, by trying it; savings of less than a tenth of what is missing are none."""
        saved = {}
        for layout in _single_changes(self.layout):
            after = next(other for other in phases(layout, self.gpu.memory) if other.name == phase.name)
            saved[" ".join(changed(self.layout, layout))] = phase.total - after.total
        least = (phase.total - self.gpu.memory) / 10
        named = sorted((words for words in saved if saved[words] > least), key=lambda words: -saved[words])
        advice = ", or ".join(f"{words} saves {saved[words] / GIB:.0f} GiB" for words in named)
        return advice or "use a card with more memory"

    @property
    def fits(self) -> bool:
        """Every phase fits."""
        return not self.faults

    @property
    def cards(self) -> int:
        """GPUs in all."""
        return self.layout.gpus + self.layout.gpus_apart

    @property
    def step(self) -> float:
        """Seconds of a step with a teacher; phases follow each other, but a separate rollout runs beside the others."""
        return self._lasts(self.seconds)

    @property
    def hours(self) -> float:
        """Of the run."""
        after = min(self.layout.untaught_steps, self.layout.steps)
        steps = self.step * (self.layout.steps - after) + self._lasts(self.untaught) * after
        return (steps + self.validating) / 3600.0

    @property
    def gpu_hours(self) -> float:
        """GPU-hours of the run."""
        return self.hours * self.cards

    def _lasts(self, seconds: dict[str, float]) -> float:
        if not self.layout.rollout_gpus:
            return sum(seconds.values())
        return max(seconds["rollout"], sum(seconds.values()) - seconds["rollout"])


def make_plan(layout: Layout, gpu: Gpu, efficiency: Efficiency | None = None) -> Plan:
    """Memory and time of ``layout`` on ``gpu``."""
    untaught = replace(layout, teacher="none", anchor=False, writer="")
    seconds, after = (step_seconds(run, gpu, efficiency) for run in (layout, untaught))
    validating = validation_seconds(layout, gpu, efficiency)
    return Plan(layout, gpu, phases(layout, gpu.memory), seconds, after, validating)


def recommend(layout: Layout, gpu: Gpu, efficiency: Efficiency | None = None) -> Plan | None:
    """The layout that fits on fewest cards; offloading and smaller micro-batches only where it does not fit without.

    Args:
        layout: the wished run; its number of GPUs is ignored.
        gpu: the card.
        efficiency: assumptions for the time.

    Returns:
        A plan that fits, or None when none does up to 64 GPUs.
    """
    gpus = 1
    while gpus <= MOST_GPUS:
        for candidate in _gentler(layout.with_gpus(gpus)):
            plan = make_plan(candidate, gpu, efficiency)
            if plan.fits:
                return plan
        gpus *= 2
    return None


def _single_changes(layout: Layout) -> list[Layout]:
    """``layout`` with one thing changed that may save memory in some phase."""
    row = layout.longest  # it is not cut
    settings: list[dict[str, Any]] = [
        *({f"{what}_offload": True} for what in ("actor", "optimizer", "reference", "teacher")),
        {"checkpointing": True},
        {"dynamic": True, "micro_tokens": max(layout.micro_tokens // 2 if layout.dynamic else row, row)},
        {
            "forward_dynamic": True,
            "forward_tokens": max(layout.forward_tokens // 2 if layout.forward_dynamic else row, row),
        },
        {"rollout_share": layout.rollout_share / 2},
        {"rollout_tokens": layout.rollout_tokens // 2},
        {"chunk_tokens": max(layout.chunk_tokens // 2, 1)},
        {"support": layout.support and "top_k"},
        {"fsdp_size": -1, "reference_fsdp_size": -1},
        {"lora_rank": layout.lora_rank or LORA_RANK},
    ]
    return [layout.with_gpus(2 * layout.gpus), *(replace(layout, **setting) for setting in settings)]


def _gentler(layout: Layout) -> list[Layout]:
    """``layout`` and what saves memory, from what costs least time to what costs most."""
    candidates = [layout]
    candidates.append(replace(candidates[-1], reference_offload=True, teacher_offload=True))
    candidates.append(replace(candidates[-1], checkpointing=True))
    candidates.append(replace(candidates[-1], optimizer_offload=True))
    candidates.append(replace(candidates[-1], actor_offload=True))
    for tokens in (max(size, layout.longest) for size in (16384, 8192, 4096)):  # a row is not cut
        smaller = replace(
            candidates[-1],
            micro_tokens=min(layout.micro_tokens, tokens),
            forward_tokens=min(layout.forward_tokens, tokens),
            dynamic=True,
            forward_dynamic=True,
        )
        candidates.append(smaller)
        candidates.append(replace(smaller, rollout_share=min(layout.rollout_share, 0.4)))
    return candidates


def changed(wished: Layout, found: Layout, cards: int | None = None) -> list[str]:
    """Overrides that turn the one layout into the other.

    Args:
        wished: the recipe's.
        found: another.
        cards: of each machine that it is for, whose number is then said in any case; None: 8.
    """
    options = {
        "tensor_parallel": "actor_rollout_ref.rollout.tensor_model_parallel_size",
        "fsdp_size": "actor_rollout_ref.actor.fsdp_config.fsdp_size",
        "reference_fsdp_size": "actor_rollout_ref.ref.fsdp_config.fsdp_size",
        "lora_rank": "actor_rollout_ref.model.lora_rank",
        "checkpointing": "actor_rollout_ref.model.enable_gradient_checkpointing",
        "dynamic": "actor_rollout_ref.actor.use_dynamic_bsz",
        "micro_tokens": "actor_rollout_ref.actor.ppo_max_token_len_per_gpu",
        "forward_dynamic": "actor_rollout_ref.rollout.log_prob_use_dynamic_bsz",
        "forward_tokens": "actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu",
        "actor_offload": "actor_rollout_ref.actor.fsdp_config.param_offload",
        "optimizer_offload": "actor_rollout_ref.actor.fsdp_config.optimizer_offload",
        "reference_offload": "actor_rollout_ref.ref.fsdp_config.param_offload",
        "teacher_offload": "sdar.teacher.offload",
        "rollout_share": "actor_rollout_ref.rollout.gpu_memory_utilization",
        "rollout_tokens": "actor_rollout_ref.rollout.max_num_batched_tokens",
        "chunk_tokens": "sdar.loss.chunk_tokens",
        "support": "sdar.loss.support",
    }
    differ = {name for name in options if getattr(found, name) != getattr(wished, name)}
    for switch, tokens in (("dynamic", "micro_tokens"), ("forward_dynamic", "forward_tokens")):
        differ |= {tokens} if switch in differ else set()
    gpus = []
    if cards or found.gpus != wished.gpus:
        nodes = -(-found.gpus // (cards or GPUS_PER_NODE))
        gpus = [f"trainer.nnodes={nodes}", f"trainer.n_gpus_per_node={found.gpus // nodes}"]
    return gpus + [f"{option}={getattr(found, name)}" for name, option in options.items() if name in differ]
