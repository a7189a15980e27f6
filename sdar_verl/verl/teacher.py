"""The teacher pass, seen from the trainer: it names the rows, the workers that hold the teacher's weights do the rest.

They read the rows' own columns and score the very response ids that were sampled, without gradient
(:meth:`sdar_verl.verl.worker.SdarTrainingWorker.score`); verl's ``@register`` stores what they return beside the rows,
so no token passes the trainer. Whose weights do that is :mod:`sdar_verl.teacher.sources`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import ray
import torch
from omegaconf import OmegaConf, open_dict
from transfer_queue import KVBatchMeta
from verl.protocol import BatchData
from verl.single_controller.ray import RayClassWithInitArgs, RayWorkerGroup
from verl.trainer.ppo.utils import Role
from verl.utils.seqlen_balancing import calculate_workload, get_seqlen_balanced_partitions

from sdar_verl.config import TeacherConfig
from sdar_verl.errors import TeacherError
from sdar_verl.fields import (
    EMPTY_CONTEXT_LOG_PROBS,
    MODULES_NODE,
    TEACHER_LOG_PROBS,
    TEACHER_MESH,
    TEACHER_NODE,
    TEACHER_PROMPTS,
    prompts_of,
)
from sdar_verl.requests import SCORING_PASS, ScoringPass, StepRequests
from sdar_verl.rollout.rows import RowInfo
from sdar_verl.table import StepTable
from sdar_verl.teacher.rows import deal, scored_rows, stop_without_contexts
from sdar_verl.teacher.server_check import COMPARED, ServerCheck, answer_metrics, stop_unanswered
from sdar_verl.teacher.sources import get_source
from sdar_verl.teacher.tolerance import ROUNDED, same_engine

_POOL = "sdar_teacher_pool"


class PrivilegedTeacher:
    """Has ``log pi_T(y_t | s_t+)`` computed for the rows of an update.

    Args:
        settings: the ``sdar.teacher`` node.
        requests: of the step's passes.
        trainer: verl's trainer, for its worker groups and config.
    """

    def __init__(self, settings: TeacherConfig, requests: StepRequests, trainer: Any):
        self._settings = settings
        self._requests = requests
        self._trainer = trainer
        self.source = get_source(settings.source)
        self.pool: Any = None
        self._begun: Any = None
        self._context_checked = self._server_checked = False

    # ---------------------------------------------------------------- set-up

    def install(self, worker: type) -> None:
        """Put our workers in the place of verl's, and ask for devices of the teacher's own; before they start.

        Args:
            worker: class of :mod:`sdar_verl.verl.worker` on the base that the trainer wants.
        """
        trainer, settings = self._trainer, self._settings
        with open_dict(trainer.config.actor_rollout_ref):
            trainer.config.actor_rollout_ref[TEACHER_NODE] = OmegaConf.create(settings.model_dump())
            trainer.config.actor_rollout_ref[MODULES_NODE] = list(trainer.sdar.modules)
        put_worker(trainer, worker)
        if settings.placement == "pool":
            # verl makes the pool with its own, and refuses when the cluster has too few devices for all of them.
            devices = [settings.pool_gpus_per_node] * (settings.pool_nodes or 1)
            trainer.resource_pool_manager.resource_pool_spec[_POOL] = devices

    def start(self) -> None:
        """Start the teacher's own workers, if it has devices of its own; after verl's have started."""
        if self._settings.placement != "pool":
            return
        from sdar_verl.verl.worker import PoolTeacherWorker

        trainer = self._trainer
        self.pool = RayWorkerGroup(
            resource_pool=trainer.resource_pool_manager.resource_pool_dict[_POOL],
            ray_cls_with_init=RayClassWithInitArgs(
                cls=ray.remote(PoolTeacherWorker), config=trainer.config.actor_rollout_ref
            ),
            device_name=trainer.config.trainer.device,
        )
        self.pool.init_model()

    # ---------------------------------------------------------------- a step

    def begin(self, table: StepTable) -> None:
        """Start the pass of :meth:`score` and do not wait for it, where that can be.

        Only a teacher with devices of its own does so: it then runs while the actor's devices compute the student's
        and the reference's log-probs. A pass that reads what those compute has to wait for them.

        Raises:
            TeacherError: no row has a context, and that is not the luck of the step.
        """
        stop_without_contexts(table.infos, table.step)
        if self.pool is not None and not self._requests.teacher.waits:
            self._begun = self._send(table, self._requests.teacher)

    def score(self, table: StepTable) -> dict[str, float]:
        """Have the teacher's columns written on every row, and one more per further pass (another teacher, a text of a
        bad context); returns what a first step's check has measured.

        A source that scores inside the update (``actor_fresh``) has nothing to do here, and neither has a teacher that
        the rollout server was asked for during the episodes.

        Raises:
            TeacherError: with an empty context the teacher is not the student.
        """
        metrics = {}
        if self._checks_context:
            metrics["sdar/empty_context_gap"] = self._empty_context_gap(table)
        self._context_checked = True
        if not self.on_server and not self.source.per_update:
            self._collect(table, self._begun if self._begun is not None else self._send(table, self._requests.teacher))
            self._begun = None
        for name in table.further_passes:
            self._collect(table, self._send(table, self._requests.teacher.further(name)))
        # On a step on which no row has a teacher, nothing is drawn to anything.
        if self._requests.anchor is not None and any(info is not None and info.has_teacher for info in table.infos):
            self._collect(table, self._send(table, self._requests.anchor))
        return metrics

    def verify(self, table: StepTable) -> dict[str, float]:
        """Look at what the teacher said; the table has been read.

        Raises:
            TeacherError: the teacher's weights are lost; or the rollout server did not answer, or is another model.
        """
        steps = self.source.staleness(self._settings, self._trainer.global_steps - 1)
        metrics = {} if steps is None else {"sdar/teacher_staleness": float(steps)}
        mask = table.mask
        if TEACHER_LOG_PROBS in table.columns and mask.any():
            teacher, student = (
                table.columns[name][mask].double().mean().item() for name in (TEACHER_LOG_PROBS, "old_log_probs")
            )
            check_not_lost(teacher, student, len(self._trainer.tokenizer))
            metrics["sdar/teacher_log_prob"] = teacher
        if self.on_server:
            stop_unanswered(table.infos)
            metrics |= answer_metrics(table.infos)
            found = ServerCheck.of(table)
            if found is not None:
                if not self._server_checked:
                    found.stop_above(self.tolerance)
                metrics |= found.metrics()
            self._server_checked |= COMPARED in metrics
        return metrics

    def updated(self) -> None:
        """The step's update is done: weights that follow the actor may follow now."""
        if self.source.own_weights:
            self._trainer.actor_rollout_wg.update_teacher(self._trainer.global_steps)

    # ---------------------------------------------------------------- guarantees

    @property
    def on_server(self) -> bool:
        """Whether the rollout server has scored, during the episodes."""
        return self._settings.placement == "rollout_server"

    @property
    def reads_actor(self) -> bool:
        """Whether a pass runs through the actor's weights as they are at that moment."""
        source = self.source
        return not (source.own_weights or source.own_engine or source.per_update)

    @property
    def equals_student(self) -> bool:
        """Whether the teacher has the student's weights at this step."""
        settings, source = self._settings, self.source
        if settings.path is not None or source.equals_student == "never":
            return False
        if source.equals_student == "always":
            return True
        fresh = self._trainer.global_steps == 1
        # An adapter that was loaded makes the student differ from its base from the start.
        adapter = self._trainer.config.actor_rollout_ref.model.get("lora_adapter_path", None)
        return fresh and (source.own_weights or adapter is None)

    @property
    def tolerance(self) -> float:
        """``sdar.teacher.sanity_tolerance``, or its default for the engine that computes the teacher."""
        if self._settings.sanity_tolerance is not None:
            return self._settings.sanity_tolerance
        other = self.source.own_engine or self.on_server
        return ROUNDED if other else same_engine(self._trainer.config)

    @property
    def _checks_context(self) -> bool:
        # Under bypass the old log-probs are the rollout engine's, not these workers': nothing to compare with.
        # The rollout server is compared with the trainer at every step, on rows that the agent loop had it score.
        wanted = self._settings.sanity_check and not self._context_checked and not self.on_server
        return wanted and self.equals_student and not self._trainer.bypasses

    def _empty_context_gap(self, table: StepTable) -> float:
        """With an empty context the teacher must repeat the student's log-probs: same weights, same prompt.

        Returns:
            Mean absolute difference over response tokens with finite numbers, nats; NaN without any.

        Raises:
            TeacherError: it exceeds ``sdar.teacher.sanity_tolerance``.
        """
        self._collect(table, self._send(table, ScoringPass.empty_context()))
        stored = table.rows.read(["response_mask", "old_log_probs", EMPTY_CONTEXT_LOG_PROBS])
        sampled = stored["response_mask"].values().bool()
        gap = (stored[EMPTY_CONTEXT_LOG_PROBS].values() - stored["old_log_probs"].values())[sampled].abs()
        gap = gap[gap.isfinite()]  # broken numbers have looks of their own, which name the rows
        difference = gap.mean().item()
        if difference > self.tolerance:
            raise TeacherError(
                "the teacher with an empty context should give the student's log-probs, but differs by "
                f"{difference:.3g} nats per token on average (largest {gap.max().item():.3g}); "
                f"sdar.teacher.sanity_tolerance={self.tolerance}. Its weights, prompt, temperature or "
                "alignment are not the student's: do not trust a run like this. Common causes: dropout in the model, "
                "weights lost by an offload, an attention that lets packed sequences see each other."
            )
        return difference

    # ---------------------------------------------------------------- the pass

    def _send(self, table: StepTable, scoring: ScoringPass) -> Any:
        """Ask the workers; rows that they score are dealt out so that ranks have as much to do."""
        trainer, batch, order = self._trainer, table.batch, list(range(len(table.infos)))
        workers = trainer.actor_rollout_wg if self.pool is None else self.pool
        if scoring.prompts != "prompts":  # the student's verl has balanced
            prompts = [_prompt_tokens(info, scoring.prompts) for info in table.infos]
            lengths = [tokens and tokens + tag["response_len"] for tokens, tag in zip(prompts, batch.tags, strict=True)]
            order = balanced_order(lengths, 1 + max(dispatched_ranks(workers, TEACHER_MESH)))
        meta = KVBatchMeta(
            keys=[batch.keys[row] for row in order],
            tags=[batch.tags[row] for row in order],
            partition_id=batch.partition_id,
            fields=[scoring.prompts, "responses", scoring.mask, *scoring.reads],
            extra_info={
                "temperature": trainer.config.actor_rollout_ref.rollout.temperature,
                SCORING_PASS: scoring.to_json(),
            },
        )
        if scoring.by_reference:
            return trainer.actor_rollout_wg.compute_anchor(meta)
        return workers.compute_teacher_log_prob(meta)

    @staticmethod
    def _collect(table: StepTable, answer: Any) -> None:
        """Wait for a pass, whose columns lie beside the rows then."""
        # A pool's workers are not waited for when they are called; then verl leaves it to the caller to collect.
        done = BatchData(ray.get(answer.futures)).concat() if hasattr(answer, "futures") else answer
        if len(done) != len(table.infos):
            raise TeacherError(
                f"the teacher pass returned {len(done)} rows for {len(table.infos)}: a fault of the engine"
            )


