"""``sdar-verl plan`` on a recipe of verl's: it reads the prompts of the recipe's own data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sdar_verl.cli import main
from sdar_verl.envs.base import Task
from sdar_verl.panels import write_panel
from tests.support.recipe_run import recipe_arguments, word_problems

COLUMN = ("sdar.context.sources=[column]", "+sdar.context.options.column.path=extra_info.answer")


def planned(capsys: pytest.CaptureFixture[str], folder: Path, *arguments: str, rows: Any = None) -> dict[str, Any]:
    flags = [word for word in arguments if word.startswith("--") or word.isdigit()]
    overrides = [word for word in arguments if word not in flags]
    status = main(
        ["plan", "--config-name", "sdar_ppo", "--json", *flags, *recipe_arguments(folder, *overrides, rows=rows)]
    )
    return {"status": status, **json.loads(capsys.readouterr().out)}


def tokens(text: str) -> int:
    """Of a user's message: a token a byte, and three control tokens."""
    return len(f"user\n{text}\nassistant\n".encode()) + 3


def test_prompts_and_contexts_are_those_of_the_data(tmp_path, capsys):
    rows = word_problems(16)
    for row in rows[:4]:
        row["extra_info"]["answer"] = ""
    mean = sum(tokens(row["prompt"][0]["content"]) for row in rows) / 16
    plan = planned(capsys, tmp_path, *COLUMN, rows=rows)
    (said,) = plan["data"]
    assert plan["status"] == 0 and said.startswith(
        f"16 rows of data.train_files: prompts of {mean:.0f} tokens in the mean, 75% have a context"
    )
    further = int(said.rsplit("of ", 1)[1].split()[0])
    answers = [len(row["extra_info"]["answer"].encode()) for row in rows[4:]]
    assert sum(answers) / 12 < further < sum(answers) / 12 + 100, "the column's own words stand before it"
    read = plan["tokens_per_step"]
    assert read["read by the student"] == pytest.approx(16 * mean, rel=0.01)
    assert read["read by the teacher"] == pytest.approx(0.75 * 16 * (mean + further), rel=0.01)


def test_what_is_given_wins_and_what_is_late_stays_a_guess(tmp_path, capsys):
    given = planned(capsys, tmp_path / "given", *COLUMN, "--prompt", "50", "--context", "10")
    assert given["tokens_per_step"]["read by the teacher"] == 16 * 60
    late = planned(capsys, tmp_path / "late", "sdar.context.sources=[sibling]")
    assert "have a context" not in late["data"][0] and late["guessed"] == ["context", "response"]


def test_what_cannot_be_read_is_said_and_guessed(tmp_path, capsys):
    path = "+sdar.context.options.column.path=extra_info.nothing"
    missing = planned(capsys, tmp_path / "a", "sdar.context.sources=[column]", path)
    assert missing["data"][0].startswith("16 rows") and ", 0% have a context" in missing["data"][0]
    assert missing["status"] == 1 and missing["data"][1].startswith("this run would not start: no row has a context")
    elsewhere = planned(capsys, tmp_path / "b", *COLUMN, "actor_rollout_ref.model.tokenizer_path=Some/Body")
    assert elsewhere["data"][0].startswith("the tokenizer of actor_rollout_ref.model.path=")
    assert "prompt" in elsewhere["guessed"]
    remote = planned(capsys, tmp_path / "c", *COLUMN, "data.train_files=hdfs://a/train.parquet")
    assert remote["data"] == []


