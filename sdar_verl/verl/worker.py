"""The training workers, with the privileged teacher in them: verl's worker class and what the trainer may ask of it.

``TeacherWorker`` takes the place of verl's ``ActorRolloutRefWorker``, ``DetachTeacherWorker`` that of its
``DetachActorWorker``; the teacher's weights are colocated with the actor's. ``PoolTeacherWorker`` is the teacher alone,
frozen, on devices of its own. All answer ``compute_teacher_log_prob``, dispatched over the mesh ``teacher``: that of
the engine the pass runs through.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from omegaconf import DictConfig, OmegaConf, open_dict
from tensordict import TensorDict
from verl.single_controller.base.decorator import Dispatch, make_nd_compute_dataproto_dispatch_fn, register
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_name
from verl.utils.profiler import DistProfiler
from verl.workers.engine_workers import ActorRolloutRefWorker, TrainingWorker

from sdar_verl.config import TeacherConfig
from sdar_verl.fields import (
    MODULES_NODE,
    SUPPORT_IDS,
    SUPPORT_LOG_PROBS,
    TEACHER_HIDDEN,
    TEACHER_LOG_PROBS,
    TEACHER_MASK,
    TEACHER_MESH,
    TEACHER_NODE,
)
from sdar_verl.modules import import_modules
from sdar_verl.requests import HEAD_REQUEST, SCORING_PASS, HeadRequest, ScoringPass
from sdar_verl.table import nested
from sdar_verl.teacher.rows import rope_axes, teacher_row
from sdar_verl.teacher.sources import WeightSource, get_source
from sdar_verl.verl import symbols
from sdar_verl.verl.detach import DetachWorker
from sdar_verl.verl.engine import MODEL_TYPE

symbols.check("workers")

_EVERYWHERE: Any = Dispatch.ONE_TO_ALL  # type: ignore[attr-defined]  # verl adds its members at run time
_ANSWERS = (SUPPORT_IDS, SUPPORT_LOG_PROBS, TEACHER_HIDDEN)


class SdarTrainingWorker(TrainingWorker):
    """verl's training worker, on our engine, which can score the teacher's rows."""

    engine: Any

    def __init__(self, config: Any):
        super().__init__(replace(config, model_type=MODEL_TYPE))

    def score(self, data: TensorDict, *, no_lora_adapter: bool = False, on_device: bool = False) -> TensorDict:
        """The :class:`~sdar_verl.requests.ScoringPass` of a batch through the engine, with the weights as they are.

        Only rows with a prompt and a token that counts are scored; the others have zeros in every column. The ranks
        agree on a number of rows, since they gather weights together.

        Args:
            data: rows with ``responses`` and the columns that the pass names.
            no_lora_adapter: score without it.
            on_device: the weights are there already, and stay.

        Returns:
            The columns that the pass writes, nested over the responses, on the CPU: log-probs (NaN at the tokens of a
            row that holds a number anywhere that is not finite), mask, and what else was asked for.
        """
        scoring = ScoringPass.from_json(tu.get(data, SCORING_PASS))
        prompts, responses, masks = (list(data[name].unbind()) for name in (scoring.prompts, "responses", scoring.mask))
        # A row by which verl fills a batch up has one token, and the columns that an agent loop stored of a whole one.
        masks = [mask[: len(response)] for mask, response in zip(masks, responses, strict=True)]
        seen = [bool(len(prompt)) and bool(mask.any()) for prompt, mask in zip(prompts, masks, strict=True)]
        numbers = self._agreed([i for i, has in enumerate(seen) if has], len(seen))
        columns = {
            TEACHER_LOG_PROBS: [torch.zeros(len(mask)) for mask in masks],
            TEACHER_MASK: [mask.cpu().long() * has for mask, has in zip(masks, seen, strict=True)],
        }
        if numbers:
            # A row that only fills up may have no prompt: any token will do.
            starts = {i: prompts[i] if len(prompts[i]) else responses[i][:1] for i in numbers}
            axes = rope_axes(getattr(self.model_config, "processor", None))
            rows = [teacher_row(starts[i], responses[i], masks[i], axes=axes) for i in numbers]
            adapter = self.engine.disable_adapter if no_lora_adapter else nullcontext
            with self.engine.eval_mode(disable_auto_offload=on_device), adapter():
                found = self._infer(rows, data, numbers, scoring.request)
            for place in _broken(found, [masks[i] for i in numbers]):
                found[TEACHER_LOG_PROBS][place][masks[numbers[place]].cpu().bool()] = float("nan")
            for name, values in found.items():
                if name not in columns:
                    shape, dtype = values[0].shape[1:], values[0].dtype
                    columns[name] = [torch.zeros(len(mask), *shape, dtype=dtype) for mask in masks]
                for i, row in zip(numbers, values, strict=True):
                    if seen[i]:
                        columns[name][i] = row
        writes = scoring.writes
        return tu.get_tensordict({writes[name]: nested(rows) for name, rows in columns.items() if name in writes})

    def _agreed(self, numbers: list[int], rows: int) -> list[int]:
        """As many rows on every rank: others are added where another rank has more, or micro-batches must be full."""
        most = torch.tensor(len(numbers), device=get_device_name())
        dist.all_reduce(most, op=dist.ReduceOp.MAX, group=self.engine.get_data_parallel_group())
        wanted = int(most)
        if not self.engine_config.use_dynamic_bsz:
            wanted += -wanted % self.engine_config.infer_micro_batch_size_per_gpu
        chosen = set(numbers)
        return [*numbers, *[i for i in range(rows) if i not in chosen][: wanted - len(numbers)]]

    def _infer(
        self, rows: list[dict[str, torch.Tensor]], data: TensorDict, numbers: list[int], request: HeadRequest
    ) -> dict[str, list[torch.Tensor]]:
        """``rows`` through verl's engine in its micro-batches; they are those of ``data`` with these numbers.

        Returns:
            Name -> per row, (response tokens, ...): of such a pass our engine makes nothing for the prompt.
        """
        names = ("input_ids", "position_ids", "loss_mask", "responses")
        batch = TensorDict({name: nested([row[name] for row in rows]) for name in names}, batch_size=len(rows))
        if request.what == "on_support":
            support = data[SUPPORT_IDS].unbind()
            batch[SUPPORT_IDS] = nested(
                [support[i][: len(row["responses"])] for i, row in zip(numbers, rows, strict=True)]
            )
        config = self.engine_config
        tu.assign_non_tensor(
            batch,
            temperature=tu.get(data, "temperature"),
            calculate_entropy=False,
            use_remove_padding=self.model_config.get("use_remove_padding", False),
            use_fused_kernels=config.use_fused_kernels,
            use_dynamic_bsz=config.use_dynamic_bsz,
            max_token_len_per_gpu=config.infer_max_token_len_per_gpu,
            micro_batch_size_per_gpu=config.infer_micro_batch_size_per_gpu,
            **{HEAD_REQUEST: request.to_json()},
        )
        # Our engine (engine.py, head.py), not infer_batch of this class: the latter gives its result to reporting ranks
        # alone.
        result = self.engine.infer_batch(batch, loss_function=None)["model_output"]
        found = {TEACHER_LOG_PROBS: result["log_probs"]} | {n: result[n] for n in _ANSWERS if n in result}
        return {name: [row.cpu() for row in values.unbind()] for name, values in found.items()}


class FreshTeacherTrainingWorker(SdarTrainingWorker):
    """The same, which scores an update's rows with the weights that this update starts from."""

    def train_batch(self, data: TensorDict) -> TensorDict:
        """One optimizer update (verl's), on rows that carry the teacher's prompts."""
        if tu.get(data, SCORING_PASS, default=None) is None:  # the teacher has retired
            return super().train_batch(data)
        for name, values in self.score(data, on_device=True).items():
            data[name] = values.to(data["responses"].device)
        self.engine.heads.hand_over(self.engine.heads, "teacher")
        return super().train_batch(data)


