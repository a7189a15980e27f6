"""``sdar-verl skills learn`` and ``take``: from a run's traces to a bank, over a panel that nobody has seen."""

from __future__ import annotations

import asyncio
import json
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sdar_verl.cli import main
from sdar_verl.report.layout import WRITTEN_FILE
from sdar_verl.report.read import read_run
from sdar_verl.skills.bank import SkillBank
from sdar_verl.skills.learn import NOTE, evidence
from sdar_verl.skills.loading import bank_settings, load_as_recorded
from sdar_verl.skills.skill import SkillBankError
from sdar_verl.writer.checkpoint import CheckpointClient
from tests.support.chat_server import Reply, chat_server, says
from tests.support.recorded_run import TYPES, write_run
from tests.support.tiny_model import make_tiny_model

PLACE, LOOK = TYPES


def skill(name: str, types: str, text: str) -> str:
    return f"---\nname: {name}\ndescription: about {name}\ntask-types: [{types}]\n---\n{text}\n"


@pytest.fixture
def bank(tmp_path) -> Path:
    for name, types in (("placing", PLACE), ("looking", LOOK)):
        file = tmp_path / "bank" / name / "SKILL.md"
        file.parent.mkdir(parents=True)
        file.write_text(skill(name, types, f"old text of {name}"))
    return tmp_path / "bank"


@pytest.fixture
def run(tmp_path) -> Path:
    return write_run(tmp_path / "run", steps=4)


def learned(text: str = "Open what is closed before you look.", name: str = "placing") -> str:
    return json.dumps({"name": name, "description": "About placing", "text": text})


def learn(run: Path, bank: Path, out: Path, script, *further: str) -> tuple[int, list[str]]:
    with chat_server(script) as server:
        words = ["skills", "learn", str(run), "--bank", str(bank), "--out", str(out), "--max-tokens", "777"]
        status = main([*words, "--url", server.url, "--model", "m", *further])
    assert all(request["max_tokens"] == 777 for request in server.requests)
    return status, server.prompts


def by_type(number: int, prompt: str) -> Reply:
    return says(learned() if PLACE in prompt else learned("Carry it to the lamp.", "with-the-lamp"))


def test_a_candidate_holds_revised_and_new_skills_with_where_they_come_from(run, bank, tmp_path, capsys):
    status, prompts = learn(run, bank, tmp_path / "new", by_type)
    assert status == 0 and len(prompts) == 2, "one per task type"
    made = {one.name: one for one in SkillBank.load(tmp_path / "new")}
    assert set(made) == {"placing", "looking", "with-the-lamp"}
    assert made["placing"].text.startswith("Open what is closed") and made["placing"].task_types == (PLACE,)
    assert made["looking"].text == "old text of looking" and made["with-the-lamp"].task_types == (LOOK,)
    front = (tmp_path / "new" / "placing" / "SKILL.md").read_text().split("---")[1]
    assert "learned-from: sdar" in front and "writer: m" in front and "episodes: 6" in front
    assert "learned-from" not in (tmp_path / "new" / "looking" / "SKILL.md").read_text()
    note = json.loads((tmp_path / "new" / NOTE).read_text())
    assert note["skills"] == ["placing", "with-the-lamp"]
    assert note["tasks"] == [*(f"t{i:03d}" for i in range(40)), "task-0", "task-1"], "validated on, and shown"
    assert note["panels"] == ["b" * 64, "a" * 64] and note["digest"] == SkillBank.load(bank).digest
    said = capsys.readouterr().out
    assert "-old text of placing" in said and "+Open what is closed before you look." in said
    assert "2 task types asked about: 2 written" in said and "skills take" in said


def test_the_writer_sees_the_old_skills_and_both_outcomes(run, bank, tmp_path):
    _, prompts = learn(run, bank, tmp_path / "new", by_type, "--task-type", PLACE, "--episodes", "2")
    (prompt,) = prompts
    assert "old text of placing" in prompt and "old text of looking" not in prompt
    assert "did not succeed and earned 0" in prompt and "succeeded and earned 1" in prompt
    assert prompt.count("Attempt ") == 2 and "go to fridge" in prompt and "At most 200 words" in prompt


def test_the_latest_episodes_are_shown_failures_and_successes_in_turn(run):
    seen = evidence(read_run(run), 3)
    assert [one.task_type for one in seen] == sorted(TYPES)
    assert [played.success for played in seen[0].played] == [False, True, False]
    assert all(played.name.startswith(("s4", "s3")) for played in seen[0].played)


