"""Typed settings of the ``sdar:`` node: every option, its allowed range and where its default comes from.

The node is plain YAML for Hydra; :func:`load_config` turns it into these models, and an unknown key or a value out of
range is an error that names the option. Defaults are the paper's (arXiv:2605.15155, section 4.1) unless a line says
otherwise. Options that belong to verl (group size, KL, learning rate, clip range, ...) stay in verl's own nodes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from omegaconf import DictConfig, OmegaConf
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from sdar_verl.errors import ConfigError


class _Node(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)


class ScheduleConfig(_Node):
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


class AnchorConfig(_Node):
    """What an objective over distributions moves the student to, beside the teacher: pi* ~ pi_T^(1-a-b) pi_ref^a
    sg[pi_theta]^b, all but pi_T on the student's prompt."""

    reference: float = Field(
        0.0, ge=0, lt=1, description="a, weight of the start policy, which verl's reference worker holds; one more pass"
    )
    student: float = Field(0.0, ge=0, lt=1, description="b, weight of the student itself, detached; no pass of its own")

    @model_validator(mode="after")
    def _leaves_the_teacher(self) -> AnchorConfig:
        if self.reference + self.student >= 1.0:
            raise ValueError(
                f"reference={self.reference} and student={self.student} leave the teacher no weight; their sum must be "
                "below 1"
            )
        return self


class LossConfig(_Node):
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
        "advantage_turn_weight (GRSD), advantage_surprise (OCSD)",
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


class TeacherConfig(_Node):
    """The privileged teacher: the same policy with a privileged context in its prompt (docs/teachers.md)."""

    source: str = Field(
        "actor",
        min_length=1,
        description="registered source of the weights: actor (current weights at the start of the step, paper), "
        "actor_fresh (current weights at every update), reference (frozen start weights, or those of path), ema, "
        "snapshot, lora_base (adapter off), or none (no teacher pass)",
    )
    path: str | None = Field(
        None, min_length=1, description="other frozen weights for source=reference; the same tokenizer is required"
    )
    ema_decay: float | None = Field(
        None, ge=0, lt=1, description="source=ema: teacher = decay * teacher + (1 - decay) * actor; null is 0.99"
    )
    update_every: int | None = Field(
        None, ge=1, description="steps between updates of the teacher's weights; null is 1 for ema, 10 for snapshot"
    )
    offload: bool | None = Field(
        None,
        description="source=ema or snapshot: whether the weights wait in CPU memory between passes; null is true",
    )
    placement: Literal["colocated", "pool", "rollout_server"] = Field(
        "colocated",
        description="who computes the teacher: the actor's devices, a pool of devices of its own, or the rollout "
        "server, while other episodes still run",
    )
    pool_gpus_per_node: int | None = Field(None, ge=1, description="placement=pool: devices per node")
    pool_nodes: int | None = Field(None, ge=1, description="placement=pool: nodes; null is 1")
    max_prompt_length: int = Field(4096, ge=1, description="tokens; the teacher's own limit, not the student's")
    on_long_prompt: Literal["error", "drop_history", "mask"] = Field(
        "error",
        description="error stops the run; drop_history keeps the skills and drops the oldest history, then errors; "
        "mask leaves the row out of the distillation term; the last two are counted in sdar/truncated_share",
    )
    sanity_check: bool = Field(
        True,
        description="at the first step, a teacher that has the student's weights must give the student's log-probs "
        "when its context is empty",
    )
    sanity_tolerance: float | None = Field(
        None,
        gt=0,
        description="largest mean |teacher - student| log-prob in that check, nats; null is 1e-3, and 0.05 where "
        "the actor computes in bf16 or another engine computes the teacher",
    )


class ContrastConfig(_Node):
    """A second, bad context. The gap is then the teacher's with the good one against its own with this one, instead of
    the student's; a row that lacks either has no teacher."""

    sources: list[str] = Field(
        default_factory=list, description="registered contexts, as sdar.context.sources; none: no contrast"
    )
    options: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="context -> its keyword arguments, for contexts named in contrast.sources"
    )
    control: Literal["none", "empty", "shuffled", "wrong", "random_text"] = Field(
        "none", description="placebo in place of it, as sdar.context.control: a context against its own placebo"
    )
    texts: int = Field(
        1,
        ge=1,
        description="at most so many different texts per row (failed siblings, say), each a teacher pass of its own; "
        "the gap is taken to the mean of their probabilities",
    )


