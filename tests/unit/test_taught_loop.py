"""verl's agent loops and a user's, run by ours with a scripted rollout server: what the teacher's prompt."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoTokenizer
from verl.experimental.agent_loop.agent_loop import DictConfigWrap
from verl.utils.dataset.rl_dataset import RLHFDataset
from verl.workers.rollout.replica import TokenOutput

from sdar_verl.compose import compose_config
from sdar_verl.config import load_config
from sdar_verl.fields import TEACHER_PROMPTS
from sdar_verl.recipe import INNER_COLUMN
from sdar_verl.rollout.rows import RowInfo
from sdar_verl.verl.late import late_contexts
from sdar_verl.verl.queue import _reward
from sdar_verl.verl.recipe_prompts import model_type
from sdar_verl.verl.taught_loop import TaughtLoop
from tests.support import agent_loops  # noqa: F401  registers them
from tests.support.recipe_run import recipe_arguments, word_problems
from tests.support.table import make_table, stored

ROW = word_problems(1)[0] | {"demonstration": ["count them", "say the number"], "hint": "Add."}
QUESTION, SOLUTION = ROW["prompt"][0]["content"], ROW["extra_info"]["answer"]


class Server:
    """In the place of verl's client of its rollout servers: answers with given words, one after the other."""

    def __init__(self, tokenizer: Any, answers: Sequence[str]):
        self.prompts: list[list[int]] = []
        self._tokenizer, self._answers = tokenizer, list(answers)

    async def generate(self, *, prompt_ids: list[int], **_: Any) -> TokenOutput:
        self.prompts.append(list(prompt_ids))
        ids = self._tokenizer.encode(self._answers.pop(0), add_special_tokens=False)
        return TokenOutput(token_ids=ids, log_probs=[-1.0] * len(ids))


class Recipe:
    """A recipe of verl's with these flags."""

    def __init__(self, folder: Path, *overrides: str):
        self.config = compose_config("sdar_ppo", [*recipe_arguments(folder, rows=[ROW] * 4), *overrides])
        self.sdar = load_config(self.config.sdar)
        self.tokenizer = AutoTokenizer.from_pretrained(self.config.actor_rollout_ref.model.path)

    def run(self, server: Server, loop: str, **columns: Any) -> Any:
        """What our loop gives for one row of the data."""
        taught = TaughtLoop(
            trainer_config=DictConfigWrap(self.config),
            server_manager=server,
            tokenizer=self.tokenizer,
            processor=None,
            hf_model_type=model_type(self.config),
            dataset_cls=RLHFDataset,
            data_config=DictConfigWrap(self.config.data),
            tools=SimpleNamespace(tools=[]),
        )
        row = {name: value for name, value in ROW.items() if name != "prompt"} | {"raw_prompt": ROW["prompt"]}
        row |= {"uid": "s1p0", "session_id": 0, "global_steps": 1, "index": 0, INNER_COLUMN: loop, **columns}
        return asyncio.run(taught.run({"temperature": 1.0}, **row))

    def play(self, *answers: str, loop: str = "single_turn_agent", **columns: Any) -> tuple[Server, list[Any]]:
        """The server, and the outputs of a training row, each with its record."""
        server, found = Server(self.tokenizer, answers), []
        for output in self.run(server, loop, **columns):
            info, ids = RowInfo.from_extra_fields(output.extra_fields), output.columns[TEACHER_PROMPTS]
            found.append((output, replace(info, teacher_prompt_ids=ids if len(ids) else None)))
        return server, found

    def text(self, info: RowInfo) -> str:
        """The teacher's prompt."""
        assert info.teacher_prompt_ids is not None
        return self.tokenizer.decode(info.teacher_prompt_ids)


COLUMN = ("sdar.context.sources=[column]", "+sdar.context.options.column.path=extra_info.answer")


