"""One local update of SDAR, from finished episodes to new weights: what a reader opens first.

It takes the place of verl's ``_step_once`` in its synchronous and in both asynchronous trainers. What begins with an
underscore is verl's own phase (:mod:`sdar_verl.verl.symbols` sees to it that each is there); the others follow, in
their order. Rows lie in verl's queue, where phases and workers read and write them by column
(:mod:`sdar_verl.fields` names ours); the table is what this process knows of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from verl.utils.debug import marked_timer

from sdar_verl.algorithm.schedules import GAP_SIZE
from sdar_verl.config import SdarConfig
from sdar_verl.config.loss import ScheduleConfig
from sdar_verl.fields import STEP_VALUES, TEACHER_PROMPTS
from sdar_verl.finite import ADVANTAGE_COLUMNS, UPDATE_COLUMNS, check_rows, check_teacher
from sdar_verl.method import Method, Strengths
from sdar_verl.observe.base import Observer
from sdar_verl.observe.metrics import gap_metrics, gap_size, reduce_loss_sums, row_metrics
from sdar_verl.requests import SCORING_PASS, StepRequests, requested
from sdar_verl.table import StepTable, stop_on_lost_episodes
from sdar_verl.teacher.several import mix, teacher_metrics
from sdar_verl.teacher.surprise import look_at_surprising
from sdar_verl.verl.advantage import AdvantageRows, advantage_rows
from sdar_verl.verl.packing import check_packing
from sdar_verl.verl.queue import RowColumns, in_order, read_table

TABLE_COLUMNS = ("response_mask", "rm_scores", "entropy", *UPDATE_COLUMNS)
"""What this process reads of every row, beside the teachers' log-probs."""

if TYPE_CHECKING:
    from verl.trainer.ppo.v1.trainer_base import PPOTrainer
else:
    PPOTrainer = object


