"""Contexts that somebody writes, in a step: on the rows of environments and of recipes of verl's, by the policy too."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
from transformers import AutoTokenizer

from sdar_verl.config import load_config
from sdar_verl.config.context import WriterConfig
from sdar_verl.context.base import Passage
from sdar_verl.context.builder import ContextBuilder
from sdar_verl.context.hindsight import LESSON
from sdar_verl.context.registry import ContextError
from sdar_verl.errors import RolloutError
from sdar_verl.local import start_policy
from sdar_verl.rollout.late_context import LateContexts
from sdar_verl.rollout.recipe_rows import record_of, task_of
from sdar_verl.verl.late import late_contexts, run_writer, step_writing
from sdar_verl.writer.base import Answer
from sdar_verl.writer.policy import PolicyWriter
from sdar_verl.writer.step import StepWriting
from tests.support.chat_server import chat_server, says
from tests.support.scripted import GOOD, LOST, MUTE, TASK, WRONG, play_episode, scripted_config
from tests.support.table import make_table
from tests.support.writing import Scripted, hints


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(start_policy())


PLAYED = {
    ("u0", 0): (TASK, [LOST, LOST, GOOD]),
    ("u0", 1): (TASK, [LOST, GOOD]),
    ("u0", 2): (TASK, [MUTE, WRONG, LOST]),
    ("u1", 0): (replace(TASK, task_id="task-2"), [GOOD]),
    ("u1", 1): (replace(TASK, task_id="task-2"), [GOOD]),
}


@pytest.fixture
def step(tokenizer, monkeypatch, tmp_path):
    """Plays a step and has its contexts written: records by key, metrics."""

    def run(url, episodes=PLAYED, *, client=None, steps=1, **settings):
        node = WriterConfig(
            **({"source": "endpoint", "url": url, "model": "m", "retries": 0} if url else {})
        ).model_dump()
        node |= settings.pop("writer", {})
        settings = {"teacher__max_prompt_length": 2000, "context__writer": node, **settings}
        config = scripted_config(max_prompt_length=1200, **settings)
        config.trainer = {"default_local_dir": str(tmp_path)}
        keys, infos = [], []
        for (uid, session), (task, script) in episodes.items():
            _, records, _, _ = play_episode(
                monkeypatch, tokenizer, script, task=task, max_prompt_length=1200, **settings
            )
            keys += [f"{uid}_{session}_{i}" for i in range(len(records))]
            infos += records
        sdar = load_config(config.sdar)
        late = late_contexts(
            config,
            sdar,
            tokenizer,
            lambda: step_writing(config, tokenizer, run_writer(config, sdar, tokenizer, lambda: client)),
        )
        metrics = late.fill(make_table(keys, infos, step=steps))
        return dict(zip(keys, infos, strict=True)), metrics, late

    return run


def test_a_step_shows_each_row_what_was_written_of_its_episode(step, tokenizer):
    with chat_server(lambda n, prompt: says(json.dumps({"lesson": f"turns {prompt.count('done:')}"}))) as server:
        rows, metrics, _ = step(server.url, context__sources=["lesson"])
    for key, info in rows.items():
        number = len([other for other in rows if other.rsplit("_", 1)[0] == key.rsplit("_", 1)[0]])
        shown = tokenizer(f"{LESSON}\nturns {number}", add_special_tokens=False)["input_ids"]
        ids = info.teacher_prompt_ids.tolist()
        assert any(ids[i : i + len(shown)] == shown for i in range(len(ids)))
        if info.episode is not None:
            assert info.episode.context == f"{LESSON}\nturns {number}"
    # Two episodes of the second group are word by word the same.
    assert (metrics["sdar/writer/asked"], metrics["sdar/writer/answered"]) == (4, 4)
    assert metrics["timing_s/writer"] > 0


def test_only_the_episodes_that_the_teacher_looks_at_are_written_about(step):
    with chat_server(lambda *_: says(hints((1, "look")))) as server:
        rows, metrics, _ = step(server.url, context__sources=["next_observation", "hint"], context__episodes="failed")
    assert len(server.requests) == 1 and metrics["sdar/writer/asked"] == 1
    seen = {key for key, info in rows.items() if info.teacher_prompt_ids is not None}
    assert seen == {"u0_2_0", "u0_2_1", "u0_2_2"}, "AHEAD: the next observation on all turns of a failure"


def test_placebos_and_the_other_slot_know_what_was_written(step, tokenizer):
    def script(number, prompt):
        return says(json.dumps({"lesson": "take the apple first" if "task-2" not in prompt else "x"}))

    with chat_server(script) as server:
        real, _, _ = step(server.url, context__sources=["lesson"])
        shuffled, _, _ = step(server.url, context__sources=["lesson"], context__control="shuffled")
        bad = {"sources": ["lesson"], "options": {}, "control": "shuffled", "texts": 2}
        both, _, _ = step(server.url, context__sources=["lesson"], context__contrast=bad)
        asked = len(server.requests)
    words = [sorted(rows["u0_0_0"].episode.context.split()) for rows in (real, shuffled)]
    assert words[0] == words[1] and real["u0_0_0"].episode.context != shuffled["u0_0_0"].episode.context
    assert len(both["u0_0_0"].contrast_prompt_ids) == 2, "two draws of the placebo are two texts"
    assert asked == 4, "all three runs are in one folder, and ask for the same"


def test_the_wrong_lesson_is_anothers(step):
    other = {**PLAYED, ("u2", 0): (replace(TASK, task_id="t3", task_type="heat", description="heat some egg"), [GOOD])}

    def script(number, prompt):
        return says(json.dumps({"lesson": "boil it well" if "egg" in prompt else "carry it there"}))

    with chat_server(script) as server:
        rows, _, _ = step(server.url, other, context__sources=["lesson"], context__control="wrong")
    assert "boil" in rows["u0_0_0"].episode.context and "carry" in rows["u2_0_0"].episode.context


def test_a_conversation_cannot_have_hints_but_has_a_lesson(step, tokenizer):
    whole = {"rollout__rows": "trajectory", "rollout__turn_length": 20, "prompt__history_length": 0}
    played = {key: value for key, value in PLAYED.items() if key[0] == "u0"}
    with chat_server(lambda *_: says('{"lesson": "take it"}')) as server:
        with pytest.raises(ContextError, match="differ by turn"):
            step(server.url, played, context__sources=["hint"], **whole)
        assert len(server.requests) == 0
        rows, _, _ = step(server.url, played, context__sources=["lesson"], **whole)
    assert all("take it" in tokenizer.decode(info.teacher_prompt_ids.tolist()) for info in rows.values())


# ---------------------------------------------------------------- the policy


class Client:
    """verl's client: answers by a function of the prompt's text."""

    def __init__(self, tokenizer, answer):
        self.tokenizer, self.answer, self.asked = tokenizer, answer, []

    async def generate(self, request_id, *, prompt_ids, sampling_params):
        self.asked.append((self.tokenizer.decode(prompt_ids), sampling_params))
        text = self.answer(self.asked[-1][0])
        if isinstance(text, Exception):
            raise text
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return SimpleNamespace(token_ids=[*ids, self.tokenizer.eos_token_id])


def policy(tokenizer, client, seed=7, **settings) -> PolicyWriter:
    given = WriterConfig(**settings)
    return PolicyWriter(lambda: client, tokenizer, given, prompt_tokens=50, answer_tokens=9, temperature=0.8, seed=seed)


def test_the_policy_is_asked_as_a_user_and_seeded_by_step_and_prompt(tokenizer):
    client = Client(tokenizer, lambda text: "go to desk 1")
    writer = policy(tokenizer, client)
    answers = writer.write(["go to fridge 1", "go to bed 1"], step=4)
    assert [answer.text for answer in answers] == ["go to desk 1"] * 2
    text, params = client.asked[0]
    assert "go to fridge 1" in text and writer.tokens("go to fridge 1") == len(writer._prompt("go to fridge 1"))
    assert {key: params[key] for key in ("temperature", "top_p", "max_tokens")} == {
        "temperature": 0.8,
        "top_p": 1.0,
        "max_tokens": 9,
    }
    seeds = [asked["seed"] for _, asked in client.asked]
    writer.write(["go to fridge 1"], step=5)
    writer.write(["go to fridge 1"], step=4)
    later, again = (asked["seed"] for _, asked in client.asked[2:])
    assert len({*seeds, later}) == 3 and again == seeds[0]
    free = Client(tokenizer, lambda text: "go")
    policy(tokenizer, free, seed=None, temperature=0.0, max_tokens=3).write(["go"], step=1)
    assert free.asked[0][1] == {"temperature": 0.0, "top_p": 1.0, "top_k": -1, "max_tokens": 3}
    assert answers[0].tokens == writer.tokens("go to fridge 1") + 5


def test_a_rollout_server_that_raises_is_a_failure_after_further_attempts(tokenizer, monkeypatch):
    monkeypatch.setattr("sdar_verl.writer.policy.PAUSE_S", 0.0)
    client = Client(tokenizer, lambda text: RuntimeError("asleep"))
    (answer,) = policy(tokenizer, client, retries=2).write(["go"], step=1)
    assert answer == Answer(failure="RuntimeError: asleep") and len(client.asked) == 3


def test_with_the_policy_all_is_written_before_the_servers_sleep(step, tokenizer, monkeypatch):
    """`write` while they are awake; `fill` asks nobody any more, and the next step begins anew."""
    client = Client(tokenizer, lambda text: "go to fridge 1")
    options = {"context__sources": ["lesson"], "context__options": {"lesson": {"form": "text"}}}
    rows, metrics, late = step(None, client=client, **options)
    assert late.during_rollout and metrics["sdar/writer/answered"] == 4
    table = make_table(list(rows), list(rows.values()), step=2)
    late.write(table)
    asked = len(client.asked)
    client.answer = lambda text: RuntimeError("asleep")
    late.fill(table)
    assert len(client.asked) == asked
    monkeypatch.setattr("sdar_verl.writer.policy.PAUSE_S", 0.0)
    assert late.fill(table)["sdar/writer/failed"] == 4
    with pytest.raises(RolloutError, match="the policy's rollout server left 8 of 8"):
        late.fill(table)


def test_passages_of_contexts_that_write_nothing_are_empty(step):
    with chat_server(lambda *_: says("no json")) as server:
        rows, metrics, _ = step(server.url, context__sources=["lesson"])
    assert all(info.context_missing and info.teacher_prompt_ids is None for info in rows.values())
    assert metrics["sdar/writer/unparsed"] == 4
    assert Passage("").text == ""


# ---------------------------------------------------------------- recipes of verl's


class Kept:
    """In the place of the maker of prompts: keeps the passages."""

    def __init__(self):
        self.passages = {}

    def add(self, task, infos, index, passage):
        self.passages[infos[index].task_id, infos[index].turn] = passage.text


class Letters:
    """Text of token ids, a letter each."""

    def decode(self, ids, skip_special_tokens=True):
        return "".join(chr(i) for i in ids)

    def __call__(self, text, add_special_tokens=False):
        return {"input_ids": [ord(letter) for letter in text]}


def test_rows_of_any_agent_loop_are_written_about(tokenizer):
    """A single answer, and a conversation with a tool; what the reward function said is the outcome."""
    letters = Letters()
    node = scripted_config(context__sources=["lesson"]).sdar
    sdar = load_config(node)
    infos = []
    for name, said, mask in (("sum", "it is 4", [1] * 7), ("tool", "ask|told|say", [1] * 4 + [0] * 5 + [1] * 3)):
        task = task_of({"raw_prompt": [{"role": "user", "content": f"question {name}"}], "data_source": "maths"})
        info = record_of(task, 0, [ord("q")] * 9, [ord(c) for c in said], mask, letters, keep_data=True)
        info.episode.reward, info.success = float(name == "sum"), name == "sum"
        infos.append(info)
    writer = Scripted(lambda text: json.dumps({"lesson": "right" if "earned 1" in text else "wrong"}))
    kept = Kept()
    late = LateContexts(sdar, ContextBuilder(sdar.context, letters), kept, StepWriting(writer, ()))
    metrics = late.fill(make_table(["u0_0_0", "u1_0_0"], infos))
    first, second = writer.batches[0]
    assert "The task: question sum\n\nTurn 1. done: it is 4\n\nThe attempt succeeded and earned 1." in first
    assert "Turn 1. done: ask|\nTurn 2. seen: told|\n   done: say" in second and "did not succeed" in second
    assert sorted(kept.passages.values()) == [f"{LESSON}\nright", f"{LESSON}\nwrong"]
    assert metrics["sdar/writer/answered"] == 2
