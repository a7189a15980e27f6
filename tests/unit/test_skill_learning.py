"""Skills that a run learns by itself: written from a step, judged on a panel of their own, sent with prompts."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from tensordict import TensorDict

from sdar_verl.checks.run import check_run
from sdar_verl.checks.skill_learning import skill_learning_faults
from sdar_verl.compose import compose_config
from sdar_verl.config import load_config
from sdar_verl.envs.base import Task
from sdar_verl.errors import ConfigError, RolloutError
from sdar_verl.observe.base import load_states, save_states
from sdar_verl.observe.skill_learning import SkillLearning, _by_type
from sdar_verl.panels import write_panel
from sdar_verl.report import layout
from sdar_verl.report.document import render
from sdar_verl.report.read import read_run
from sdar_verl.rollout.rows import AFTER, BEFORE, EVIDENCE_COLUMN, LEARNED_COLUMN, EpisodeNote, RowInfo
from sdar_verl.rollout.skills_of import SkillFinder
from sdar_verl.skills.bank import SkillBank
from sdar_verl.skills.learn import choose
from sdar_verl.skills.skill import Skill, skills_to_json
from sdar_verl.verl.validation import ArmDataset, arm_metrics, with_lost
from sdar_verl.writer.base import Answer
from sdar_verl.writer.step import StepWriting
from tests.support.recorded_run import write_run
from tests.support.table import make_table
from tests.support.writing import Scripted

HEAT, LOOK = "pick_heat_then_place_in_recep", "look_at_obj_in_light"
LEARN = "sdar.skills.learn"


def settings(*overrides: str):
    return load_config(compose_config("sdar_quickstart", [f"{LEARN}.every=2", *overrides]).sdar)


def answer(name: str, text: str = "Open the microwave first.") -> str:
    return json.dumps({"name": name, "description": "of use", "text": text})


def by_type(prompt: str) -> str:
    return answer("heating-well") if HEAT in prompt else answer("lamp-first", "Find the lamp before all else.")


class Words:
    """A tokenizer of words."""

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": text.split()}


class Play:
    """A run with an observer that learns.

    Attributes:
        writer: what it asked, in batches.
        panel: of validations.
    """

    def __init__(self, folder: Path, script=by_type, *overrides: str) -> None:
        self.folder = folder / layout.RECORD
        self.folder.mkdir(exist_ok=True)
        self.writer = Scripted(script)
        tasks = [Task("alfworld", f"{kind}-{i}", kind, "do it") for kind in (HEAT, LOOK) for i in range(12)]
        write_panel(tasks, folder / "third.parquet", "third")
        rows = [
            {"data_source": "alfworld", "extra_info": {"task_type": kind}, "task": json.dumps({"task_type": kind})}
            for kind in (HEAT, LOOK)
        ]
        self.panel = ArmDataset(Panel(rows), {"student": None})
        run = SimpleNamespace(tokenizer=Words(), learn_panel=Panel(rows), writing=lambda: StepWriting(self.writer, ()))
        self.learning = SkillLearning(
            settings(f"{LEARN}.panel={folder}/third.parquet", "sdar.skills.max_tokens=60", *overrides), run, self.folder
        )

    def step(self, number: int) -> dict[str, float]:
        """What the observer says of a step of two tasks, each solved once and failed once."""
        keys, infos = [], []
        for task_type in (HEAT, LOOK):
            for session, success in enumerate((True, False)):
                task = {"env": "alfworld", "task_id": task_type, "task_type": task_type, "description": "do it"}
                note = EpisodeNote({**task, "data": {}}, reward=10.0 * success)
                keys.append(f"{task_type.replace('_', '-')}_{session}_0")
                infos.append(RowInfo(0, task_type, observation="a room", action="look", success=success, episode=note))
        table = make_table(keys, infos, step=number)
        if self.learning.wants_rollout(number):
            self.learning.after_rollout(table)
        return dict(self.learning.after_updates(table, {}))

    def validate(self, number: int, helped=(HEAT,)) -> list[dict]:
        """The rows that a validation is sent; success rises from 0 to 1 on the types in ``helped``."""
        self.panel.begin()
        self.learning.before_validation(self.panel)
        rows = [self.panel[i] for i in range(len(self.panel))]
        tasks = [(f"{kind}-{i}", kind) for kind in (HEAT, LOOK) for i in range(12)]
        outcomes: dict[str, list] = {"arm": [], "task_id": [], "task_type": [], "acc": []}
        for arm in (BEFORE, AFTER):
            for name, kind in tasks:
                solved = float(arm == AFTER and kind in helped)
                for column, value in zip(outcomes.values(), (arm, name, kind, solved), strict=True):
                    column.append(value)
        self.learning.after_validation(number, {}, outcomes)
        return rows

    def column(self) -> dict[str, str]:
        """What the next step's prompts are sent: name of a learned skill -> text."""
        prompts = TensorDict({"x": [0, 1]}, batch_size=2)
        self.learning.before_rollout(prompts)
        if LEARNED_COLUMN not in set(prompts.keys()):
            return {}
        sent = list(prompts[LEARNED_COLUMN])
        assert sent[0] == sent[1]
        return {skill["name"]: skill["text"] for skill in json.loads(sent[0])}