class WithTeacher(ActorRolloutRefWorker):
    """Actor, rollout and reference as verl has them, and the teacher's weights beside them; put it before verl's class.

    Args:
        config: verl's ``actor_rollout_ref`` node, with ``sdar.teacher`` in it (:data:`TEACHER_NODE`).
        role: verl's name of the role.
        **kwargs: verl's.

    Attributes:
        other: frozen weights from ``sdar.teacher.path``, in an engine of their own; None without.
        source: where the teacher's weights come from; there after :meth:`init_model`.
    """

    actor_worker_cls = ref_worker_cls = SdarTrainingWorker
    actor: Any
    ref: Any
    source: WeightSource

    def __init__(self, config: DictConfig, role: str, **kwargs: Any):
        super().__init__(config, role, **kwargs)
        import_modules(config[MODULES_NODE])
        self._settings = teacher_settings(config)
        self._own_config = copy.deepcopy(config)  # verl's init_model renames keys in the reference's node
        self.other: TrainingWorker | None = None
        if get_source(self._settings.source).per_update:
            self.actor_worker_cls = FreshTeacherTrainingWorker

    @register(dispatch_mode=_EVERYWHERE)
    def init_model(self) -> None:
        """Build verl's models, then the teacher's weights."""
        super().init_model()
        if self._settings.path is not None and self._settings.placement == "colocated":
            frozen = FrozenWorker(config=other_weights(self._own_config, self._settings.path), role="ref")
            frozen.init_model()
            self.other = frozen.ref
        self.source = get_source(self._settings.source)(self._settings, self)
        self.set_dispatch_collect(mesh_name=TEACHER_MESH, **self.source.worker.get_dispatch_collect())

    @register(dispatch_mode=make_nd_compute_dataproto_dispatch_fn(mesh_name=TEACHER_MESH))
    @DistProfiler.annotate(color="cyan", role="teacher_compute_log_prob")
    def compute_teacher_log_prob(self, data: TensorDict) -> TensorDict:
        """Score teacher rows with the teacher's weights, which the reference's or the actor's worker has
        (:mod:`sdar_verl.teacher.sources`); see :meth:`SdarTrainingWorker.score`."""
        with self.source.scoring() as options:
            fields = self.source.worker.score(data, **options)
        self.source.worker.engine.heads.hand_over(self.actor.engine.heads, "teacher")
        return fields

    @register(dispatch_mode=make_nd_compute_dataproto_dispatch_fn(mesh_name="ref"))
    @DistProfiler.annotate(color="cyan", role="anchor")
    def compute_anchor(self, data: TensorDict) -> TensorDict:
        """What the start policy says of the student's rows, for a target that is drawn to it."""
        fields = self.ref.score(data)
        self.ref.engine.heads.hand_over(self.actor.engine.heads, "anchor")
        return fields

    @register(dispatch_mode=make_nd_compute_dataproto_dispatch_fn(mesh_name="actor"))
    def update_actor(self, data: TensorDict) -> TensorDict | None:
        """verl's update; afterwards the copies of the teacher's and the reference's head are freed."""
        try:
            return super().update_actor(data)
        finally:
            self.actor.engine.heads.teacher = self.actor.engine.heads.anchor = None

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


