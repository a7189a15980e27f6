"""What of a run's config decides its memory and its time."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from omegaconf import DictConfig, OmegaConf

from sdar_verl.algorithm.gates import gate_reads
from sdar_verl.checks.engine import sequence_parallel
from sdar_verl.checks.modes import verl_mode
from sdar_verl.config import SdarConfig
from sdar_verl.context.builder import further_passes
from sdar_verl.context.registry import get_context
from sdar_verl.errors import ConfigError
from sdar_verl.method import Strengths
from sdar_verl.planner.architecture import Architecture
from sdar_verl.planner.families import find_architecture
from sdar_verl.recipe import plays_environments
from sdar_verl.requests import CHUNK_TOKENS, reads_distributions
from sdar_verl.teacher.sources import has_reference
from sdar_verl.writer.endpoint import ANSWER_TOKENS, PROMPT_TOKENS


@dataclass(frozen=True)
class Layout:
    """A run, as the planner sees it.

    Attributes:
        architecture: of the policy; reference and teacher have the same.
        gpus: training GPUs.
        rollout_gpus: GPUs of the rollout alone, which runs beside the training (``sdar_separate_async``); else 0.
        shares_rollout: training GPUs have rollout engines, too; those of ``sdar_separate_async`` play validations and
            warm up, and ``actor_rollout_ref.hybrid_engine=False`` leaves them out.
        tensor_parallel: GPUs of one rollout engine.
        fsdp_size: training GPUs that the actor's weights are dealt out over, -1 for all; further ones hold copies.
        reference_fsdp_size: the same of the reference.
        checkpointing: activations are recomputed in the backward pass.
        training_bytes: bytes of a weight that the optimizer updates (verl keeps float32 unless told otherwise).
        mini_batch_rows: rows of an update, which all training GPUs share evenly; 0: counted in prompts, or with several
            GPUs to a row (sequence parallelism, which the planner does not know).
        micro_tokens: largest tokens per GPU in one micro-batch of the update; of one with a fixed number of rows, if
            all are the longest.
        forward_tokens: the same for log-prob passes.
        dynamic: micro-batches of the update are filled up to so many tokens.
        forward_dynamic: those of log-prob passes are.
        actor_offload: the actor's weights wait on the CPU while the engine generates.
        optimizer_offload: the optimizer's moments do.
        reference: verl has a reference; with LoRA it is the base under the actor's adapter, without weights of its own.
        reference_offload: its weights wait on the CPU between its passes.
        reference_pass: it is asked for log-probs of the student's rows.
        entropy: the update computes the entropy of the student.
        rollout_share: of the card's memory that the rollout engine may take.
        rollout_tokens: tokens that the rollout engine computes at a time, at most.
        teacher: source of the teacher's weights, ``none`` without one.
        teacher_passes: forward passes of the teacher over a row: one, one per further teacher, and one per text of a
            bad context.
        teacher_share: of the rows, those that it looks at.
        anchor: the reference scores the student's rows for an anchored target, too.
        teacher_placement: ``colocated``, ``pool`` or ``rollout_server``.
        teacher_offload: EMA and snapshot weights wait on the CPU between passes.
        teacher_gpus: GPUs of the teacher's own pool.
        objective: of the distillation term.
        support: where the update compares distributions, ``full`` or ``top_k``; None: it does not.
        chunk_tokens: tokens whose logits such an objective has in memory at a time.
        lora_rank: 0 without LoRA.
        writer: of contexts that somebody writes, ``policy`` or ``endpoint``; empty without such.
        writings: texts that it writes per step, at most.
        validations: how many there are over the run, and of how many episodes each.
        validates_only: there is no step (``trainer.val_only``).
        untaught_steps: steps at the end without a teacher, as far as lambda's schedule says it beforehand.
        writer_prompt: tokens that it reads for one, on average.
        writer_answer: tokens that it writes, on average.
        episodes: episodes per step.
        turns: turns per episode, on average.
        prompt: tokens of a student's prompt, on average.
        context: tokens that the privileged context adds.
        response: tokens of a response, on average.
        longest: longest sequence of a training row (student or teacher).
        steps: optimisation steps of the run.
        guessed: which of turns, prompt, context and response nobody has given.
    """

    architecture: Architecture
    gpus: int
    rollout_gpus: int = 0
    shares_rollout: bool = True
    tensor_parallel: int = 1
    fsdp_size: int = -1
    reference_fsdp_size: int = -1
    checkpointing: bool = True
    training_bytes: int = 4
    mini_batch_rows: int = 0
    micro_tokens: int = 16384
    forward_tokens: int = 32768
    dynamic: bool = True
    forward_dynamic: bool = True
    actor_offload: bool = False
    optimizer_offload: bool = False
    reference: bool = True
    reference_offload: bool = True
    reference_pass: bool = True
    entropy: bool = False
    rollout_share: float = 0.6
    rollout_tokens: int = 8192
    teacher: str = "actor"
    teacher_passes: int = 1
    teacher_share: float = 1.0
    anchor: bool = False
    teacher_placement: str = "colocated"
    teacher_offload: bool = True
    teacher_gpus: int = 0
    objective: str = "sampled"
    support: str | None = None
    chunk_tokens: int = CHUNK_TOKENS
    lora_rank: int = 0
    writer: str = ""
    writings: int = 0
    untaught_steps: int = 0
    writer_prompt: float = 0.0
    writer_answer: float = 0.0
    episodes: int = 128
    turns: float = 30.0
    prompt: float = 1000.0
    context: float = 1000.0
    response: float = 150.0
    longest: int = 4608
    steps: int = 150
    validations: tuple[tuple[int, int], ...] = ()
    validates_only: bool = False
    guessed: tuple[str, ...] = ()

    @property
    def known(self) -> bool:
        """Whether the run's length is."""
        return not self.unknown

    @property
    def unknown(self) -> str:
        """Why the run's length is not known; empty where it is."""
        if self.validates_only and not self.validations:
            return "how many tasks it validates on is not known: give data.val_files that lie here"
        if not self.validates_only and not self.steps:
            return (
                "how many steps it has is not known: set trainer.total_training_steps, or trainer.total_epochs with "
                "data.train_files that lie here"
            )
        return ""

    @property
    def rows(self) -> float:
        """Training rows of a step: one per turn."""
        return self.episodes * self.turns

    @property
    def shards(self) -> int:
        """Training GPUs that a copy of the actor's weights is dealt out over."""
        return self.fsdp_size if 0 < self.fsdp_size < self.gpus else self.gpus

    @property
    def reference_shards(self) -> int:
        """Those of the reference's."""
        return self.reference_fsdp_size if 0 < self.reference_fsdp_size < self.gpus else self.gpus

    @property
    def gpus_apart(self) -> int:
        """Those of a separate rollout and of the teacher's own pool, which do not train."""
        return self.rollout_gpus + (self.teacher_gpus if self.teacher_placement == "pool" else 0)

    def with_gpus(self, gpus: int) -> Layout:
        """The same run on another number of training GPUs; engines that they cannot be dealt out to become smaller."""
        engine = math.gcd(self.tensor_parallel, gpus) if self.shares_rollout else self.tensor_parallel
        return replace(self, gpus=gpus, tensor_parallel=engine)

    @classmethod
    def from_config(
        cls,
        config: DictConfig,
        sdar: SdarConfig,
        *,
        turns: float | None = None,
        prompt: float | None = None,
        context: float | None = None,
        response: float | None = None,
        taught_rows: float = 1.0,
        steps: int | None = None,
        validations: Sequence[tuple[int, int]] = (),
    ) -> Layout:
        """Read verl's whole config; what only a run can know may be given.

        Args:
            config: verl's, composed from a recipe.
            sdar: its ``sdar`` node.
            turns: turns per episode; None: half of ``sdar.env.max_steps``, a guess, and 1 with agent loops of verl's or
                the user's, which make a row of a whole conversation.
            prompt: tokens of a prompt; None: half of ``data.max_prompt_length``, a guess.
            context: tokens of the privileged context; None: half of what the teacher's limit leaves, a guess.
            response: tokens of a response; None: a third of ``data.max_response_length``, a guess.
            taught_rows: share of the rows that have a context.
            steps: training steps; None: ``trainer.total_training_steps``.
            validations: how many there are, and of how many episodes each.

        Raises:
            ConfigError: a model the planner does not know, or rollout engines of GPUs that are not there.
        """
        model, actor = config.actor_rollout_ref.model, config.actor_rollout_ref.actor
        rollout, reference = config.actor_rollout_ref.rollout, config.actor_rollout_ref.ref
        fsdp = actor.fsdp_config
        given = {"turns": turns, "prompt": prompt, "context": context, "response": response}
        prompt = config.data.max_prompt_length / 2 if prompt is None else prompt
        if turns is None:
            turns = sdar.env.max_steps / 2 if plays_environments(config) else 1.0
        room = max(sdar.teacher.max_prompt_length - config.data.max_prompt_length, 0)
        teacher = sdar.teacher.source
        lora = int(OmegaConf.select(model, "lora_rank") or OmegaConf.select(model, "lora.rank") or 0)
        reads_reference = bool((actor.use_kl_loss and actor.kl_loss_coef) or config.algorithm.use_kl_in_reward)
        separate = verl_mode(config.trainer.v1.trainer_mode) == "separate_async"
        gpus = int(config.trainer.n_gpus_per_node * config.trainer.nnodes)
        own = int(rollout.nnodes * rollout.n_gpus_per_node) if separate else 0
        shares = not separate or bool(config.actor_rollout_ref.hybrid_engine)
        for size, options in (
            (gpus if shares else 0, "GPUs (trainer.n_gpus_per_node x trainer.nnodes)"),
            (own, "GPUs of the rollout (actor_rollout_ref.rollout.n_gpus_per_node x nnodes)"),
        ):
            if size % rollout.tensor_model_parallel_size:
                raise ConfigError(
                    f"actor_rollout_ref.rollout.tensor_model_parallel_size={rollout.tensor_model_parallel_size} does "
                    f"not divide the {size} {options}; choose a divisor"
                )
        validates_only = bool(config.trainer.get("val_only", False))
        steps = config.trainer.total_training_steps if steps is None else steps
        steps = 0 if validates_only else int(steps or 0)
        longest = int(
            max(config.data.max_prompt_length, 0 if teacher == "none" else sdar.teacher.max_prompt_length)
            + config.data.max_response_length
        )
        dynamic, forward_dynamic = bool(actor.use_dynamic_bsz), bool(rollout.log_prob_use_dynamic_bsz)
        fixed = actor.ppo_micro_batch_size_per_gpu, rollout.log_prob_micro_batch_size_per_gpu
        micro_tokens = actor.ppo_max_token_len_per_gpu if dynamic else (fixed[0] or 1) * longest
        forward_tokens = rollout.log_prob_max_token_len_per_gpu or actor.ppo_max_token_len_per_gpu
        return cls(
            architecture=find_architecture(str(model.path)),
            gpus=gpus,
            rollout_gpus=own,
            shares_rollout=shares,
            tensor_parallel=int(rollout.tensor_model_parallel_size),
            fsdp_size=int(fsdp.get("fsdp_size", -1)),
            reference_fsdp_size=int(reference.fsdp_config.get("fsdp_size", -1)),
            checkpointing=bool(model.enable_gradient_checkpointing),
            training_bytes=2 if fsdp.get("model_dtype") in ("bf16", "bfloat16") else 4,
            mini_batch_rows=int(sdar.update.mini_batch_rows or 0) if sequence_parallel(actor)[1] == 1 else 0,
            micro_tokens=int(micro_tokens),
            forward_tokens=int(forward_tokens if forward_dynamic else (fixed[1] or fixed[0] or 1) * longest),
            dynamic=dynamic,
            forward_dynamic=forward_dynamic,
            actor_offload=bool(fsdp.param_offload),
            optimizer_offload=bool(fsdp.optimizer_offload),
            reference=has_reference(config),
            reference_offload=bool(reference.fsdp_config.param_offload),
            reference_pass=reads_reference,
            entropy=bool(actor.entropy_coeff) or gate_reads(sdar.loss.gate, "entropy"),
            rollout_share=float(rollout.gpu_memory_utilization),
            rollout_tokens=int(rollout.max_num_batched_tokens),
            teacher=teacher,
            teacher_passes=1 + len(further_passes(sdar.context)),
            teacher_share=taught_rows * min(1.0, math.ceil((sdar.context.turns_share or 1.0) * turns) / turns),
            anchor=sdar.loss.anchor.reference > 0,
            teacher_placement=sdar.teacher.placement,
            teacher_offload=sdar.teacher.offload is not False,
            teacher_gpus=(sdar.teacher.pool_gpus_per_node or 0) * (sdar.teacher.pool_nodes or 1),
            objective=sdar.loss.objective,
            support=(sdar.loss.support or "full") if reads_distributions(sdar.loss) else None,
            chunk_tokens=sdar.loss.chunk_tokens or CHUNK_TOKENS,
            lora_rank=lora,
            **_writing(config, sdar),
            episodes=int(config.data.train_batch_size * rollout.n),
            turns=turns,
            prompt=prompt,
            context=(0.0 if teacher == "none" else room / 2) if context is None else context,
            response=config.data.max_response_length / 3 if response is None else response,
            longest=longest,
            steps=steps,
            untaught_steps=_untaught(sdar, steps),
            validations=tuple(validations),
            validates_only=validates_only,
            guessed=tuple(name for name, value in given.items() if value is None and _is_open(name, config, teacher)),
        )