def _prompt_tokens(info: RowInfo | None, column: str) -> int:
    """Tokens of a row's prompt in such a column, 0 where it has none."""
    if info is None:
        return 0
    if column == TEACHER_PROMPTS:
        return info.teacher_prompt_tokens or 0
    return next((len(ids) for name, ids in info.further_prompts.items() if prompts_of(name) == column), 0)


def balanced_order(lengths: Sequence[int], ranks: int) -> list[int]:
    """An order of rows, of ``lengths`` tokens or 0 where they are not scored, in which all ranks have as much to do."""
    scored = scored_rows(lengths, ranks)
    if not scored:
        return list(range(len(lengths)))
    loads = calculate_workload(torch.tensor([max(1, lengths[row]) for row in scored])).tolist()
    return deal(lengths, ranks, get_seqlen_balanced_partitions(loads, k_partitions=ranks, equal_size=True))


def dispatched_ranks(workers: Any, mesh: str) -> list[int]:
    """Which data-parallel rank of ``mesh`` each worker of a group is."""
    if mesh not in workers._dispatch_info:
        workers._dispatch_info[mesh] = workers._query_dispatch_info(mesh)
    return workers._dispatch_info[mesh]


def put_worker(trainer: Any, worker: type) -> None:
    """Make ``worker`` the class of the actor's role, whatever else the role has."""
    for role in {Role.Actor, Role.ActorRollout, Role.ActorRolloutRef} & trainer.role_worker_mapping.keys():
        trainer.role_worker_mapping[role] = ray.remote(worker)


def check_not_lost(teacher_log_prob: float, student_log_prob: float, vocabulary: int) -> None:
    """A teacher that knows no more than chance about tokens that its student is sure of has lost its weights.

    Args:
        teacher_log_prob: mean over the sampled tokens, nats.
        student_log_prob: the same of the student.
        vocabulary: number of tokens; a uniform distribution gives each -log(vocabulary).

    Raises:
        TeacherError: the teacher is at or below chance (or not a number), the student is well above.
    """
    chance = -math.log(vocabulary)
    if teacher_log_prob > 0.98 * chance or student_log_prob < 0.5 * chance:
        return
    raise TeacherError(
        f"the teacher gives the sampled tokens {teacher_log_prob:.3f} nats on average, the student "
        f"{student_log_prob:.3f}; a uniform distribution over {vocabulary} tokens gives {chance:.3f}. The teacher's "
        "weights are lost or of another model. Known causes: weights freed while a worker slept, a faulty "
        "sdar.teacher.path, an offload that was not undone."
    )
