"""Warnings for runs that go on without teaching anything: each is told once and counted from then on.

A warning names what was seen, the likely cause and the option to look at. Thresholds are the constants below;
docs/metrics.md lists them.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from sdar_verl.algorithm.signals import signal_reads
from sdar_verl.config import SdarConfig
from sdar_verl.config.loss import LossConfig
from sdar_verl.observe.base import Observer
from sdar_verl.observe.record import RunRecord
from sdar_verl.observe.teacher_arms import STANDARD_ERRORS, BestOfArms, worse_teacher
from sdar_verl.report import layout
from sdar_verl.table import StepTable
from sdar_verl.teacher.tolerance import ROUNDED

logger = logging.getLogger(__name__)

NAMES = (
    "zero_gap",
    "gate_at_half",
    "no_context",
    "flat_rewards",
    "gap_grows",
    "kl_grows",
    "collapse",
    "teacher_worse",
    "teacher_falls",
    "engines_apart",
    "teacher_unanswered",
    "episodes_lost",
    "unparsed",
    "update_skipped",
)

ZERO_GAP = 1e-6
"""Nats; 99 % of the gaps within this distance of 0 are the same number computed twice."""
HALF_SHARE = 0.99
"""Share of tokens whose gate is within 0.01 of 1/2."""
CONTEXT_SHARE = 0.5
FLAT_SHARE = 0.9
"""Share of groups without reward variance, over the last steps together."""
FLAT_STEPS = 3
FLAT_KINDS = ("without_variance", "of_one")
TURN_GAP = 1.0
"""Nats, mean |gap| of an episode's late turns; and at least TURN_GROWTH times that of its first turns."""
TURN_KL = 0.5
"""Nats per token, KL to the reference of an episode's late turns."""
TURN_GROWTH = 2.0
TURN_TOKENS = 64
"""Turns with fewer tokens in a step say nothing."""
COLLAPSE_STEPS = 5
COLLAPSE_SHARE = 0.5
"""Success over the last steps, as a share of the best so far ..."""
COLLAPSE_BEST = 0.1
"""... which was at least this."""
UNANSWERED_SHARE = 0.01
"""Rows with a context to which the rollout server gave no answer, as a share."""
LOST_SHARE = 0.05
"""Episodes of a step that could not be played, as a share."""
UNPARSED_SHARE = 0.9
"""Turns of a step whose answer held no action, as a share."""


