"""docs/extending.md, executed: its Python as one module, its YAML as a preset, its claims as assertions."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sdar_verl.algorithm import gates, objectives, schedules, signals
from sdar_verl.algorithm.divergence_rows import Anchor, FullDivergence, TopKDivergence
from sdar_verl.algorithm.divergences import DIVERGENCES, SUPPORT_OF, on_support, top_k_ids
from sdar_verl.context import registry

PAGE = (Path(__file__).parents[2] / "docs" / "extending.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def overrides() -> list[str]:
    """The page's lines of options for objectives, a signal and a schedule."""
    lines = re.findall(r"^    (sdar\.loss\..*)$", PAGE, re.MULTILINE)
    assert len(lines) == 4
    return lines


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page's module, imported."""
    folder = tmp_path_factory.mktemp("page")
    (folder / "extending_page.py").write_text("\n".join(blocks("python")))
    sys.path.insert(0, str(folder))
    yield importlib.import_module("extending_page")
    sys.path.remove(str(folder))
    gates._GATES._entries.pop("endorse")  # other tests list what the package itself has
    for name in ("huber", "skewed_kl"):
        objectives._OBJECTIVES._entries.pop(name)
    del DIVERGENCES["skewed_kl"], SUPPORT_OF["skewed_kl"]
    signals._SIGNALS._entries.pop("damp")
    for name in ("inverse", "calm"):
        schedules._SCHEDULES._entries.pop(name)
    registry._contexts.pop("failures")
    registry._contexts.pop("question")


def test_the_gate_endorses_only(page):
    gate = page.endorse(torch.tensor([0.8, -0.5, 0.0, 0.05]), beta=5.0)
    assert torch.allclose(gate, torch.tensor([torch.tanh(torch.tensor(3.75)).item(), 0.0, 0.0, 0.0]))


def test_the_numbers_tried_on_the_page_are_what_it_says(page):
    gradient = page.student.grad[0]
    assert gradient[0] == pytest.approx(-torch.tanh(torch.tensor(5 * 0.75)).item() / 3)
    assert gradient[1:].tolist() == [0.0, 0.0]
    assert page.stats["tokens"] == 3


def test_the_context_tells_how_others_failed(page):
    from sdar_verl.context.base import ContextRequest, PlayedEpisode, PlayedTurn
    from sdar_verl.envs.base import Task

    def episode(name: str, action: str | None, success: bool) -> PlayedEpisode:
        return PlayedEpisode(name, (PlayedTurn("a room", action, action is not None),), success, float(success), "end")

    task = Task("alfworld", "t", "look", "look at a book")
    played = (episode("1", "take a mug", False), episode("2", "use lamp", True), episode("3", None, False))
    text = page.failures(ContextRequest(task, siblings=played))
    assert text.splitlines()[1:] == ["- it ended with: take a mug", "- it ended with: no action"]
    assert page.failures(ContextRequest(task, siblings=played[1:2])) is None


def test_the_written_context_asks_and_reads(page):
    from sdar_verl.context.base import ContextRequest, PlayedEpisode, PlayedTurn
    from sdar_verl.context.prompt import UnreadableAnswer
    from sdar_verl.envs.base import Task

    context = registry.get_context("question")
    assert context.writes and context.late
    episode = PlayedEpisode("1", (PlayedTurn("a room", "take a mug", True),), False, 0.0, "end")
    request = ContextRequest(Task("alfworld", "t", "look", "look at a book"), episode=episode)
    seen = []
    for answer, expected in (("Where is it?", "Ask yourself: Where is it?"), (None, None)):
        asking = context.function(request, words=7)
        seen.append(next(asking).fit(1000, len)[0])
        with pytest.raises(StopIteration) as end:
            asking.send(answer)
        assert end.value.value == expected
    assert "a room -> take a mug" in seen[0] and "At most 7 words" in seen[0]
    asking = context.function(request)
    next(asking)
    with pytest.raises(UnreadableAnswer):
        asking.send("no idea")


def test_the_objective_is_quadratic_and_then_linear(page):
    student = torch.tensor([[-1.0, -1.0, -3.0]], requires_grad=True)
    loss = page.huber(student, torch.tensor([[-1.0, -1.5, -1.0]]), delta=1.0)
    assert torch.allclose(loss, torch.tensor([[0.0, 0.125, 1.5]]))
    loss.sum().backward()
    assert torch.allclose(student.grad, torch.tensor([[0.0, 0.5, -1.0]]))


