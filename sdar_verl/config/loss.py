"""``sdar.loss``: what the teacher's signal does to training."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from sdar_verl.config.node import Node


class ScheduleConfig(Node):
    """How a value changes over the steps: value = base * window * warm-up * factor."""

    name: str = Field("constant", description="registered schedule")
    start_step: int = Field(1, ge=1, description="first step with a value other than 0")
    stop_step: int | None = Field(None, ge=2, description="first step that has 0 again; null: never")
    warmup_steps: int = Field(0, ge=0, description="linear rise over these steps from start_step on")
    options: dict[str, Any] = Field(default_factory=dict, description="keyword arguments of the schedule")

    @model_validator(mode="after")
    def _window(self) -> ScheduleConfig:
        if self.stop_step is not None and self.stop_step <= self.start_step:
            raise ValueError(f"stop_step={self.stop_step} is not after start_step={self.start_step}: the value is 0")
        return self


class AnchorConfig(Node):
    """What the student is moved to, beside the teacher: pi* ~ pi_T^(1-a-b) pi_ref^a sg[pi_theta]^b, all but pi_T on the
    student's prompt. Objectives on the sampled token read its log-prob under pi*."""

    reference: float = Field(
        0.0, ge=0, lt=1, description="a, weight of the start policy, which verl's reference worker holds; one more pass"
    )
    student: float = Field(0.0, ge=0, lt=1, description="b, weight of the student itself, detached; no pass of its own")
    student_schedule: ScheduleConfig = ScheduleConfig()

    @model_validator(mode="after")
    def _leaves_the_teacher(self) -> AnchorConfig:
        if self.reference + self.student >= 1.0:
            raise ValueError(
                f"reference={self.reference} and student={self.student} leave the teacher no weight; their sum must be "
                "below 1"
            )
        return self


class LossConfig(Node):
    """What the teacher's signal does to training: by default an auxiliary loss, ``coef * Agg[g_t * objective_t]``
    (paper, equations 5 to 8)."""

    coef: float = Field(
        0.01, ge=0, description="lambda, the strength of the signal; 0 trains plain GRPO and still reports gate and gap"
    )
    coef_schedule: ScheduleConfig = ScheduleConfig()
    signal: str = Field(
        "loss",
        description="registered signal, where the teacher enters: loss (paper), advantage_weight (RLSD), "
        "advantage_factor (AgentOPSD), advantage_shaping (ADRS), advantage_nudge (RLCSD, SIPO), "
        "advantage_turn_weight (GRSD), advantage_tilt (OCSD), advantage_distance (TIDE)",
    )
    signal_options: dict[str, Any] = Field(default_factory=dict, description="keyword arguments of the signal")
    rl_coef: float = Field(
        1.0,
        ge=0,
        description="weight of the policy gradient: a factor on the advantages, before a signal adds to them; with "
        "coef=w, 1-w mixes both convexly",
    )
    rl_schedule: ScheduleConfig = ScheduleConfig()
    policy_gradient: bool = Field(
        True, description="false leaves verl's policy gradient out (OPSD); its KL and entropy terms stay"
    )
    gate: str = Field(
        "gap",
        description="registered gate: gap (paper), entropy, soft_or, calibrated (ICSD), none (constant 1), "
        "half (constant 1/2)",
    )
    gate_options: dict[str, Any] = Field(
        default_factory=dict, description="keyword arguments of the gate; soft_or needs norm"
    )
    beta: float = Field(5.0, ge=0, description="sharpness of the gate sigmoid(beta * gap)")
    beta_schedule: ScheduleConfig = ScheduleConfig()
    centre: Literal["none", "trajectory", "batch"] = Field(
        "none", description="what is taken off the gap: nothing, its mean over the trajectory, or over the step's rows"
    )
    clamp: float | None = Field(None, gt=0, description="largest absolute gap, nats; null: no limit")
    granularity: Literal["token", "turn", "trajectory"] = Field(
        "token", description="the gap enters the gate per token, or as its mean over the turn or the trajectory"
    )
    objective: str = Field(
        "sampled",
        description="registered objective: sampled (paper), k1, k2, k3 (Skill-SD); over "
        "distributions (docs/divergences.md): forward_kl, reverse_kl, jsd",
    )
    objective_options: dict[str, Any] = Field(default_factory=dict, description="keyword arguments of the objective")
    importance_clip: float | None = Field(
        None,
        ge=1,
        description="cap c of the importance weight min(pi_theta / pi_old, c), detached, on the term of every token "
        "(SDPO's code, TRL: 2); it counts from a step's second update on; null: no weight",
    )
    divide_by: Literal["tokens", "trajectory", "weights", "gap_bearing"] = Field(
        "tokens",
        description="what the term is a mean over: response tokens, tokens of a trajectory and then trajectories "
        "(the paper's Agg), gates (a weighted mean), or tokens whose gap reaches gap_threshold",
    )
    gap_threshold: float = Field(0.05, gt=0, description="nats, for divide_by=gap_bearing")
    measure_every: int | None = Field(
        None,
        ge=1,
        description="steps between measurements of sdar/grad_share_weights: two further passes, forward and backward, "
        "over the step's first update; null: never",
    )
    support: Literal["full", "top_k"] | None = Field(
        None,
        description="objectives over distributions: over the whole vocabulary or k of its tokens; null is full",
    )
    top_k: int | None = Field(
        None,
        ge=1,
        description="support=top_k: the student's likeliest tokens (reverse_kl, jsd) or the teacher's (forward_kl); "
        "null is 100",
    )
    tail: Literal["bucket", "renormalise"] | None = Field(
        None,
        description="support=top_k: all other tokens as one event, or left out with the rest scaled to 1; "
        "null is bucket",
    )
    anchor: AnchorConfig = AnchorConfig()
    chunk_tokens: int | None = Field(
        None,
        ge=1,
        description="objectives over distributions: tokens whose logits are in memory at a time; null is 128",
    )