def test_what_the_limits_leave_out_is_not_in_the_means(tmp_path, capsys):
    rows = word_problems(16)
    rows[3]["prompt"][0]["content"] = "How many? " * 2000
    rows[5]["extra_info"]["answer"] = "so many " * 100
    told = []
    for number, overrides in enumerate(([], ["data.filter_overlong_prompts=True"])):
        plan = planned(
            capsys, tmp_path / str(number), *COLUMN, "sdar.teacher.on_long_prompt=mask", *overrides, rows=rows
        )
        told += plan["data"]
        share = plan["tokens_per_step"]["read by the student"] / 16
        kept = [tokens(row["prompt"][0]["content"]) for row in rows if row is not rows[3]]
        assert share == pytest.approx(sum(kept) / 15 if overrides else (sum(kept) + 256) / 16, rel=0.01)
    assert told[0].startswith("16 rows") and ", 88% have a context that fits" in told[0]
    assert told[1].startswith("15 rows") and "(1 longer ones are left out), 93% have a context that fits" in told[1]


def test_a_column_that_is_not_there_is_named(tmp_path, capsys):
    said, stops = planned(capsys, tmp_path, *COLUMN, "data.prompt_key=question")["data"]
    assert "row 0 of train.parquet: there is no column 'question' (data.prompt_key)" in said
    assert stops.startswith("this run would not start")


def test_the_price_of_a_machine_says_what_was_read(tmp_path, capsys):
    found = planned(capsys, tmp_path, *COLUMN, "--cloud")
    assert found["data"][0].startswith("16 rows of data.train_files")


def test_what_stops_a_run_is_said_and_is_no_plan(tmp_path, capsys):
    rows = word_problems(16)
    rows[5]["extra_info"]["answer"] = "so many " * 100
    for number, (overrides, why) in enumerate(
        (
            ([], "sdar.context.sources says what the teacher of this recipe sees, and names nothing of it"),
            (["sdar.context.sources=[column]"], "context 'column' needs +sdar.context.options.column.path"),
            ([*COLUMN], "tokens, above sdar.teacher.max_prompt_length=512 (sdar.teacher.on_long_prompt=error)"),
        )
    ):
        plan = planned(capsys, tmp_path / str(number), *overrides, rows=rows)
        assert plan["status"] == 1 and plan["data"][-1].startswith("this run would not start: ")
        assert why in plan["data"][-1]


def test_a_batch_that_the_data_do_not_fill_is_no_plan(tmp_path, capsys):
    epochs = ["trainer.total_training_steps=null", "trainer.total_epochs=3", "data.train_batch_size=17"]
    why = "data.train_batch_size=17, but data.train_files holds 16 tasks"
    for number, overrides in enumerate((epochs, [*epochs, "trainer.total_training_steps=10"])):
        plan = planned(capsys, tmp_path / str(number), *COLUMN, *overrides, rows=word_problems(16))
        assert plan["status"] == 1 and plan["data"][-1].startswith(f"this run would not start: {why}")
    status = main(["plan", "--config-name", "sdar_ppo", "--cloud", *recipe_arguments(tmp_path / "c", *COLUMN, *epochs)])
    assert status == 2 and why.replace("16 tasks", "") in capsys.readouterr().err


def test_the_number_of_steps_is_that_of_the_epochs(tmp_path, capsys):
    epochs = ["trainer.total_training_steps=null", "trainer.total_epochs=3"]
    assert planned(capsys, tmp_path / "a", *COLUMN, *epochs)["steps"] == 12
    elsewhere = [*epochs, "data.train_files=hdfs://a/train.parquet"]
    unknown = planned(capsys, tmp_path / "b", *COLUMN, *elsewhere)
    assert unknown["steps"] == 0 and unknown["gpu_hours"] is None and unknown["cost"] is None
    status = main(
        ["plan", "--config-name", "sdar_ppo", "--cloud", *recipe_arguments(tmp_path / "c", *COLUMN, *elsewhere)]
    )
    assert status == 2 and "how many steps it has is not known" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--turns", "--prompt", "--response", "--price"])
def test_numbers_of_its_own_are_above_0(flag, capsys):
    assert main(["plan", flag, "0"]) == 2 and f"{flag} 0: must be above 0" in capsys.readouterr().err


