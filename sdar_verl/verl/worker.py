"""The training workers, with the privileged teacher in them: verl's worker class and what the trainer may ask of it.

``TeacherWorker`` takes the place of verl's ``ActorRolloutRefWorker``, ``DetachTeacherWorker`` that of its
``DetachActorWorker``; the teacher's weights are colocated with the actor's. ``PoolTeacherWorker`` is the teacher alone,
frozen, on devices of its own. All answer ``compute_teacher_log_prob``, dispatched over the mesh ``teacher``: that of
the engine the pass runs through.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf, open_dict
from tensordict import TensorDict
from verl.single_controller.base.decorator import Dispatch, make_nd_compute_dataproto_dispatch_fn, register
from verl.utils import tensordict_utils as tu
from verl.utils.profiler import DistProfiler
from verl.workers.engine_workers import ActorRolloutRefWorker, TrainingWorker

from sdar_verl.config import TeacherConfig
from sdar_verl.modules import import_modules
from sdar_verl.teacher.rows import nested, response_part, teacher_row
from sdar_verl.teacher.sources import WeightSource, get_source
from sdar_verl.verl.detach import DetachWorker
from sdar_verl.verl.fields import (
    MODULES_NODE,
    TEACHER_ENTROPY,
    TEACHER_LOG_PROBS,
    TEACHER_NODE,
    TEACHER_PROMPTS,
)
from sdar_verl.verl.gradient_probe import GradientProbe
from sdar_verl.verl.head import HeadTap
from sdar_verl.verl.requests import HEAD_FIELDS, HEAD_REQUEST, SUPPORT_IDS, HeadRequest

MESH = "teacher"
_EVERYWHERE: Any = Dispatch.ONE_TO_ALL  # type: ignore[attr-defined]  # verl adds its members at run time


def score(worker: TrainingWorker, data: TensorDict) -> TensorDict | None:
    """One teacher pass through ``worker``'s engine, with the weights as they are.

    Args:
        worker: verl's, of the actor, the reference or the teacher's own engine.
        data: this rank's teacher rows; a request at the head may ask for more than log-probs and entropy
            (:mod:`sdar_verl.verl.requests`).

    Returns:
        Nested fields over the responses, on the CPU; None on a rank that does not report (sequence parallelism).
    """
    result = worker.infer_batch(data)
    if result is None:
        return None
    fields = {TEACHER_LOG_PROBS: result["log_probs"]}
    if "entropy" in result:
        fields[TEACHER_ENTROPY] = result["entropy"]
    lengths = data["responses"].offsets().diff().tolist()
    fields = {name: response_part(values, lengths) for name, values in fields.items()}
    fields |= {name: result[name] for name in HEAD_FIELDS if name in result}
    return tu.get_tensordict(fields).cpu()


class FreshTeacherTrainingWorker(TrainingWorker):
    """verl's training worker, which scores an update's rows with the weights that this update starts from."""

    def train_batch(self, data: TensorDict) -> TensorDict:
        """One optimizer update (verl's), on rows that carry the teacher's prompts."""
        if TEACHER_PROMPTS in data:
            for name, values in self._teacher_fields(data).items():
                data[name] = values
        return super().train_batch(data)

    def _teacher_fields(self, data: TensorDict) -> dict[str, torch.Tensor]:
        columns = [data[name].unbind() for name in (TEACHER_PROMPTS, "responses", "response_mask")]
        rows = [teacher_row(*row) for row in zip(*columns, strict=True)]
        names = ("input_ids", "position_ids", "loss_mask")
        batch = TensorDict({name: nested([row[name] for row in rows]) for name in names}, batch_size=len(rows))
        tu.assign_non_tensor(
            batch,
            temperature=tu.get(data, "temperature"),
            calculate_entropy=False,
            use_remove_padding=self.model_config.get("use_remove_padding", False),
            use_fused_kernels=self.engine_config.use_fused_kernels,
            use_dynamic_bsz=self.engine_config.use_dynamic_bsz,
            max_token_len_per_gpu=self.engine_config.infer_max_token_len_per_gpu,
            micro_batch_size_per_gpu=self.engine_config.infer_micro_batch_size_per_gpu,
        )
        asked = tu.get(data, HEAD_REQUEST, default=None)
        request = HeadRequest.from_json(asked).teacher if asked is not None else None
        if request is not None:
            tu.assign_non_tensor(batch, **{HEAD_REQUEST: request.to_json()})
            if request.what == "on_support":
                batch[SUPPORT_IDS] = data[SUPPORT_IDS]
        # The engine, not infer_batch of this class: the latter gives its result to reporting ranks alone, and every
        # rank needs it. verl's train_batch puts the module into training mode again.
        with self.engine.eval_mode(disable_auto_offload=True):
            output = self.engine.infer_batch(batch, loss_function=None)
        result, device = output["model_output"], data["responses"].device
        if request is not None:
            HeadTap.attach(self.engine).hand_head_to(self.engine)
        lengths = data["responses"].offsets().diff().tolist()
        fields = {TEACHER_LOG_PROBS: response_part(result["log_probs"], lengths)}
        fields |= {name: result[name] for name in HEAD_FIELDS if name in result}
        return {name: values.to(device) for name, values in fields.items()}


class WithTeacher(ActorRolloutRefWorker):
    """Actor, rollout and reference as verl has them, and the teacher's weights beside them; put it before verl's class.

    Args:
        config: verl's ``actor_rollout_ref`` node, with ``sdar.teacher`` in it (:data:`TEACHER_NODE`).
        role: verl's name of the role.
        **kwargs: verl's.
    """

    def __init__(self, config: DictConfig, role: str, **kwargs: Any):
        super().__init__(config, role, **kwargs)
        import_modules(config[MODULES_NODE])
        self._settings = teacher_settings(config)
        self._own_config = copy.deepcopy(config)  # verl's init_model renames keys in the reference's node
        self._other: TrainingWorker | None = None
        self._source: WeightSource | None = None
        if get_source(self._settings.source).per_update:
            self.actor_worker_cls = FreshTeacherTrainingWorker

    @property
    def _actor(self) -> TrainingWorker:
        assert self.actor is not None, "init_model comes first"
        return self.actor

    @property
    def other(self) -> TrainingWorker | None:
        """Frozen weights from ``sdar.teacher.path``, in an engine of their own."""
        return self._other

    @property
    def source(self) -> WeightSource:
        """Where the teacher's weights come from; there after :meth:`init_model`."""
        assert self._source is not None, "init_model comes first"
        return self._source

    @register(dispatch_mode=_EVERYWHERE)
    def init_model(self) -> None:
        """Build verl's models, then the teacher's weights."""
        super().init_model()
        if self._settings.path is not None:
            frozen = ActorRolloutRefWorker(config=other_weights(self._own_config, self._settings.path), role="ref")
            frozen.init_model()
            self._other = frozen.ref
        self._source = get_source(self._settings.source)(self._settings, self)
        self.set_dispatch_collect(mesh_name=MESH, **self._source.engine.get_dispatch_collect())
        for worker in (self.actor, self.ref, self._other):
            if worker is not None:
                HeadTap.attach(worker.engine)
        GradientProbe.attach(self._actor.engine)

    @register(dispatch_mode=make_nd_compute_dataproto_dispatch_fn(mesh_name=MESH))
    @DistProfiler.annotate(color="cyan", role="teacher_compute_log_prob")
    def compute_teacher_log_prob(self, data: TensorDict) -> TensorDict | None:
        """Score teacher rows with the teacher's weights; see :func:`score`."""
        with self.source.scoring() as extra:
            tu.assign_non_tensor(data, **extra)
            fields = score(self.source.engine, data)
        HeadTap.attach(self.source.engine.engine).hand_head_to(self._actor.engine)
        return fields

    @register(dispatch_mode=make_nd_compute_dataproto_dispatch_fn(mesh_name="actor"))
    def update_actor(self, data: TensorDict) -> TensorDict | None:
        """verl's update; afterwards the copy of the teacher's head, if there was one, is freed."""
        try:
            return super().update_actor(data)
        finally:
            HeadTap.attach(self._actor.engine).teacher_head = None

    @register(dispatch_mode=_EVERYWHERE)
    def update_teacher(self, step: int) -> None:
        """Training step ``step`` has updated the actor: let the teacher follow, if it does."""
        self.source.updated(step)

    @register(dispatch_mode=_EVERYWHERE)
    def save_checkpoint(
        self, local_path: str, hdfs_path: str | None = None, global_step: int = 0, max_ckpt_to_keep: int | None = None
    ) -> None:
        """The teacher's own weights, then verl's checkpoint; verl's trainer marks the step as saved after both."""
        self.source.save(self._teacher_file(local_path), global_step)
        super().save_checkpoint(local_path, hdfs_path, global_step, max_ckpt_to_keep)

    @register(dispatch_mode=_EVERYWHERE)
    def load_checkpoint(
        self, local_path: str, hdfs_path: str | None = None, del_local_after_load: bool = False
    ) -> None:
        """verl's checkpoint and the teacher's own weights beside it."""
        super().load_checkpoint(local_path, hdfs_path, del_local_after_load)
        self.source.load(self._teacher_file(local_path))

    def _teacher_file(self, folder: str) -> Path:
        return Path(folder) / f"sdar_teacher_world_size_{self.world_size}_rank_{self.rank}.pt"


class TeacherWorker(WithTeacher):
    """On verl's worker of the synchronous and the colocated trainer."""


class DetachTeacherWorker(WithTeacher, DetachWorker):
    """On verl's worker of the separate trainer, which keeps the weights that a step began with."""


class PoolTeacherWorker(ActorRolloutRefWorker):
    """A frozen teacher on devices of its own.

    Args:
        config: verl's ``actor_rollout_ref`` node, with ``sdar.teacher`` in it.
    """

    def __init__(self, config: DictConfig, **kwargs: Any):
        settings = teacher_settings(config)
        path = settings.path if settings.path is not None else config.model.path
        super().__init__(other_weights(config, path), role="ref", **kwargs)

    @property
    def teacher(self) -> TrainingWorker:
        """The frozen model; there after :meth:`init_model`."""
        assert self.ref is not None, "init_model comes first"
        return self.ref

    @register(dispatch_mode=_EVERYWHERE)
    def init_model(self) -> None:
        """Build the teacher's model."""
        super().init_model()
        self.set_dispatch_collect(mesh_name=MESH, **self.teacher.get_dispatch_collect())
        HeadTap.attach(self.teacher.engine)

    @register(dispatch_mode=make_nd_compute_dataproto_dispatch_fn(mesh_name=MESH), blocking=False)
    @DistProfiler.annotate(color="cyan", role="teacher_compute_log_prob")
    def compute_teacher_log_prob(self, data: TensorDict) -> TensorDict | None:
        """Score teacher rows; see :func:`score`. The caller gets futures: its own devices have work meanwhile."""
        return score(self.teacher, data)


def teacher_settings(config: DictConfig) -> TeacherConfig:
    """The ``sdar.teacher`` node that the trainer put into verl's ``actor_rollout_ref`` node."""
    return TeacherConfig.model_validate(OmegaConf.to_container(config[TEACHER_NODE], resolve=True))


def other_weights(config: DictConfig, path: str) -> DictConfig:
    """verl's node for a frozen model at ``path``: the reference's settings, no adapter."""
    config = copy.deepcopy(config)
    with open_dict(config):
        if path != config.model.path:
            config.model.hf_config_path = None  # of the student: another model has its own
        config.model.path = path
        config.model.tokenizer_path = None
        config.model.lora_rank = 0
        config.model.lora_adapter_path = None
        if config.model.get("lora", None) is not None:
            config.model.lora.rank = 0
    return config