def _untaught(sdar: SdarConfig, steps: int) -> int:
    strengths = Strengths(sdar.loss)
    return steps - bisect_left(range(1, steps + 1), True, key=strengths.retired)


def _is_open(name: str, config: DictConfig, teacher: str) -> bool:
    """Whether a length is a run's to know: there is no context without a teacher, and one row per conversation of a
    recipe of verl's."""
    return teacher != "none" if name == "context" else name != "turns" or plays_environments(config)


def _writing(config: DictConfig, sdar: SdarConfig) -> dict[str, Any]:
    """Fields about the writer: as if every group were mixed and every episode looked at; half of its limits."""
    contexts = [get_context(name) for name in sdar.context.named if sdar.teacher.source != "none"]
    contexts = [context for context in contexts if context.writes]
    if not contexts:
        return {}
    settings, tasks = sdar.context.writer, int(config.data.train_batch_size)
    here = settings.source == "policy"
    prompt = settings.max_prompt_length or (config.data.max_prompt_length if here else PROMPT_TOKENS)
    answer = settings.max_tokens or (config.data.max_response_length if here else ANSWER_TOKENS)
    episodes = tasks * int(config.actor_rollout_ref.rollout.n)
    return {
        "writer": settings.source,
        # A guide is one more per group.
        "writings": sum(episodes + (tasks if context.name == "guide" else 0) for context in contexts),
        "writer_prompt": prompt / 2,
        "writer_answer": answer / 2,
    }