@pytest.mark.parametrize(
    ("overrides", "shown"),
    [
        (["sdar.context.sources=[answer]"], f"The right answer is: {ROW['reward_model']['ground_truth']}"),
        (COLUMN, SOLUTION),
        ([*COLUMN, "sdar.context.place=system"], SOLUTION),
        (["sdar.context.sources=[demonstration]"], "1. count them\n2. say the number"),
        (["sdar.context.sources=[skills]", "sdar.skills.retrieval=[full]"], "Count on your fingers."),
        (["sdar.context.sources=[answer,column]", COLUMN[1]], f"\n\n{SOLUTION}"),
    ],
)
def test_the_teacher_sees_a_context_and_else_what_the_student_sees(tmp_path, overrides, shown):
    bank = tmp_path / "bank" / "fingers"
    bank.mkdir(parents=True)
    (bank / "SKILL.md").write_text("---\nname: fingers\ndescription: d\nkeywords: [x]\n---\nCount on your fingers.")
    skills = [f"sdar.skills.bank={bank.parent}"] if "sdar.context.sources=[skills]" in overrides else []
    recipe = Recipe(tmp_path, *overrides, *skills)
    server, [(output, info)] = recipe.play("It is 7.")
    assert output.prompt_ids == server.prompts[0] and shown not in recipe.tokenizer.decode(output.prompt_ids)
    assert recipe.tokenizer.decode(output.response_ids) == "It is 7." and set(output.response_mask) == {1}
    text = recipe.text(info)
    assert shown in text and QUESTION in text
    assert (
        info.error is None
        and not info.foreign
        and info.context_tokens == len(info.teacher_prompt_ids) - len(output.prompt_ids)
    )


def test_placebos_stand_in_the_place_of_the_context(tmp_path):
    texts = {}
    for control in ("none", "shuffled", "random_text", "empty"):
        recipe = Recipe(tmp_path / control, *COLUMN, f"sdar.context.control={control}")
        _, [(output, info)] = recipe.play("7")
        texts[control] = recipe.text(info)
        if control == "empty":
            assert info.teacher_prompt_ids.tolist() == output.prompt_ids
    words = {name: sorted(text.replace("<|im_end|>", " ").split()) for name, text in texts.items()}
    assert words["none"] == words["shuffled"] and texts["none"] != texts["shuffled"]
    assert SOLUTION not in texts["random_text"] and len(texts["random_text"]) > len(texts["empty"]) + 10


def test_a_row_without_a_context_has_no_teacher(tmp_path):
    missing = Recipe(tmp_path, "sdar.context.sources=[column]", "+sdar.context.options.column.path=extra_info.none")
    _, [(_, info)] = missing.play("7")
    assert info.context_empty and info.teacher_prompt_ids is None and info.error is None
    strict = Recipe(tmp_path / "strict", *COLUMN, "sdar.context.on_empty=error")
    _, [(_, info)] = strict.play("7", extra_info={})
    assert "find nothing to show the teacher" in info.error and QUESTION[:10] in info.error


def test_a_prompt_that_verl_does_not_make_is_an_error_or_left_out(tmp_path):
    recipe = Recipe(tmp_path, "sdar.context.sources=[answer]")
    _, [(_, info)] = recipe.play("7", loop="own_words")
    for told in ("agent loop own_words", QUESTION[:10], "teacher_prompt_ids", "on_foreign_prompt=mask"):
        assert told in info.error
    masked = Recipe(tmp_path / "mask", "sdar.context.sources=[answer]", "sdar.context.on_foreign_prompt=mask")
    _, [(_, info)] = masked.play("7", loop="own_words")
    assert info.foreign and info.error is None and info.teacher_prompt_ids is None
    _, [(_, info)] = recipe.play("7", loop="own_teacher")
    assert recipe.text(info).endswith(f"It is {ROW['reward_model']['ground_truth']}.") and info.error is None
    _, [(_, info)] = recipe.play("7", loop="own_template")
    assert "The right answer is" in recipe.text(info) and not info.foreign


def test_each_output_of_a_loop_has_a_prompt_of_its_own(tmp_path):
    recipe = Recipe(tmp_path, "sdar.context.sources=[answer]")
    server, rows = recipe.play("six", "seven", loop="two_drafts")
    assert [info.turn for _, info in rows] == [0, 1] and len(server.prompts) == 2
    for (output, info), prompt in zip(rows, server.prompts, strict=True):
        assert output.prompt_ids == prompt and "The right answer is" in recipe.text(info)
    assert "Again." in recipe.text(rows[1][1]) and "six" in recipe.text(rows[1][1])


