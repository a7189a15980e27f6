"""verl's trainers with SDAR in them; trainer mode ``sdar`` is its synchronous one.

What an update does stands in :mod:`sdar_verl.step`; here is where it hooks into verl: set-up, rollout, validation,
checkpoints. Everything not named here is verl's. The asynchronous modes are in :mod:`sdar_verl.verl.async_modes`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar

from omegaconf import OmegaConf, open_dict
from tensordict import TensorDict
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.utils import create_rl_dataset
from verl.trainer.ppo.v1 import PPOTrainerSync
from verl.trainer.ppo.v1.trainer_base import PPOTrainer, register_trainer
from verl.utils import tensordict_utils as tu
from verl.utils.config import omega_conf_to_dataclass
from verl.utils.dataset.rl_dataset import collate_fn
from verl.workers.utils.losses import ppo_loss

from sdar_verl.checks.panel_tasks import panel_digests, panel_files
from sdar_verl.checks.run import check_run
from sdar_verl.cloud.attempt import CloudRun
from sdar_verl.compat import EXPECTED, validation_counts
from sdar_verl.config import load_config
from sdar_verl.context.builder import further_passes
from sdar_verl.fields import LOOKED_AT, TEACHER_LOG_PROBS, log_probs_of
from sdar_verl.method import Method, Strengths
from sdar_verl.modules import Importing
from sdar_verl.observe import observers
from sdar_verl.observe.base import load_states, save_states
from sdar_verl.observe.lines import step_line, validation_line
from sdar_verl.observe.step_metrics import step_metrics
from sdar_verl.recipe import plays_environments
from sdar_verl.requests import StepRequests
from sdar_verl.rollout.rows import RETIRED_COLUMN, TRACED_COLUMN
from sdar_verl.rollout.runtime import make_prompts
from sdar_verl.rollout.uids import PromptUids
from sdar_verl.step import LocalUpdate
from sdar_verl.table import StepTable, joined, stop_on_errors, stop_on_lost_episodes
from sdar_verl.verl import symbols
from sdar_verl.verl.late import late_contexts, run_writer, step_writing
from sdar_verl.verl.liveness import Liveness, check_queue_is_ours, queue_processes, run_processes, watched
from sdar_verl.verl.loss import sdar_loss
from sdar_verl.verl.queue import RowColumns
from sdar_verl.verl.resume import claim_checkpoints, from_scratch, resumed_folder
from sdar_verl.verl.taught_loop import teach
from sdar_verl.verl.teacher import PrivilegedTeacher
from sdar_verl.verl.validation import ArmDataset, ArmLoader, arm_metrics, with_lost
from sdar_verl.writer.base import Writer
from sdar_verl.writer.step import StepWriting

symbols.check("trainer")


class SdarTraining(LocalUpdate, PPOTrainer):
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
        check_queue_is_ours(config)
        self.cloud = CloudRun(config, self.sdar, self)  # first: it may bring the checkpoint to go on from
        check_run(config, self.sdar)
        claim_checkpoints(config)
        self._queue: dict[str, Any] = {}
        self._liveness = Liveness(lambda: {**run_processes(self), **self._queue})
        super().__init__(config)
        if self.sdar.rollout.poll_interval_s is not None:
            self.replay_buffer.poll_interval = self.sdar.rollout.poll_interval_s
        self.method, self.strengths = Method(self.sdar.loss), Strengths(self.sdar.loss)
        taught = self.sdar.teacher.source != "none"
        mask = "response_mask" if self.sdar.context.turns_share is None else LOOKED_AT
        self.requests = StepRequests.of(self.sdar.loss, mask)
        self.teacher = PrivilegedTeacher(self.sdar.teacher, self.requests, self) if taught else None
        self.taught = taught
        self.observers = [*observers(self.sdar, config, self), self.cloud]
        self.late_contexts = None
        self.row_columns = RowColumns()
        self.teacher_columns = []
        if self.teacher is not None and not self.teacher.source.per_update:
            self.teacher_columns = [TEACHER_LOG_PROBS, *map(log_probs_of, further_passes(self.sdar.context))]
        self._environments = plays_environments(config)
        self.checks_packing = bool(config.actor_rollout_ref.model.use_remove_padding)
        self._uids = PromptUids()
        self._tables: list[StepTable] = []
        self._updates: list[dict[str, Any]] = []
        if taught and self.method.reads_entropy:
            with open_dict(config):
                config.actor_rollout_ref.actor.calculate_entropy = True

    # ---------------------------------------------------------------- set-up

    def _build_replay_buffer(self) -> Any:
        return watched(super()._build_replay_buffer(), self._liveness)

    def _init_tokenizer(self) -> None:
        super()._init_tokenizer()
        if self._environments:
            make_prompts(self.config, self.sdar, self.tokenizer)  # its checks, before the models are loaded

    def _init_dataloader(self) -> None:
        super()._init_dataloader()
        for option in ("train_files", "val_files"):
            files, digests = panel_files(self.config, option), panel_digests(self.config, option)
            for file, digest in zip(files, digests, strict=True):
                print(f"sdar panel {file}: hash {digest}", flush=True)
        learn = self.sdar.skills.learn
        if learn.every:
            self.learn_panel = create_rl_dataset(
                learn.panel, self.config.data, self.tokenizer, self.processor, is_train=False
            )
        loop = None if self._environments else self.config.actor_rollout_ref.rollout.agent.default_agent_loop
        self.val_dataset = ArmDataset(self.val_dataset, self.sdar.validation.arms, loop)
        self.val_dataloader = ArmLoader(
            dataset=self.val_dataset,
            batch_size=self.config.data.val_batch_size or len(self.val_dataset),
            num_workers=self.config.data.dataloader_num_workers,
            shuffle=False,
            drop_last=False,
            collate_fn=collate_fn,
        )

    def _init_resource_pool_mgr(self) -> None:
        super()._init_resource_pool_mgr()
        if self.teacher is not None:
            self.teacher.install(self._teacher_worker())

    def _teacher_worker(self) -> type:
        """The worker class with a teacher in it, on the base that verl's trainer of this mode wants."""
        from sdar_verl.verl.worker import TeacherWorker

        return TeacherWorker

    def on_init_end(self) -> None:
        """Give the actor workers their loss and set the size of an update; then verl's first weight sync."""
        actor = self.config.actor_rollout_ref.actor.copy()
        if self.use_reference_policy and not _reads_reference(self.config):
            # The reference is there for the teacher at most: a KL with coefficient 0 is not worth a pass per step.
            self.use_reference_policy = False
            actor.use_kl_loss = False
            if self.teacher is None:
                self.actor_rollout_wg.set_loss_fn(partial(ppo_loss, config=omega_conf_to_dataclass(actor)))
        if self.teacher is not None:
            self.teacher.start()
            loss = partial(sdar_loss, config=omega_conf_to_dataclass(actor), method=self.method)
            self.actor_rollout_wg.set_loss_fn(Importing(loss, self.sdar.modules))
            self.late_contexts = late_contexts(self.config, self.sdar, self.tokenizer, self.writing)
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
        self.agent_loop_manager = agent_loop_manager  # verl's first act, too; the watch asks for its workers
        run_processes(self)
        with self._liveness.watching(), self.cloud:
            super().fit(agent_loop_manager)

    # ---------------------------------------------------------------- a step

    def step(self, metrics: dict, timing_raw: dict) -> KVBatchMeta:
        """verl's: all updates up to the next weight sync, one in most modes; then what is known of all together."""
        self._updates, self._tables = [], []
        if self.teacher is not None and self.strengths.retired(self.global_steps):
            print(f"sdar: lambda is 0 for good from step {self.global_steps} on; the teacher's pass ends", flush=True)
            self.teacher = self.late_contexts = None
            self.teacher_columns, self.requests = [], StepRequests()
        batch = super().step(metrics, timing_raw)
        metrics.update(step_metrics(self._updates))
        self.strengths.observe(self.global_steps, metrics)
        with self.timed("observers"):
            table = joined(self._tables)
            for observer in self.observers:
                metrics.update(observer.after_updates(table, metrics))
        self._tables = []
        return batch

    def _step_once(self, metrics: dict, timing_raw: dict, sample_batch_size: int) -> KVBatchMeta:
        table = self.local_update(metrics, sample_batch_size)
        self._tables.append(table)
        self._updates.append(dict(metrics))
        return table.batch

    # ---------------------------------------------------------------- who writes contexts

    def writing(self) -> StepWriting:
        """A way to the run's writer."""
        return step_writing(self.config, self.tokenizer, self._writer)

    @cached_property
    def _writer(self) -> Writer:
        return run_writer(self.config, self.sdar, self.tokenizer, self.get_llm_client)

    # ---------------------------------------------------------------- rollout

    def _next_train_batch(self, num_prompts: int | None = None) -> TensorDict:
        """verl's, with numbered prompt ids: rows can then be put into one order, whichever episode ended first."""
        batch = super()._next_train_batch(num_prompts)
        tasks = list(batch["task"]) if self._environments else [str(prompt) for prompt in batch["raw_prompt"]]
        tu.assign_non_tensor_stack(batch, "uid", self._uids.name(self.global_steps, tasks))
        every = self.sdar.trace.every
        if every and (self.verl_mode != "sync" or self.global_steps % every == 0):
            # In the asynchronous modes it is not known yet which step will train on them.
            tu.assign_non_tensor_stack(batch, TRACED_COLUMN, [True] * len(batch))
        if self.taught and self.strengths.retired(self.global_steps):
            tu.assign_non_tensor_stack(batch, RETIRED_COLUMN, [True] * len(batch))
        if not self._environments:
            teach(batch, self.config.actor_rollout_ref.rollout.agent.default_agent_loop)
        for observer in self.observers:
            observer.before_rollout(batch)
        return batch

    # ---------------------------------------------------------------- validation

    def on_validate_begin(self) -> None:
        """verl's hook, before the panel is read."""
        super().on_validate_begin()
        self.val_dataset.begin()
        for observer in self.observers:
            observer.before_validation(self.val_dataset)

    def _val_metrics_update(
        self,
        data_sources: Sequence[str],
        sample_uids: Sequence[str],
        reward_extra_infos_dict: dict[str, list[Any]],
        *args: Any,
        **kwargs: Any,
    ) -> dict[str, float]:
        counts = validation_counts(kwargs)
        outcomes: dict[str, list[Any]] = reward_extra_infos_dict
        if not self._environments:
            outcomes = self.val_dataloader.outcomes(data_sources, sample_uids, reward_extra_infos_dict, counts)
            data_sources, counts = self.val_dataloader.named(data_sources, sample_uids, counts)
            kwargs |= {EXPECTED: counts} if counts else {}
        metrics = super()._val_metrics_update(data_sources, sample_uids, reward_extra_infos_dict, *args, **kwargs)
        stop_on_errors(reward_extra_infos_dict.get("error", []))
        stop_on_lost_episodes([failure or None for failure in reward_extra_infos_dict.get("failure", [])], asked=0)
        arms = {}  # in a recipe of verl's, its own metrics are there
        if self._environments:
            rollouts = self.config.actor_rollout_ref.rollout.val_kwargs.n
            outcomes = with_lost(outcomes, self.val_dataset.asked(rollouts))
            arms = arm_metrics(outcomes)
        if arms:
            print(validation_line(self.global_steps, arms), flush=True)
        if "arm" in outcomes:
            for observer in self.observers:
                observer.after_validation(self.global_steps, {**metrics, **arms}, outcomes)
        return {**metrics, **arms}

    # ---------------------------------------------------------------- checkpoints

    @property
    def _stateful(self) -> list[Any]:
        return [*([self.strengths] if self.taught else []), *self.observers]

    def _save_checkpoint(self) -> None:
        # Before verl's own: its last act is to name this checkpoint the latest.
        save_states(self._stateful, Path(self.config.trainer.default_local_dir) / f"global_step_{self.global_steps}")
        super()._save_checkpoint()

    def _load_checkpoint(self) -> None:
        super()._load_checkpoint()
        if self.global_steps == 0:
            print(from_scratch(self.config), end="", flush=True)
        else:
            load_states(self._stateful, resumed_folder(self.config, self.global_steps))
            if any(observer.awaits_validation for observer in self.observers):
                with open_dict(self.config):
                    self.config.trainer.val_before_train = True

    # ---------------------------------------------------------------- what a person sees

    def _compute_metrics(self, batch: KVBatchMeta, metrics: dict, timing_raw: dict, *args: Any, **kwargs: Any) -> None:
        super()._compute_metrics(batch, metrics, timing_raw, *args, **kwargs)
        for observer in self.observers:
            observer.after_step(self.global_steps, metrics)
        print(step_line(self.global_steps, self.total_training_steps, metrics), flush=True)


@register_trainer("sdar")
class SdarTrainer(SdarTraining, PPOTrainerSync):
    """verl's synchronous trainer, plus the privileged teacher and the ``sdar`` advantages."""

    verl_mode = "sync"


def _reads_reference(config: Any) -> bool:
    """Whether verl itself needs the reference's log-probs of the student's rows."""
    return bool(config.actor_rollout_ref.actor.kl_loss_coef or config.algorithm.use_kl_in_reward)
