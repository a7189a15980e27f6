"""Rebuilds the quick start's policy, sdar_verl/local/policy: python scripts/start_policy/build.py --out DIR

A tiny Qwen3 with a word-level tokenizer learns from scripted players in a simulator of the generated ALFWorld games.
Every episode draws a household of its own, so the weights learn to read a skill, never where things lie. The shipped
one took 37 minutes with --threads 1 on two busy cores (75 s data, 17 minutes look-up lesson, 19 demonstrations).
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

# Set before torch loads: glibc's malloc gives memory back after each step otherwise, which costs most of the time.
_MALLOC = {
    "MALLOC_TOP_PAD_": "1000000000",
    "MALLOC_MMAP_THRESHOLD_": "4000000000",
    "MALLOC_TRIM_THRESHOLD_": "8000000000",
}


def main() -> None:
    """Parse the command line, train, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--games", type=int, default=6000, help="demonstrated episodes")
    parser.add_argument("--steps", type=int, default=1450, help="training steps on them")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if any(os.environ.get(name) != value for name, value in _MALLOC.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **_MALLOC})

    import torch
    from episodes import TEMPLATE, Mix, SkillWriter, demonstrate, encode_turn
    from model import new_model
    from tokenizer import build_tokenizer, words_of
    from warm_start import Schedule, demonstration_row, train

    from sdar_verl.envs.alfworld.spec import ROOMS, GeneratorConfig
    from sdar_verl.rollout.prompts import PromptTemplate

    started = time.monotonic()

    def log(message: str) -> None:
        print(f"[{time.monotonic() - started:4.0f} s] {message}", flush=True)

    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    template, writer = PromptTemplate.load(TEMPLATE), SkillWriter()
    turns = [
        turn
        for index in range(options.games)
        for turn in demonstrate(template, writer, GeneratorConfig(), index, Mix(), options.seed)
    ]
    names = [n for room in ROOMS.values() for n in (*room.objects, *room.receptacles)]
    spoken = ["nothing happens . none turn on off"]  # what a policy may hear and the players never did
    tokenizer = build_tokenizer(words_of([*(text for turn in turns for text in turn), *names, *spoken]))
    schedule = Schedule(steps=options.steps)
    rows = [demonstration_row(*encode_turn(tokenizer, *turn), schedule.prompt_weight) for turn in turns]
    log(f"{options.games} games, {len(rows)} turns, {len(tokenizer)} words")

    model = new_model(tokenizer, layers=options.layers)
    train(model, tokenizer, rows, schedule, options.seed, log)
    model.half().save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    log(f"saved {sum(p.numel() for p in model.parameters()):,} weights to {options.out}")


if __name__ == "__main__":
    main()