class WriterConfig(_Node):
    """Who writes, for contexts that ask somebody (docs/contexts.md): prompts go out once the episodes have ended."""

    source: Literal["policy", "endpoint"] = Field(
        "policy",
        description="the policy itself, by its rollout servers and with the weights of the step, or an "
        "OpenAI-compatible chat endpoint",
    )
    url: str | None = Field(
        None, min_length=1, description="endpoint: its base address, such as http://127.0.0.1:8000/v1"
    )
    model: str | None = Field(None, min_length=1, description="endpoint: the model's name there")
    key_variable: str | None = Field(
        None,
        min_length=1,
        description="endpoint: environment variable that holds the key; it must be set where verl's driver runs; null: "
        "no key is sent",
    )
    body: dict[str, Any] = Field(
        default_factory=dict,
        description="endpoint: further fields of every request, such as {reasoning_effort: low}; one that is null is "
        "left out ({max_tokens: null, max_completion_tokens: 2048}, {seed: null})",
    )
    temperature: float | None = Field(
        None, ge=0, description="null: the rollout's for the policy, the server's own for an endpoint"
    )
    max_tokens: int | None = Field(
        None, ge=1, description="of an answer; null: data.max_response_length for the policy, 1024 for an endpoint"
    )
    max_prompt_length: int | None = Field(
        None,
        ge=1,
        description="tokens of the policy's tokenizer; the oldest turns of what is shown are left out until it fits, "
        "counted in sdar/writer/cut; null: data.max_prompt_length for the policy, 8192 for an endpoint",
    )
    in_flight: int = Field(16, ge=1, description="endpoint: requests at a time")
    timeout_s: float = Field(120.0, gt=0, description="endpoint: seconds of one attempt")
    retries: int = Field(
        4,
        ge=0,
        description="further attempts, after growing pauses; of an endpoint after a time-out, a lost connection, or a "
        "status that says that it is busy or down",
    )
    budget: int | None = Field(
        None,
        ge=0,
        description="endpoint: answers that may be paid for in this run's folder; after that contexts are missing, "
        "counted in sdar/writer/over_budget; null: no limit",
    )


class ContextConfig(_Node):
    """Privileged context: what the teacher sees and the student does not."""

    sources: list[str] = Field(
        default_factory=lambda: ["skills"],
        min_length=1,
        description="registered contexts, in this order: skills (paper), answer, column, demonstration, sibling, "
        "failed_sibling, feedback, next_observation; written by sdar.context.writer: lesson, guide, hint",
    )
    options: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="context -> its keyword arguments, for contexts named in sources"
    )
    control: Literal["none", "empty", "shuffled", "wrong", "random_text"] = Field(
        "none",
        description="placebo in place of the context: empty (no text, the teacher reads the student's prompt), "
        "shuffled (its words permuted), wrong (that of a task of another type), random_text (everyday words)",
    )
    contrast: ContrastConfig = ContrastConfig()
    writer: WriterConfig = WriterConfig()
    episodes: Literal["all", "failed", "solved"] = Field(
        "all",
        description="which episodes the teacher looks at, by how they ended; the rows of the others are not scored and "
        "keep their advantages (AHEAD: failed)",
    )
    on_empty: Literal["mask", "error"] = Field(
        "mask",
        description="a task for which the sources find nothing: mask leaves its rows out of the distillation term, "
        "counted in sdar/context_empty_share; error stops the run, before its start where the panel shows such a task",
    )
    student: Literal["none", "skills"] = Field(
        "none", description="skills puts the retrieved skills into the student's own prompt in training (Skill-GRPO)"
    )
    seed: int = Field(0, ge=0, description="for contexts and controls that draw; draws are per task")
    place: str = Field(
        "user",
        min_length=1,
        description="with agent loops of verl's or yours: where the context stands in the prompt's messages: user (end "
        "of the last user message), system, or a Jinja template with the slots prompt and context",
    )
    chat_template_kwargs: dict[str, Any] = Field(
        default_factory=dict,
        description="with such loops: arguments of the chat template for the teacher alone, beyond the student's; "
        "{enable_thinking: true} lets a thinking teacher judge a plain student",
    )
    on_foreign_prompt: Literal["error", "mask"] = Field(
        "error",
        description="with such loops: a prompt that verl's tokenisation does not make of its messages: error stops the "
        "run, mask leaves the row out of the distillation term, counted in sdar/foreign_prompt_share",
    )

    @property
    def named(self) -> tuple[str, ...]:
        """The contexts of both slots."""
        return (*self.sources, *self.contrast.sources)