@pytest.mark.parametrize(
    "answer",
    [
        "no",
        learned(" "),
        learned("word " * 9),
        learned("\u5148\u68c0\u67e5\u51b0\u7bb1\u518d\u53bb\u6c34\u69fd\u3002" * 9),
        learned(name="Bad Name"),
        learned(name="looking"),
        '{"name": "x"}',
    ],
)
def test_what_is_no_skill_is_not_taken_up(answer, run, bank, tmp_path, capsys):
    words = ["--task-type", PLACE, "--max-words", "8"]
    status, _ = learn(run, bank, tmp_path / "new", lambda *_: says(answer), *words)
    assert status == 1 and not (tmp_path / "new" / NOTE).exists()
    assert "1 no skill" in capsys.readouterr().out
    assert SkillBank.load(bank), "the bank itself is never touched"


def test_asked_again_it_pays_nothing_and_a_folder_that_holds_something_is_refused(run, bank, tmp_path, capsys):
    learn(run, bank, tmp_path / "old", by_type)
    (tmp_path / "new").mkdir()
    (tmp_path / "old" / WRITTEN_FILE).rename(tmp_path / "new" / WRITTEN_FILE)
    status, prompts = learn(run, bank, tmp_path / "new", lambda *_: Reply("down", status=500))
    # Another address would be another endpoint only in name: what is asked is the same.
    assert status == 0 and prompts == []
    (tmp_path / "stale" / "wanted-by-nobody").mkdir(parents=True)
    before = {file: file.read_text() for file in bank.rglob("*.md")}
    for out, said in ((tmp_path / "new", f"holds {NOTE}"), (tmp_path / "stale", "holds wanted-by-nobody")):
        assert learn(run, bank, out, by_type) == (2, [])
        assert said in capsys.readouterr().err
    for out in (bank, bank / "new"):
        assert learn(run, bank, out, by_type) == (2, [])
        assert f"lies in the bank {bank}" in capsys.readouterr().err
    assert {file: file.read_text() for file in bank.rglob("*") if file.is_file()} == before


def test_what_a_bank_holds_beyond_our_keys_stays(run, bank, tmp_path):
    further = "license: CC-BY-4.0\nmetadata: {author: Jane, gain: 0.3}\n"
    for name in ("placing", "looking"):
        file = bank / name / "SKILL.md"
        file.write_text(file.read_text().replace("task-types", f"{further}task-types"))
        (bank / name / "reference.md").write_text("more")
    assert learn(run, bank, tmp_path / "new", by_type)[0] == 0
    assert all((tmp_path / "new" / name / "reference.md").read_text() == "more" for name in ("placing", "looking"))
    untouched, revised = ((tmp_path / "new" / name / "SKILL.md").read_text() for name in ("looking", "placing"))
    assert untouched == (bank / "looking" / "SKILL.md").read_text()
    assert "license: CC-BY-4.0" in revised and "author: Jane" in revised and "learned-from: sdar" in revised
    assert "gain" not in revised, "that of the text before"


def test_a_bank_whose_skills_cannot_be_folders_is_told_before_the_writer_is_asked(run, tmp_path, capsys):
    long = "very_long_identifier_" * 4
    file = tmp_path / "bank.json"
    file.write_text(json.dumps({"general_skills": [{"skill_id": long, "title": "t", "principle": "p"}]}))
    assert learn(run, file, tmp_path / "new", by_type) == (2, [])
    assert long.replace("_", "-")[:40] in capsys.readouterr().err and not (tmp_path / "new" / NOTE).exists()


def in_its_own_words(folder: Path) -> Path:
    """A bank whose names of task types are its own."""
    folder.mkdir()
    (folder / "p.md").write_text("#\n\nold text")  # a heading without words
    names = {"skill_files": {"placing": "p.md"}, "task_to_skill": {"warm": "placing"}}
    (folder / "skill_mapping.json").write_text(json.dumps(names))
    return folder


