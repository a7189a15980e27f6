"""What the quick start ends with: one summary (JSON and a few lines) and a plot.

    python -m sdar_verl.local.summary outputs/quickstart

reads what the run left: its metrics (the record, which outlives a resume, else verl's file tracker), the panel it was
validated on, and its last checkpoint.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from sdar_verl.arguments import given_path
from sdar_verl.compose import compose_config
from sdar_verl.config import load_config
from sdar_verl.errors import SdarError
from sdar_verl.local import start_policy
from sdar_verl.panels import panel_digest, read_panel
from sdar_verl.report.layout import METRICS_FILE, find_record, read_lines

ARMS = {"": "student", "_t04": "student_t04"}
TEACHER_ARMS = {"": "teacher", "_t04": "teacher_t04"}


class IncompleteRun(SdarError):
    """The run's folder lacks something that the summary needs."""


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Lines of a run's record, or of verl's file tracker: ``{"step": ..., "data": {...}}``, those of a step as one.

    Raises:
        IncompleteRun: no file.
    """
    if not path.is_file():
        raise IncompleteRun(f"{path} does not exist: the run ended before its first record; see the run's log")
    steps: dict[int, dict[str, Any]] = {}
    for line in read_lines(path):
        steps.setdefault(line["step"], {}).update(line["data"])
    return [{"step": step, "data": data} for step, data in steps.items()]


def summarise(
    records: Sequence[Mapping[str, Any]],
    *,
    internalised: tuple[float, float],
    panel_hash: str,
    times: Mapping[str, float],
) -> dict[str, Any]:
    """Numbers before and after training.

    Args:
        records: see :func:`read_metrics`.
        internalised: the probe before and after.
        panel_hash: content hash of the panel that was evaluated.
        times: ``train`` and ``total``, seconds.

    Raises:
        IncompleteRun: validation before or after training is missing.
    """
    validations = [record for record in records if "sdar-val/student/success" in record["data"]]
    if len(validations) < 2:
        raise IncompleteRun(f"{len(validations)} validations in the run's metrics; one before and one after are needed")
    before, after = validations[0]["data"], validations[-1]["data"]
    missing = [arm for arm in (*ARMS.values(), *TEACHER_ARMS.values()) if f"sdar-val/{arm}/success" not in after]
    if missing:
        raise IncompleteRun(f"the run did not validate the arms {', '.join(missing)} (sdar.validation.arms)")
    steps = [record for record in records if "sdar/gate_mean" in record["data"] or "sdar/success" in record["data"]]
    summary: dict[str, Any] = {}
    for suffix, arm in ARMS.items():
        summary[f"success_before{suffix}"] = before[f"sdar-val/{arm}/success"]
        summary[f"success_after{suffix}"] = after[f"sdar-val/{arm}/success"]
    for suffix, arm in TEACHER_ARMS.items():
        summary[f"teacher_success_before{suffix}"] = before[f"sdar-val/{arm}/success"]
        summary[f"teacher_success_after{suffix}"] = after[f"sdar-val/{arm}/success"]
    summary |= {
        "invalid_share_before": before["sdar-val/student/invalid_share"],
        "invalid_share_after": after["sdar-val/student/invalid_share"],
        "internalisation_before": internalised[0],
        "internalisation_after": internalised[1],
        "episodes_eval": after["sdar-val/student/episodes"],
        "steps": max(record["step"] for record in records),
        "gate_mean": _mean(steps, "sdar/gate_mean"),
        "gap_mean": _mean(steps, "sdar/gap_mean"),
        "seconds_train": times["train"],
        "seconds_total": times["total"],
        "panel_hash": panel_hash,
        "versions": versions(),
    }
    return summary


def versions() -> dict[str, str]:
    """Versions that a number depends on."""
    names = ("sdar-verl", "verl", "torch", "transformers", "ray", "alfworld", "TransferQueue")
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in names}}


def plot(records: Sequence[Mapping[str, Any]], summary: Mapping[str, Any], path: Path) -> None:
    """Success, probe, gate and gap over steps, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(10, 6.5), constrained_layout=True)
    last = summary["steps"]

    def curve(axis: Any, key: str, **style: Any) -> None:
        points = [(record["step"], record["data"][key]) for record in records if key in record["data"]]
        axis.plot([step for step, _ in points], [value for _, value in points], **style)

    curve(axes[0, 0], "sdar/success", color="#bbbbbb", label="training tasks")
    curve(axes[0, 0], "sdar-val/student/success", color="#0072b2", marker="o", label="unseen games, no skill")
    curve(axes[0, 0], "sdar-val/teacher/success", color="#e69f00", marker="s", label="unseen games, with skill")
    axes[0, 0].set(title="success", ylim=(0, 1))
    axes[0, 0].legend(frameon=False, fontsize=8)
    ends = [summary["internalisation_before"], summary["internalisation_after"]]
    axes[0, 1].plot([0, last], ends, color="#009e73", marker="o")
    axes[0, 1].set(title="internalisation: P(usual place | no skill)", ylim=(0, 1))
    curve(axes[1, 0], "sdar/gate_mean", color="#0072b2")
    axes[1, 0].axhline(0.5, color="#bbbbbb", linewidth=0.8)
    axes[1, 0].set(title="gate, mean over tokens", xlabel="step")
    curve(axes[1, 1], "sdar/gap_mean", color="#d55e00")
    axes[1, 1].axhline(0.0, color="#bbbbbb", linewidth=0.8)
    axes[1, 1].set(title="teacher-student gap, nats per token", xlabel="step")
    for axis in axes.flat:
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def describe(summary: Mapping[str, Any]) -> str:
    """The summary in a few lines."""

    def change(name: str, key: str) -> str:
        before, after = summary[f"{key}_before"], summary[f"{key}_after"]
        return f"  {name:<34}{before:8.3f} -> {after:.3f}"

    def change_t04(name: str, key: str) -> str:
        return f"  {name:<34}{summary[key + '_before_t04']:8.3f} -> {summary[key + '_after_t04']:.3f}"

    return "\n".join(
        [
            f"{summary['steps']} steps; {int(summary['episodes_eval'])} unseen games, real engine, before -> after",
            change("success, T=1", "success"),
            change_t04("success, T=0.4", "success"),
            change("success with the skill, T=1", "teacher_success"),
            change_t04("success with the skill, T=0.4", "teacher_success"),
            change("internalisation probe", "internalisation"),
            change("invalid actions, share of turns", "invalid_share"),
            *(
                [f"  gate mean {summary['gate_mean']:.3f}, gap mean {summary['gap_mean']:+.3f} nats"]
                if summary["gate_mean"] is not None
                else []
            ),
            f"  training {summary['seconds_train']:.0f} s, everything {summary['seconds_total']:.0f} s",
        ]
    )


