"""The documents say what the code does: options, metrics, names of settings, links."""

from __future__ import annotations

import argparse
import ast
import functools
import inspect
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import verl  # noqa: F401  loads the plugin, which puts our configs on the search path
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from verl.trainer.ppo.v1 import PPOTrainer

from sdar_verl.algorithm.divergences import COLUMNS
from sdar_verl.algorithm.loss import distillation_terms
from sdar_verl.algorithm.stats import stats_sums
from sdar_verl.cli import _parser, guarded
from sdar_verl.config import load_config
from sdar_verl.errors import SdarError
from sdar_verl.fields import NORM_PREFIX, SUMS_PREFIX, TEACHER_LOG_PROBS, contrast_pass, log_probs_of
from sdar_verl.finite import check_rows, check_teacher
from sdar_verl.observe import warnings
from sdar_verl.observe.metrics import gap_metrics, gap_size, reduce_loss_sums, row_metrics
from sdar_verl.observe.skill_statistics import statistics_metrics
from sdar_verl.observe.trackers import HISTOGRAMS
from sdar_verl.rollout.rows import EpisodeNote, RowInfo, TurnNote
from sdar_verl.skills.ucb import TypeStatistics
from sdar_verl.teacher.server_check import ServerCheck, answer_metrics
from sdar_verl.teacher.several import teacher_metrics
from sdar_verl.verl.validation import arm_metrics
from sdar_verl.writer.base import WriterCounts
from tests.support.table import make_table
from tests.support.verl_version import IS_VERL_090

ROOT = Path(__file__).parents[2]
SINCE_VERL_091 = {"trainer.v1.separate_async.hybrid_rollout.enable_switch"}
DOCUMENTS = [
    *sorted(path.relative_to(ROOT) for folder in ("docs", "recipes") for path in (ROOT / folder).rglob("*.md")),
    *map(Path, ("README.md", "CHANGELOG.md", "benchmarks/README.md")),
]
SOURCES = [
    ROOT / "sdar_verl" / name
    for name in (*("step.py", "verl/trainer.py", "verl/teacher.py", "observe/skill_learning.py"),)
]
METRIC = re.compile(r"`(sdar(?:-val)?/[^`]+|timing_s/teacher)`")
SETTING = re.compile(r"(?:sdar|actor_rollout_ref|data|trainer|algorithm)(?:\.\w+)+(?:=\S+)?|(?:model|hardware)=\S+")


def test_the_page_of_options_is_fresh():
    # In a process of its own: other tests register names, and the page lists the registered ones.
    script = ROOT / "scripts" / "make_options_doc.py"
    done = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


# ---------------------------------------------------------------- metrics


def documented_metrics() -> list[str]:
    rows = [line for line in (ROOT / "docs" / "metrics.md").read_text().splitlines() if line.startswith("| `")]
    return [line.split("`")[1] for line in rows]


def emitted_metrics() -> set[str]:
    """Every name, from the functions that make them, given all they can be given, and the trainer's source."""
    seen = RowInfo(
        0,
        "<task type>",
        turns=(TurnNote(0, 1),),
        skills=("<skill>",),
        teacher_prompt_tokens=3,
        teachers=("<source>",),
        contrast_prompt_ids=(np.ones(3, dtype=np.int32),),
        rewarded=True,
        context_tokens=1,
        episode=EpisodeNote({}),
    )
    infos = [seen, RowInfo(0, "<task type>", failed=True)]
    columns = {
        "response_mask": [[1], [0]],
        TEACHER_LOG_PROBS: [[0.0], [0.0]],
        log_probs_of(contrast_pass(0)): [[0.0], [0.0]],
    }
    table = make_table(["u_0_0", "u_1_0"], infos, columns)
    names = set(row_metrics(table))
    table.columns |= {name: torch.zeros(2, 1) for name in ("old_log_probs", log_probs_of(contrast_pass(0)))}
    names |= set(teacher_metrics(table, torch.ones(2, 1), {}))
    names |= {*check_rows(table, {}, "drop", 0), *check_teacher(table, "drop")}
    counted = {"acc": [1.0], "task_score": [1.0], "turns": [1.0], "invalid_actions": [0.0], "failed": [0.0]}
    outcomes = {**counted, "task_id": ["t"]}
    names |= set(arm_metrics({**outcomes, "task_type": ["<task type>"], "arm": ["<arm>"]}))
    names |= set(reduce_loss_sums(worker_metrics()))
    three, one = torch.ones(3, 1), torch.ones(3, 1, dtype=torch.bool)
    names |= {*gap_metrics(three, one, one, ["e"] * 3, [0, 1, 2], three), *gap_size(three, one, one)}
    names |= {*answer_metrics([seen]), *ServerCheck(0.0, 0.0, 0.0).metrics()}
    names |= {*HISTOGRAMS, *(f"sdar/warnings/{name}" for name in warnings.NAMES)}
    names |= set(statistics_metrics({"<task type>": TypeStatistics()})) | set(WriterCounts().metrics())
    return names | {name for source in SOURCES for name in constants(source)}