class Panel(list):
    """verl's data set, as far as arms read it."""

    @property
    def dataframe(self):
        return {"extra_info": [row["extra_info"] for row in self]}


def test_what_helps_goes_into_the_bank_and_what_does_not_is_left(tmp_path):
    play = Play(tmp_path)
    assert play.step(1) == {"sdar/skills/version": 0, "sdar/skills/learned": 0} and not play.writer.batches
    found = play.step(2)
    assert found["sdar/skills/candidates"] == found["sdar/skills/asked"] == 2 and found["sdar/skills/tokens"] == 4
    (prompts,) = play.writer.batches
    assert len(prompts) == 2 and "did not succeed" in prompts[0] and "Heating" not in prompts[1]
    assert play.column() == {}, "not before they are judged"

    rows = play.validate(2)
    assert [row["sdar_arm"] for row in rows] == [*["student"] * 2, *[BEFORE] * 2, *[AFTER] * 2]
    shown = [[skill["name"] for skill in json.loads(row[LEARNED_COLUMN])] for row in rows]
    assert shown == [[]] * 4 + [["heating-well"], ["lamp-first"]], "each is judged by itself"
    assert {row["data_source"] for row in rows} == {"alfworld/student", f"alfworld/{BEFORE}", f"alfworld/{AFTER}"}
    assert play.column() == {"heating-well": "Open the microwave first."}
    lines = {line["skill"]: line for line in layout.read_lines(play.folder / layout.SKILLS_FILE)}
    assert lines["heating-well"]["taken"] is True and lines["heating-well"]["gain"] == 1.0
    assert lines["lamp-first"]["taken"] is False and lines["lamp-first"]["tasks"] == 12
    bank = {skill.name: skill for skill in SkillBank.load(tmp_path / "skills" / "version_1")}
    assert bank["heating-well"].task_types == (HEAT,) and "lamp-first" not in bank
    assert set(bank) == {skill.name for skill in SkillBank.load(settings().skills.bank)} | {"heating-well"}
    front = (tmp_path / "skills" / "version_1" / "heating-well" / "SKILL.md").read_text()
    assert "learned-at-step: 2" in front and "gain: 1.0" in front and "tasks: 12" in front
    assert play.step(3)["sdar/skills/version"] == 1
    # Nothing waits: the next validation has its own arms alone, and shows what was learned.
    assert [row["sdar_arm"] for row in play.validate(3)] == ["student"] * 2


def test_a_skill_that_was_learned_can_be_revised(tmp_path):
    texts = iter(["Open the microwave first.", "Close the microwave afterwards."])
    play = Play(tmp_path, lambda prompt: answer("heating-well", next(texts)) if HEAT in prompt else "no")
    for step in (2, 4):
        play.step(step)
        play.validate(step)
    assert play.column() == {"heating-well": "Close the microwave afterwards."}
    shown = "\n".join(play.writer.batches[1])
    assert "Open the microwave first." in shown, "the writer is shown what was learned"
    lines = layout.read_lines(play.folder / layout.SKILLS_FILE)
    assert [(line["version"], line["revised"]) for line in lines] == [(1, False), (2, True)]
    assert (tmp_path / "skills" / "version_2").is_dir()


