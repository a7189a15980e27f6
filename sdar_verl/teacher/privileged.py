"""The teacher pass, seen from the trainer: rows to the workers that hold the teacher's weights, log-probs back.

It answers for the very response ids that were sampled, in verl's micro-batches, without gradient. What the rows are is
:mod:`sdar_verl.teacher.rows`, whose weights is :mod:`sdar_verl.teacher.sources`, the workers' side is
:mod:`sdar_verl.verl.worker`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
import torch
import transfer_queue as tq
from omegaconf import OmegaConf, open_dict
from tensordict import TensorDict
from transfer_queue import KVBatchMeta
from verl.protocol import BatchData
from verl.single_controller.ray import RayClassWithInitArgs, RayWorkerGroup
from verl.trainer.ppo.utils import Role
from verl.utils.tensordict_utils import list_of_dict_to_tensordict

from sdar_verl.config import TeacherConfig
from sdar_verl.errors import TeacherError
from sdar_verl.finite import check_teacher
from sdar_verl.rollout.rows import RowInfo
from sdar_verl.teacher.answers import COMPARED, answered_log_probs, answered_rows, server_metrics
from sdar_verl.teacher.rows import TeacherRows, nested, stop_without_contexts
from sdar_verl.teacher.sources import get_source
from sdar_verl.teacher.tolerance import ROUNDED, same_engine
from sdar_verl.verl.fields import (
    MODULES_NODE,
    TEACHER_LOG_PROBS,
    TEACHER_MASK,
    TEACHER_NODE,
    TEACHER_PARTITION,
    TEACHER_PROMPTS,
)
from sdar_verl.verl.requests import HEAD_REQUEST, HeadRequest

_POOL = "sdar_teacher_pool"


@dataclass(frozen=True)
class _Sent:
    """A pass on its way: the keys of its rows, the fields they carry, and what the workers answered."""

    keys: list[str]
    carry: tuple[str, ...]
    answer: Any


class PrivilegedTeacher:
    """Computes ``log pi_T(y_t | s_t+)`` for a batch of rows and writes it beside verl's own fields.

    Args:
        settings: the ``sdar.teacher`` node.
        trainer: verl's trainer; its worker groups, tokenizer and rollout temperature are used.
    """

    def __init__(self, settings: TeacherConfig, trainer: Any):
        self._settings = settings
        self._trainer = trainer
        self._source = get_source(settings.source)
        self._pool: Any = None
        self._begun: _Sent | None = None
        self._early: dict[str, torch.Tensor] | None = None
        self._server_checked = False

    # ---------------------------------------------------------------- set-up

    def install(self, worker: type) -> None:
        """Put our workers in the place of verl's, or ask for devices; before the trainer starts its workers.

        Args:
            worker: class of :mod:`sdar_verl.verl.worker` on the base that the trainer wants.
        """
        trainer, settings = self._trainer, self._settings
        with open_dict(trainer.config.actor_rollout_ref):
            trainer.config.actor_rollout_ref[TEACHER_NODE] = OmegaConf.create(settings.model_dump())
            trainer.config.actor_rollout_ref[MODULES_NODE] = list(trainer.sdar.all_modules)
        if settings.placement == "pool":
            # verl makes the pool with its own, and refuses when the cluster has too few devices for all of them.
            devices = [settings.pool_gpus_per_node] * (settings.pool_nodes or 1)
            trainer.resource_pool_manager.resource_pool_spec[_POOL] = devices
        else:
            put_worker(trainer, worker)

    def start(self) -> None:
        """Start the teacher's own workers, if it has devices of its own; after verl's have started."""
        if self._settings.placement == "pool":
            from sdar_verl.verl.worker import PoolTeacherWorker

            trainer = self._trainer
            self._pool = RayWorkerGroup(
                resource_pool=trainer.resource_pool_manager.resource_pool_dict[_POOL],
                ray_cls_with_init=RayClassWithInitArgs(
                    cls=ray.remote(PoolTeacherWorker), config=trainer.config.actor_rollout_ref
                ),
                device_name=trainer.config.trainer.device,
            )
            self._pool.init_model()

    @property
    def pool(self) -> Any:
        """The teacher's own worker group, or None."""
        return self._pool

    # ---------------------------------------------------------------- a step

    def begin(
        self,
        batch: KVBatchMeta,
        infos: Sequence[RowInfo | None],
        *,
        carry: Sequence[str] = (),
        request: HeadRequest | None = None,
    ) -> None:
        """Start the pass of :meth:`score`, with its arguments, and do not wait for it.

        Only a teacher with devices of its own does so: it then runs while the actor's devices compute the student's
        and the reference's log-probs. A pass that reads what those compute (``carry``) has to wait for them.
        """
        if self._pool is not None and not carry:
            self._begun = self._send(batch, TeacherRows.read(batch, infos), carry, request)

    def score(
        self,
        batch: KVBatchMeta,
        infos: Sequence[RowInfo | None],
        *,
        carry: Sequence[str] = (),
        request: HeadRequest | None = None,
    ) -> dict[str, float]:
        """Write log-probs, entropy and mask of the teacher, and what else is asked for, on every row.

        A source that scores inside the update (``actor_fresh``) gets the prompts written instead of log-probs. Where
        the rollout server was asked during the episodes, its answers are written.

        Args:
            batch: the step's rows.
            infos: the agent loop's record of each row, None for verl's padding rows.
            carry: fields of the training rows that the request reads.
            request: what to compute at the language-model head (:mod:`sdar_verl.verl.requests`).

        Returns:
            Metrics of the pass.

        Raises:
            TeacherError: no row has a context, by a fault of the set-up; the teacher's weights are lost; or the rollout
                server did not answer.
            NonFiniteError: a number of the teacher's is not finite, and ``sdar.on_nonfinite`` is ``error``.
        """
        stop_without_contexts(infos, self._trainer.global_steps)
        rows = TeacherRows.read(batch, infos)
        if self.on_server:
            rows = answered_rows(rows, infos)
        masks = rows.teacher_masks()
        fields: dict[str, torch.Tensor] = {}
        metrics: dict[str, float] = {}
        if self._source.per_update:
            scored: dict[str, torch.Tensor] = {}
            fields[TEACHER_PROMPTS] = nested(rows.prompts)
        elif self.on_server:
            scored = {TEACHER_LOG_PROBS: answered_log_probs(rows, infos)}
        else:
            self._receive_early()
            scored = self._early if self._early is not None else self._pass(batch, rows, carry, request)
            self._early = None
        if scored:
            on_nonfinite = self._trainer.sdar.on_nonfinite
            scored, masks, broken = check_teacher(scored, masks, batch.keys, infos, on_nonfinite)
            if on_nonfinite == "drop":
                metrics["sdar/nonfinite_teacher_rows"] = broken
        fields |= {**scored, TEACHER_MASK: nested(masks)}
        metrics |= self._metrics(batch, scored, fields[TEACHER_MASK])
        if self.on_server:
            metrics |= server_metrics(batch, infos, self.tolerance if not self._server_checked else None)
            self._server_checked |= COMPARED in metrics
        tq.kv_batch_put(
            keys=batch.keys, partition_id=batch.partition_id, fields=TensorDict(fields, batch_size=len(batch))
        )
        return metrics

    def updated(self) -> None:
        """The step's update is done: weights that follow the actor may follow now."""
        if self._source.own_weights:
            self._trainer.actor_rollout_wg.update_teacher(self._trainer.global_steps)

    # ---------------------------------------------------------------- guarantees

    @property
    def on_server(self) -> bool:
        """Whether the rollout server has scored, during the episodes."""
        return self._settings.placement == "rollout_server"

    @property
    def reads_actor(self) -> bool:
        """Whether a pass runs through the actor's weights as they are at that moment."""
        source = self._source
        return not (source.own_weights or source.own_engine or source.per_update)

    @property
    def equals_student(self) -> bool:
        """Whether the teacher has the student's weights at this step."""
        settings, source = self._settings, self._source
        if settings.path is not None or source.equals_student == "never":
            return False
        if source.equals_student == "always":
            return True
        fresh = self._trainer.global_steps == 1
        # An adapter that was loaded makes the student differ from its base from the start.
        adapter = self._trainer.config.actor_rollout_ref.model.get("lora_adapter_path", None)
        return fresh and (source.own_weights or adapter is None)

    def check_empty_context(self, batch: KVBatchMeta) -> float:
        """With an empty context the teacher must repeat the student's log-probs: same weights, same prompt.

        Returns:
            Mean absolute difference over response tokens, nats.

        Raises:
            TeacherError: it exceeds ``sdar.teacher.sanity_tolerance``.
        """
        self._receive_early()  # its rows have the same keys
        rows = TeacherRows.read(batch, None)
        teacher = self._pass(batch, rows)[TEACHER_LOG_PROBS]
        student = self._student_log_probs(batch)
        gap = (teacher.values() - student.values())[torch.cat(rows.response_masks).bool()].abs()
        difference = gap.mean().item()
        if not difference <= self.tolerance:
            raise TeacherError(
                "the teacher with an empty context should give the student's log-probs, but differs by "
                f"{difference:.3g} nats per token on average (largest {gap.max().item():.3g}); "
                f"sdar.teacher.sanity_tolerance={self.tolerance}. Its weights, prompt, temperature or "
                "alignment are not the student's: do not trust a run like this. Common causes: dropout in the model, "
                "weights lost by an offload, an attention that lets packed sequences see each other."
            )
        return difference

    @property
    def tolerance(self) -> float:
        """``sdar.teacher.sanity_tolerance``, or its default for the engine that computes the teacher."""
        if self._settings.sanity_tolerance is not None:
            return self._settings.sanity_tolerance
        other = self._source.own_engine or self.on_server
        return ROUNDED if other else same_engine(self._trainer.config)

    def _metrics(self, batch: KVBatchMeta, scored: Mapping[str, torch.Tensor], mask: torch.Tensor) -> dict[str, float]:
        steps = self._source.staleness(self._settings, self._trainer.global_steps - 1)
        seen = mask.values().bool()
        if not scored or not seen.any():
            return teacher_metrics(None, steps)
        columns = (scored[TEACHER_LOG_PROBS], self._student_log_probs(batch))
        teacher, student = (column.values()[seen].double().mean().item() for column in columns)
        check_not_lost(teacher, student, len(self._trainer.tokenizer))
        return teacher_metrics(teacher, steps)

    # ---------------------------------------------------------------- the pass

    def _pass(
        self, batch: KVBatchMeta, rows: TeacherRows, carry: Sequence[str] = (), request: HeadRequest | None = None
    ) -> dict[str, torch.Tensor]:
        """Fields of the pass, nested (rows, response tokens[, columns])."""
        return self._receive(self._send(batch, rows, carry, request))

    def _send(self, batch: KVBatchMeta, rows: TeacherRows, carry: Sequence[str], request: HeadRequest | None) -> _Sent:
        keys = list(batch.keys)
        inputs = list_of_dict_to_tensordict(rows.inputs())
        if carry:
            inputs.update(
                tq.kv_batch_get(keys=keys, partition_id=batch.partition_id, select_fields=list(carry)).select(*carry)
            )
        tags = [
            {**tag, "prompt_len": len(prompt), "seq_len": len(prompt) + len(response)}
            for tag, prompt, response in zip(batch.tags, rows.prompts, rows.responses, strict=True)
        ]
        extra: dict[str, Any] = {
            "calculate_entropy": True,
            "compute_loss": False,
            "temperature": self._trainer.config.actor_rollout_ref.rollout.temperature,
        }
        if request is not None:
            extra[HEAD_REQUEST] = request.to_json()
        tq.kv_batch_put(keys=keys, partition_id=TEACHER_PARTITION, fields=inputs, tags=tags)
        meta = KVBatchMeta(partition_id=TEACHER_PARTITION, keys=keys, tags=tags, extra_info=extra)
        workers = self._trainer.actor_rollout_wg if self._pool is None else self._pool
        return _Sent(keys, tuple(carry), workers.compute_teacher_log_prob(meta))

    def _receive(self, sent: _Sent) -> dict[str, torch.Tensor]:
        try:
            # A pool's workers are not waited for when they are called; then verl leaves it to the caller to collect.
            done = sent.answer if self._pool is None else BatchData(ray.get(sent.answer.futures)).concat()
            if len(done) != len(sent.keys):
                raise TeacherError(
                    f"the teacher pass returned {len(done)} rows for {len(sent.keys)}: a fault of the engine"
                )
            names = [name for name in done.fields if name.startswith("sdar_") and name not in sent.carry]
            data = tq.kv_batch_get(keys=sent.keys, partition_id=TEACHER_PARTITION, select_fields=names)
            return {name: data[name] for name in names}
        finally:
            tq.kv_clear(keys=sent.keys, partition_id=TEACHER_PARTITION)

    def _receive_early(self) -> None:
        if self._begun is not None:
            self._early, self._begun = self._receive(self._begun), None

    def _student_log_probs(self, batch: KVBatchMeta) -> torch.Tensor:
        data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=["old_log_probs"])
        return data["old_log_probs"]


def put_worker(trainer: Any, worker: type) -> None:
    """Make ``worker`` the class of the actor's role, whatever else the role has."""
    for role in {Role.Actor, Role.ActorRollout, Role.ActorRolloutRef} & trainer.role_worker_mapping.keys():
        trainer.role_worker_mapping[role] = ray.remote(worker)


def teacher_metrics(log_prob: float | None, staleness: int | None) -> dict[str, float]:
    """The pass in numbers; what a source does not have is left out.

    Args:
        log_prob: mean log pi_T of the sampled tokens of rows with a context, nats.
        staleness: steps since the teacher took weights from the actor.
    """
    metrics = {
        "sdar/teacher_log_prob": log_prob,
        "sdar/teacher_staleness": staleness,
    }
    return {name: value for name, value in metrics.items() if value is not None}


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
