"""``sdar.context``: what the teacher sees, and who writes it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from sdar_verl.config.node import Node


class ContrastConfig(Node):
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


class TeachersConfig(Node):
    """A teacher for each of ``sdar.context.sources``, in the place of one that is shown all of them: their mixture, or
    one that a row's task chooses. They differ in what they are shown; their weights (``sdar.teacher``) are the same."""

    weights: list[Annotated[float, Field(gt=0)]] = Field(
        default_factory=list,
        description="a number above 0 per source: the teacher is the mixture of their distributions with these shares, "
        "a teacher pass each; a source that a row does not have leaves its share to the others",
    )
    by: str | None = Field(
        None,
        min_length=1,
        description="what chooses a row's teacher: task_type, or a column of the data with dots into it "
        "(extra_info.kind)",
    )
    choice: dict[str, str] = Field(default_factory=dict, description="its value -> the source that teaches these rows")

    @property
    def several(self) -> bool:
        """Whether sources have a teacher each."""
        return bool(self.weights) or self.by is not None


class WriterConfig(Node):
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


class ContextConfig(Node):
    """Privileged context: what the teacher sees and the student does not."""

    sources: list[str] = Field(
        default_factory=lambda: ["skills"],
        min_length=1,
        description="registered contexts, shown in this order: skills (paper), answer, column, demonstration, sibling, "
        "failed_sibling, own_failure, feedback, next_observation; written by sdar.context.writer: lesson, guide, hint",
    )
    options: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="context -> its keyword arguments, for contexts named in sources"
    )
    control: Literal["none", "empty", "shuffled", "wrong", "random_text"] = Field(
        "none",
        description="placebo in place of the context: empty (no text, the teacher reads the student's prompt), "
        "shuffled (its words permuted), wrong (that of a task of another type), random_text (everyday words)",
    )
    teachers: TeachersConfig = TeachersConfig()
    contrast: ContrastConfig = ContrastConfig()
    writer: WriterConfig = WriterConfig()
    episodes: Literal["all", "failed", "solved"] = Field(
        "all",
        description="which episodes the teacher looks at, by how they ended; the rows of the others are not scored and "
        "keep their advantages (AHEAD: failed)",
    )
    turns_share: float | None = Field(
        None,
        gt=0,
        le=1,
        description="of an episode's turns, the share that the teacher looks at: those that the student itself found "
        "least likely (mean -log pi_old), rounded up; the others are not scored; null: all (OCSD: .2)",
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
    def shares(self) -> dict[str, float]:
        """Source -> weight of its teacher, where teachers are mixed."""
        return dict(zip(self.sources, self.teachers.weights, strict=False))

    @property
    def named(self) -> tuple[str, ...]:
        """The contexts of both slots."""
        return (*self.sources, *self.contrast.sources)