class SkillsConfig(_Node):
    """A skill bank and the rules that pick from it."""

    bank: str = Field(
        "alfworld",
        min_length=1,
        description="name of a shipped bank, or a path: folder of <name>/SKILL.md, skill_mapping.json, SkillRL's JSON",
    )
    task_types: dict[str, list[str]] = Field(
        default_factory=dict, description="the bank's name of a task type -> the environment's, several or none"
    )
    retrieval: list[str] = Field(
        default_factory=lambda: ["keyword", "task_type"],
        min_length=1,
        description="registered retrieval rules, applied in order without duplicates",
    )
    options: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="rule -> its keyword arguments, for rules named in retrieval (docs/skills.md)"
    )
    max_tokens: int | None = Field(
        None,
        ge=1,
        description="tokens of one task's skills: what comes last is left out, whole skills at a time, and counted in "
        "sdar/skills_dropped_share; null: no limit",
    )
    seed: int = Field(0, ge=0, description="for rules that draw, such as random")


class EnvConfig(_Node):
    """The environment and the processes that run it."""

    name: str = Field("alfworld", min_length=1, description="registered environment")
    options: dict[str, Any] = Field(default_factory=dict, description="keyword arguments of the environment")
    invalid_action: Literal["noop", "last_line"] = Field(
        "noop",
        description="an answer without an action: noop lets the environment say that nothing happened, last_line sends "
        "the answer's last line as the action (released code); invalid it is in both",
    )
    max_steps: int = Field(50, ge=1, description="turns per episode (released scripts: 50 on ALFWorld)")
    processes: int = Field(4, ge=1, description="environment processes per agent-loop worker")
    envs_per_process: int = Field(16, ge=1, description="episodes that one process hosts at a time")
    reset_timeout_s: float = Field(60.0, gt=0, description="seconds")
    step_timeout_s: float = Field(30.0, gt=0, description="seconds")


class PromptConfig(_Node):
    """The prompt of student and teacher: one template, with the skill slot empty or filled."""

    template: str = Field("alfworld", min_length=1, description="name of a shipped template or a .jinja file")
    history_length: int = Field(
        2, ge=0, description="past (observation, action) pairs shown (released scripts: 2 on ALFWorld)"
    )
    skill_position: Literal["user", "system", "front"] = Field(
        "user",
        description="where the context stands: in the template's slot in the user turn (paper), in a system message, "
        "or in front of the whole chat (released code)",
    )
    think: Literal["optional", "required"] = Field(
        "optional", description="required makes an answer without a think block invalid (released code's way)"
    )


class AdvantageConfig(_Node):
    """The ``sdar`` advantage estimator (``algorithm.adv_estimator=sdar``)."""

    group_stats: Literal["episode", "turn"] = Field(
        "episode", description="group mean and std over episodes (paper) or over turn rows (released code)"
    )
    invalid_action_penalty: float = Field(
        0.1, ge=0, description="taken off the turn that gave an invalid action (released scripts: 0.1)"
    )


class ValidationArm(_Node):
    """One way to run the validation panel."""

    context: Literal["none", "skills", "teacher"] = Field(
        "none", description="in the prompt: nothing, the retrieved skills, or all that the teacher sees (sdar.context)"
    )
    temperature: float = Field(..., ge=0, description="sampling temperature, 0 is greedy")


class ValidationConfig(_Node):
    """Validation runs every arm over the whole panel, each task once (times ``rollout.val_kwargs.n``)."""

    arms: dict[str, ValidationArm] = Field(
        default_factory=lambda: {"student": ValidationArm(context="none", temperature=0.4)},
        min_length=1,
        description="name -> arm (released scripts: student at temperature 0.4)",
    )


class RolloutConfig(_Node):
    """What the agent loop asks of verl's rollout engine beyond verl's own settings."""

    rows: Literal["per_turn", "trajectory"] = Field(
        "per_turn",
        description="per_turn: each turn is a row, with a window of history (paper); trajectory: the conversation is "
        "one row, observations masked, and data.max_response_length is the limit of all its turns",
    )
    turn_length: int | None = Field(
        None,
        ge=1,
        description="tokens of one answer where rows=trajectory; an episode ends when less than that is left",
    )
    seed: int | None = Field(
        None,
        ge=0,
        description="per-request sampling seeds derived from this and the task, so that a run repeats: exactly on the "
        "CPU's server, only nearly on vLLM, whose bf16 log-probs depend on who shares a batch, and which samples "
        "seeded requests one by one",
    )
    poll_interval_s: float | None = Field(
        None, gt=0, description="how often verl's replay buffer looks for finished rows; null keeps verl's 2 s"
    )


class UpdateConfig(_Node):
    """How a step's rows become optimizer updates."""

    mini_batch_rows: int | None = Field(
        None, ge=1, description="rows per optimizer update; null keeps verl's ppo_mini_batch_size * rollout.n"
    )