def test_validations_are_in_the_hours_where_their_panel_is_here(tmp_path, capsys):
    rows = ("trainer.total_training_steps=10", "trainer.test_freq=4", "actor_rollout_ref.rollout.val_kwargs.n=2")
    plan = planned(capsys, tmp_path / "a", *COLUMN, *rows, rows=word_problems(16))
    validated = 4  # data.val_max_samples
    first = [{"times": 3, "episodes": 2 * validated}]
    assert plan["validations"] == first, "after steps 4, 8 and the last; small runs do not validate before"
    assert plan["validation_seconds"] > 0
    told = ("+sdar.validation.arms.told.context=teacher", "+sdar.validation.arms.told.temperature=1")
    arms = (*told, "trainer.val_before_train=True")
    more = planned(capsys, tmp_path / "b", *COLUMN, *rows, *arms, rows=word_problems(16))
    assert more["validations"] == [{"times": 4, "episodes": 4 * validated}], "verl's own, and the arm beside it"
    none = planned(capsys, tmp_path / "c", *COLUMN, *rows[:1], "trainer.test_freq=-1", rows=word_problems(16))
    assert none["validations"] == [] and none["validation_seconds"] == 0
    assert none["gpu_hours"] == pytest.approx(plan["gpu_hours"] - plan["validation_seconds"] / 3600)
    gone = planned(capsys, tmp_path / "d", *COLUMN, *rows, "data.val_files=nowhere.parquet", rows=word_problems(16))
    assert gone["validations"] == [] and any("data.val_files are not in the hours" in note for note in gone["data"])


def test_a_run_that_only_validates_has_no_step(tmp_path, capsys):
    only = ("trainer.val_only=True", "trainer.val_before_train=True", "trainer.test_freq=2")
    plan = planned(capsys, tmp_path, *COLUMN, *only)
    assert plan["steps"] == 0 and plan["validations"] == [{"times": 1, "episodes": 4}]
    assert plan["gpu_hours"] == pytest.approx(plan["validation_seconds"] / 3600)
    gone = planned(capsys, tmp_path / "gone", *COLUMN, *only, "data.val_files=nowhere.parquet", "--price", "2")
    assert gone["gpu_hours"] is None and gone["cost"] is None, "not 0: the panel is not here"
    for words, status in ((["--cloud"], 2), ([], 0)):
        assert main(["plan", "model=qwen2.5-3b", "trainer.val_only=True", *words]) == status
        assert "how many tasks it validates on is not known: give data.val_files" in "".join(capsys.readouterr())


def test_a_panel_that_cannot_be_read_is_named(tmp_path, capsys):
    (tmp_path / "bad.parquet").write_text("x")
    files = (f"data.val_files={tmp_path / 'bad.parquet'}", "trainer.test_freq=2")
    plan = planned(capsys, tmp_path / "a", *COLUMN, *files)
    assert any("1 validations over data.val_files are not in the hours" in note for note in plan["data"])


def test_a_panel_that_judges_skills_is_played_twice(tmp_path, capsys):
    for name in ("train", "val", "judge"):
        tasks = [Task("alfworld", f"{name}-{i}", "look_at_obj_in_light", "look at a mug") for i in range(5)]
        write_panel(tasks, tmp_path / f"{name}.parquet", name)
    files = [f"data.{name}_files={tmp_path / name}.parquet" for name in ("train", "val")]
    learning = ["sdar.skills.learn.every=10", f"sdar.skills.learn.panel={tmp_path / 'judge.parquet'}"]
    steps = ["trainer.total_training_steps=20", "trainer.test_freq=5", "trainer.val_before_train=False"]
    main(["plan", "--config-name", "sdar_alfworld", "--json", *files, *learning, *steps])
    plan = json.loads(capsys.readouterr().out)
    arms = plan["validations"][0]["episodes"] // 5
    assert plan["validations"] == [{"times": 4, "episodes": 5 * arms}, {"times": 2, "episodes": 10}]
    main(["plan", "--config-name", "sdar_alfworld", *files, *learning, *steps])
    assert f"20 steps, and validations (4 of {5 * arms} episodes, 2 of 10 episodes; " in capsys.readouterr().out