def _mean(records: Sequence[Mapping[str, Any]], key: str) -> float | None:
    values = [record["data"][key] for record in records if key in record["data"]]
    return sum(values) / len(values) if values else None


def last_checkpoint(folder: Path) -> Path:
    """The Hugging Face form of the latest checkpoint below ``folder``.

    Raises:
        IncompleteRun: there is none.
    """
    found = sorted(folder.glob("global_step_*/actor/huggingface"), key=lambda path: int(path.parts[-3].split("_")[-1]))
    if not found or not (found[-1] / "config.json").is_file():
        raise IncompleteRun(f"no checkpoint with Hugging Face weights under {folder}")
    return found[-1]


def probe(panel: Path, checkpoints: Sequence[str | Path]) -> list[float]:
    """Internalisation of each checkpoint over the first turns of a panel's games (real engine)."""
    from sdar_verl.envs.registry import make_env
    from sdar_verl.local.probe import first_turns, internalisation
    from sdar_verl.rollout.prompts import PromptTemplate

    settings = load_config(compose_config("sdar_quickstart").sdar)
    environment = make_env(settings.env.name, **settings.env.options)
    turns = first_turns(read_panel(panel), environment)
    template = PromptTemplate.load(settings.prompt.template)
    return [
        internalisation(str(path), start_policy(), turns, template, max_steps=settings.env.max_steps)
        for path in checkpoints
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=given_path, help="the run's folder")
    parser.add_argument("--panel", type=given_path, help="default: RUN/data/test.parquet")
    parser.add_argument("--seconds-train", type=float, default=float("nan"), help="wall time of the training command")
    parser.add_argument("--started", type=float, help="when everything began, seconds since the epoch")
    arguments = parser.parse_args(argv)
    run: Path = arguments.run
    panel = arguments.panel or run / "data" / "test.parquet"
    try:
        record = find_record(run)
        records = read_metrics(run / METRICS_FILE if record is None else record / METRICS_FILE)
        before, after = probe(panel, [start_policy(), last_checkpoint(run / "checkpoints")])
        started = arguments.started if arguments.started is not None else time.time() - arguments.seconds_train
        summary = summarise(
            records,
            internalised=(before, after),
            panel_hash=panel_digest(panel),
            times={"train": arguments.seconds_train, "total": time.time() - started},
        )
    except SdarError as error:
        print(f"no summary: {error}", file=sys.stderr)
        return 1
    (run / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    plot(records, summary, run / "summary.png")
    print(describe(summary))
    print(f"{run / 'summary.json'}, {run / 'summary.png'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