def test_a_prompt_that_is_too_long_names_its_row(tmp_path):
    recipe = Recipe(tmp_path, *COLUMN, "sdar.teacher.max_prompt_length=60")
    _, [(_, info)] = recipe.play("7")
    assert "sdar.teacher.max_prompt_length=60" in info.error and QUESTION[:10] in info.error and info.truncated
    masked = Recipe(tmp_path / "mask", *COLUMN, "sdar.teacher.max_prompt_length=60", "sdar.teacher.on_long_prompt=mask")
    _, [(_, info)] = masked.play("7")
    assert info.truncated and info.error is None and info.teacher_prompt_ids is None


def test_a_validation_arm_is_shown_the_context_itself(tmp_path):
    arm = "+sdar.validation.arms.told={context: teacher, temperature: 0.5}"
    recipe = Recipe(tmp_path, "sdar.context.sources=[answer]", arm)
    prompts = []
    for name in ("told", ""):
        server = Server(recipe.tokenizer, ["7"])
        recipe.run(server, "single_turn_agent", sdar_arm=name)
        prompts.append(recipe.tokenizer.decode(server.prompts[0]))
    assert "The right answer is" in prompts[0] and "The right answer is" not in prompts[1]


@pytest.mark.parametrize(
    ("overrides", "shown"),
    [
        (["sdar.context.sources=[sibling]"], {0: "won second", 1: "won first", 2: "won second"}),
        (["sdar.context.sources=[failed_sibling]"], {0: None, 1: "lost", 2: "lost"}),
        (["sdar.context.sources=[own_failure]"], {0: "lost", 1: None, 2: None}),
        (
            ["sdar.context.sources=[feedback]", "+sdar.context.options.feedback.field=judge"],
            {0: "Too hasty.", 1: None, 2: None},
        ),
        (["sdar.context.sources=[answer,feedback]", "+sdar.context.options.feedback.field=judge"], {0: "Too hasty."}),
    ],
)
def test_a_late_context_is_made_of_the_group(tmp_path, overrides, shown):
    """Three answers to one prompt: the first wrong, with a word of the judge, the others right."""
    recipe = Recipe(tmp_path, *overrides)
    infos = []
    for session, (words, reward, said) in enumerate(
        [("lost", 0.0, {"judge": "Too hasty."}), ("won second", 1.0, {}), ("won first", 1.0, {})]
    ):
        _, [(_, info)] = recipe.play(words, session_id=session)
        _reward(info, reward, said)
        infos.append(info)
    table = make_table([f"s1p0_{session}_0" for session in range(3)], infos)
    late = late_contexts(recipe.config, recipe.sdar, recipe.tokenizer, lambda: None)
    assert late is not None
    late.fill(table)
    for (number, words), column in zip(shown.items(), stored(table)[TEACHER_PROMPTS], strict=False):
        info = infos[number]
        assert column.tolist() == ([] if info.teacher_prompt_ids is None else info.teacher_prompt_ids.tolist())
        if words is None:
            assert info.teacher_prompt_ids is None and info.context_missing
        else:
            assert words in recipe.text(info) and QUESTION in recipe.text(info)
    if "answer" in overrides[0]:
        assert all("The right answer is" in recipe.text(info) for info in infos)


def test_a_thought_that_the_prompt_begins_belongs_to_the_answer(tmp_path):
    """A sibling's may be left out, whether it came to an end or was cut off."""
    template = "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}<think>{% endif %}"
    flags = ["sdar.context.sources=[failed_sibling]", "+sdar.context.options.failed_sibling.thinking=False"]
    recipe = Recipe(tmp_path, *flags)
    recipe.tokenizer.chat_template = template
    infos = []
    for session, words in enumerate(("hm</think>six", "hm")):
        _, [(_, info)] = recipe.play(words, session_id=session)
        assert info.action == f"<think>\n{words}"
        _reward(info, 0.0, {"acc": 0})
        infos.append(info)
    late = late_contexts(recipe.config, recipe.sdar, recipe.tokenizer, lambda: None)
    assert late is not None
    late.fill(make_table(["s1p0_0_0", "s1p0_1_0"], infos))
    assert infos[0].teacher_prompt_ids is None or "hm" not in recipe.text(infos[0])
    assert "six" in recipe.text(infos[1]) and "hm" not in recipe.text(infos[1])