@pytest.mark.parametrize("k", [0, 3, 6], ids=["full", "top_k", "all"])
@pytest.mark.parametrize("anchored", [False, True])
def test_the_divergence_has_autograds_slope_on_the_logits(page, k, anchored):
    """Value and slope as the package makes them in chunks, against the definition and one autograd over all of it."""
    draw = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(4, 6, generator=draw) for _ in range(2))
    student[0, 1] = teacher[1, 2] = -float("inf")
    options = {"skew": 0.3}
    ids = top_k_ids(student, k or 1)
    there = on_support(teacher, ids) if k else teacher.log_softmax(-1)

    def value(logits):
        p = on_support(logits, ids) if k else logits.log_softmax(-1)
        q = there
        if anchored:
            q = (0.75 * q.clamp(min=-1e30) + 0.25 * p.detach().clamp(min=-1e30)).log_softmax(-1)
        p, q = p.clamp(min=-1e30), q.clamp(min=-1e30)
        return (p.exp() * (p - (0.7 * q.exp() + 0.3 * p.exp()).clamp(min=1e-38).log())).sum(-1)

    anchor = Anchor(0.0, 0.25, None) if anchored else None
    if k:
        rows = TopKDivergence("skewed_kl", ids, there, "bucket", anchor, options)
    else:
        rows = FullDivergence("skewed_kl", lambda part: teacher[part].clone(), anchor, options)
    leaf = student.clone().requires_grad_()
    expected = value(leaf)
    upstream = torch.tensor([1.0, -2.0, 0.5, 1.0])
    (slope,) = torch.autograd.grad(expected, leaf, upstream)
    for part in (slice(0, 1), slice(1, 4)):
        torch.testing.assert_close(rows.columns(student[part].clone(), part)[:, 0], expected[part].detach())
        torch.testing.assert_close(rows.slope(student[part].clone(), part, upstream[part]), slope[part])


def test_the_signal_damps_where_there_is_a_teacher(page):
    on, mask = torch.ones(1, 3, dtype=torch.bool), torch.tensor([[True, True, False]])
    zero, gap = torch.zeros(1, 3), torch.tensor([[0.0, -2.0, 0.0]])
    advantages = torch.tensor([[1.0, -1.0, 1.0]])
    rows = signals.SignalRows(advantages, on, mask, zero, zero, gap, zero, ["e"], ["g"], [0], torch.ones(1))
    assert page.damp(rows, strength=0.5, scale=2.0).tolist() == [[1.0, pytest.approx(-1 / 1.5), 1.0]]


def test_the_schedule_is_one_half_at_its_half(page):
    schedule = schedules.make_schedule("inverse", {"half": 4})
    assert schedules.Scheduled(0.5, schedule).value(4) == 0.25


def test_the_schedule_that_learns_takes_back_what_it_learned(page):
    schedule = schedules.make_schedule("calm", {"rate": 0.5})
    for gap in (0.6, 0.4, 0.7):
        schedule.observe(1.0, gap)
    again = schedules.make_schedule("calm", {"rate": 0.5})
    again.state = schedule.state
    assert schedules.measures_of(again) == ("sdar/gap_mean",) and again.factor(4) == 0.25


def test_the_preset_and_its_options_pass_the_checks_of_a_run(tmp_path):
    """In a process of its own, where nothing but sdar.modules imports the page's module."""
    module = "\n".join(block for block in blocks("python") if "gated_distillation_loss" not in block)
    (tmp_path / "my_methods.py").write_text(module)
    preset = tmp_path / "my_configs" / "method" / "endorse.yaml"
    preset.parent.mkdir(parents=True)
    preset.write_text(blocks("yaml")[0])
    script = f"""
from sdar_verl.compose import compose_config
from sdar_verl.config import load_config
from sdar_verl.envs.base import Task
from sdar_verl.panels import write_panel
from sdar_verl.checks.run import check_run
files = []
for name in ("train", "val"):
    tasks = [Task("alfworld", f"g-{{i}}", "pick_and_place_simple", "put a mug on desk") for i in range(8)]
    write_panel(tasks, f"{{name}}.parquet", name)
    files.append(f"data.{{name}}_files={{name}}.parquet")
where = "hydra.searchpath=[file://{tmp_path}/my_configs]"
config = compose_config("sdar_quickstart", [where, "method=endorse", "+sdar.loss.gate_options.margin=0.1", *files])
sdar = load_config(config.sdar)
check_run(config, sdar)
print(sdar.method, sdar.loss.gate, sdar.loss.coef, sdar.context.sources)
for line in {overrides()!r}:
    config = compose_config("sdar_quickstart", ["sdar.modules=[my_methods]", *line.split(), *files])
    check_run(config, load_config(config.sdar))
    print("sound:", line)
try:
    config = compose_config("sdar_quickstart", [where, "method=endorse", "+sdar.loss.gate_options.margn=1", *files])
    check_run(config, load_config(config.sdar))
except Exception as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, env=environment()
    )
    assert "endorse endorse 0.1 ['skills', 'failures']" in done.stdout, done.stdout + done.stderr
    assert all(f"sound: {line}" in done.stdout for line in overrides()), done.stdout + done.stderr
    assert "margn" in done.stdout and "margin" in done.stdout


def environment() -> dict[str, str]:
    root = str(Path(__file__).parents[2])
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]),
        "VERL_PLATFORM": "cpu",
    }