def test_a_skill_of_several_types_is_judged_apart_from_those_that_wait_beside_it(tmp_path):
    shared = Skill("shared", "of use", "Old words.", (HEAT, LOOK))
    play = Play(tmp_path, lambda prompt: answer("shared", "New words.") if HEAT in prompt else by_type(prompt))
    play.learning._learned = {"shared": shared}
    play.step(2)
    waiting = play.learning._candidates
    assert set(waiting) == {"shared", "lamp-first"} and waiting["shared"].task_types == (HEAT, LOOK)
    columns = {kind: json.loads(play.learning._column(kind)) for kind in (HEAT, LOOK)}
    shown = {kind: {skill["name"]: skill["text"] for skill in skills} for kind, skills in columns.items()}
    assert shown[HEAT] == {"shared": "New words."}
    assert shown[LOOK] == {"shared": "Old words.", "lamp-first": "Find the lamp before all else."}
    judged = {name: {task.split("-")[0] for task in play.learning._shows(skill)} for name, skill in waiting.items()}
    assert judged == {"shared": {HEAT}, "lamp-first": {LOOK}}


def test_what_the_bank_says_already_is_not_judged_again(tmp_path):
    play = Play(tmp_path)
    for step, waiting in ((2, 2), (4, 1)):
        assert play.step(step)["sdar/skills/candidates"] == waiting
        play.validate(step)


def test_two_types_cannot_choose_one_name_and_no_answer_stops_the_run(tmp_path):
    play = Play(tmp_path, lambda prompt: answer("same-name", "hot" if HEAT in prompt else "light"))
    assert play.step(2)["sdar/skills/written"] == 1
    odd = Play(
        tmp_path, lambda prompt: json.dumps({"name": "odd-one", "description": "x", "text": "a\ud800\x07b\r\nc"})
    )
    odd.step(2)
    odd.validate(2, helped=(HEAT, LOOK))
    assert odd.column() == {"odd-one": "a\ufffdb\nc"}
    bank = {skill.name: skill.text for skill in SkillBank.load(tmp_path / "skills" / "version_1")}
    assert bank["odd-one"] == "a\ufffdb\nc"


def test_the_writer_is_shown_many_tasks_of_a_type(tmp_path):
    keys, infos = [], []
    for number in range(3):
        for session in range(4):
            task = {"env": "alfworld", "task_id": f"t{number}", "task_type": HEAT, "description": f"egg {number}"}
            keys.append(f"u{number}_{session}_0")
            infos.append(RowInfo(0, HEAT, success=session % 2 == 0, episode=EpisodeNote({**task, "data": {}})))
    (chosen,) = choose(_by_type(make_table(keys, infos)), 6)
    assert {task.task_id for task in chosen.tasks} == {"t0", "t1", "t2"}


def test_a_dead_writer_stops_the_run_in_the_end(tmp_path):
    play = Play(tmp_path, lambda prompt: Answer(failure="refused"))
    with pytest.raises(RolloutError):
        for step in range(2, 20, 2):
            play.step(step)


def test_a_folder_of_a_version_is_this_runs_alone(tmp_path):
    play = Play(tmp_path)
    play.step(2)
    save_states([play.learning], tmp_path)
    for version in (1, 2):
        (tmp_path / "skills" / f"version_{version}" / "stranger").mkdir(parents=True)
    again = Play(tmp_path)
    load_states([again.learning], tmp_path)
    assert not list((tmp_path / "skills").iterdir())
    again.validate(2)
    assert "stranger" not in {path.name for path in (tmp_path / "skills" / "version_1").iterdir()}


def test_one_that_alone_is_over_the_budget_would_stop_the_run_and_is_left_out(tmp_path):
    play = Play(tmp_path, lambda prompt: answer("too-long", "word " * 61) if HEAT in prompt else answer("lamp-first"))
    assert play.step(2)["sdar/skills/candidates"] == 1


