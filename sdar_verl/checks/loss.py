"""Checks of the ``sdar.loss`` node: names, their options, and options that would have no effect."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from omegaconf import DictConfig

from sdar_verl.algorithm.gates import check_gate_options, gate_reads, get_gate
from sdar_verl.algorithm.objectives import check_objective_options, get_objective
from sdar_verl.algorithm.schedules import (
    GAP_SIZE,
    GRAD_SHARE,
    GRAD_SHARE_WEIGHTS,
    Schedule,
    make_schedule,
    measures_of,
)
from sdar_verl.algorithm.signals import check_signal, get_signal, shapes_advantages, signal_reads
from sdar_verl.checks.distributions import distribution_faults
from sdar_verl.config import SdarConfig
from sdar_verl.config.loss import LossConfig, ScheduleConfig

_TEACHERS = ("sdar/gap", "sdar/gate", "sdar/loss", "sdar/grad_share", "sdar/teacher")
"""Metrics that end with the teacher."""


def loss_faults(config: DictConfig, sdar: SdarConfig) -> list[str]:
    """Every fault of the node, one line each; ``config`` is verl's whole config."""
    loss = sdar.loss
    named = [*_names(loss)]
    if named:
        return named  # the rest asks gates, signals and schedules about themselves
    faults = [*_schedules(loss), *_without_effect(loss, sdar), *_run(loss, config, sdar)]
    return faults + distribution_faults(config, sdar)


def _names(loss: LossConfig) -> Iterator[str]:
    attempts: dict[str, Callable[[], object]] = {
        "gate": lambda: get_gate(loss.gate),
        "objective": lambda: get_objective(loss.objective),
        "signal": lambda: get_signal(loss.signal),
    }
    options: dict[str, Callable[[], object]] = {
        "gate": lambda: check_gate_options(loss.gate, loss.gate_options),
        "objective": lambda: check_objective_options(loss.objective, loss.objective_options),
        "signal": lambda: check_signal(loss.signal, 0.0, loss.signal_options),
        **{
            option: lambda node=node: make_schedule(node.name, node.options)  # type: ignore[misc]
            for option, (node, _) in _scheduled(loss).items()
        },
    }
    for option, attempt in attempts.items():
        fault = _fault(attempt)
        if fault:
            yield f"sdar.loss.{option}: {fault}"
            options.pop(option)
    for option, attempt in options.items():
        fault = _fault(attempt)
        if fault:
            where = option if option.endswith("schedule") else f"{option}_options"
            yield f"sdar.loss.{where}: {fault}"
        elif option == "signal" and (
            fault := _fault(lambda: check_signal(loss.signal, loss.coef, loss.signal_options))
        ):
            yield f"sdar.loss.coef={loss.coef:g}, the strength of sdar.loss.signal={loss.signal}: {fault}"


def _fault(attempt: Callable[[], object]) -> str | None:
    try:
        attempt()
    except (ValueError, TypeError) as error:  # an option of the wrong type may raise either
        return str(error)
    return None


def _schedules(loss: LossConfig) -> Iterator[str]:
    """What a schedule follows must be measured, and be moved by the value that it sets."""
    shares = (GRAD_SHARE, GRAD_SHARE_WEIGHTS)
    for option, (node, moves) in _scheduled(loss).items():
        for measure in measures_of(make_schedule(node.name, node.options)):
            if measure in shares and option != "coef_schedule":
                yield (
                    f"sdar.loss.{option}.name={node.name} follows {measure}, which lambda moves and {moves} does not; "
                    "use it in sdar.loss.coef_schedule"
                )
    strength = make_schedule(loss.coef_schedule.name, loss.coef_schedule.options)
    followed = measures_of(strength)
    by_itself = strength.ended(10**9) or (followed and type(strength).ended is not Schedule.ended)
    if loss.coef_schedule.stop_step is not None or by_itself:
        ends = "name" if by_itself else "stop_step"
        also = measures_of(make_schedule(loss.rl_schedule.name, loss.rl_schedule.options))
        for measure in (name for name in also if name.startswith(_TEACHERS)):
            yield (
                f"sdar.loss.rl_schedule.name={loss.rl_schedule.name} follows {measure}, which nobody measures once "
                f"sdar.loss.coef_schedule.{ends}={getattr(loss.coef_schedule, ends)} has ended the teacher: the policy "
                "gradient would keep the weight of that moment; use another schedule for one of them"
            )
    if followed and {*followed} <= {*shares} and not loss.policy_gradient:
        yield (
            f"sdar.loss.coef_schedule.name={loss.coef_schedule.name} follows a share of the policy gradient, and "
            "sdar.loss.policy_gradient=False leaves that out; use another schedule"
        )
    if loss.measure_every is not None and not loss.policy_gradient:
        yield (
            f"sdar.loss.measure_every={loss.measure_every} compares the distillation gradient with the policy "
            "gradient, which sdar.loss.policy_gradient=False leaves out; leave it at null"
        )
    if GRAD_SHARE_WEIGHTS in followed and loss.measure_every is None:
        yield (
            f"sdar.loss.coef_schedule.options.of=weights follows {GRAD_SHARE_WEIGHTS}, which is not measured; set "
            "sdar.loss.measure_every to a number of steps, say 10"
        )
    for measure in followed:
        if measure in shares and not signal_reads(loss.signal, "loss", loss.signal_options):
            yield (
                f"sdar.loss.coef_schedule.name={loss.coef_schedule.name} follows {measure}, a measure of the "
                f"auxiliary loss, which sdar.loss.signal={loss.signal} does not have; use signal=loss or another "
                "schedule"
            )


