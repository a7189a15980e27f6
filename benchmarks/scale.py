"""Step time against episodes and turns, and tokens computed for T turns by rows per turn and by whole conversations.

    python -m benchmarks.scale [--part tokens|time] [--tasks 2 4 8] [--turns 2 4 8]

tokens  of one episode of T turns in a real ALFWorld game, counted exactly by the package's own prompts: rows per turn
        that show the whole history, rows per turn that show the last two turns (the paper's), one row for the
        conversation. Template and skills as in the cluster recipe, a byte-level BPE trained here, answers of
        ``--answer`` tokens. "Grows by" is the factor from the line before; where T doubles, 2 is linear, 4 quadratic
time    steps of the quick start's recipe through verl's main_ppo: one run per number of tasks (4 rollouts each), in
        which every step plays episodes of another length, up and down. Every row is as long as every other, so a line
        through (rows, seconds) says what a step costs before its first row, and what a row costs
"""

from __future__ import annotations

import argparse
import random
import shutil
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.common import as_task, machine, real_games, table
from benchmarks.runs import Watched, watch
from sdar_verl.config import SkillsConfig
from sdar_verl.envs.alfworld.env import AlfworldEnv
from sdar_verl.envs.base import Task
from sdar_verl.panels import write_panel
from sdar_verl.rollout.control import control_strings_of
from sdar_verl.rollout.prompt_builder import PromptBuilder, TurnView
from sdar_verl.rollout.prompts import PromptTemplate
from sdar_verl.skills.loading import load_run_bank
from sdar_verl.skills.retrieval import render_skills, retrieve
from tests.support.chatml import chatml_tokenizer
from tests.support.verl_run import run_main_ppo

WINDOW, ROLLOUTS = 2, 4

# ---------------------------------------------------------------- tokens


def conversation(game: Path, turns: int) -> list[TurnView]:
    """What the agent knows before each turn of random play, with its whole history."""
    env, rng = AlfworldEnv(), random.Random(0)
    task = as_task(game)
    state, history, seen = env.reset(task), [], []
    for step in range(1, turns + 1):
        seen.append(
            TurnView(
                task.description, tuple(history), state.observation, state.admissible_actions, step, max_steps=turns
            )
        )
        history.append((state.observation, rng.choice(state.admissible_actions)))
        state = env.step(history[-1][1])
        if state.done:  # solved by chance: the game goes on in the next one of the same kind
            state = env.reset(task)
    return seen


def tokens(prompts: PromptBuilder, seen: list[TurnView], skills: str, answer: list[int]) -> dict[str, int]:
    """Tokens of the rows that these turns become, prompts and answers, for each way of making rows."""
    whole = sum(len(prompts.encode(turn, skills, turn.history)) + len(answer) for turn in seen)
    window = sum(len(prompts.encode(turn, skills, turn.history[-WINDOW:])) + len(answer) for turn in seen)
    ids = [*prompts.encode(seen[0], skills, ()), *answer]
    for turn in seen[1:]:
        ids += [*prompts.follow_up(turn, ids[-1]), *answer]
    return {"per turn, whole history": whole, f"per turn, last {WINDOW}": window, "conversation": len(ids)}


def count(args: argparse.Namespace) -> None:
    """The table of tokens."""
    game = real_games(args.data / "full_room", 1, n_receptacles=16, n_distractors=6)[0]
    seen = conversation(game, max(args.lengths))
    texts = [turn.observation + "\n".join(turn.admissible_actions) for turn in seen]
    package = Path(__file__).parents[1] / "sdar_verl"
    texts += [file.read_text() for file in sorted(package.rglob("*.md")) + sorted(package.rglob("*.jinja"))]
    tokenizer = chatml_tokenizer(texts, 8192)
    prompts = PromptBuilder(tokenizer, PromptTemplate.load("alfworld", control_strings_of(tokenizer)))
    bank = load_run_bank(SkillsConfig(bank="alfworld"), "alfworld")
    skills = render_skills(retrieve(bank, as_task(game), ["keyword", "task_type"], 0, {}, None).skills)
    answer = [*tokenizer("word " * args.answer, add_special_tokens=False)["input_ids"][: args.answer - 1]]
    answer.append(tokenizer.eos_token_id)
    for who, text in (("student", ""), ("teacher", skills)):
        rows, before = [], None
        for length in args.lengths:
            got = tokens(prompts, seen[:length], text, answer)
            growth = [f"{got[way] / before[way]:.2f}" if before else "" for way in got]
            rows.append([length, *(cell for pair in zip(got.values(), growth, strict=True) for cell in pair)])
            before = got
        head = ["turns", *(cell for way in got for cell in (way, "grows by"))]
        print(f"\nTokens of one episode, {who}'s prompts:\n\n{table(head, rows)}", flush=True)