class LocalUpdate(PPOTrainer):
    """Put before a trainer of verl's by :class:`sdar_verl.verl.trainer.SdarTraining`, which sets it up.

    Attributes:
        method, strengths: the ``sdar.loss`` node: its mathematics, and lambda and beta over the steps.
        requests: what the passes of a step are asked for.
        teacher: :class:`sdar_verl.verl.teacher.PrivilegedTeacher`; None without one, and once it has retired.
        taught: whether the run began with a teacher: the method goes on without it, with lambda = 0.
        late_contexts: contexts made of the step's own episodes; None without any.
        teacher_columns: log-prob columns of the teacher passes.
        row_columns: what a run's rows are stored as.
        observers: they see the finished rows of a step.
        checks_packing: whether verl's packing is still to be looked at.
    """

    sdar: SdarConfig
    method: Method
    strengths: Strengths
    requests: StepRequests
    teacher: Any
    taught: bool
    late_contexts: Any
    teacher_columns: list[str]
    row_columns: RowColumns
    observers: list[Observer]
    checks_packing: bool

    def local_update(self, metrics: dict[str, Any], size: int) -> StepTable:
        """Sample the finished episodes of ``size`` prompts, let the teacher score them, update the actor.

        Args:
            metrics: of this update; everything is added to it.
            size: prompts.

        Returns:
            The rows that it was made on.
        """
        with self.timed("gen"):
            batch = self.finished_episodes(size, metrics)
        if self.colocated_reward_model:
            with self.timed("reward"):
                batch = self._compute_reward_colocate(batch, metrics=metrics)
        table = read_table(self._balance_batch(batch, metrics=metrics), self.global_steps, self.row_columns)
        metrics |= self.count_crashed(table, size)
        if self.late_contexts is not None:
            with self.timed("contexts"):
                metrics |= self.late_contexts.fill(table)
        metrics |= row_metrics(table)
        metrics |= self.first_checks(table)

        if self.teacher is not None:
            self.teacher.begin(table)  # stops without contexts; on devices of its own it scores from here on
        with self.timed("old_log_prob"):
            self.old_log_probs(table, metrics)
        if self.use_reference_policy:
            with self.timed("ref"):
                table.batch = self._compute_ref_log_prob(table.rows.lean(), metrics=metrics)
        if self.use_critic:
            with self.timed("values"):
                table.batch = self._compute_values(table.rows.lean(), metrics=metrics)
        if self.teacher is not None:
            with self.timed("teacher"):
                metrics |= self.score_teacher(table)

        table.read([*TABLE_COLUMNS, *self.teacher_columns])
        metrics |= self.check(table, UPDATE_COLUMNS)
        if self.teacher is not None:
            metrics |= check_teacher(table, self.sdar.on_nonfinite)
            if self.sdar.context.teachers.weights:
                mix(table, self.sdar.context.shares)
            metrics |= self.teacher.verify(table)

        with self.timed("adv"):
            self.advantages(table, metrics)
        metrics |= self.check(table, ADVANTAGE_COLUMNS)
        if self.taught:  # also when the teacher has retired: the policy gradient's weight is the method's
            with self.timed("method"):
                metrics |= self.judge(table)

        if self.use_critic:
            with self.timed("update_critic"):
                table.batch = self._update_critic(table.rows.lean(), metrics=metrics)
        if self.config.trainer.critic_warmup <= self.global_steps:
            with self.timed("update_actor"):
                self.update_actor(table, metrics)
        return table

    # ---------------------------------------------------------------- rows

    def finished_episodes(self, size: int, metrics: dict[str, Any]) -> Any:
        """verl's batch: the rows of ``size`` prompts whose episodes have ended, in one order whichever ended first."""
        self.on_sample_begin()
        batch, sampled = self.replay_buffer.sample(
            global_steps=self.global_steps, partition_id="train", batch_size=size
        )
        metrics.update(sampled)
        batch.extra_info["temperature"] = self.config.actor_rollout_ref.rollout.temperature
        batch = in_order(batch)
        # While the rollout servers still have the policy: who asks it something does so now.
        observers = [observer for observer in self.observers if observer.wants_rollout(self.global_steps)]
        late = self.late_contexts if self.late_contexts is not None and self.late_contexts.during_rollout else None
        if observers or late is not None:
            table = read_table(batch, self.global_steps, self.row_columns)
            if late is not None:
                late.write(table)
            for observer in observers:
                observer.after_rollout(table)
        self.on_sample_end()
        return batch

    def count_crashed(self, table: StepTable, size: int) -> dict[str, float]:
        """Episodes that left no row; too many of these and of those that failed stop the run."""
        expected, failures = size * self.config.actor_rollout_ref.rollout.n, table.failures()
        stop_on_lost_episodes(failures, expected)
        return {"sdar/crashed_episodes": expected - len(failures)}

    def first_checks(self, table: StepTable) -> dict[str, float]:
        """What can only be seen on rows and workers, once."""
        if not self.checks_packing:
            return {}
        self.checks_packing = False
        return {"sdar/packing_gap": check_packing(self, table)}

    def check(self, table: StepTable, columns: Mapping[str, str]) -> dict[str, float]:
        """Stop, or take rows out, where one of these columns is not finite."""
        return check_rows(table, columns, self.sdar.on_nonfinite, self.tokenizer.eos_token_id)

    # ---------------------------------------------------------------- passes

    def old_log_probs(self, table: StepTable, metrics: dict[str, Any]) -> None:
        """verl's, with what the objective asks of the student's pass."""
        batch = table.rows.lean()
        with requested(batch.extra_info, self.requests.student):
            if self.requests.student is not None and self.bypasses:
                temperature = self.config.actor_rollout_ref.rollout.temperature
                batch.extra_info.update(calculate_entropy=False, compute_loss=False, temperature=temperature)
                self.actor_rollout_wg.compute_log_prob(batch)
            table.batch = self._compute_old_log_prob(batch, metrics=metrics)

    def score_teacher(self, table: StepTable) -> dict[str, float]:
        """The teacher's columns, on every row that it looks at."""
        metrics, share = {}, self.sdar.context.turns_share
        if share is not None:
            metrics["sdar/looked_at_share"] = look_at_surprising(table, share)
        return metrics | self.teacher.score(table)

    # ---------------------------------------------------------------- numbers

    def advantages(self, table: StepTable, metrics: dict[str, Any]) -> None:
        """verl's, whose estimator ``sdar`` is told which row belongs to which episode."""
        with advantage_rows(AdvantageRows.of(self.sdar.advantage, table)) as told:
            table.batch = self._compute_advantage(table.batch, metrics=metrics)
        if told.counts is not None:
            metrics["sdar/groups_without_variance"] = told.counts.groups_without_variance
            metrics["sdar/groups_of_one"] = told.counts.groups_of_one
            metrics["sdar/groups"] = told.counts.groups
        if told.advantages is not None:
            table.columns["advantages"] = told.advantages
        else:
            table.read(["advantages"])
        if self.correction.get("rollout_rs"):
            table.read(["response_mask"])  # tokens that it rejected are out of it

    def judge(self, table: StepTable) -> dict[str, float]:
        """The method's view of all rows: statistics and signals go to the rows, lambda and beta with the batch.

        Gap and gate of here are those at the old weights, for what spans rows and for metrics; the loss takes its own
        at the weights of each update (:meth:`sdar_verl.method.Method.terms`).
        """
        coef, beta, rl = self.strengths.at(self.global_steps)
        metrics = {"sdar/lambda": coef, "sdar/beta": beta}
        if self.sdar.loss.rl_schedule.name != "constant" or rl != 1.0:
            metrics["sdar/rl_weight"] = rl
        if self.sdar.loss.anchor.student_schedule != ScheduleConfig():
            metrics["sdar/anchor_student"] = self.strengths.anchor(self.global_steps)
        judged = self.method.judge(table, coef, beta, rl)
        if judged.gap is not None and judged.gate is not None:
            gap, entropy = judged.gap, table.columns.get("entropy")
            metrics |= gap_metrics(gap, table.mask, table.response, table.episode_ids, table.turns, entropy)
            if self.sdar.context.teachers.several:
                metrics |= teacher_metrics(table, judged.gate, self.sdar.context.shares)
            table.columns |= {"gap": gap, "gate": judged.gate}
            if GAP_SIZE in self.strengths.measures:
                metrics |= gap_size(gap, table.mask, table.response)
        if judged.change is not None:
            metrics["sdar/advantage_change"] = judged.change
        table.write(judged.columns)
        table.batch.extra_info[STEP_VALUES] = asdict(judged.values)
        return metrics

    def update_actor(self, table: StepTable, metrics: dict[str, Any]) -> None:
        """verl's, whose workers call :func:`sdar_verl.verl.loss.sdar_loss` with what :meth:`judge` sent along; their
        sums become means."""
        if self.teacher is None:
            table.batch = self._update_actor(table.rows.lean(teacher=False), metrics=metrics)
            return
        within = self.teacher.source.per_update
        batch = table.rows.lean(*([TEACHER_PROMPTS] if within else []))
        if within:
            batch.extra_info[SCORING_PASS] = self.requests.teacher.to_json()
        with requested(batch.extra_info, self.requests.update_with(self.strengths.anchor(self.global_steps))):
            table.batch = self._update_actor(batch, metrics=metrics)
        if self.local_trigger_step == self.parameter_sync_step - 1:
            self.teacher.updated()
        metrics.update(reduce_loss_sums(metrics))

    # ---------------------------------------------------------------- of the run

    @property
    def correction(self) -> Mapping[str, Any]:
        """verl's ``algorithm.rollout_correction``."""
        return self.config.algorithm.get("rollout_correction", None) or {}

    @property
    def bypasses(self) -> bool:
        """verl takes the rollout's log-probs for the old ones and makes no pass over the student's rows."""
        return bool(self.correction.get("bypass_mode", False))

    @property
    def colocated_reward_model(self) -> bool:
        """Rewards come from a model on the training devices, after the episodes."""
        return self.reward_loop_manager.reward_loop_worker_handles is None

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """The seconds within the context are those of ``timing_s/<phase>``."""
        with marked_timer(phase, self.timing_raw):
            yield
