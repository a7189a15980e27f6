"""One local update of SDAR, from finished episodes to new weights: what a reader opens first.

It takes the place of verl's ``_step_once`` in its synchronous and in both asynchronous trainers. What begins with an
underscore is verl's own phase (:mod:`sdar_verl.verl.symbols` sees to it that each is there); the rest is this package.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sdar_verl.finite import ADVANTAGES, STUDENT, leave_out_broken_rows, leave_out_broken_teacher
from sdar_verl.observe.metrics import row_metrics
from sdar_verl.teacher.several import mix

if TYPE_CHECKING:
    from sdar_verl.verl.trainer import SdarTraining


def local_update(run: SdarTraining, metrics: dict[str, Any], size: int) -> Any:
    """Sample the finished episodes of ``size`` prompts, let the teacher judge them, update the actor.

    Args:
        run: the trainer.
        metrics: of this update; everything is added to it.
        size: prompts.

    Returns:
        verl's batch, as its trainer wants it back.
    """
    with run.timed("gen"):
        batch = run.finished_episodes(size, metrics)
    if run.colocated_reward_model:
        with run.timed("reward"):
            batch = run._compute_reward_colocate(batch, metrics=metrics)
    batch = run._balance_batch(batch, metrics=metrics)

    table = run.read_table(batch)
    metrics |= run.count_crashed(table)
    if run.late_contexts is not None:
        metrics |= run.late_contexts.fill(table)
    metrics |= row_metrics(table)
    run.first_checks(table, metrics)

    if run.teacher is not None:
        run.teacher.begin(table)
    with run.timed("old_log_prob"):
        batch = run.old_log_probs(batch, metrics)
    if run.use_reference_policy:
        with run.timed("ref"):
            batch = run._compute_ref_log_prob(batch, metrics=metrics)
    if run.use_critic:
        with run.timed("values"):
            batch = run._compute_values(batch, metrics=metrics)
    table.rows.batch = batch
    if run.teacher is not None:
        with run.timed("teacher"):
            metrics |= run.score_teacher(table)

    table.read(run.columns)
    metrics |= leave_out_broken_rows(table, STUDENT, run.sdar.on_nonfinite, run.tokenizer.eos_token_id)
    if run.teacher is not None:
        metrics |= leave_out_broken_teacher(table, run.sdar.on_nonfinite)
        mix(table, run.sdar.context.shares)
        metrics |= run.teacher.verify(table)

    with run.timed("adv"):
        batch = run.advantages(batch, table, metrics)
    metrics |= leave_out_broken_rows(table, ADVANTAGES, run.sdar.on_nonfinite, run.tokenizer.eos_token_id)
    if run.taught:
        with run.timed("method"):
            metrics |= run.judge(batch, table)

    if run.use_critic:
        with run.timed("update_critic"):
            batch = run._update_critic(batch, metrics=metrics)
    if run.config.trainer.critic_warmup <= run.global_steps:
        with run.timed("update_actor"):
            batch = run.update_actor(batch, metrics)
    run.tables.append(table)
    return batch