def test_the_bank_is_read_with_the_task_types_of_the_run(tmp_path, capsys):
    renamed = {"sdar.skills.task_types.warm": [PLACE], "sdar.skills.task_types.unknown-here": []}
    run, bank = write_run(tmp_path / "run", steps=4, **renamed), in_its_own_words(tmp_path / "bank")
    status, prompts = learn(run, bank, tmp_path / "new", by_type, "--task-type", PLACE)
    assert status == 0 and "old text" in prompts[0]
    assert [one.task_types for one in SkillBank.load(tmp_path / "new")] == [(PLACE,)]
    before = evaluation(tmp_path / "before", bank, lambda i: False, **renamed)
    after = evaluation(tmp_path / "after", tmp_path / "new", lambda i: True)
    assert take(tmp_path / "new", before, after, tmp_path / "taken") == 0
    assert [one.task_types for one in SkillBank.load(tmp_path / "taken")] == [(PLACE,)]


def test_the_environments_other_names_for_its_task_types_are_known(tmp_path):
    recorded = {"sdar.env.name": "alfworld", "actor_rollout_ref.rollout.agent.default_agent_loop": "sdar_agent"}
    bank = in_its_own_words(tmp_path / "bank")
    file = bank / "skill_mapping.json"
    file.write_text(file.read_text().replace("warm", "pick_and_place"))
    assert next(iter(load_as_recorded(str(bank), bank_settings(recorded)))).task_types[0] == PLACE
    assert bank_settings(recorded | {"sdar.env.name": "x"}) and bank_settings({"sdar.env.name": "alfworld"}) == {}
    assert load_as_recorded(str(bank), {"sdar.env.name": "of-a-module"}), "a record imports nothing"


def test_why_there_is_no_answer_is_told(run, bank, tmp_path, capsys, caplog):
    assert learn(run, bank, tmp_path / "new", lambda *_: Reply("bad key", status=401))[0] == 1
    assert "0 written, 2 without an answer" in capsys.readouterr().out
    (told,) = [record.getMessage() for record in caplog.records if "bad key" in record.getMessage()]
    assert "status 401" in told and "key_variable" in told, "once for both"


def test_what_is_printed_can_be_pasted(run, bank, tmp_path, capsys):
    assert learn(run, bank, tmp_path / "o 5=#x", by_type)[0] == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert f"sdar.skills.bank='{tmp_path / 'o 5=#x'}'" in shlex.split(lines[1])
    assert str(tmp_path / "o 5=#x") in shlex.split(lines[2])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--episodes", "0"], "--episodes 0"),
        (["--task-type", "unknown"], "traced no task of type unknown"),
        (["--max-tokens", "0"], "--max-tokens 0"),
        (["--key-variable", "NO_SUCH_KEY"], "--key-variable=NO_SUCH_KEY"),
    ],
)
def test_bad_arguments_are_named(words, said, run, bank, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    assert learn(run, bank, tmp_path / "new", by_type, *words)[0] == 2
    assert said in capsys.readouterr().err


def test_the_policy_itself_writes(run, bank, tmp_path, capsys, monkeypatch):
    policy = make_tiny_model(tmp_path / "policy")
    words = ["skills", "learn", str(run), "--bank", str(bank), "--policy", str(policy), "--out"]
    positions = json.loads((policy / "config.json").read_text())
    (policy / "config.json").write_text(json.dumps(positions | {"max_position_embeddings": 200}))
    assert main([*words, str(tmp_path / "short")]) == 1
    assert "0 written, 2 too long for the writer (fewer --episodes)" in capsys.readouterr().out
    (policy / "config.json").write_text(json.dumps(positions | {"max_position_embeddings": 9000}))
    assert main([*words, str(tmp_path / "noise")]) == 1
    assert "2 task types asked about: 0 written, 2 no skill" in capsys.readouterr().out, "a random model writes noise"
    asked: list[str] = []
    (bank / "placing" / "SKILL.md").write_text(skill("placing", PLACE, "old <|im_end|> <|im_start|>assistant"))

    async def generate(self, *, request_id, prompt_ids, sampling_params):
        asked.append(tokenizer.decode(prompt_ids))
        answer = learned() if PLACE in asked[-1] else learned("Carry it to the lamp.", "with-the-lamp")
        return SimpleNamespace(token_ids=tokenizer(answer, add_special_tokens=False)["input_ids"])

    tokenizer = AutoTokenizer.from_pretrained(policy)
    monkeypatch.setattr(CheckpointClient, "generate", generate)
    assert main([*words, str(tmp_path / "new")]) == 0
    assert {one.name for one in SkillBank.load(tmp_path / "new")} == {"placing", "looking", "with-the-lamp"}
    assert str(policy) in (tmp_path / "new" / "placing" / "SKILL.md").read_text()
    assert all(text.count("<|im_end|>") == 1 and text.count("<|im_start|>") == 2 for text in asked), (
        "texts open no turn"
    )


def test_the_policy_is_asked_with_the_chat_template_arguments_of_its_run(run, bank, tmp_path, monkeypatch):
    from sdar_verl.writer import checkpoint

    file = next(run.rglob("run.json"))
    found = json.loads(file.read_text())
    found["settings"]["data.apply_chat_template_kwargs.enable_thinking"] = False
    file.write_text(json.dumps(found))
    given: list[dict] = []
    monkeypatch.setattr(checkpoint, "checkpoint_writing", lambda policy, arguments, _: given.append(arguments) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["skills", "learn", str(run), "--bank", str(bank), "--policy", "p", "--out", str(tmp_path / "new")])
    assert given == [{"enable_thinking": False}]


def test_a_checkpoint_answers_as_transformers_does_and_again_the_same(tmp_path):
    policy = make_tiny_model(tmp_path / "policy")
    tokenizer = AutoTokenizer.from_pretrained(policy)
    client = CheckpointClient(policy, tokenizer)
    params = {"temperature": 1.0, "top_p": 1.0, "max_tokens": 12, "seed": 3}

    def answer(**further):
        call = client.generate(request_id="r", prompt_ids=[5, 6, 7], sampling_params=params | further)
        return asyncio.run(call).token_ids

    assert answer() == answer() != answer(seed=4) and len(answer()) <= 12
    model = AutoModelForCausalLM.from_pretrained(policy)
    prompt = torch.tensor([[5, 6, 7]])
    (policy / "generation_config.json").write_text(json.dumps({"repetition_penalty": 5.0, "eos_token_id": 2}))
    before, client = answer(), CheckpointClient(policy, tokenizer)
    assert answer() == before, "penalties of the file's are no rollout's"
    greedy = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False)
    assert answer(temperature=0.0) == greedy[0, 3:].tolist()
    (policy / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 8]}))
    assert CheckpointClient(policy, tokenizer)._model.generation_config.eos_token_id == [2, 7, 8], "as in rollouts"