def _scheduled(loss: LossConfig) -> dict[str, tuple[ScheduleConfig, str]]:
    """Option -> its node, and what it moves."""
    return {
        "coef_schedule": (loss.coef_schedule, "lambda"),
        "beta_schedule": (loss.beta_schedule, "beta"),
        "rl_schedule": (loss.rl_schedule, "the policy gradient's weight"),
        "anchor.student_schedule": (loss.anchor.student_schedule, "the target's weight"),
    }


def _without_effect(loss: LossConfig, sdar: SdarConfig) -> Iterator[str]:
    """Options that differ from their default and that nothing reads."""
    signal = f"sdar.loss.signal={loss.signal}"
    gate = f"sdar.loss.gate={loss.gate}"
    in_loss = signal_reads(loss.signal, "loss", loss.signal_options)
    gated = signal_reads(loss.signal, "gate", loss.signal_options)
    gate_sees_gap = gated and gate_reads(loss.gate, "gap")
    signal_sees_gap = shapes_advantages(loss.signal) and signal_reads(loss.signal, "gap", loss.signal_options)
    if sdar.teacher.source == "none" or loss.coef == 0:
        return  # the whole signal is off: a baseline of some recipe, whose other options may stay as they are
    if not in_loss:
        yield from _unused(
            loss, ["objective", "objective_options", "divide_by", "measure_every", "importance_clip"], signal
        )
        if not gated:
            yield from _unused(loss, ["gate", "gate_options"], signal)
    if not (gated and gate_reads(loss.gate, "beta")):
        yield from _unused(loss, ["beta", "beta_schedule"], gate if gated else signal)
    if not gate_sees_gap:
        yield from _unused(loss, ["granularity"], gate if gated else signal)
        if not signal_sees_gap:
            yield from _unused(loss, ["centre", "clamp"], gate if gated else signal)
    if loss.beta == 0 and loss.beta_schedule != ScheduleConfig():
        yield "sdar.loss.beta_schedule has no effect with sdar.loss.beta=0; set that above 0"
    divisor_sees_gap = in_loss and loss.divide_by == "gap_bearing"
    seen = gate_sees_gap or divisor_sees_gap or signal_sees_gap
    if sdar.context.contrast.sources and not seen:
        unread = gate if gated else signal
        yield (
            f"sdar.context.contrast.sources={sdar.context.contrast.sources} changes the gap, which {unread} does not "
            "read; use gate=gap, another signal, or no contrast"
        )
    if loss.divide_by != "gap_bearing":
        yield from _unused(loss, ["gap_threshold"], f"sdar.loss.divide_by={loss.divide_by}")
    if loss.centre == "trajectory" and loss.granularity == "trajectory":
        yield (
            "sdar.loss.centre=trajectory takes off what sdar.loss.granularity=trajectory keeps: every gap would be 0; "
            "use centre=batch or granularity=turn"
        )


def _unused(loss: LossConfig, names: list[str], reason: str) -> Iterator[str]:
    for name in names:
        value, default = getattr(loss, name), LossConfig.model_fields[name].get_default(call_default_factory=True)
        if value != default:
            shown = value.name if hasattr(value, "name") else value
            back = default.name if hasattr(default, "name") else default
            yield (
                f"sdar.loss.{name}={shown} has no effect with {reason}; leave it at {'null' if back is None else back}"
            )