def worker_metrics() -> dict[str, float]:
    terms = distillation_terms(-torch.ones(1, 2), -torch.ones(1, 2), torch.ones(1, 2))
    sums = {f"actor/{SUMS_PREFIX}{name}": value for name, value in stats_sums(terms).items()}
    squares = {f"actor/{SUMS_PREFIX}grad_{name}_squared": 1.0 for name in ("rl", "distill")}
    columns = {f"actor/{SUMS_PREFIX}distribution_{name}": 1.0 for name in COLUMNS}
    norms = {f"actor/{NORM_PREFIX}{part}": 1.0 for part in ("rl", "distillation")}
    return {**sums, **squares, **norms, **columns, "actor/sdar/loss": 0.0}


def constants(source: Path) -> Iterator[str]:
    """``metrics["sdar/..."] = ...``, dicts of such names, and the names of timers."""
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "metrics":
            assert isinstance(node.slice, ast.Constant)
            yield node.slice.value
        if isinstance(node, ast.Dict):
            yield from (
                key.value for key in node.keys if isinstance(key, ast.Constant) and str(key.value).startswith("sdar/")
            )
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("self.timed", "run.timed"):
            assert isinstance(node.args[0], ast.Constant)
            if f'"{node.args[0].value}"' not in inspect.getsource(PPOTrainer._step_once):  # verl's own
                yield f"timing_s/{node.args[0].value}"


def test_every_metric_is_documented_and_every_documented_one_exists():
    documented = documented_metrics()
    assert len(documented) == len(set(documented))
    assert set(documented) == emitted_metrics()


def test_metrics_named_elsewhere_exist():
    emitted = emitted_metrics()
    for path in DOCUMENTS:
        for name in METRIC.findall((ROOT / path).read_text()):
            assert name in emitted or name.endswith("*"), f"{path} names the metric {name}"


# ---------------------------------------------------------------- options, links


def documented_settings() -> set[tuple[str, ...]]:
    """What stands in backticks and is made of nothing but options (``node.key``) or overrides (``node.key=value``)."""
    found = set()
    for path in DOCUMENTS:
        for code in re.findall(r"`([^`\n]+)`", (ROOT / path).read_text()):
            words = tuple(code.split()) if "=" in code else (code,)
            if all(SETTING.fullmatch(word) for word in words):
                found.add(words)
    return found


def _has(config, name: str) -> bool:
    parent, _, key = name.rpartition(".")
    node = OmegaConf.select(config, parent)
    return OmegaConf.is_dict(node) and key in node


@pytest.fixture(scope="module")
def recipe():
    with initialize_config_module("verl.trainer.config", version_base=None):
        yield functools.cache(lambda *groups, env="alfworld": compose(f"sdar_{env}", overrides=list(groups)))