class RunWarnings(Observer):
    """Looks at each step and validation; ``sdar/warnings/<name>`` counts the steps on which a warning held.

    Args:
        settings: the ``sdar`` node.
        record: the run's record, whose distributions are read and whose folder gets ``warnings.jsonl``.
        say: prints a warning.
    """

    name = "warnings"

    def __init__(self, settings: SdarConfig, record: RunRecord, say: Callable[[str], None] | None = None):
        self._settings = settings
        self._record = record
        self._say = say or (lambda text: print(text, flush=True))
        self._counts: dict[str, int] = {}
        self._flat: list[tuple[float, float]] = []
        self._successes: list[tuple[float, float]] = []
        self._best = 0.0
        self._arms = BestOfArms(settings)

    def after_updates(self, table: StepTable, metrics: Mapping[str, Any]) -> Mapping[str, float]:
        turns = [step for info in table.infos if info is not None for step in info.steps]
        errors = Counter(turn.parse_error for turn in turns if turn.parse_error)
        seen = {**_teacher(self._settings, metrics, self._record.latest), **_turns(self._record.latest)}
        seen |= self._over_steps(metrics)
        seen |= {**_server(self._settings, metrics), **_lost(metrics), **_unparsed(metrics, errors)}
        for name, text in seen.items():
            self._count(name, text, table.step)
        return {f"sdar/warnings/{name}": count for name, count in self._counts.items()}

    def after_validation(self, step: int, metrics: Mapping[str, float], outcomes: dict[str, list[Any]]) -> None:
        seen = {
            "teacher_worse": worse_teacher(self._settings, outcomes),
            "teacher_falls": self._arms.fall(step, outcomes),
        }
        for name, text in seen.items():
            if text:
                self._count(name, text, step)

    def state_dict(self) -> dict[str, Any]:
        state = {
            "counts": self._counts,
            "flat": self._flat,
            "successes": self._successes,
            "best": self._best,
            "arms": self._arms.best,
        }
        return state if self._successes or self._counts or self._arms.best else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._counts = dict(state["counts"])
        self._flat = [tuple(pair) for pair in state["flat"]]
        self._successes = [tuple(pair) for pair in state["successes"]]
        self._best = state["best"]
        self._arms.best = {arm: tuple(best) for arm, best in state.get("arms", {}).items()}

    def _count(self, name: str, text: str, step: int) -> None:
        self._counts[name] = self._counts.get(name, 0) + 1
        if self._counts[name] == 1:
            self._say(f"sdar warning at step {step}, {name}: {text}")
            if self._record.folder.is_dir():
                layout.append_line(
                    self._record.folder / layout.WARNINGS_FILE, {"step": step, "name": name, "text": text}
                )

    def _over_steps(self, metrics: Mapping[str, Any]) -> dict[str, str]:
        """What only several steps together can show, and what an update did to the weights."""
        seen = {}
        if not np.isfinite(metrics.get("actor/grad_norm", 0.0)):
            seen["update_skipped"] = (
                "the gradient of an update is NaN or infinite while all log-probs of the step are finite; verl leaves "
                "such an update out and goes on. Once is the luck of one batch; if it comes again, lower "
                "actor_rollout_ref.actor.optim.lr, or compute in another precision "
                "(actor_rollout_ref.actor.fsdp_config.mixed_precision)"
            )
        if metrics.get("sdar/groups"):
            self._flat = [
                *self._flat[1 - FLAT_STEPS :],
                (sum(metrics.get(f"sdar/groups_{kind}", 0.0) for kind in FLAT_KINDS), float(metrics["sdar/groups"])),
            ]
            flat, groups = np.sum(self._flat, axis=0)
            if len(self._flat) == FLAT_STEPS and flat / groups >= FLAT_SHARE:
                seen["flat_rewards"] = (
                    f"{flat:.0f} of {groups:.0f} groups of the last {FLAT_STEPS} steps have one and the same reward on "
                    "all rollouts (or one rollout left), so that their advantage is 0: tasks too hard or too easy for "
                    "the policy, rollouts that are copies of each other, or a reward that never comes. Look at "
                    "sdar/success, and at actor_rollout_ref.rollout.temperature, actor_rollout_ref.rollout.n and "
                    "sdar.env.max_steps"
                )
        if "sdar/success" in metrics:
            episodes = float(metrics["sdar/episodes"])
            self._successes = [
                *self._successes[1 - COLLAPSE_STEPS :],
                (float(metrics["sdar/success"]) * episodes, episodes),
            ]
            if len(self._successes) == COLLAPSE_STEPS:
                solved, played = np.sum(self._successes, axis=0)
                now, best = solved / played, self._best
                error = float(np.sqrt(max(best * (1 - best), 1e-9) / played))
                if best >= COLLAPSE_BEST and now < COLLAPSE_SHARE * best and best - now > STANDARD_ERRORS * error:
                    seen["collapse"] = (
                        f"success over the last {COLLAPSE_STEPS} steps is {now:.3f}, its best was {best:.3f}: the "
                        "update is too strong or the teacher pulls the wrong way. Lower "
                        "actor_rollout_ref.actor.optim.lr or sdar.loss.coef, add KL to the reference "
                        "(actor_rollout_ref.actor.use_kl_loss), and go on from an earlier checkpoint"
                    )
                self._best = max(best, now)
        return seen


def _teacher(settings: SdarConfig, metrics: Mapping[str, Any], distributions: Mapping[str, Any]) -> dict[str, str]:
    """Whether the teacher has anything to say on this step."""
    retired = metrics.get("sdar/lambda") == 0 and "sdar/gap_mean" not in metrics
    if settings.teacher.source == "none" or retired:
        return {}
    seen = _context(metrics)
    if "gap_quantiles" not in distributions:
        return seen
    quantiles, turns = distributions["gap_quantiles"], distributions["by_turn"]["abs_gap"]
    if max(abs(quantiles[0]), abs(quantiles[-1])) <= ZERO_GAP and max(turns) <= ZERO_GAP:
        seen["zero_gap"] = (
            "teacher and student give every sampled token the same probability: the teacher's prompt holds nothing of "
            "its own. Look at sdar/context_tokens/mean, at sdar.skills.bank and sdar.skills.retrieval, and whether "
            "sdar.prompt.template shows its skill slot"
        )
    elif distributions["half_share"] >= HALF_SHARE and _sharpens(settings.loss):
        seen["gate_at_half"] = (
            f"{distributions['half_share']:.1%} of the tokens have a gate of 1/2, so that all are pushed alike: the "
            f"gaps are too small for sdar.loss.beta={settings.loss.beta:g}. Raise it, or give the teacher a context "
            "that says more (sdar.skills)"
        )
    return seen


def _sharpens(loss: LossConfig) -> bool:
    """Whether the method has a gate that a larger beta would move."""
    gated = signal_reads(loss.signal, "gate", loss.signal_options)
    return gated and loss.beta > 0 and loss.gate != "half"


def _context(metrics: Mapping[str, Any]) -> dict[str, str]:
    """Whether the teacher sees anything at all; also on a step on which it sees nothing."""
    seen = {}
    share = metrics.get("sdar/context_share")
    if share is not None and share < CONTEXT_SHARE:
        seen["no_context"] = (
            f"the teacher has a context on {share:.0%} of the rows only; the others add nothing to the distillation "
            "term. sdar/no_match_share counts tasks without a skill of their own (sdar.skills.retrieval), "
            "sdar/context_empty_share tasks for which nothing was found, sdar/truncated_share prompts that are too "
            "long (sdar.teacher.max_prompt_length)"
        )
    return seen


