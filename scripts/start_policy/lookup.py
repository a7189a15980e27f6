"""A synthetic first lesson: find in a list of `object in place` lines what is asked, many questions to a prompt.

Demonstrations ask one such question per episode, with one or two lines to read. The shipped policy's lesson ended at
its limit of 600 steps with a loss of 0.28, short of its goal; the demonstrations did the rest.
"""

from __future__ import annotations

import random
from typing import Any

from sdar_verl.envs.alfworld.spec import LAMP, ROOMS

_QUESTIONS = 12
_WITH_PLACES = 0.75


def lookup_lesson(tokenizer: Any, rng: random.Random) -> tuple[list[int], list[float]]:
    """(token ids, weight of each token in the loss) of one prompt with its answers."""
    name = rng.choice(list(ROOMS))
    room = ROOMS[name]
    objects = [o.lower() for o in room.objects] + ([LAMP.lower()] if name == "bedroom" else [])
    types = [r.lower() for r in room.receptacles]
    places = {o: rng.choice(types) for o in objects}
    rng.shuffle(objects)
    informed = rng.random() < _WITH_PLACES
    receptacles = [f"{t} {n}" for t in rng.sample(types, 5) for n in range(1, rng.choice([2, 2, 3]))]
    here = rng.choice(receptacles)
    takes = {o: f"take {o} {rng.choice([1, 1, 2])} from {here}" for o in rng.sample(objects, rng.randint(0, 4))}
    actions = [f"go to {r}" for r in receptacles if r != here] + list(takes.values())
    actions.sort() if rng.random() < 0.5 else rng.shuffle(actions)
    parts = ["<user>", "skills : " + " ".join(f"{o} in {places[o]} ." for o in objects) if informed else "task :"]
    parts += ["now : you see", " , and ".join(f"a {o} 1" for o in takes) or "nothing"]
    parts += ["actions :", " ; ".join(actions), "<assistant>"]
    ids = tokenizer(" ".join(parts))["input_ids"]
    weights = [0.0] * len(ids)
    for _ in range(_QUESTIONS):
        asked = rng.choice(objects)
        if asked in takes:
            answer = tokenizer(f"<think> {asked} take </think> <action> {takes[asked]} </action>")["input_ids"]
            learnt = [0.0, 0.0] + [1.0] * (len(answer) - 2)
        else:
            place = places[asked] if informed else rng.choice(types)
            answer = tokenizer(f"<think> {asked} in {place} </think>")["input_ids"]
            learnt = [0.0, 0.0, 1.0, 1.0 if informed else 0.0, 0.0]
        ids, weights = ids + answer, weights + learnt
    return ids, weights