def test_settings_in_the_documents_exist_and_are_accepted(recipe):
    settings = documented_settings()
    assert len(settings) > 50, "the documents, or the pattern that reads them, changed"
    faults = []
    for words in sorted(settings):
        groups = [word for word in words if word.startswith(("model=", "hardware="))]
        try:
            config = recipe(*groups)
            for name in (word.split("=")[0] for word in words if word not in groups):
                if IS_VERL_090 and name in SINCE_VERL_091:
                    continue
                nodes = (config, recipe("hardware=cpu"), recipe(env="search"), recipe(env="webshop"))
                assert any(_has(node, name) for node in nodes), f"no such option: {name}"
            ours = [word.removeprefix("sdar.") for word in words if word.startswith("sdar.") and "=" in word]
            if ours:
                load_config(OmegaConf.merge(config.sdar, OmegaConf.from_dotlist(ours)))
        except (AssertionError, OmegaConfBaseException, SdarError) as error:
            faults.append(f"{' '.join(words)}: {error}")
    assert not faults, "\n".join(faults)


def test_links_lead_somewhere():
    dead = []
    for path in DOCUMENTS:
        for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", (ROOT / path).read_text()):
            if not ((ROOT / path).parent / target).exists():
                dead.append(f"{path}: {target}")
    assert not dead, "\n".join(dead)


def anchors(path: Path) -> set[str]:
    """What GitHub makes of the headings."""
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    titles = [re.sub(r"[`*]", "", title).strip().lower() for title in re.findall(r"^#+ (.*)$", text, re.MULTILINE)]
    return {re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", title)) for title in titles}


def test_anchors_are_headings():
    assert "what-works" in anchors(ROOT / "README.md")
    dead = []
    for path in DOCUMENTS:
        for file, anchor in re.findall(r"\]\((?!https?://)([^)#]*)#([^)]+)\)", (ROOT / path).read_text()):
            target = (ROOT / path).parent / file if file else ROOT / path
            if target.suffix == ".md" and anchor not in anchors(target):
                dead.append(f"{path}: {file}#{anchor}")
    assert not dead, "\n".join(dead)


def commands() -> Iterator[tuple[Path, str]]:
    """Calls of ``sdar-verl`` that a reader may copy: lines of code, and code in the text that quotes a task. Outlines
    of a command (with dots, or options in brackets) are left out."""
    for path in DOCUMENTS:
        text = (ROOT / path).read_text()
        lines = re.findall(r"^(?: {4})?(sdar-verl .*?)(?:  +#.*)?$", text, re.MULTILINE)
        inline = [" ".join(code.split()) for code in re.findall(r"`(sdar-verl [^`]+)`", text)]
        for line in lines + [code for code in inline if '"' in code]:
            if not re.search(r"\.\.\.|\[-|\|", line):
                yield path, line


def test_commands_in_the_documents_are_accepted(monkeypatch):
    def stop(parser, message):
        raise ValueError(message)

    monkeypatch.setattr(argparse.ArgumentParser, "error", stop)
    found, faults = list(commands()), []
    assert len(found) > 15, "the documents, or the pattern that reads them, changed"
    for path, line in found:
        try:
            arguments, rest = _parser().parse_known_args(guarded(shlex.split(line)[1:])[0])
            if rest and not hasattr(arguments, "overrides"):
                raise ValueError(f"unrecognized arguments: {rest}")
        except ValueError as error:
            faults.append(f"{path}: {line}: {error}")
    assert not faults, "\n".join(faults)


def test_tables_have_a_head():
    """A line of a table that a blank line cuts off is shown as text."""
    for path in DOCUMENTS:
        text = re.sub(r"```.*?```", "", (ROOT / path).read_text(), flags=re.DOTALL)
        for table in re.findall(r"(?:^\|.*\n?)+", text, re.MULTILINE):
            lines = table.splitlines()
            assert len(lines) > 2 and re.fullmatch(r"\|[-| :]+\|", lines[1]), f"{path}: {lines[0]}"


def test_no_paths_of_one_machine():
    for path in DOCUMENTS:
        assert not re.search(r"(?<![\w.$}~-])/(?:tmp|work|home|root)/", (ROOT / path).read_text()), path