def _run(loss: LossConfig, config: DictConfig, sdar: SdarConfig) -> Iterator[str]:
    actor = config.actor_rollout_ref.actor
    in_loss = signal_reads(loss.signal, "loss", loss.signal_options)
    unread = "sdar.teacher.source=none" if sdar.teacher.source == "none" else "sdar.loss.policy_gradient=False"
    if sdar.teacher.source == "none" or not loss.policy_gradient:
        yield from _unused(loss, ["rl_coef", "rl_schedule"], unread)
    if loss.rl_coef == 0 and loss.rl_schedule != ScheduleConfig():
        yield (
            f"sdar.loss.rl_schedule.name={loss.rl_schedule.name} has no effect with sdar.loss.rl_coef=0, nor has its "
            "window; set that above 0"
        )
    if loss.rl_coef == 0 and loss.policy_gradient and loss.coef > 0 and sdar.teacher.source != "none":
        readers = {
            "gate": gate_reads(loss.gate, "advantages") and signal_reads(loss.signal, "gate", loss.signal_options)
        }
        readers["signal"] = signal_reads(loss.signal, "advantages", loss.signal_options)
        yield from (
            f"sdar.loss.{name}={getattr(loss, name)} reads the advantages of the policy gradient, and "
            "sdar.loss.rl_coef=0 makes all of them 0; set that above 0, or use another"
            for name, reads in readers.items()
            if reads
        )
    if not loss.policy_gradient and (loss.coef == 0 or sdar.teacher.source == "none" or not in_loss):
        off = f"sdar.loss.signal={loss.signal}" if not in_loss else f"sdar.loss.coef={loss.coef}"
        yield (
            f"sdar.loss.policy_gradient=False leaves the distillation loss alone in charge, but with {off} there is "
            "none; set sdar.loss.coef above 0 and sdar.loss.signal=loss"
        )
    shapes = shapes_advantages(loss.signal)
    if shapes and loss.coef > 0 and sdar.teacher.source != "none" and gate_reads(loss.gate, "advantages"):
        yield (
            f"sdar.loss.gate={loss.gate} reads the advantages, which sdar.loss.signal={loss.signal} changes; use "
            "sdar.loss.signal=loss, or another gate"
        )
    weighs = loss.objective == "k1" or (loss.objective == "k3" and loss.objective_options.get("importance", True))
    if loss.importance_clip is not None and weighs:
        yield (
            f"sdar.loss.importance_clip={loss.importance_clip} weighs tokens by pi_theta / pi_old, and "
            f"sdar.loss.objective={loss.objective} does so itself; leave it at null, or use another objective"
        )
    if loss.divide_by != "tokens" and actor.loss_agg_mode != "token-mean":
        yield (
            f"sdar.loss.divide_by={loss.divide_by} re-weights a token mean, but "
            f"actor_rollout_ref.actor.loss_agg_mode={actor.loss_agg_mode}; set it to token-mean, or divide_by to tokens"
        )
    if actor.loss_agg_mode != "token-mean" and signal_reads(loss.signal, "token_mean", loss.signal_options):
        yield (
            f"sdar.loss.signal={loss.signal} with signal_options={loss.signal_options} re-weighs a token mean, but "
            f"actor_rollout_ref.actor.loss_agg_mode={actor.loss_agg_mode}; set it to token-mean, or other options"
        )
    correction = config.algorithm.get("rollout_correction", None)
    rejects = str((correction and correction.get("rollout_rs", None)) or "")
    if "token" in rejects and sdar.teacher.source != "none" and loss.coef > 0:
        yield from (
            f"algorithm.rollout_correction.rollout_rs={rejects} takes tokens out of the middle of turns, and {option} "
            "looks at whole turns; reject sequences (seq_...), or use another"
            for option in _by_turn(loss)
        )
    bypass = bool(correction and correction.get("bypass_mode", False))
    if bypass and sdar.teacher.source != "none" and gate_reads(loss.gate, "entropy") and _wants_entropy_early(loss):
        yield (
            f"sdar.loss.gate={loss.gate} needs the student's entropy before the update "
            f"(sdar.loss.signal={loss.signal}, divide_by={loss.divide_by}), which "
            "algorithm.rollout_correction.bypass_mode=True leaves out; set it to False or use another gate"
        )


def _by_turn(loss: LossConfig) -> Iterator[str]:
    """Settings that sum, average or rank over turns."""
    if signal_reads(loss.signal, "turns", loss.signal_options):
        yield f"sdar.loss.signal={loss.signal}"
    if signal_reads(loss.signal, "gate", loss.signal_options):
        if gate_reads(loss.gate, "turn"):
            yield f"sdar.loss.gate={loss.gate}"
        if loss.granularity == "turn":
            yield "sdar.loss.granularity=turn"
    for option, (node, _) in _scheduled(loss).items():
        if GAP_SIZE in measures_of(make_schedule(node.name, node.options)):
            yield f"sdar.loss.{option}.name={node.name}"


def _wants_entropy_early(loss: LossConfig) -> bool:
    """Whether the trainer itself must evaluate the gate, from the log-probs before the update."""
    return gate_reads(loss.gate, "ranges") or loss.divide_by == "weights" or shapes_advantages(loss.signal)


def needs_step_statistics(loss: LossConfig) -> list[str]:
    """Options that need the teacher's log-probs of the whole step before the update, ``option=value`` each."""
    asks: dict[str, Any] = {
        "granularity": loss.granularity == "trajectory",
        "centre": loss.centre != "none",
        "divide_by": loss.divide_by in ("weights", "gap_bearing"),
        "signal": shapes_advantages(loss.signal),
        "gate": gate_reads(loss.gate, "ranges") and loss.gate_options.get("norm") == "batch_minmax",
    }
    found = [f"sdar.loss.{name}={getattr(loss, name)}" for name, asked in asks.items() if asked]
    for option, (node, _) in _scheduled(loss).items():
        if GAP_SIZE in measures_of(make_schedule(node.name, node.options)):
            found.append(f"sdar.loss.{option}.name={node.name}")
    return found