def test_a_resume_goes_on_with_what_was_learned_and_judges_what_waits(tmp_path):
    play = Play(tmp_path)
    for step in (2, 4):
        play.step(step)
        if step == 2:
            play.validate(2)
    save_states([play.learning], tmp_path)  # before the validation of step 4, as verl does
    play.validate(4, helped=(HEAT, LOOK))
    after = play.column()
    lines = layout.read_lines(play.folder / layout.SKILLS_FILE)

    again = Play(tmp_path)
    load_states([again.learning], tmp_path)
    assert again.learning.awaits_validation and again.column() == {"heating-well": "Open the microwave first."}
    assert not again.learning.wants_rollout(4), "it has written at that step"
    again.validate(4, helped=(HEAT, LOOK))
    assert again.column() == after and len(after) == 2
    assert layout.read_lines(again.folder / layout.SKILLS_FILE) == lines, "no verdict stands there twice"
    state = again.learning.state_dict()
    assert json.loads(json.dumps(state)) == state


def test_a_checkpoint_without_it_is_refused(tmp_path):
    save_states([], tmp_path)
    with pytest.raises(ConfigError, match="skill_learning"):
        load_states([Play(tmp_path).learning], tmp_path)


# ---------------------------------------------------------------- what is shown


def test_the_prompts_column_puts_learned_skills_in_the_place_of_their_namesakes():
    finder = SkillFinder(settings().skills, len, "alfworld")
    task = Task("alfworld", "t", HEAT, "put a hot egg in fridge")
    plain = finder.find(task)
    name = plain.skills[0]
    old = next(skill for skill in finder.bank if skill.name == name)
    learned = [replace(old, text="A new text."), Skill("further", "x", "And another.", (HEAT,))]
    found = finder.find(task, {LEARNED_COLUMN: skills_to_json(learned)})
    assert set(found.skills) == {*plain.skills, "further"}
    assert "A new text." in found.text and "And another." in found.text and old.text not in found.text
    assert finder.find(task, {EVIDENCE_COLUMN: ""}) == plain == finder.find(task, {LEARNED_COLUMN: "[]"})


def test_arms_that_judge_are_counted_by_their_own_panel():
    kinds = enumerate((HEAT, LOOK, LOOK))
    rows = [{"data_source": "alfworld", "extra_info": {"task_type": kind, "task_id": str(at)}} for at, kind in kinds]
    arms = ArmDataset(Panel(rows[:1]), {"student": None})
    arms.judging = Panel(rows)
    asked = arms.asked(2)
    assert len(arms) == 7 and sum(asked.values()) == 14 and asked[AFTER, "2", LOOK] == 2 == asked["student", "0", HEAT]
    names = ("acc", "task_score", "turns", "invalid_actions", "failed", "task_type", "task_id", "arm")
    outcomes = {name: [0.0] for name in names} | {"arm": [AFTER], "task_type": [HEAT], "task_id": ["0"], "acc": [1.0]}
    metrics = arm_metrics(with_lost(outcomes, arms.asked(1)))
    assert metrics[f"sdar-val/{AFTER}/success"] == pytest.approx(1 / 3)
    assert metrics[f"sdar-val/{AFTER}/success/{LOOK}"] == 0.0
    assert f"sdar-val/student/success/{LOOK}" not in metrics
    arms.begin()
    assert len(arms) == 1


def test_the_report_shows_each_skill_with_its_verdict(tmp_path):
    run = write_run(tmp_path / "run", steps=4)
    line = {"step": 2, "version": 1, "skill": "heating-<b>", "text": "Open <it>.", "revised": False, "taken": True}
    file = run / "checkpoints" / layout.RECORD / layout.SKILLS_FILE
    layout.append_line(file, {**line, "tasks": 8, "gain": 0.5, "low": 0.2, "high": 0.8})
    layout.append_line(file, {**line, "taken": False, "tasks": 0, "gain": None, "low": None, "high": None})
    page = re.sub(r"\s+", " ", render(read_run(run)))
    assert "Which skills did it learn?" in page and "+0.500 [+0.200, +0.800]" in page and "not measured" in page
    assert "heating-&lt;b&gt; (new)" in page and "Open &lt;it&gt;." in page and "taken, version 1" in page
    assert "Which skills did it learn?" not in render(read_run(write_run(tmp_path / "other", steps=4)))


