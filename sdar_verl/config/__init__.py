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
from pydantic import BaseModel, Field, ValidationError, model_validator

from sdar_verl.config.context import ContextConfig
from sdar_verl.config.loss import LossConfig
from sdar_verl.config.node import Node
from sdar_verl.errors import ConfigError
from sdar_verl.missing_node import NO_NODE


class TeacherConfig(Node):
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


class LearnConfig(Node):
    """Skills that the run adds to its bank by itself (docs/skills.md): written by sdar.context.writer from the step's
    episodes, taken when success with them in the prompt rises outside its interval on a panel of their own."""

    every: int = Field(0, ge=0, description="steps from one writing to the next; 0: the bank stays as it is")
    panel: str | None = Field(
        None,
        min_length=1,
        description="panel that decides (a Parquet file of sdar-verl prepare), no task of which is in data.train_files "
        "or data.val_files; it is played with the bank as it is and with what was written",
    )
    episodes: int = Field(
        6, ge=1, description="episodes that the writer is shown per task type, failures and successes in turn"
    )
    max_words: int = Field(200, ge=1, description="of a skill's text")


class SkillsConfig(Node):
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
    column: str | None = Field(
        None,
        min_length=1,
        description="recipes of verl's: the column of the data that the rules read in the place of the last user "
        "message, with dots into it (extra_info.topic)",
    )
    max_tokens: int | None = Field(
        None,
        ge=1,
        description="tokens of one task's skills: what comes last is left out, whole skills at a time, and counted in "
        "sdar/skills_dropped_share; null: no limit",
    )
    seed: int = Field(0, ge=0, description="for rules that draw, such as random")
    learn: LearnConfig = LearnConfig()


class EnvConfig(Node):
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


class PromptConfig(Node):
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


class AdvantageConfig(Node):
    """The ``sdar`` advantage estimator (``algorithm.adv_estimator=sdar``)."""

    group_stats: Literal["episode", "turn", "anchor"] = Field(
        "episode",
        description="group mean and std over episodes (paper) or over turn rows (released code); anchor: the return "
        "from a turn on, less its mean over turns of the group with the same recent observations (TIDE)",
    )
    discount: float | None = Field(
        None, gt=0, le=1, description="group_stats=anchor: of the reward, per turn to the episode's end; null is 0.95"
    )
    anchors: int | None = Field(
        None, ge=1, description="group_stats=anchor: at most so many recent observations are compared; null is 3"
    )
    invalid_action_penalty: float = Field(
        0.1, ge=0, description="taken off the turn that gave an invalid action (released scripts: 0.1)"
    )


class ValidationArm(Node):
    """One way to run the validation panel."""

    context: Literal["none", "skills", "teacher"] = Field(
        "none", description="in the prompt: nothing, the retrieved skills, or all that the teacher sees (sdar.context)"
    )
    temperature: float = Field(..., ge=0, description="sampling temperature, 0 is greedy")


class ValidationConfig(Node):
    """Validation runs every arm over the whole panel, each task once (times ``rollout.val_kwargs.n``)."""

    arms: dict[str, ValidationArm] = Field(
        default_factory=lambda: {"student": ValidationArm(context="none", temperature=0.4)},
        min_length=1,
        description="name -> arm (released scripts: student at temperature 0.4); in a recipe of verl's its own "
        "validation stays, and arms come beside it, student where it is changed",
    )


def played_arms(arms: Mapping[str, Any], environments: bool) -> list[str | None]:
    """The arms that a validation plays, of a text environment or a recipe of verl's; None is verl's own."""
    if environments:
        return list(arms)
    untouched = ValidationConfig().arms
    return [None, *(name for name, arm in arms.items() if arm != untouched.get(name))]


class RolloutConfig(Node):
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


class UpdateConfig(Node):
    """How a step's rows become optimizer updates."""

    mini_batch_rows: int | None = Field(
        None, ge=1, description="rows per optimizer update; null keeps verl's ppo_mini_batch_size * rollout.n"
    )


class TraceConfig(Node):
    """Episodes written down token by token, for the report (docs/report.md)."""

    every: int = Field(0, ge=0, description="steps from one trace to the next; 0 writes none")
    episodes: int = Field(16, ge=1, description="episodes per traced step, up to four of a group")
    max_mb: float = Field(
        256.0, gt=0, description="megabytes of traces per run; beyond it every other one goes and the interval doubles"
    )


class CloudConfig(Node):
    """A run on rented machines (docs/cloud.md)."""

    mirror: str | None = Field(
        None,
        min_length=1,
        description="s3://BUCKET/PATH, gs://, az:// or file://: every checkpoint goes there in the background, and an "
        "empty folder is filled from there at the start; null: nowhere",
    )
    keep: int = Field(2, ge=1, description="whole checkpoints in the mirror; older ones are deleted")


class SdarConfig(Node):
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
        raise ConfigError(NO_NODE)
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
