"""What SDAR adds to verl's v1 trainers, and trainer mode ``sdar``: verl's synchronous one with it.

    rollout -> old log-probs -> reference -> teacher pass -> advantages -> update

Everything not named here is verl's: rollout, replay buffer, checkpoints, validation loop, trackers. The asynchronous
modes are in :mod:`sdar_verl.training.async_modes`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from omegaconf import OmegaConf, open_dict
from tensordict import TensorDict
from torchdata.stateful_dataloader import StatefulDataLoader
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.v1 import PPOTrainerSync
from verl.trainer.ppo.v1.trainer_base import PPOTrainer, register_trainer
from verl.utils import tensordict_utils as tu
from verl.utils.config import omega_conf_to_dataclass
from verl.utils.dataset.rl_dataset import collate_fn
from verl.utils.debug import marked_timer
from verl.workers.utils.losses import ppo_loss

from sdar_verl.cloud.attempt import CloudRun
from sdar_verl.compat import validation_counts
from sdar_verl.config import load_config
from sdar_verl.modules import Importing
from sdar_verl.panels import panel_digest
from sdar_verl.rollout.rows import TRACED_COLUMN, RowInfo
from sdar_verl.rollout.uids import PromptUids
from sdar_verl.training.advantage import AdvantageRows, advantage_rows
from sdar_verl.training.checks.run import check_run
from sdar_verl.training.finite import ADVANTAGES, check_student
from sdar_verl.training.head.distributions import StepRequests, step_requests
from sdar_verl.training.head.loss import distribution_loss
from sdar_verl.training.head.requests import asked
from sdar_verl.training.late_context import LateContexts, late_contexts
from sdar_verl.training.live import step_line, validation_line
from sdar_verl.training.liveness import Liveness, queue_processes, run_processes, watched
from sdar_verl.training.metrics import reduce_loss_sums, row_metrics
from sdar_verl.training.panel_tasks import panel_files
from sdar_verl.training.parts.assemble import make_parts
from sdar_verl.training.parts.base import StepRows, load_parts, save_parts
from sdar_verl.training.read_rows import read_infos, row_order, stop_on_errors
from sdar_verl.training.resume import claim_checkpoints, from_scratch, resumed_folder
from sdar_verl.training.step_metrics import step_metrics
from sdar_verl.training.teacher.privileged import PrivilegedTeacher
from sdar_verl.training.validation import ArmDataset, arm_metrics, expected_episodes

logger = logging.getLogger(__name__)


class SdarTraining(PPOTrainer):
    """The privileged teacher and the ``sdar`` advantages, for any of verl's trainers: put it before verl's class.

    Class attributes:
        verl_mode: the mode of verl's that the class stands on. verl compares ``trainer_mode`` with the literals of its
            own modes in seven places and looks its settings up under it (``trainer.v1.<mode>``), and would take our
            name for an asynchronous mode without settings.
    """

    verl_mode: ClassVar[str]

    trainer_mode = property(lambda self: self.verl_mode, lambda self, value: None)

    def __init__(self, config: Any):
        self.sdar = load_config(config.get("sdar"))
        self.cloud = CloudRun(config, self.sdar)
        check_run(config, self.sdar)
        claim_checkpoints(config)
        self._queue: dict[str, Any] = {}
        self._liveness = Liveness(lambda: {**run_processes(self), **self._queue})
        super().__init__(config)
        if self.sdar.rollout.poll_interval_s is not None:
            self.replay_buffer.poll_interval = self.sdar.rollout.poll_interval_s
        self._has_teacher = self.sdar.teacher.source != "none"
        if self._has_teacher:
            self._teacher = PrivilegedTeacher(self.sdar.teacher, self)
        self._requests = step_requests(self.sdar.loss) if self._has_teacher else StepRequests()
        correction = config.algorithm.get("rollout_correction", None)
        self._bypasses = bool(correction and correction.get("bypass_mode", False))
        self._teacher_checked = False
        self._infos: list[RowInfo | None] = []
        self.parts = [*make_parts(self.sdar, config), self.cloud]
        self._late_contexts: LateContexts | None = None
        self._uids = PromptUids()
        self._updates: list[dict] = []

    # ---------------------------------------------------------------- set-up

    def _build_replay_buffer(self) -> Any:
        return watched(super()._build_replay_buffer(), self._liveness)

    def _init_dataloader(self) -> None:
        super()._init_dataloader()
        for option in ("train_files", "val_files"):
            for file in panel_files(self.config, option):
                print(f"sdar panel {file}: hash {panel_digest(file)}", flush=True)
        self.val_dataset = ArmDataset(self.val_dataset, self.sdar.validation.arms)
        self._val_types = self.val_dataset.task_types()
        self.val_dataloader = StatefulDataLoader(
            dataset=self.val_dataset,
            batch_size=self.config.data.val_batch_size or len(self.val_dataset),
            num_workers=self.config.data.dataloader_num_workers,
            shuffle=False,
            drop_last=False,
            collate_fn=collate_fn,
        )

    def _init_resource_pool_mgr(self) -> None:
        super()._init_resource_pool_mgr()
        if self._has_teacher:
            self._teacher.install(self._teacher_worker())

    def _teacher_worker(self) -> type:
        """The worker class with a teacher in it, on the base that verl's trainer of this mode wants."""
        from sdar_verl.training.teacher.worker import TeacherWorker

        return TeacherWorker

    def on_init_end(self) -> None:
        """Give the actor workers their loss and set the size of an update; then verl's first weight sync."""
        if self._has_teacher:
            self._teacher.start()
        actor = self.config.actor_rollout_ref.actor.copy()
        if self.use_reference_policy and not _reads_reference(self.config):
            # The reference is there for the teacher at most: a KL with coefficient 0 is not worth a pass per step.
            self.use_reference_policy = False
            actor.use_kl_loss = False
            if not self._has_teacher:
                self.actor_rollout_wg.set_loss_fn(partial(ppo_loss, config=omega_conf_to_dataclass(actor)))
        if self._has_teacher:
            self.actor_rollout_wg.set_loss_fn(
                Importing(
                    partial(distribution_loss, config=omega_conf_to_dataclass(actor), settings=self.sdar.loss),
                    self.sdar.all_modules,
                )
            )
            self._late_contexts = late_contexts(self.config, self.sdar, self.tokenizer)
        rows = self.sdar.update.mini_batch_rows
        if rows is not None:
            # verl counts a mini-batch in prompts and bounds it by the prompts of a step; a step of T-turn episodes has
            # T times as many rows. The workers are built by now, so this number is read by this process alone.
            with open_dict(self.config):
                group = self.config.actor_rollout_ref.rollout.n
                self.config.actor_rollout_ref.actor.ppo_mini_batch_size = rows // group
        super().on_init_end()

    def fit(self, agent_loop_manager: Any) -> None:
        """verl's, under watch: a dead process ends the run and is named."""
        units = "transfer_queue.backend.SimpleStorage.num_data_storage_units"
        self._queue = queue_processes(OmegaConf.select(self.config, units) or 0)
        with self._liveness.watching(), self.cloud:
            super().fit(agent_loop_manager)

    # ---------------------------------------------------------------- a step

    def step(self, metrics: dict, timing_raw: dict) -> KVBatchMeta:
        """verl's: all updates up to the next weight sync, one in most modes; then what is known of all together."""
        self._updates = []
        batch = super().step(metrics, timing_raw)
        metrics.update(step_metrics(self._updates))
        for part in self.parts:
            part.on_trained(self.global_steps, metrics)
        return batch

    def _step_once(self, metrics: dict, *args: Any, **kwargs: Any) -> KVBatchMeta:
        batch = super()._step_once(metrics, *args, **kwargs)
        self._updates.append(dict(metrics))
        return batch

    # ---------------------------------------------------------------- rollout

    def _next_train_batch(self, num_prompts: int | None = None) -> TensorDict:
        """verl's, with numbered prompt ids: rows can then be put into one order, whichever episode ended first."""
        batch = super()._next_train_batch(num_prompts)
        tu.assign_non_tensor_stack(batch, "uid", self._uids.name(self.global_steps, list(batch["task"])))
        if self.verl_mode != "sync" and self.sdar.trace.every:
            # Which step will train on them is not known yet.
            tu.assign_non_tensor_stack(batch, TRACED_COLUMN, [True] * len(batch))
        for part in self.parts:
            part.on_prompts(self.global_steps, batch)
        return batch

    def _balance_batch(self, batch: KVBatchMeta, metrics: dict, *args: Any, **kwargs: Any) -> KVBatchMeta:
        batch.reorder(sorted(range(len(batch.keys)), key=lambda i: row_order(batch.keys[i])))
        batch = super()._balance_batch(batch, metrics, *args, **kwargs)
        self._infos = read_infos(batch)
        if self._late_contexts is not None:
            self._late_contexts.fill(batch.keys, self._infos)
            stop_on_errors([info.error for info in self._infos if info is not None])
        metrics.update(row_metrics(batch.keys, self._infos))
        tasks = self.config.data.train_batch_size // self.parameter_sync_step
        wanted = tasks * self.config.actor_rollout_ref.rollout.n
        metrics["sdar/crashed_episodes"] = wanted - metrics["sdar/episodes"]
        rows = self._step_rows(batch, metrics)
        for part in self.parts:
            part.on_rows(rows)
        return batch

    def _step_rows(self, batch: KVBatchMeta, metrics: dict) -> StepRows:
        part, parts = self.local_trigger_step, self.parameter_sync_step
        return StepRows(self.global_steps, batch, self._infos, metrics, self.sdar, self, part, parts)

    # ---------------------------------------------------------------- teacher and advantages

    def _compute_old_log_prob(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        if self._has_teacher:
            self._teacher.begin(batch, self._infos, carry=self._requests.carry, request=self._requests.teacher)
        with asked(batch.extra_info, self._requests.student):
            if self._requests.student is not None and self._bypasses:
                # verl takes the rollout's log-probs and makes no pass over the student's rows.
                temperature = self.config.actor_rollout_ref.rollout.temperature
                batch.extra_info.update(calculate_entropy=False, compute_loss=False, temperature=temperature)
                self.actor_rollout_wg.compute_log_prob(batch)
            return super()._compute_old_log_prob(batch, metrics)

    def _compute_advantage(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        check_student(self._step_rows(batch, metrics), self.tokenizer.eos_token_id)
        if self._has_teacher:
            with marked_timer("teacher", self.timing_raw, color="blue"):
                self._teacher_pass(batch, metrics)
        with advantage_rows(AdvantageRows.from_batch(self.sdar.advantage, batch.keys, self._infos)) as rows:
            batch = super()._compute_advantage(batch, metrics)
        if rows.counts is not None:
            metrics["sdar/groups_without_variance"] = rows.counts.groups_without_variance
            metrics["sdar/groups"] = rows.counts.groups
        step_rows = self._step_rows(batch, metrics)
        check_student(step_rows, self.tokenizer.eos_token_id, ADVANTAGES)
        with marked_timer("parts", self.timing_raw, color="green"):
            for part in self.parts:
                part.on_advantages(step_rows)
        return batch

    def _teacher_pass(self, batch: KVBatchMeta, metrics: dict) -> None:
        # Under bypass the old log-probs are the rollout engine's, not these workers': nothing to compare with.
        # The rollout server is compared with the trainer at every step, on rows that the agent loop had it score.
        checks = self.sdar.teacher.sanity_check and self._teacher.equals_student and not self._bypasses
        checks = checks and not self._teacher.on_server
        if checks and not self._teacher_checked:
            metrics["sdar/empty_context_gap"] = self._teacher.check_empty_context(batch)
        self._teacher_checked = True
        requests = self._requests
        metrics.update(self._teacher.score(batch, self._infos, carry=requests.carry, request=requests.teacher))

    def _update_actor(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        with asked(batch.extra_info, self._requests.update):
            batch = super()._update_actor(batch, metrics)
        if self._has_teacher:
            if self.local_trigger_step == self.parameter_sync_step - 1:
                self._teacher.updated()
            metrics.update(reduce_loss_sums(metrics))
        return batch

    # ---------------------------------------------------------------- validation

    def on_validate_begin(self) -> None:
        """verl's hook, before the panel is read."""
        super().on_validate_begin()
        for part in self.parts:
            part.on_validation(self.val_dataset)

    def _val_metrics_update(
        self,
        data_sources: Sequence[str],
        sample_uids: Sequence[str],
        reward_extra_infos_dict: dict[str, list[Any]],
        *args: Any,
        **kwargs: Any,
    ) -> dict[str, float]:
        metrics = super()._val_metrics_update(data_sources, sample_uids, reward_extra_infos_dict, *args, **kwargs)
        stop_on_errors(reward_extra_infos_dict.get("error", []))
        asked = validation_counts(kwargs)
        rollouts = self.config.actor_rollout_ref.rollout.val_kwargs.n
        expected = expected_episodes(asked) if asked else self.val_dataset.asked(rollouts)
        arms = arm_metrics(reward_extra_infos_dict, expected, self._val_types)
        if arms:
            print(validation_line(self.global_steps, arms), flush=True)
            for part in self.parts:
                part.on_validated(self.global_steps, arms, reward_extra_infos_dict)
        return {**metrics, **arms}

    # ---------------------------------------------------------------- checkpoints

    def _save_checkpoint(self) -> None:
        # Before verl's own: its last act is to name this checkpoint the latest.
        save_parts(self.parts, Path(self.config.trainer.default_local_dir) / f"global_step_{self.global_steps}")
        super()._save_checkpoint()

    def _load_checkpoint(self) -> None:
        super()._load_checkpoint()
        if self.global_steps == 0:
            print(from_scratch(self.config), end="", flush=True)
        else:
            load_parts(self.parts, resumed_folder(self.config, self.global_steps))

    # ---------------------------------------------------------------- what a person sees

    def _compute_metrics(self, batch: KVBatchMeta, metrics: dict, timing_raw: dict, *args: Any, **kwargs: Any) -> None:
        # Teacher pass and parts run within verl's advantage phase; their times are shown on their own.
        timing_raw["adv"] -= timing_raw.get("teacher", 0.0) + timing_raw.get("parts", 0.0)
        super()._compute_metrics(batch, metrics, timing_raw, *args, **kwargs)
        for part in self.parts:
            part.on_step_end(self.global_steps, metrics)
        print(step_line(self.global_steps, self.total_training_steps, metrics), flush=True)


@register_trainer("sdar")
class SdarTrainer(SdarTraining, PPOTrainerSync):
    """verl's synchronous trainer, plus the privileged teacher and the ``sdar`` advantages."""

    verl_mode = "sync"


def _reads_reference(config: Any) -> bool:
    """Whether verl itself needs the reference's log-probs of the student's rows."""
    return bool(config.actor_rollout_ref.actor.kl_loss_coef or config.algorithm.use_kl_in_reward)