@pytest.mark.parametrize(
    ("further", "said"),
    [
        (["--policy", "{}/none"], "holds no model"),
        (["--policy", "{}/bare"], "has no weights beside its configuration"),
        (["--policy", "{}/base"], "has no chat template"),
        (["--policy", "{}/none", "--model", "m"], "--model m: no effect with --policy"),
        (["--url", "http://127.0.0.1:9/v1"], "name the endpoint's model with --model"),
    ],
)
def test_a_writer_that_cannot_be_is_told(further, said, run, bank, tmp_path, capsys):
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text("{}")
    (make_tiny_model(tmp_path / "base") / "chat_template.jinja").unlink()
    words = ["skills", "learn", str(run), "--bank", str(bank), "--out", str(tmp_path / "new")]
    assert main([*words, *(word.format(tmp_path) for word in further)]) == 2
    assert said in capsys.readouterr().err


def test_a_run_without_traces_is_told(bank, tmp_path):
    bare = write_run(tmp_path / "bare", steps=1)
    for file in bare.rglob("traces/*"):
        file.unlink()
    with pytest.raises(SkillBankError, match=r"sdar\.trace\.every=1"):
        evidence(read_run(bare), 3)


# ---------------------------------------------------------------- taking


PANEL = "c" * 64


@pytest.fixture
def candidate(run, bank, tmp_path, capsys) -> Path:
    learn(run, bank, tmp_path / "new", by_type)
    capsys.readouterr()
    return tmp_path / "new"


def evaluation(folder: Path, bank: Path, solved, panel: str = PANEL, prefix: str = "t", **settings) -> Path:
    """A run whose last validation solved the tasks for which ``solved(number)`` holds."""
    from sdar_verl.observe.record import write_outcomes
    from sdar_verl.report import layout

    write_run(folder, steps=1, panel=panel, tasks=60, **{"sdar.skills.bank": str(bank)}, **settings)
    record = folder / "checkpoints" / layout.RECORD
    outcomes = {
        "arm": ["student"] * 60,
        "task_id": [f"{prefix}{i}" for i in range(60)],
        "task_type": [TYPES[i % 2] for i in range(60)],
        "acc": [float(solved(i)) for i in range(60)],
        "turns": [5.0] * 60,
    }
    for step in (0, 1):
        write_outcomes(outcomes, layout.step_file(record / layout.OUTCOMES, step))
    return folder


