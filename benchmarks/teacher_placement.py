"""The teacher asked from the rollout server, while episodes run, against the trainer's pass after them.

    python -m benchmarks.teacher_placement [--waits 0 0.1 0.3] [--rounds 3]

The rollout and the teacher of one step, without a trainer around them: 32 episodes on the CPU server's scheduler, most
of two or three turns and a few of twelve, whose environment takes ``--waits`` seconds per step. One arm asks for the
teacher's log-probs of a turn as soon as it is sampled; the other plays without, and afterwards makes the trainer's pass
over the same rows, in batches of 16384 tokens. One thread of torch. Prompts, lengths and sampled tokens come from fixed
seeds and are the same in both arms; so are the log-probs, within 1e-4 nats, which is checked.

``rollout`` is the seconds of the clock until the last episode has ended, ``total`` until the last log-prob is there,
``cpu`` the process's CPU seconds. Medians over the rounds; ratios are of rollout_server to colocated within a round.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.common import machine, table
from sdar_verl.local import start_policy
from sdar_verl.local.sampling import SamplingParams
from sdar_verl.local.scheduler import BatchScheduler

PLACEMENTS = ("colocated", "rollout_server")
TURNS = (2, 2, 2, 3, 3, 4, 6, 12)

GROUP, PROMPT, CONTEXT, ANSWER, BUDGET = 4, (200, 280), 60, 20, 16384


@dataclass
class Played:
    """One arm.

    Attributes:
        rollout: seconds until the last episode had ended.
        total: seconds until the last log-prob was there.
        cpu: seconds of this process.
        scores: (episode, turn) -> the teacher's log-probs of the answer.
    """

    rollout: float = 0.0
    total: float = 0.0
    cpu: float = 0.0
    scores: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)


async def rollout(scheduler: BatchScheduler, wait: float, played: Played, *, ask: bool) -> dict[tuple[int, int], Any]:
    """All episodes; returns each turn's teacher prompt and answer. With ``ask``, the scores are in ``played``."""
    rows: dict[tuple[int, int], tuple[list[int], list[int]]] = {}
    tasks = []

    async def score(key: tuple[int, int], prompt: list[int], answer: list[int]) -> None:
        params = SamplingParams(1, prompt_logprobs=0, seed=0)
        done = await asyncio.wrap_future(scheduler.submit([*prompt, *answer], params))
        assert done.scored is not None
        played.scores[key] = torch.tensor(done.scored[1][len(prompt) - 1 :])[:, 0]

    async def episode(number: int) -> None:
        draw = random.Random(number)
        for turn in range(TURNS[number % len(TURNS)]):
            prompt = [draw.randrange(3, 100) for _ in range(draw.randrange(*PROMPT))]
            params = SamplingParams(ANSWER, ignore_eos=True, seed=1000 * number + turn)
            done = await asyncio.wrap_future(scheduler.submit(prompt, params))
            key, teacher = (number, turn), [draw.randrange(3, 100) for _ in range(CONTEXT)] + prompt
            rows[key] = (teacher, done.token_ids)
            if ask:
                tasks.append(asyncio.create_task(score(key, teacher, done.token_ids)))
            await asyncio.sleep(wait * draw.uniform(0.5, 1.5))

    started = time.perf_counter()
    await asyncio.gather(*[episode(number) for number in range(GROUP * len(TURNS))])
    played.rollout = time.perf_counter() - started
    await asyncio.gather(*tasks)
    return rows


@torch.inference_mode()
def trainer_pass(model: Any, rows: dict[tuple[int, int], Any]) -> dict[tuple[int, int], torch.Tensor]:
    """The rows in padded batches, as verl's engine makes them on a CPU, and the log-probs of their answers."""
    scores, keys = {}, sorted(rows)
    while keys:
        width, count = 0, 0
        for key in keys:
            width = max(width, sum(map(len, rows[key])))
            if count and width * (count + 1) > BUDGET:
                break
            count += 1
        batch, keys = keys[:count], keys[count:]
        ids = [[*rows[key][0], *rows[key][1]] for key in batch]
        width = max(map(len, ids))
        padded = torch.tensor([one + [0] * (width - len(one)) for one in ids])
        mask = torch.tensor([[1] * len(one) + [0] * (width - len(one)) for one in ids])
        log_probs = model(input_ids=padded, attention_mask=mask, use_cache=False).logits.float().log_softmax(-1)
        found = log_probs[:, :-1].gather(2, padded[:, 1:, None])[..., 0]
        for i, key in enumerate(batch):
            start = len(rows[key][0]) - 1
            scores[key] = found[i, start : start + len(rows[key][1])].clone()
    return scores


def play(placement: str, model: Any, wait: float) -> Played:
    """One arm: all episodes and all of the teacher's log-probs."""
    played = Played()
    scheduler = BatchScheduler(model, eos_token_ids=[], max_num_seqs=128)
    started, cpu = time.perf_counter(), time.process_time()
    rows = asyncio.run(rollout(scheduler, wait, played, ask=placement == "rollout_server"))
    if placement == "colocated":
        played.scores = trainer_pass(model, rows)
    played.total, played.cpu = time.perf_counter() - started, time.process_time() - cpu
    scheduler.close()
    assert played.scores.keys() == rows.keys()
    return played


def compared(here: list[float], there: list[float]) -> list[str]:
    """Both medians, and the median of the ratios of a round."""
    pairs = [b / a for a, b in zip(here, there, strict=True) if a]
    ratio = f"{statistics.median(pairs):.2f}" if pairs else "-"
    return [f"{statistics.median(here):.2f}", f"{statistics.median(there):.2f}", ratio]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--waits", type=float, nargs="+", default=[0.0, 0.1, 0.3], help="seconds of a step")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(start_policy(), dtype=torch.float32, attn_implementation="sdpa").eval()
    play("rollout_server", model, 0.0)  # warm-up
    lines = []
    for wait in args.waits:
        seen: dict[str, list[Played]] = {placement: [] for placement in PLACEMENTS}
        for number in range(args.rounds):
            for placement in PLACEMENTS if number % 2 == 0 else reversed(PLACEMENTS):
                seen[placement].append(play(placement, model, wait))
            here, there = (seen[placement][-1].scores for placement in PLACEMENTS)
            apart = max((there[key] - here[key]).abs().max().item() for key in here)
            assert apart < 1e-4, f"the placements differ by {apart} nats"
        for name in ("rollout", "total", "cpu"):
            here, there = ([getattr(one, name) for one in seen[placement]] for placement in PLACEMENTS)
            lines.append([f"{wait:g}", name, *compared(here, there)])
    print("\n" + machine("torch", "transformers"))
    print(f"{GROUP * len(TURNS)} episodes, {GROUP * sum(TURNS)} rows, {args.rounds} rounds\n")
    print(table(["environment's step, s", "seconds", *PLACEMENTS, "ratio"], lines))


if __name__ == "__main__":
    main()