class TraceConfig(_Node):
    """Episodes written down token by token, for the report (docs/report.md)."""

    every: int = Field(0, ge=0, description="steps from one trace to the next; 0 writes none")
    episodes: int = Field(16, ge=1, description="episodes per traced step, up to four of a group")
    max_mb: float = Field(
        256.0, gt=0, description="megabytes of traces per run; beyond it every other one goes and the interval doubles"
    )


class CloudConfig(_Node):
    """A run on rented machines (docs/cloud.md)."""

    mirror: str | None = Field(
        None,
        min_length=1,
        description="s3://BUCKET/PATH, gs://, az:// or file://: every checkpoint goes there in the background, and an "
        "empty folder is filled from there at the start; null: nowhere",
    )
    keep: int = Field(2, ge=1, description="whole checkpoints in the mirror; older ones are deleted")


class SdarConfig(_Node):
    """The whole ``sdar:`` node."""

    method: str = Field(
        "sdar", min_length=1, description="name of the method, for logs and reports; the config group method sets it"
    )
    variant: Literal["paper", "released"] = Field(
        "paper", description="whose reading, where paper and released code differ; the config group variant sets it"
    )

    modules: list[str] = Field(
        default_factory=list,
        description="modules imported in every process of the run: they register contexts, gates, environments, ...",
    )
    on_nonfinite: Literal["error", "drop"] = Field(
        "error",
        description="NaN or infinity in log-probs, the teacher's numbers or advantages: error stops the run and "
        "names the rows; drop leaves them out of the update, or of the distillation term where the teacher is at "
        "fault, counted in sdar/nonfinite_rows and sdar/nonfinite_teacher_rows",
    )
    loss: LossConfig = LossConfig()
    teacher: TeacherConfig = TeacherConfig()
    context: ContextConfig = ContextConfig()
    skills: SkillsConfig = SkillsConfig()
    env: EnvConfig = EnvConfig()
    prompt: PromptConfig = PromptConfig()
    advantage: AdvantageConfig = AdvantageConfig()
    validation: ValidationConfig = ValidationConfig()
    rollout: RolloutConfig = RolloutConfig()
    update: UpdateConfig = UpdateConfig()
    trace: TraceConfig = TraceConfig()
    cloud: CloudConfig = CloudConfig()

    @model_validator(mode="after")
    def _teacher_for_the_loss(self) -> SdarConfig:
        if self.teacher.source == "none" and self.loss.coef > 0:
            raise ValueError(
                f"sdar.loss.coef={self.loss.coef} needs a teacher, but sdar.teacher.source=none; "
                "set sdar.loss.coef=0 for plain GRPO or choose a source (actor, reference, ema, ...)"
            )
        return self


def load_config(node: Mapping[str, Any] | DictConfig | None) -> SdarConfig:
    """Check the ``sdar:`` node and return it typed.

    Raises:
        ConfigError: naming every option that is unknown or out of range, its value and what is allowed.
    """
    if node is None:
        raise ConfigError(
            "the config has no `sdar:` node; start from one of our recipes, e.g. --config-name sdar_alfworld"
        )
    raw = OmegaConf.to_container(node, resolve=True) if isinstance(node, DictConfig) else dict(node)
    if strange := list(_not_finite(raw, "sdar")):
        raise ConfigError("\n".join(strange))
    try:
        return SdarConfig.model_validate(raw)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(item) for item in error.errors())) from None


def _not_finite(value: Any, name: str) -> Iterator[str]:
    """Numbers that no comparison finds wrong, in options of gates, contexts and environments, too."""
    if isinstance(value, float) and not math.isfinite(value):
        yield f"{name}={value} must be a finite number"
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _not_finite(inner, f"{name}.{key}")
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            yield from _not_finite(inner, f"{name}[{number}]")


def _explain(item: Any) -> str:
    option = ".".join(["sdar", *(str(part) for part in item["loc"])])
    if item["type"] == "extra_forbidden":
        return f"{option}: no such option ({_known_keys(item['loc'])})"
    if item["type"] == "value_error":
        return str(item["ctx"]["error"]) if not item["loc"] else f"{option}: {item['ctx']['error']}"
    if item["type"] == "missing":
        return f"{option} is not set and has no default; docs/options.md says what it takes"
    return f"{option}={item['input']!r}: {item['msg'][0].lower()}{item['msg'][1:]}"


def _known_keys(location: tuple[Any, ...]) -> str:
    model: type[BaseModel] = SdarConfig
    for part in location[:-1]:
        field = model.model_fields.get(str(part))
        annotation = field.annotation if field is not None else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return "see docs/options.md"
        model = annotation
    return "known: " + ", ".join(model.model_fields)