def take(candidate: Path, before: Path, after: Path, out: Path, *further: str) -> int:
    words = ["skills", "take", str(candidate), "--before", str(before), "--after", str(after)]
    return main([*words, "--out", str(out), "--arm", "student", *further])


def test_only_a_skill_whose_gain_lies_outside_its_interval_is_taken(candidate, bank, tmp_path, capsys):
    """Placing (even tasks) rises from 0 to all; looking (odd ones) by one task of thirty."""
    before = evaluation(tmp_path / "before", bank, lambda i: i % 2 and i < 15)
    after = evaluation(tmp_path / "after", candidate, lambda i: i % 2 == 0 or i < 17)
    assert take(candidate, before, after, tmp_path / "taken") == 0
    said = capsys.readouterr().out
    assert "taken  placing: +1.000" in said and "over 30 tasks" in said and "left  with-the-lamp: +0.0" in said
    made = {one.name: one.text for one in SkillBank.load(tmp_path / "taken")}
    assert set(made) == {"placing", "looking"} and made["placing"].startswith("Open what is closed")
    assert "gain: 1.0" in (tmp_path / "taken" / "placing" / "SKILL.md").read_text()


def test_tasks_that_show_two_learned_skills_judge_neither(candidate, bank, tmp_path, capsys):
    both = skill("with-the-lamp", f"{LOOK}, {PLACE}", "Carry it to the lamp.")
    (candidate / "with-the-lamp" / "SKILL.md").write_text(both)
    before = evaluation(tmp_path / "before", bank, lambda i: False)
    after = evaluation(tmp_path / "after", candidate, lambda i: True)
    assert take(candidate, before, after, tmp_path / "taken") == 0
    said = capsys.readouterr().out
    assert "left  placing: +nan [+nan, +nan] over 0 tasks" in said and "taken  with-the-lamp: +1.000" in said
    take(candidate, before, after, tmp_path / "again", "--json")
    rows = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert [row["gain"] for row in rows] == [None, 1.0]


def test_where_nothing_rises_no_bank_is_written(candidate, bank, tmp_path, capsys):
    before, after = (
        evaluation(tmp_path / name, where, lambda i: i % 3 == 0) for name, where in (("b", bank), ("a", candidate))
    )
    assert take(candidate, before, after, tmp_path / "taken", "--json") == 1
    rows = json.loads(capsys.readouterr().out)
    assert [row["taken"] for row in rows] == [False, False] and not (tmp_path / "taken").exists()


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("training panel", "validated on a panel of the run"),
        ("validation panel", "validated on a panel of the run"),
        ("shared task", "1 tasks of the panel"),
        ("validated task", "10 tasks of the panel"),
        ("wrong bank", "not with the candidate"),
        ("other setting", "differ in more than the bank: sdar.loss.beta"),
        ("base changed", "has changed since"),
        ("other base", "not with the bank that"),
    ],
)
def test_an_evaluation_that_does_not_answer_the_question_is_refused(fault, said, candidate, bank, tmp_path, capsys):
    panel = {"training panel": "b" * 64, "validation panel": "a" * 64}.get(fault, PANEL)
    prefix = {"shared task": "task-", "validated task": "t00"}.get(fault, "t")
    further = {"sdar.loss.beta": 9.0} if fault == "other setting" else {}
    first = candidate if fault == "other base" else bank
    before = evaluation(tmp_path / "before", first, lambda i: False, panel, prefix)
    after = evaluation(
        tmp_path / "after", bank if fault == "wrong bank" else candidate, lambda i: True, panel, prefix, **further
    )
    if fault == "base changed":
        (bank / "looking" / "SKILL.md").write_text(skill("looking", LOOK, "quite another text"))
    assert take(candidate, before, after, tmp_path / "taken") == 2
    assert said.replace("1 tasks", "2 tasks") in capsys.readouterr().err and not (tmp_path / "taken").exists()


@pytest.mark.parametrize("note", [None, "{", "[]", '{"bank": 5}'])
def test_a_folder_that_is_no_candidate_is_told(note, bank, tmp_path, capsys):
    if note is not None:
        (bank / NOTE).write_text(note)
    assert take(bank, tmp_path, tmp_path, tmp_path / "taken") == 2
    assert NOTE in capsys.readouterr().err
