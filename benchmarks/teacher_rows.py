"""Teacher rows per second: token ids put together, against text decoded, prepended and encoded again.

    python -m benchmarks.teacher_rows [--rows 256] [--rounds 5]

The rows are turns of real ALFWorld games in the recipes' own template and with the skills that retrieval finds. The
tokenizer is a byte-level BPE with a ChatML template, as Qwen's, trained here on the package's own texts.

worker      what stands between rollout and teacher pass: the agent loop's ids in front of the sampled ids, with masks
            and positions (:func:`sdar_verl.teacher.rows.teacher_row`)
re-encode   the same rows from text: decode the student's prompt, put the skills into it, encode, append
agent loop  what the worker's rows cost before, in the agent loop while other episodes generate: template, chat
            template, one encoding. It is part of the work, but of no step's critical path

The worker's and the re-encoded rows end with the same response ids. Both arms leave verl's queue out, which they would
use alike. CPU seconds, arms in turn, medians over the rounds.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import as_task, interleaved, machine, median, ratio, real_games, table
from sdar_verl.config import SkillsConfig, TeacherConfig
from sdar_verl.context.base import Passage
from sdar_verl.envs.alfworld.env import AlfworldEnv
from sdar_verl.rollout.control import control_strings_of
from sdar_verl.rollout.prompt_builder import PromptBuilder, TurnView
from sdar_verl.rollout.prompts import PromptTemplate
from sdar_verl.rollout.rows import RowInfo
from sdar_verl.rollout.teacher_prompt import add_teacher_prompt
from sdar_verl.skills.loading import load_run_bank
from sdar_verl.skills.retrieval import render_skills, retrieve
from sdar_verl.teacher.rows import teacher_row
from tests.support.chatml import chatml_tokenizer

TEMPLATE, HISTORY, MAX_STEPS = "alfworld", 2, 50
SETTINGS = TeacherConfig(max_prompt_length=8192)


def turns(games: list[Path], count: int, seed: int = 0) -> list[tuple[TurnView, str]]:
    """``count`` turns of random play, and the skills of their tasks."""
    bank = load_run_bank(SkillsConfig(bank="alfworld"), "alfworld")
    env, rng = AlfworldEnv(), random.Random(seed)
    found: list[tuple[TurnView, str]] = []
    while len(found) < count:
        for game in games:
            task = as_task(game)
            skills = render_skills(retrieve(bank, task, ["task_type"], 0, {}, None).skills)
            state, history = env.reset(task), []
            for step in range(1, 13):
                seen = TurnView(
                    task.description,
                    tuple(history[-HISTORY:]),
                    state.observation,
                    state.admissible_actions,
                    step,
                    MAX_STEPS,
                )
                found.append((seen, skills))
                history.append((state.observation, rng.choice(state.admissible_actions)))
                state = env.step(history[-1][1])
    return found[:count]


class Rows:
    """The turns of a step with sampled answers, and the three ways."""

    def __init__(self, tokenizer: Any, contexts: list[tuple[TurnView, str]], response_tokens: int) -> None:
        self.tokenizer = tokenizer
        self.prompts = PromptBuilder(tokenizer, PromptTemplate.load(TEMPLATE, control_strings_of(tokenizer)))
        self.contexts = contexts
        generator = torch.Generator().manual_seed(0)
        sizes = torch.randint(response_tokens // 4, response_tokens + 1, (len(contexts),), generator=generator)
        self.responses = [torch.randint(3, len(tokenizer), (size,), generator=generator) for size in sizes.tolist()]
        self.masks = [torch.ones_like(response) for response in self.responses]
        self.student = [self.prompts.encode(seen, "", seen.history) for seen, _ in contexts]
        self.teacher = [info.teacher_prompt_ids for info in self.agent_loop()]

    def agent_loop(self) -> list[RowInfo]:
        """The teacher's prompts, made where the student's are."""
        infos = []
        for (seen, skills), ids in zip(self.contexts, self.student, strict=True):
            info = RowInfo(turn=seen.step - 1, task_type="", task_id="", prompt_tokens=len(ids))
            add_teacher_prompt(info, self.prompts, seen, Passage(skills), SETTINGS)
            infos.append(info)
        return infos

    def worker(self) -> list[dict[str, torch.Tensor]]:
        """Ids that are there already."""
        prompts = [torch.from_numpy(ids) for ids in self.teacher]
        return [teacher_row(*row) for row in zip(prompts, self.responses, self.masks, strict=True)]

    def re_encode(self) -> list[dict[str, torch.Tensor]]:
        """Text, row by row."""
        rows = []
        for ids, (_, skills), response, mask in zip(
            self.student, self.contexts, self.responses, self.masks, strict=True
        ):
            text = self.tokenizer.decode(ids)
            head, turn, rest = text.partition("<|im_start|>user\n")
            prompt = self.tokenizer(f"{head}{turn}{skills}\n\n{rest}", add_special_tokens=False)["input_ids"]
            rows.append(teacher_row(torch.tensor(prompt), response, mask))
        return rows


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--response-tokens", type=int, default=512, help="most tokens of an answer")
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--games", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--data", type=Path, default=Path("outputs/benchmarks/games"), help="games are kept here")
    args = parser.parse_args()
    torch.set_num_threads(1)

    games = real_games(args.data / "small_room", args.games)
    contexts = turns(games, args.rows)
    package = Path(__file__).parents[1] / "sdar_verl"
    texts = [file.read_text() for file in sorted(package.rglob("*.md")) + sorted(package.rglob("*.py"))]
    texts += [seen.observation + "\n".join(seen.admissible_actions) for seen, _ in contexts]
    rows = Rows(chatml_tokenizer(texts, args.vocabulary), contexts, args.response_tokens)
    assert all(
        torch.equal(a["responses"], b["responses"]) and len(a["prompts"]) > len(ids)
        for a, b, ids in zip(rows.worker(), rows.re_encode(), rows.student, strict=True)
    )

    arms = {"worker": rows.worker, "re-encode": rows.re_encode, "agent loop": rows.agent_loop}
    costs = interleaved(arms, args.rounds)
    lengths = [np.mean([len(ids) for ids in prompts]) for prompts in (rows.student, rows.teacher)]
    print(machine("torch", "transformers", "tokenizers"))
    print(
        f"{args.rows} rows; prompts of {lengths[0]:.0f} tokens (student) and {lengths[1]:.0f} (teacher) on average, "
        f"vocabulary {len(rows.tokenizer)}\n"
    )
    lines = [
        [arm, f"{args.rows / median(costs[arm]):.0f}", f"{ratio(costs['re-encode'], costs[arm]):.2f}"] for arm in arms
    ]
    print(table(["arm", "rows/s", "times re-encode"], lines))


if __name__ == "__main__":
    main()
