"""A writer of hindsight that is right: rules in the place of a large model, at an OpenAI-compatible endpoint.

    python -m benchmarks.hindsight_rules

It reads where things were picked up in an episode of ALFWorld ("take mug 1 from shelf 2") and says so in the words of
the quick start's skills ("mug in shelf ."), as the lesson, and as the hint for every turn before that; of an episode
that found nothing it has nothing to say. With it the hindsight methods of docs/study.md run on a policy that writes no
prose; it prints the options that lead to it.
"""

from __future__ import annotations

import json
import re
import threading

from tests.support.chat_server import chat_server, says

TURN = re.compile(r"^Turn (\d+)\.", re.MULTILINE)
TAKEN = re.compile(r"done: take (\w+) \d+ from (\w+) \d+$", re.MULTILINE)
NOTED = re.compile(r"\w+ in \w+ \.")


def found(story: str) -> dict[str, int]:
    """What was learned of places -> the turn that showed it, from 1."""
    _, *parts = TURN.split(story)
    seen: dict[str, int] = {}
    for number, turn in zip(parts[::2], parts[1::2], strict=True):
        if taken := TAKEN.search(turn):
            seen.setdefault(f"{taken[1]} in {taken[2]} .", int(number))
    return seen


def answer(prompt: str) -> str:
    """To a prompt of sdar_verl.context.hindsight: its JSON object where it asks for one, else the lines alone."""
    seen = found(prompt)
    if "JSON" not in prompt:
        return "\n".join(seen or dict.fromkeys(NOTED.findall(prompt)))
    last = max(seen.values(), default=0)
    hints = [{"turn": turn, "hint": "\n".join(n for n in seen if turn <= seen[n])} for turn in range(1, last + 1)]
    return json.dumps({"summary": "", "lesson": "\n".join(seen), "hints": hints})


def main() -> None:
    """Print where it listens, and answer until it is stopped."""
    with chat_server(lambda _, prompt: says(answer(prompt))) as server:
        print(
            f"sdar.context.writer.source=endpoint sdar.context.writer.model=rules sdar.context.writer.url={server.url}"
        )
        threading.Event().wait()


if __name__ == "__main__":
    main()
