"""Seconds per step and phase: FLOPs and bytes over a card's data sheet, times stated efficiencies.

    pass      forward FLOPs / (N * peak * forward efficiency)
    update    3 x forward FLOPs (4 x with checkpointing) / (N * peak * training efficiency)
    rollout   turns * (prefill + answer tokens * time of a decoding step + environment)
    writing   prefill + tokens * time of a decoding step, where the policy writes contexts (of an endpoint: not known)

An episode's turns follow each other; all episodes run at once, spread over the N / TP engines (N of the rollout's own
GPUs in mode ``sdar_separate_async``, where the slower of rollout and training sets the pace). A decoding step reads
the weights once and the cache of every running episode, or is bound by its FLOPs, whichever takes longer. A teacher
that the rollout server computes is added to the rollout in full, as if no wait and no tail hid any of it.
"""

from __future__ import annotations

from dataclasses import replace

from sdar_verl.planner.hardware import Efficiency, Gpu
from sdar_verl.planner.layout import Layout


def row_flops(layout: Layout, context: float = 0.0) -> float:
    """Forward FLOPs of all rows of a step, whose prompts have ``context`` more tokens."""
    length = round(layout.prompt + context + layout.response)
    return layout.rows * layout.architecture.forward_flops([length])


def phase_flops(layout: Layout) -> dict[str, float]:
    """FLOPs of every training phase of a step, over all GPUs."""
    student, taught = row_flops(layout), 0.0 if layout.teacher == "none" else layout.teacher_share
    teacher = taught * layout.teacher_passes * row_flops(layout, layout.context)
    flops = {"old log-probs": student}
    if layout.reference_pass:
        flops["reference"] = student
    if layout.teacher not in ("none", "actor_fresh"):
        flops["teacher"] = teacher
    if layout.anchor:
        flops["anchor"] = taught * student
    flops["update"] = student * (4.0 if layout.checkpointing else 3.0)
    if layout.teacher == "actor_fresh":
        flops["update"] += teacher
    return flops


def rollout_seconds(layout: Layout, gpu: Gpu, efficiency: Efficiency) -> float:
    """Seconds until the last of a step's episodes has ended, if all have the mean number of turns."""
    answer = answer_seconds(layout, gpu, efficiency, layout.episodes, layout.prompt, layout.response)
    return layout.turns * (answer + efficiency.env_latency)


def answer_seconds(
    layout: Layout, gpu: Gpu, efficiency: Efficiency, requests: float, prompt: float, response: float
) -> float:
    """Seconds until so many requests, spread over the engines and running at once, are answered."""
    a, tp = layout.architecture, layout.tensor_parallel
    engines = max((layout.rollout_gpus or layout.gpus) // tp, 1)
    running = requests / engines
    peak, bandwidth = gpu.flops * tp * efficiency.prefill, gpu.bandwidth * tp * efficiency.decode
    prefill = running * a.forward_flops([round(prompt)], head_tokens=1) / peak
    cache = running * (prompt + response / 2) * a.kv_bytes_per_token()
    compute = running * a.forward_flops([1]) / peak
    token = max((2.0 * a.read_parameters(running) + cache) / bandwidth, compute) + efficiency.token_latency
    return prefill + response * token


def step_seconds(layout: Layout, gpu: Gpu, efficiency: Efficiency | None = None) -> dict[str, float]:
    """Seconds of every phase of a step.

    Args:
        layout: the run.
        gpu: the card.
        efficiency: assumptions; None: the defaults.
    """
    efficiency = efficiency or Efficiency()
    seconds = {"rollout": rollout_seconds(layout, gpu, efficiency)}
    if layout.writer == "policy":
        read, written = layout.writer_prompt, layout.writer_answer
        seconds["writing"] = answer_seconds(layout, gpu, efficiency, layout.writings, read, written)
    for phase, flops in phase_flops(layout).items():
        if phase == "teacher" and layout.teacher_placement == "rollout_server":
            seconds["rollout"] += flops / (layout.gpus * gpu.flops * efficiency.prefill)
            continue
        on_pool = phase == "teacher" and layout.teacher_placement == "pool"
        gpus = max(layout.teacher_gpus, 1) if on_pool else layout.gpus
        share = efficiency.training if phase == "update" else efficiency.forward
        seconds[phase] = flops / (gpus * gpu.flops * share)
    return seconds


def validation_seconds(layout: Layout, gpu: Gpu, efficiency: Efficiency | None = None) -> float:
    """Seconds of all validations of the run, whose episodes are taken to be as long as those of the training."""
    used = efficiency or Efficiency()
    return sum(n * rollout_seconds(replace(layout, episodes=size), gpu, used) for n, size in layout.validations)


def tokens_per_step(layout: Layout) -> dict[str, float]:
    """Tokens that a step reads and writes."""
    teacher = 0.0 if layout.teacher == "none" else layout.teacher_passes * layout.teacher_share
    tokens = {
        "written by the policy": layout.rows * layout.response,
        "read by the student": layout.rows * layout.prompt,
        "read by the teacher": layout.rows * teacher * (layout.prompt + layout.context),
    }
    if layout.writer:
        tokens["read by the writer of contexts"] = layout.writings * layout.writer_prompt
        tokens["written by it"] = layout.writings * layout.writer_answer
    return tokens