class FrozenWorker(ActorRolloutRefWorker):
    """verl's worker of a reference, on our engine."""

    ref_worker_cls = SdarTrainingWorker
    ref: Any


class PoolTeacherWorker(FrozenWorker):
    """A frozen teacher on devices of its own.

    Args:
        config: verl's ``actor_rollout_ref`` node, with ``sdar.teacher`` in it.
    """

    def __init__(self, config: DictConfig, **kwargs: Any):
        settings = teacher_settings(config)
        path = settings.path if settings.path is not None else config.model.path
        super().__init__(other_weights(config, path), role="ref", **kwargs)

    @register(dispatch_mode=_EVERYWHERE)
    def init_model(self) -> None:
        """Build the teacher's model."""
        super().init_model()
        self.set_dispatch_collect(mesh_name=TEACHER_MESH, **self.ref.get_dispatch_collect())

    @register(dispatch_mode=make_nd_compute_dataproto_dispatch_fn(mesh_name=TEACHER_MESH), blocking=False)
    @DistProfiler.annotate(color="cyan", role="teacher_compute_log_prob")
    def compute_teacher_log_prob(self, data: TensorDict) -> TensorDict:
        """Score teacher rows. The caller gets futures: its own devices have work meanwhile."""
        return self.ref.score(data)


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


def _broken(found: dict[str, list[torch.Tensor]], masks: list[torch.Tensor]) -> list[int]:
    """Places of rows that hold NaN or infinity where the mask is on; hidden states show in the log-probs."""
    return [
        place
        for place, mask in enumerate(masks)
        if any(
            not torch.isfinite(values[place][mask.cpu().bool()]).all()
            for name, values in found.items()
            if name != TEACHER_HIDDEN and values[place].is_floating_point()
        )
    ]