# ---------------------------------------------------------------- time


def run(tasks: int, order: list[int], args: argparse.Namespace) -> Watched:
    """One run; step k plays ``order[k]`` turns."""
    folder = (args.out / f"tasks-{tasks}").resolve()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    panel = [
        Task("counted", f"step-{step:03d}-{i:03d}", "", "put some apple in fridge", {"turns": turns})
        for step, turns in enumerate(order)
        for i in range(tasks)
    ]
    files = [folder / "train.parquet", folder / "validation.parquet"]
    for file in files:
        write_panel(panel, file, file.stem)
    overrides = [
        f"data.train_files={files[0]}",
        f"data.val_files={files[1]}",
        "data.shuffle=False",
        f"data.train_batch_size={tasks}",
        f"actor_rollout_ref.rollout.n={ROLLOUTS}",
        f"actor_rollout_ref.actor.ppo_mini_batch_size={tasks}",
        f"sdar.update.mini_batch_rows={min(args.tasks) * ROLLOUTS * min(order)}",
        "sdar.env.name=counted",
        "sdar.modules=[benchmarks.counted_env]",
        "~sdar.env.options",
        "+sdar.env.options={}",
        "sdar.env.processes=1",
        f"sdar.env.max_steps={max(order)}",
        "sdar.skills.retrieval=[full]",
        "sdar.skills.max_tokens=40",
        "trainer.val_before_train=False",
        "trainer.test_freq=-1",
        "trainer.save_freq=-1",
        f"trainer.total_training_steps={len(order)}",
    ]
    return watch(
        folder, partial(run_main_ppo, folder, overrides, timeout=args.timeout, forked=False, PYTHONUNBUFFERED="1"), 0.5
    )


def measure(args: argparse.Namespace) -> None:
    """The table of step times, and lines through it."""
    # The first step warms up.
    order = [min(args.turns), *args.turns, *reversed(args.turns)]
    points: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for tasks in args.tasks:
        watched = run(tasks, order, args)
        assert watched.run is not None
        ends = watched.step_ends()
        for step, turns in enumerate(order, start=1):
            data = watched.run.metrics[step]
            if data["sdar/rows"] != tasks * ROLLOUTS * turns:
                raise SystemExit(f"step {step} has {data['sdar/rows']} rows instead of {tasks * ROLLOUTS * turns}")
            if step > 1:
                cpu = watched.cpu_between(ends[step - 1], ends[step])["all"]
                points.setdefault((tasks, turns), []).append((data["timing_s/step"], cpu))
    rows = []
    for (tasks, turns), values in sorted(points.items()):
        wall, cpu = np.mean(values, axis=0)
        number = tasks * ROLLOUTS * turns
        rows.append([tasks * ROLLOUTS, turns, number, f"{wall:.2f}", f"{cpu:.2f}", f"{1000 * cpu / number:.0f}"])
    print("\n" + table(["episodes", "turns", "rows", "seconds", "CPU s", "CPU ms per row"], rows) + "\n")
    numbers = [tasks * ROLLOUTS * turns for tasks, turns in points for _ in points[tasks, turns]]
    for index, unit in enumerate(("seconds", "CPU seconds")):
        values = [value[index] for point in points.values() for value in point]
        slope, height = np.polyfit(numbers, values, 1)
        correlation = np.corrcoef(numbers, values)[0, 1] ** 2
        print(f"{unit}: {height:.2f} + {1000 * slope:.1f} ms per row, R^2 = {correlation:.3f}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["tokens", "time"], help="only this one")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64], help="turns to count for")
    parser.add_argument("--answer", type=int, default=128, help="tokens of an answer")
    parser.add_argument("--tasks", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--turns", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--timeout", type=float, default=1200.0, help="seconds for one run")
    parser.add_argument("--data", type=Path, default=Path("outputs/benchmarks/games"), help="games are kept here")
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmarks/scale"))
    args = parser.parse_args()
    print(machine("verl", "torch", "ray"), flush=True)
    if args.part != "time":
        count(args)
    if args.part != "tokens":
        measure(args)


if __name__ == "__main__":
    main()