# ---------------------------------------------------------------- before the start


@pytest.fixture
def panels(tmp_path):
    def write(name: str, *tasks: str, env: str = "alfworld") -> str:
        path = tmp_path / f"{name}.parquet"
        tasks = (*tasks, *(f"{name}-{i}" for i in range(10)))
        write_panel([Task(env, task, HEAT, "put a hot egg in fridge") for task in tasks], path, name)
        return str(path)

    return write


def faults(*overrides: str, config_name: str = "sdar_quickstart") -> list[str]:
    config = compose_config(config_name, list(overrides))
    return skill_learning_faults(config, load_config(config.sdar))


def right(panels) -> list[str]:
    return [
        f"{LEARN}.every=10",
        "trainer.test_freq=5",
        f"{LEARN}.panel={panels('third', 'c')}",
        "sdar.skills.max_tokens=200",
        f"data.train_files={panels('train', 'a')}",
        f"data.val_files={panels('val', 'b')}",
    ]


UNSHOWN = [f"sdar.validation.arms.{name}.context=none" for name in ("teacher", "teacher_t04")]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([f"{LEARN}.every=7"], "every=7 is no multiple of trainer.test_freq=5"),
        (["trainer.test_freq=-1"], "no multiple of trainer.test_freq=-1"),
        ([f"{LEARN}.panel=null"], "needs sdar.skills.learn.panel"),
        (
            [f"{LEARN}.panel=/no/such.parquet"],
            "learn.panel=/no/such.parquet does not exist; make the task panels with `sdar-verl prepare",
        ),
        (["sdar.skills.max_tokens=null"], "needs sdar.skills.max_tokens"),
        (["sdar.skills.max_tokens=320"], "data.max_prompt_length=320 tokens in all"),
        (["sdar.skills.retrieval=[oracle]"], "does not show every task"),
        (["sdar.skills.retrieval=[keyword]"], "a written skill has no keywords"),
        (["sdar.skills.retrieval=[ucb,task_type]"], "random and ucb draw"),
        (["sdar.context.sources=[demonstration]", *UNSHOWN], "nobody is shown skills"),
        (["+sdar.validation.arms.skills_after={context: skills, temperature: 1}"], "arms.skills_after"),
        ([f"{LEARN}.every=0"], "panel="),
    ],
)
def test_what_cannot_apply_is_told(overrides, words, panels):
    assert faults(*right(panels)) == []
    found = faults(*right(panels), *overrides)
    assert len(found) == 1 and words in found[0], found


def test_a_panel_that_training_or_validation_sees_is_refused(panels):
    for option in ("train", "val"):
        found = faults(*right(panels), f"data.{option}_files={panels('seen', 'x', 'c')}")
        assert len(found) == 1 and f"shares 1 tasks with data.{option}_files, c for one" in found[0]
    (found,) = faults(*right(panels), f"{LEARN}.panel={panels('other', 'z', env='webshop')}")
    assert "holds tasks of webshop" in found
    broken = panels("broken", "k")
    Path(broken).write_bytes(b"no parquet")
    assert broken in faults(*right(panels), f"{LEARN}.panel={broken}")[0]


def test_a_recipe_of_verls_is_told_of_the_command():
    found = faults(f"{LEARN}.every=2", config_name="sdar_ppo")
    assert len(found) == 1 and "sdar-verl skills learn" in found[0]


def test_the_checks_before_the_start_hold_it_and_the_writer_knows_it(panels):
    config = compose_config(
        "sdar_quickstart", [*right(panels), "sdar.context.writer.max_tokens=60", f"{LEARN}.every=7"]
    )
    with pytest.raises(ConfigError) as error:
        check_run(config, load_config(config.sdar))
    assert "every=7 is no multiple" in str(error.value)
    assert "writer.max_tokens=60 has no effect" not in str(error.value)
    assert "rollout.max_model_len" in str(error.value)