def _server(settings: SdarConfig, metrics: Mapping[str, Any]) -> dict[str, str]:
    """Whether a teacher asked from the rollout server is to be trusted (``sdar.teacher.placement=rollout_server``)."""
    seen = {}
    apart, tolerance = metrics.get("sdar/server_check/trainer"), settings.teacher.sanity_tolerance
    tolerance = ROUNDED if tolerance is None else tolerance
    if apart is not None and not apart <= tolerance:
        seen["engines_apart"] = (
            f"rollout server and trainer differ by {apart:.3g} nats per token on the student's own prompts, more than "
            f"{tolerance:g} (sdar.teacher.sanity_tolerance); this is in every gap, whatever the context says. Use "
            "sdar.teacher.placement=colocated, or a rollout of the trainer's precision"
        )
    share = metrics.get("sdar/teacher_failed_share", 0.0)
    if share > UNANSWERED_SHARE:
        seen["teacher_unanswered"] = (
            f"the rollout server gave no answer for the teacher of {share:.1%} of the rows, which are left out of the "
            "distillation term. The agent loop's log has the reasons; if the server runs out of memory, lower "
            "actor_rollout_ref.rollout.max_num_batched_tokens, or use sdar.teacher.placement=colocated"
        )
    return seen


def _lost(metrics: Mapping[str, Any]) -> dict[str, str]:
    """Episodes that a step goes on without; a fault of one process or node takes the same ones at every step."""
    failed, crashed = (metrics.get(f"sdar/{kind}_episodes", 0) for kind in ("failed", "crashed"))
    asked = metrics.get("sdar/episodes", 0) + crashed
    if failed + crashed <= LOST_SHARE * asked:
        return {}
    return {
        "episodes_lost": (
            f"{failed + crashed:.0f} of {asked:.0f} episodes could not be played, and training goes on with the rest: "
            f"{failed:.0f} failed (environment, rollout server or agent loop), of {crashed:.0f} nothing came back; "
            "their logs say why. An inference engine that died behind its server fails all its requests: then "
            "start again, trainer.resume_mode=auto goes on from the last checkpoint"
        )
    }


def _unparsed(metrics: Mapping[str, Any], errors: Counter[str]) -> dict[str, str]:
    """Whether the answers of a step hold actions at all."""
    share = metrics.get("sdar/unparsed_share", 0.0)
    if share < UNPARSED_SHARE:
        return {}
    most = ", ".join(f"{error!r} {count} times" for error, count in errors.most_common(3)) or "no reason is known"
    return {
        "unparsed": (
            f"{share:.0%} of the answers of this step hold no action that can be read: {most}. 'not closed' means that "
            "answers are cut off (data.max_response_length, sdar.rollout.turn_length) or that the model thinks on; 'no "
            "think block' that it writes none (sdar.prompt.think=optional); 'no ... block' that it does not write the "
            "tags that sdar.prompt.template asks for: look at the answers in the trace (sdar.trace.every)"
        )
    }


def _turns(distributions: Mapping[str, Any]) -> dict[str, str]:
    """Whether gap or KL grow from turn to turn past their limits."""
    seen = {}
    for name, column, limit, cause in (
        (
            "gap_grows",
            "abs_gap",
            TURN_GAP,
            "late turns are far from anything the teacher would say, and weigh most in the distillation term: the "
            "context may not fit what happens there. Lower sdar.loss.beta or sdar.loss.coef, or shorten "
            "sdar.env.max_steps",
        ),
        (
            "kl_grows",
            "kl",
            TURN_KL,
            "the policy leaves its reference on late turns. Raise actor_rollout_ref.actor.kl_loss_coef, lower "
            "actor_rollout_ref.actor.optim.lr or sdar.loss.coef",
        ),
    ):
        ends = _first_and_last(distributions.get("by_turn", {}), column)
        if ends and ends[1] > limit and ends[1] > TURN_GROWTH * ends[0]:
            what = "mean |gap|" if column == "abs_gap" else "KL to the reference"
            seen[name] = f"{what} grows from {ends[0]:.3f} on first turns to {ends[1]:.3f} nats on late ones: {cause}"
    return seen


def _first_and_last(by_turn: Mapping[str, Sequence[float]], column: str) -> tuple[float, float] | None:
    """Means over the first and the last third of the turns that have enough tokens; None with fewer than three."""
    if column not in by_turn:
        return None
    rows = [
        (tokens, value)
        for tokens, value in zip(by_turn["tokens"], by_turn[column], strict=True)
        if tokens >= TURN_TOKENS
    ]
    third = len(rows) // 3
    if not third:
        return None
    return _weighted(rows[:third]), _weighted(rows[-third:])


def _weighted(rows: Sequence[tuple[float, float]]) -> float:
    return sum(weight * value for weight, value in rows) / sum(weight for weight, _ in rows)
