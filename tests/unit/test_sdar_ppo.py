"""SDAR for the recipe you have: what ``sdar_ppo`` changes of verl's defaults, and what is told before Ray starts."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf, open_dict

from sdar_verl.checks.notes import run_notes
from sdar_verl.checks.options import flat
from sdar_verl.checks.run import check_run
from sdar_verl.compose import compose_config
from sdar_verl.config import load_config
from sdar_verl.config_folders import ConfigFolders
from sdar_verl.errors import ConfigError
from sdar_verl.rollout.recipe_rows import task_of
from tests.support.recipe_run import recipe_arguments, word_problems, write_data
from tests.support.verl_run import forked_python


def composed(name: str, overrides: list[str]) -> Any:
    return compose_config(name, overrides)


def faults(folder: Path, *overrides: str, rows: Any = None) -> str:
    """What stops a run with these flags; empty when nothing does."""
    config = composed("sdar_ppo", [*recipe_arguments(folder, *overrides, rows=rows)])
    try:
        check_run(config, load_config(config.sdar))
    except ConfigError as error:
        return str(error)
    return ""


def test_nothing_of_verls_is_changed_but_the_trainer():
    theirs = flat(OmegaConf.to_container(composed("ppo_trainer", []), resolve=False))
    ours = flat(OmegaConf.to_container(composed("sdar_ppo", []), resolve=False))
    of_verl = {key: value for key, value in ours.items() if key.split(".")[0] != "sdar"}
    different = {key for key in {*theirs, *of_verl} if theirs.get(key, "-") != of_verl.get(key, "-")}
    assert different == {"trainer.v1.trainer_mode"}
    assert ours["trainer.v1.trainer_mode"] == "sdar"


def test_two_lines_add_it_to_a_config_of_ones_own(tmp_path):
    from hydra import compose, initialize_config_dir

    (tmp_path / "mine.yaml").write_text(
        "hydra:\n  searchpath: [pkg://verl.trainer.config]\n\n"
        "defaults:\n  - ppo_trainer\n  - sdar_node\n  - _self_\n  - method: rlsd\n\ndata:\n  train_batch_size: 7\n"
    )
    with initialize_config_dir(str(tmp_path), version_base=None):
        config = compose("mine")
    assert (config.data.train_batch_size, config.trainer.v1.trainer_mode, config.sdar.method) == (7, "sdar", "rlsd")


LOOP = "actor_rollout_ref.rollout.agent.default_agent_loop"
METHODS = ("sdar", "opsd", "rlsd", "sdpo", "revkl_frozen", "sdar_frozen", "grpo_opsd", "skill_sd")


@pytest.mark.parametrize("method", METHODS)
def test_presets_work_on_top_of_it(tmp_path, method):
    sources = [] if method == "sdpo" else ["sdar.context.sources=[answer]"]
    assert faults(tmp_path, f"method={method}", *sources) == ""


@pytest.mark.parametrize("method", ["sdar", "opsd", "rlsd", "skill_sd"])
def test_the_released_codes_reading_works_on_top_of_it(tmp_path, method):
    assert faults(tmp_path, f"method={method}", "variant=released", "sdar.context.sources=[answer]") == ""


def test_two_more_lines_give_a_config_of_ones_own_the_variants(tmp_path):
    lines = "  - method: rlsd\n  - variant: paper\n  - optional method_variant: ${method}-${variant}\n"
    (tmp_path / "mine.yaml").write_text(f"defaults:\n  - ppo_trainer\n  - sdar_node\n  - _self_\n{lines}")
    folders = ConfigFolders(dir=str(tmp_path))
    for variant, schedule in (("paper", "constant"), ("released", "linear_decay")):
        sdar = compose_config("mine", [f"variant={variant}"], folders).sdar
        assert (sdar.variant, sdar.loss.coef_schedule.name, sdar.prompt.think) == (variant, schedule, "optional")


def test_grpo_needs_no_context_and_takes_one_that_the_script_names(tmp_path):
    assert faults(tmp_path, "method=grpo", "sdar.context.sources=[skills]") == ""
    column = ["method=grpo", "sdar.context.sources=[column]", "+sdar.context.options.column.path=extra_info.answer"]
    assert faults(tmp_path, *column) == ""
    config = composed("sdar_ppo", recipe_arguments(tmp_path, *column))
    (note,) = [note for note in run_notes(config, load_config(config.sdar)) if "sdar.context" in note]
    assert note.startswith("sdar.context.sources=['column'] has no effect: there is no teacher")


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ([], "sdar.context.sources=[skills] is the default of the text environments; say what the teacher of this"),
        (["sdar.context.sources=[next_observation]"], "next_observation has nothing to show with single_turn_agent"),
        (
            ["sdar.context.sources=[next_observation]", f"{LOOP}=tool_agent"],
            "next_observation differ by turn, but a row of tool_agent is a whole conversation",
        ),
        (
            ["sdar.context.sources=[answer]", "sdar.context.turns_share=0.2"],
            "but a row of single_turn_agent is a whole conversation; set it to null",
        ),
        (
            ["sdar.context.sources=[sibling]", "actor_rollout_ref.rollout.n=1"],
            "n=1: the context sibling is made of other",
        ),
        (
            [
                "sdar.modules=[tests.support.third_party]",
                *("sdar.context.sources=[their_sibling]", "actor_rollout_ref.rollout.n=1"),
            ],
            "n=1: the context their_sibling is made of other",
        ),
        (
            ["sdar.context.sources=[answer]", "custom_reward_function.path=mine.py"],
            "custom_reward_function.path=mine.py is not supported: verl's v1 trainer reads it under reward alone",
        ),
        (["sdar.context.sources=[column]"], "context 'column' needs +sdar.context.options.column.path=..."),
        (["sdar.context.sources=[answer]", "distillation.enabled=True"], "distillation.enabled=True is not supported"),
        (["sdar.context.sources=[answer]", "sdar.env.max_steps=7"], "sdar.env.max_steps=7 has no effect"),
        (["sdar.context.sources=[answer]", "sdar.prompt.history_length=1"], "sdar.prompt.history_length=1 has no"),
        (["sdar.context.sources=[answer]", "sdar.skills.bank=mine"], "sdar.skills.bank=mine has no effect"),
        (["sdar.context.sources=[answer]", "sdar.context.place=nowhere.jinja"], "sdar.context.place=nowhere.jinja"),
        (["sdar.context.sources=[answer]", "sdar.teacher.on_long_prompt=drop_history"], "use error or mask"),
        (["sdar.context.sources=[answer]", "data.prompt_key=question"], "there is no column 'question'"),
        (
            ["sdar.context.sources=[answer]", "actor_rollout_ref.actor.ulysses_sequence_parallel_size=4"],
            "ulysses_sequence_parallel_size=4 does not divide the 1 devices",
        ),
        (
            ["sdar.context.sources=[column]", "+sdar.context.options.column.path=extra_info.nothing"],
            "has nothing to show for the first 16 tasks",
        ),
    ],
)
def test_a_fault_is_told_with_its_remedy(tmp_path, overrides, told):
    assert told in faults(tmp_path, *overrides)


def test_hints_for_turns_work_where_a_row_is_a_turn(tmp_path):
    written = ["sdar.context.writer.source=policy", "sdar.teacher.on_long_prompt=mask"]
    for loop, sources in (("single_turn_agent", "hint"), ("two_drafts", "hint"), ("two_drafts", "next_observation")):
        modules = ["sdar.modules=[tests.support.agent_loops]"] if loop == "two_drafts" else []
        flags = [
            f"sdar.context.sources=[{sources}]",
            f"{LOOP}={loop}",
            *modules,
            *(written if sources == "hint" else []),
        ]
        assert faults(tmp_path / f"{loop}-{sources}", *flags) == "", flags


@pytest.mark.parametrize("sources", ["skills", "column", "next_observation"])
def test_a_context_that_cannot_be_is_told_once(tmp_path, sources):
    assert len(faults(tmp_path, f"sdar.context.sources=[{sources}]").splitlines()) == 1


def test_an_option_that_hydra_does_not_know_is_told_first_and_by_us():
    with pytest.raises(ConfigError) as caught:
        composed("sdar_ppo", ["sdar.loss.coeff=1", *(f"trainer.experiment_name={number}" for number in range(9))])
    assert str(caught.value).startswith("sdar.loss.coeff: no such option (known: coef, ")
    assert str(caught.value).endswith("\n(--config-name sdar_ppo)")
    for word, told in (
        ("sdar.context.options.column.path=a", "use +sdar.context.options.column.path=a"),
        ("a.b=1", "use +a.b=1"),
    ):
        with pytest.raises(ConfigError, match=re.escape(told)):
            composed("sdar_ppo", [word])


SCRIPT = (
    # As verl's own examples have them: switched off, or read by trainers of before.
    *("algorithm.use_kl_in_reward=False", "algorithm.kl_ctrl.kl_coef=0.0", "actor_rollout_ref.actor.use_kl_loss=False"),
    *("actor_rollout_ref.actor.kl_loss_coef=0.0", "actor_rollout_ref.actor.kl_loss_type=mse"),
    *("actor_rollout_ref.actor.clip_ratio_low=0.2", "actor_rollout_ref.actor.clip_ratio_high=0.28"),
    *("actor_rollout_ref.actor.clip_ratio_c=10.0", "actor_rollout_ref.rollout.multi_stage_wake_up=True"),
    *("actor_rollout_ref.rollout.over_sample_rate=0.1", "critic.ppo_max_token_len_per_gpu=8192"),
    *("actor_rollout_ref.model.lora_alpha=32", "trainer.critic_warmup=0"),
)


def test_flags_of_a_script_that_do_nothing_stay_and_are_told(tmp_path):
    flags = ["sdar.context.sources=[answer]", *SCRIPT]
    assert faults(tmp_path, *flags) == ""
    config = composed("sdar_ppo", recipe_arguments(tmp_path, *flags))
    told = [note for note in run_notes(config, load_config(config.sdar)) if "has no effect" in note]
    for option in ("kl_loss_type=mse", "multi_stage_wake_up=True", "over_sample_rate=0.1", "lora_alpha=32"):
        assert any(option in note for note in told), option


def test_flags_that_name_nothing_are_told(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def score(data_source, solution_str, ground_truth, extra_info=None):\n    return 0\n"
    )
    for override, told in {
        "actor_rollout_ref.rollout.agent.default_agent_loop=tool_agnet": "loop=tool_agnet is no agent loop",
        "actor_rollout_ref.rollout.agent.agent_loop_config_path=/no.yaml": "agent_loop_config_path=/no.yaml does not",
        "actor_rollout_ref.rollout.multi_turn.tool_config_path=/no.yaml": "tool_config_path=/no.yaml does not exist",
        "reward.custom_reward_function.path=/no.py": "reward.custom_reward_function.path=/no.py does not exist",
        f"reward.custom_reward_function.path={tmp_path}/mine.py": "custom_reward_function.name=compute_score",
        "data.gen_batch_size=3": "data.gen_batch_size=3 does not divide data.train_batch_size=4",
        "data.train_batch_size=32": "data.train_batch_size=32, but data.train_files holds 16 tasks",
        "data.train_max_samples=2": "data.train_max_samples=2 leaves 2 tasks",
        "trainer.total_epochs=1 trainer.total_training_steps=9": "trainer.total_epochs=1 ends the run after 4 steps",
        "data.max_prompt_length=4": "data.max_prompt_length=4, but the prompt of row 0 of",
        "sdar.teacher.max_prompt_length=4": "sdar.teacher.max_prompt_length=4, but the prompt of row 0 of",
        "+sdar.validation.arms.sk={context: skills, temperature: 1.0}": "arms.sk.context=skills has none",
    }.items():
        words = [override] if override.startswith("+") else override.split(" ")
        assert told in faults(tmp_path / "run", "sdar.context.sources=[answer]", *words), override


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("tools:\n  - {class_name: nowhere.Tool, config: {type: native}}\n", "nowhere.Tool cannot be imported ("),
        (
            "tools:\n  - {class_name: verl.tools.base_tool.NoTool, config: {type: native}}\n",
            "NoTool cannot be imported (",
        ),
        ("- {name: calculator}\n", "cannot be read ("),
        ("tools: [\n", "cannot be read ("),
        ("tools:\n  - {class_name: verl.tools.base_tool.BaseTool, config: {type: native}}\n", ""),
    ],
)
def test_a_tool_that_cannot_be_made_is_told(tmp_path, text, told):
    option, path = "actor_rollout_ref.rollout.multi_turn.tool_config_path", tmp_path / "tools.yaml"
    path.write_text(text)
    found = faults(tmp_path / "run", "sdar.context.sources=[answer]", f"{option}={path}")
    assert told in found
    assert found.startswith(f"{option}={path}" if told else "")


def test_a_loop_that_cannot_be_made_is_told(tmp_path):
    option, path = "actor_rollout_ref.rollout.agent.agent_loop_config_path", tmp_path / "loops.yaml"
    path.write_text("- {name: mine, _target_: nowhere.Loop}\n")
    found = faults(tmp_path / "run", "sdar.context.sources=[answer]", f"{option}={path}")
    assert found.startswith(f"{option}={path}: nowhere.Loop cannot be imported (")


def test_a_micro_batch_that_dynamic_ones_make_idle_is_told(tmp_path):
    sizes = ("actor.ppo", "ref.log_prob", "rollout.log_prob")
    flags = [
        "sdar.context.sources=[answer]",
        *(f"actor_rollout_ref.{size}_micro_batch_size_per_gpu=4" for size in sizes),
    ]
    for dynamic, number in (("True", 3), ("False", 0)):
        words = recipe_arguments(tmp_path, *flags, f"actor_rollout_ref.actor.use_dynamic_bsz={dynamic}")
        config = composed("sdar_ppo", words)
        told = [note for note in run_notes(config, load_config(config.sdar)) if "micro_batch_size_per_gpu=4" in note]
        assert len(told) == number
        assert all("has no effect without" in note and "dynamic_bsz=False" in note for note in told)


def row_faults(folder: Path, changed: Any, *overrides: str) -> str:
    """What is told when row 3 of the data has these columns."""
    rows = word_problems(16)
    rows[3] = {**rows[3], **changed}
    lines = "\n".join(json.dumps(row) for row in rows)
    folder.mkdir(exist_ok=True)
    (folder / "rows.jsonl").write_text(lines)
    data = [f"data.train_files={folder}/rows.jsonl", f"data.val_files={folder}/rows.jsonl"]
    return faults(folder, "sdar.context.sources=[answer]", *data, *overrides)


def test_a_row_that_cannot_be_used_is_named(tmp_path):
    parts = [{"type": "text", "text": "How many?"}]
    for changed, told in (
        ({"prompt": None}, "row 3: the column 'prompt' holds NoneType"),
        ({"prompt": [{"role": "user"}]}, "row 3: the column 'prompt' holds"),
        ({"prompt": [{"role": "human", "content": "Hi"}]}, "row 3: the prompt has no user message"),
        ({"prompt": [{"role": "user", "content": parts}]}, "write what is a list of parts as one text"),
        ({"reward_model": None}, "row 3: there is no reward_model"),
        ({"agent_name": "sdar_agent"}, "row 3: agent_name=sdar_agent is no agent loop"),
    ):
        assert told in row_faults(tmp_path, changed), changed
    assert row_faults(tmp_path, {"reward_model": {"style": "rule", "ground_truth": None}}) == ""


def test_a_fault_of_a_column_is_told_beside_one_of_a_row(tmp_path):
    """Rows that cannot be read leave the others to be looked at."""
    told = row_faults(
        tmp_path, {"prompt": None}, "sdar.context.sources=[column]", "+sdar.context.options.column.path=extra_info.TYPO"
    )
    assert "row 3: the column 'prompt'" in told
    assert "with sdar.context.options.column.path=extra_info.TYPO; their data are ability, data_source, " in told
    assert ", extra_info.answer, " in told


def test_an_arm_without_a_context_in_the_validation_data_is_told(tmp_path):
    rows = [{**row, "extra_info": {"index": 0}} for row in word_problems(8)]
    validation = write_data(tmp_path, rows, "validation")
    column = ("sdar.context.sources=[column]", "+sdar.context.options.column.path=extra_info.answer")
    arm = "+sdar.validation.arms.told={context: teacher, temperature: 1.0}"
    assert faults(tmp_path / "run", *column, f"data.val_files={validation}") == ""
    told = faults(tmp_path / "run", *column, f"data.val_files={validation}", arm)
    assert "nothing to show for the first 8 tasks of data.val_files" in told


def test_a_bad_context_that_nobody_has_is_told(tmp_path):
    column = ("sdar.context.sources=[column]", "+sdar.context.options.column.path=extra_info.answer")
    bad = ("sdar.context.contrast.sources=[column]", "+sdar.context.contrast.options.column.path=extra_info.no")
    told = faults(tmp_path, *column, *bad)
    assert "sdar.context.contrast.sources: context 'column' has nothing to show for the first 16 tasks" in told
    assert "with sdar.context.contrast.options.column.path=extra_info.no" in told
    same = ("sdar.context.control=empty", "sdar.context.contrast.control=empty")
    assert "show the teacher nothing in either place" in faults(
        tmp_path / "empty", *column, *bad[:1], *same, "+sdar.context.contrast.options.column.path=extra_info.answer"
    )


def test_remote_data_are_verls_to_read(tmp_path):
    assert faults(tmp_path, "sdar.context.sources=[answer]", "data.train_files=hdfs://a/train.parquet") == ""


@pytest.mark.parametrize("name", ["rows.pq", "rows.txt"])
def test_a_file_that_verl_does_not_read_is_told(tmp_path, name):
    (tmp_path / name).write_text("{}")
    told = faults(tmp_path / "run", "sdar.context.sources=[answer]", f"data.train_files={tmp_path}/{name}")
    assert f"{name}: verl reads files that end in .parquet, .json or .jsonl" in told


@pytest.mark.parametrize("wrong", ["{% include 'x.jinja' %}", "{{ prompt + 1 }}{{ context }}", "{{ 1 / 0 }}"])
def test_a_template_that_fails_is_told_by_its_path(tmp_path, wrong):
    place = tmp_path / "place.jinja"
    place.write_text(wrong)
    told = faults(tmp_path / "run", "sdar.context.sources=[answer]", f"sdar.context.place={place}")
    assert f"sdar.context.place={place}: " in told and "Error" in told


def test_a_template_that_loses_the_prompt_is_refused(tmp_path):
    template = tmp_path / "place.jinja"
    template.write_text("{{ context }}")
    told = faults(tmp_path / "run", "sdar.context.sources=[answer]", f"sdar.context.place={template}")
    assert "does not show prompt" in told


def test_prompts_that_are_no_messages_are_told(tmp_path):
    rows = [{**row, "prompt": "How many?"} for row in word_problems(8)]
    assert "not a list of messages" in faults(tmp_path, "sdar.context.sources=[answer]", rows=rows)


def test_skills_are_looked_for_in_a_column_of_the_data(tmp_path):
    from sdar_verl.rollout.skills_of import SkillFinder

    for name, word in (("sums", "addition"), ("pens", "pens")):
        folder = tmp_path / "bank" / name
        folder.mkdir(parents=True)
        (folder / "SKILL.md").write_text(f"---\nname: {name}\ndescription: d\nkeywords: [{word}]\n---\nAbout {name}.")
    rows = [
        {**row, "extra_info": {"topic": "Addition of pens" if i else None}} for i, row in enumerate(word_problems(4))
    ]
    bank = ["sdar.context.sources=[skills]", f"sdar.skills.bank={tmp_path}/bank", "sdar.skills.retrieval=[keyword]"]
    assert faults(tmp_path / "run", *bank, "sdar.skills.column=extra_info.topic", rows=rows) == ""
    told = faults(tmp_path / "run", *bank, "sdar.skills.column=extra_info.subject", rows=rows)
    assert "sdar.skills.column=extra_info.subject has no text in 4 rows" in told and "extra_info.topic" in told
    told = faults(tmp_path / "run", *bank, "sdar.skills.column=extra_info", rows=rows)
    assert "sdar.skills.column=extra_info holds an object with topic, not a text" in told
    config = composed("sdar_ppo", [*bank, "sdar.skills.column=extra_info.topic"])
    finder = SkillFinder(load_config(config.sdar).skills, len, None)
    tasks = [task_of({**row, "raw_prompt": row["prompt"]}) for row in rows]
    assert [finder.find(task).skills for task in tasks[:2]] == [(), ("sums", "pens")]
    with pytest.raises(ConfigError, match=r"sdar\.skills\.column=a has no effect with the text environments"):
        config = composed("sdar_quickstart", ["sdar.skills.column=a"])
        check_run(config, load_config(config.sdar))


def test_what_verl_leaves_to_the_user_is_told_where_nobody_set_it(tmp_path):
    assert faults(tmp_path, "actor_rollout_ref.rollout.name=???").splitlines() == [
        "actor_rollout_ref.rollout.name has no value; set it: actor_rollout_ref.rollout.name=..."
    ]


def test_hydras_own_node_is_left_alone(tmp_path):
    """It is there in a run, and cannot be resolved outside of Hydra."""
    config = composed("sdar_ppo", recipe_arguments(tmp_path, "sdar.context.sources=[answer]"))
    with open_dict(config):
        config.hydra = {"sweep": {"subdir": "${hydra:job.num}"}}
    check_run(config, load_config(config.sdar))


def test_a_missing_file_is_told(tmp_path):
    told = faults(tmp_path, "sdar.context.sources=[answer]", "data.val_files=/nowhere/val.parquet")
    assert "data.val_files=/nowhere/val.parquet does not exist" in told


def test_options_for_other_loops_are_an_error_with_a_text_environment(tmp_path):
    config = composed("sdar_quickstart", ["sdar.context.place=system"])
    with pytest.raises(ConfigError, match=r"sdar\.context\.place=system has no effect with the text environments"):
        check_run(config, load_config(config.sdar))


def test_data_of_json_lines_are_read(tmp_path):
    import json

    from sdar_verl.checks.panel_tasks import read_rows

    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in word_problems(3)))
    assert [row["data_source"] for row in read_rows(path)] == ["openai/gsm8k"] * 3
    assert write_data(tmp_path, word_problems(3)).is_file()


def test_our_trainer_without_our_node_is_told_before_ray_starts(tmp_path):
    command = [*forked_python(), "-m", "verl.trainer.main_ppo", "trainer.v1.trainer_mode=sdar"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "trainer.v1.trainer_mode=sdar: the config has no `sdar:` node: use --config-name sdar_ppo" in done.stderr
    assert "sdar.context.sources=[answer]" in done.stderr and "ray init" not in done.stdout


def test_few_rows_may_have_a_context_and_one_of_several_sources_may_be_rare(tmp_path):
    rows = [{**row, "hint": "Add them." if number > 12 else None} for number, row in enumerate(word_problems(16))]
    column = "+sdar.context.options.column.path=hint"
    assert faults(tmp_path, "sdar.context.sources=[column]", column, rows=rows) == ""
    assert faults(tmp_path, "sdar.context.sources=[answer,column]", column, rows=rows) == ""
    never = [{**row, "hint": None} for row in rows]
    told = faults(tmp_path, "sdar.context.sources=[answer,column]", column, rows=never)
    assert "context 'column' has nothing to show for the first 16 tasks" in told


@pytest.mark.parametrize("column", ["images", "videos", "audios"])
def test_rows_with_something_to_look_at_are_refused(tmp_path, column):
    assert f"row 3: the column {column!r} has something to look at" in row_faults(tmp_path, {column: [{"a": 1}]})
    assert row_faults(tmp_path, {column: []}) == ""


def test_a_later_rows_prompt_that_does_not_fit_is_told(tmp_path):
    long = [{"role": "user", "content": "How many? " * 200}]
    assert "but the prompt of row 3 of" in row_faults(tmp_path, {"prompt": long})
    for leaves in ("data.filter_overlong_prompts=True", "sdar.context.on_foreign_prompt=mask"):
        assert row_faults(tmp_path, {"prompt": long}, leaves) == ""
    answer = {"reward_model": {"style": "rule", "ground_truth": "7 " * 400}}
    told = row_faults(tmp_path, answer, "sdar.teacher.max_prompt_length=200")
    assert "sdar.teacher.max_prompt_length=200, but the prompt of row 3 of" in told and "with its context" in told
    assert row_faults(tmp_path, answer, "sdar.teacher.max_prompt_length=200", "sdar.teacher.on_long_prompt=mask") == ""


def test_a_row_that_the_chat_template_refuses_is_told(tmp_path):
    """Of any role but these; and a template of the script's own stands in for the tokenizer's."""
    picky = "{% for m in messages %}{% if m.role == 'critic' %}{{ raise_exception('no critics') }}{% endif %}"
    picky += "{{ m.content }}{% endfor %}"
    messages = [{"role": "user", "content": "How many?"}, {"role": "critic", "content": "Hm."}]
    template = f"actor_rollout_ref.model.custom_chat_template={json.dumps(picky)}"
    told = row_faults(tmp_path, {"prompt": messages}, template)
    assert "cannot make the prompt of row 3 of" in told and "no critics" in told
    assert row_faults(tmp_path, {}, template) == ""


def test_a_model_that_holds_less_than_a_row_is_told(tmp_path):
    for room, told in ((256, "max_model_len=256 leaves no room behind data.max_prompt_length=256"), (257, "")):
        flag = f"actor_rollout_ref.rollout.max_model_len={room}"
        found = faults(tmp_path, "sdar.context.sources=[answer]", flag)
        assert told in found and bool(found) == bool(told)


def test_rows_that_name_their_loops_are_judged_by_these(tmp_path):
    """Contexts that differ by turn, where the flag names a loop of one turn and the rows name another."""
    for loop, told in (("tool_agent", "a row of tool_agent is a whole conversation"), ("two_drafts", "")):
        flags = ["sdar.context.sources=[next_observation]", "sdar.modules=[tests.support.agent_loops]"]
        flags += ["sdar.context.turns_share=0.5"] * (loop == "two_drafts")
        found = faults(tmp_path, *flags, rows=word_problems(8, agent=loop))
        assert told in found and bool(found) == bool(told)
    remote = ["sdar.context.sources=[next_observation]", "data.train_files=hdfs://a/train.parquet"]
    assert faults(tmp_path, *remote) == ""


def test_a_row_without_a_context_is_not_held_against_the_teachers_limit(tmp_path):
    long = {"prompt": [{"role": "user", "content": "How many? " * 20}], "extra_info": {"index": 3}}
    column = ["sdar.context.sources=[column]", "+sdar.context.options.column.path=extra_info.answer"]
    limit = "sdar.teacher.max_prompt_length=200"
    assert row_faults(tmp_path, long, *column, limit) == ""
    told = row_faults(tmp_path, {**long, "extra_info": {"answer": "7"}}, *column, limit)
    assert "but the prompt of row 3 of" in told


def test_a_tokenizer_that_is_elsewhere_is_not_looked_at(tmp_path):
    elsewhere = "actor_rollout_ref.model.tokenizer_path=Somebody/Model"
    assert faults(tmp_path, "sdar.context.sources=[answer]", elsewhere) == ""
