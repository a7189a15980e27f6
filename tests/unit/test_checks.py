"""Faults that are known before Ray starts: named with option, value and remedy."""

from __future__ import annotations

import copy
import sys

import pytest
import verl  # noqa: F401  loads the plugin, which puts our configs on the search path

from sdar_verl.checks.teacher import teacher_faults
from sdar_verl.compat import check_verl_version
from sdar_verl.config import load_config
from sdar_verl.envs import registry
from sdar_verl.envs.base import Task
from sdar_verl.errors import ConfigError
from sdar_verl.panels import write_panel
from tests.support.checked_recipe import checked_recipe, run_checks
from tests.support.tiny_model import make_tiny_model


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return checked_recipe(tmp_path_factory.mktemp("panels"))


@pytest.fixture(autouse=True)
def no_toy_environment():
    """What a case registers is gone after it."""
    yield
    registry._registered.pop("toy_search", None)
    sys.modules.pop("tests.support.toy_env", None)


def test_the_quick_starts_recipe_is_sound(recipe):
    run_checks(recipe)


CASES = {
    "gate": ({"sdar.loss.gate": "gpa"}, ["sdar.loss.gate", "gpa", "gap"]),
    "objective": ({"sdar.loss.objective": "kl"}, ["sdar.loss.objective", "sampled"]),
    "environment": ({"sdar.env.name": "alfwrld"}, ["sdar.env", "alfwrld", "alfworld"]),
    "environment option": ({"sdar.env.options": {"colour": 1}}, ["sdar.env", "colour"]),
    "environment module": ({"sdar.modules": ["no_such_module_here"]}, ["sdar.modules", "no_such_module_here"]),
    "template": ({"sdar.prompt.template": "alfwrld"}, ["sdar.prompt.template", "alfworld_compact"]),
    "a template with other tags": (
        {"sdar.prompt.template": "search"},
        [
            "asks for the tags <search>, <answer>",
            "sdar.env.name=alfworld reads <action>",
            "set action_tags = ['action']",
        ],
    ),
    "bank": ({"sdar.skills.bank": "/no/such/bank"}, ["sdar.skills.bank", "/no/such/bank"]),
    "retrieval": ({"sdar.skills.retrieval": ["keywrd"]}, ["sdar.skills.retrieval", "keywrd", "keyword"]),
    "retrieval that has no effect": ({"sdar.skills.retrieval": ["none", "keyword"]}, ["sdar.skills.retrieval", "none"]),
    "a teacher without context": (
        {"sdar.skills.retrieval": ["none"]},
        ["retrieval=[none]", "sdar.context.sources", "sdar.teacher.source=none"],
    ),
    "modules": ({"sdar.modules": ["no_such_module_here"]}, ["sdar.modules", "no_such_module_here", "PYTHONPATH"]),
    "context": ({"sdar.context.sources": ["skill"]}, ["sdar.context.sources", "unknown context 'skill'", "sibling"]),
    "option of an idle context": (
        {"sdar.context.options": {"sibling": {"choice": "first"}}},
        ["sdar.context.options.sibling has no effect", "['skills']"],
    ),
    "no ground truth": (
        {"sdar.context.sources": ["answer"]},
        ["context 'answer'", "their data are empty", "sdar.context.options.answer"],
    ),
    "no walkthrough": (
        {"sdar.context.sources": ["skills", "demonstration"]},
        ["context 'demonstration'", "8 tasks of data.train_files", "alfworld"],
    ),
    "a teacher that sees what the student sees": (
        {"sdar.context.student": "skills", "sdar.teacher.source": "actor"},
        ["sdar.context.student=skills", "gap is 0", "sdar.teacher.source=none"],
    ),
    "a student without skills": (
        {
            "sdar.context.student": "skills",
            "sdar.context.sources": ["feedback"],
            "sdar.skills.retrieval": ["none"],
            "sdar.validation.arms": {"student": {"context": "none", "temperature": 1.0}},
        },
        ["retrieval=[none]", "sdar.context.student"],
    ),
    "one task type": ({"sdar.context.control": "wrong"}, ["sdar.context.control=wrong", "pick_and_place_simple"]),
    "a late context in validation": (
        {
            "sdar.context.sources": ["sibling"],
            "sdar.validation.arms": {"teacher": {"context": "teacher", "temperature": 1.0}},
        },
        ["sdar.validation.arms.teacher.context=teacher", "sibling"],
    ),
    "a placebo for nobody": (
        {"sdar.context.control": "shuffled", "sdar.teacher.source": "none", "sdar.loss.coef": 0},
        ["sdar.context.control=shuffled has no effect", "sdar.teacher.source=none"],
    ),
    "a turn length for rows of one turn": (
        {"sdar.rollout.turn_length": 10},
        ["sdar.rollout.turn_length=10 has no effect", "per_turn"],
    ),
    "no turn length": (
        {"sdar.rollout.rows": "trajectory"},
        ["sdar.rollout.turn_length=null", "max_response_length=20"],
    ),
    "history in a conversation": ({"sdar.rollout.rows": "trajectory"}, ["sdar.prompt.history_length=2 has no effect"]),
    "more rows per update than conversations": (
        {"sdar.rollout.rows": "trajectory"},
        ["sdar.update.mini_batch_rows=128", "a step has 32 rows"],
    ),
    "no room for a conversation": (
        {"sdar.rollout.rows": "trajectory", "actor_rollout_ref.rollout.max_model_len": 300},
        ["max_model_len=300", "= 340"],
    ),
    "no room for a prompt and an answer": (
        {"actor_rollout_ref.rollout.max_model_len": 300},
        ["max_model_len=300", "a row may have", "= 340"],
    ),
    "shards that do not divide the devices": (
        {"trainer.n_gpus_per_node": 4, "actor_rollout_ref.actor.fsdp_config.fsdp_size": 3},
        ["actor_rollout_ref.actor.fsdp_config.fsdp_size=3 does not divide the 4 devices"],
    ),
    "a rollout larger than its devices": (
        {"actor_rollout_ref.rollout.tensor_model_parallel_size": 2},
        ["rollout.tensor_model_parallel_size=2 does not divide the 1 devices"],
    ),
    "passes of no size": (
        {"actor_rollout_ref.rollout.log_prob_use_dynamic_bsz": False},
        ["log_prob_use_dynamic_bsz=False needs actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu"],
    ),
    "turn statistics of a conversation": (
        {"sdar.rollout.rows": "trajectory", "sdar.advantage.group_stats": "turn"},
        ["sdar.advantage.group_stats=turn", "episode"],
    ),
    "another environment's panel": (
        {"sdar.env.name": "toy_search", "sdar.modules": ["tests.support.toy_env"], "sdar.env.options": {}},
        ["data.train_files", "tasks of alfworld", "sdar.env.name=toy_search"],
    ),
    "not a panel": ({"data.val_files": __file__}, ["data.val_files", "not a task panel"]),
    "no flash-attn": (
        {"trainer.device": "cuda", "actor_rollout_ref.model.override_config.attn_implementation": "flash_attention_2"},
        ["flash-attn is not installed", 'pip install --no-build-isolation "sdar-verl[flash-attn]"'],
    ),
    "too few tasks": ({"data.train_batch_size": 17}, ["data.train_batch_size=17", "holds 16 tasks"]),
    "a GPU beside the CPU's rollout": ({"trainer.device": "cuda"}, ["trainer.device=cuda", "VERL_PLATFORM=cpu"]),
    "vLLM on a CPU": (
        {"actor_rollout_ref.rollout.name": "vllm"},
        ["trainer.device=cpu", "rollout.name=transformers, not vllm"],
    ),
    "another engine on a CPU, with vLLM's worker": (
        {
            "actor_rollout_ref.rollout.name": "sglang",
            "actor_rollout_ref.rollout.engine_kwargs.vllm.worker_extension_cls": "a.Worker",
        },
        ["trainer.device=cpu", "rollout.name=transformers, not sglang"],
    ),
    "trainer mode": ({"trainer.v1.trainer_mode": "sync"}, ["trainer.v1.trainer_mode=sync", "=sdar"]),
    "a misspelt trainer mode": (
        {"trainer.v1.trainer_mode": "sdar_async"},
        ["trainer.v1.trainer_mode=sdar_async", "sdar_colocate_async", "sdar.modules"],
    ),
    "legacy trainer": ({"trainer.use_v1": False}, ["trainer.use_v1=False"]),
    "estimator": ({"algorithm.adv_estimator": "grpo"}, ["invalid_action_penalty=0.1 has no effect", "grpo"]),
    "strategy": ({"actor_rollout_ref.actor.strategy": "megatron"}, ["strategy=megatron", "fsdp2"]),
    "agent loop": (
        {"actor_rollout_ref.rollout.agent.default_agent_loop": "tool_agent"},
        ["default_agent_loop=tool_agent", "sdar_agent"],
    ),
    "verl's distillation": ({"distillation.enabled": True}, ["distillation.enabled=True"]),
    "no reference": (
        {"sdar.teacher.source": "reference", "actor_rollout_ref.actor.use_kl_loss": False},
        ["sdar.teacher.source=reference", "use_kl_loss=True"],
    ),
    "teacher source": ({"sdar.teacher.source": "emma"}, ["sdar.teacher.source", "emma", "ema", "none"]),
    "a decay of 1": (
        {"sdar.teacher.source": "ema", "sdar.teacher.ema_decay": 1.0},
        ["sdar.teacher.ema_decay=1.0", "less than 1"],
    ),
    "a negative decay": (
        {"sdar.teacher.source": "ema", "sdar.teacher.ema_decay": -0.1},
        ["sdar.teacher.ema_decay=-0.1"],
    ),
    "a period of 0": (
        {"sdar.teacher.source": "snapshot", "sdar.teacher.update_every": 0},
        ["sdar.teacher.update_every=0"],
    ),
    "a decay without an average": (
        {"sdar.teacher.source": "actor", "sdar.teacher.ema_decay": 0.9},
        ["sdar.teacher.ema_decay=0.9 has no effect", "source=actor", "it is for sdar.teacher.source=ema"],
    ),
    "a period without copies": (
        {"sdar.teacher.source": "reference", "sdar.teacher.update_every": 5},
        ["sdar.teacher.update_every=5 has no effect", "ema or snapshot"],
    ),
    "a path without a reference": (
        {"sdar.teacher.source": "ema", "sdar.teacher.path": "/some/model"},
        ["sdar.teacher.path=/some/model has no effect", "source=reference"],
    ),
    "an offload of nothing": (
        {"sdar.teacher.source": "actor", "sdar.teacher.offload": False},
        ["sdar.teacher.offload=False has no effect"],
    ),
    "weights on the device beside an actor in CPU memory": (
        {
            "sdar.teacher.source": "ema",
            "sdar.teacher.offload": False,
            "actor_rollout_ref.actor.fsdp_config.param_offload": True,
        },
        ["sdar.teacher.offload=False has no effect", "fsdp_config.param_offload=True"],
    ),
    "an option without a teacher": (
        {"sdar.teacher.source": "none", "sdar.loss.coef": 0, "sdar.teacher.ema_decay": 0.5},
        ["sdar.teacher.ema_decay=0.5 has no effect", "source=none"],
    ),
    "a whole step for a teacher inside the update": (
        {"sdar.teacher.source": "actor_fresh", "sdar.loss.centre": "batch"},
        ["sdar.loss.centre=batch", "sdar.teacher.source=actor_fresh scores inside the update"],
    ),
    "no adapter": ({"sdar.teacher.source": "lora_base"}, ["source=lora_base", "actor_rollout_ref.model.lora_rank"]),
    "a pool for the actor": (
        {"sdar.teacher.source": "actor", "sdar.teacher.placement": "pool", "sdar.teacher.pool_gpus_per_node": 1},
        ["sdar.teacher.placement=pool", "source=actor", "possible with source=reference"],
    ),
    "a pool without devices": (
        {"sdar.teacher.source": "reference", "sdar.teacher.placement": "pool"},
        ["sdar.teacher.pool_gpus_per_node"],
    ),
    "devices without a pool": (
        {"sdar.teacher.source": "reference", "sdar.teacher.pool_nodes": 2},
        ["sdar.teacher.pool_nodes=2 has no effect", "placement=colocated"],
    ),
    "quantization-aware training": (
        {"sdar.teacher.source": "ema", "actor_rollout_ref.actor.fsdp_config.qat.enable": True},
        ["source=ema", "quantization-aware", "qat.enable=False"],
    ),
    "no weights at the path": (
        {"sdar.teacher.source": "reference", "sdar.teacher.path": "/no/such/model"},
        ["sdar.teacher.path=/no/such/model", "no model here", "Hugging Face"],
    ),
    "a model that is not there": (
        {"actor_rollout_ref.model.path": "/no/such/model"},
        ["actor_rollout_ref.model.path=/no/such/model", "config.json", "Qwen/Qwen2.5-3B-Instruct"],
    ),
    "an arm without a temperature": (
        {"sdar.validation.arms": {"mine": {"context": "skills"}}},
        ["sdar.validation.arms.mine.temperature is not set", "docs/options.md"],
    ),
    "no training panel at all": ({"data.train_files": None}, ["data.train_files is not set", "sdar-verl prepare"]),
    "a prompt of no tokens": ({"data.max_prompt_length": 0}, ["data.max_prompt_length=0", "at least 1"]),
    "a response as long as the model's positions": (
        {"data.max_response_length": 512},
        ["512 positions", "lower data.max_response_length"],
    ),
    "rows left out of an update that scores itself": (
        {"sdar.teacher.source": "actor_fresh", "sdar.on_nonfinite": "drop"},
        ["sdar.on_nonfinite=drop", "source=actor_fresh", "source=actor,"],
    ),
    "no history to drop": (
        {"sdar.teacher.on_long_prompt": "drop_history", "sdar.prompt.history_length": 0},
        ["on_long_prompt=drop_history has nothing to drop", "history_length=0"],
    ),
    "more teacher tokens than positions": (
        {"sdar.teacher.max_prompt_length": 600},
        ["sdar.teacher.max_prompt_length=600", "620 tokens", "512 positions", "at most 492"],
    ),
    "an empty context that may yet come": (
        {"sdar.context.sources": ["skills", "sibling"], "sdar.context.on_empty": "error"},
        ["sdar.context.on_empty=error has no effect", "context_missing_share"],
    ),
    "an empty context of no teacher": (
        {"sdar.context.on_empty": "error", "sdar.teacher.source": "none", "sdar.loss.coef": 0},
        ["sdar.context.on_empty=error has no effect", "source=none"],
    ),
    "no checkpoint to resume from": (
        {"trainer.resume_mode": "resume_path", "trainer.resume_from_path": "/no/global_step_3"},
        ["trainer.resume_from_path=/no/global_step_3 does not exist"],
    ),
    "mini-batch": ({"sdar.update.mini_batch_rows": 100}, ["sdar.update.mini_batch_rows=100", "rollout.n=8"]),
    "ranks": ({"trainer.n_gpus_per_node": 3}, ["sdar.update.mini_batch_rows=128", "3 ranks"]),
    "ranks under sequence parallelism": (
        {
            "trainer.n_gpus_per_node": 6,
            "actor_rollout_ref.actor.fsdp_config.ulysses_sequence_parallel_size": 2,
        },
        ["sdar.update.mini_batch_rows=128", "3 ranks"],
    ),
    "a pool that cannot split its rows": (
        {
            "sdar.teacher.source": "reference",
            "sdar.teacher.placement": "pool",
            "sdar.teacher.pool_gpus_per_node": 1,
            "actor_rollout_ref.ref.fsdp_config.ulysses_sequence_parallel_size": 2,
        },
        ["sdar.teacher.placement=pool", "pool_gpus_per_node=1", "ref.fsdp_config.ulysses_sequence_parallel_size=2"],
    ),
    "a pool that does not divide among copies of the teacher": (
        {
            "sdar.teacher.source": "reference",
            "sdar.teacher.placement": "pool",
            "sdar.teacher.pool_gpus_per_node": 3,
            "actor_rollout_ref.ref.fsdp_config.fsdp_size": 2,
        },
        ["ref.fsdp_config.fsdp_size=2 does not divide the 3 devices (sdar.teacher.placement=pool", "per_node=3"],
    ),
    "a pool that does not divide the rows": (
        {
            "sdar.teacher.source": "reference",
            "sdar.teacher.placement": "pool",
            "sdar.teacher.pool_gpus_per_node": 6,
        },
        ["pool_gpus_per_node=6 on pool_nodes=1", "the 6 ranks do not divide the rows", "a multiple of 128"],
    ),
    "a reference that cannot split its rows": (
        {
            "sdar.teacher.source": "actor",
            "actor_rollout_ref.actor.use_kl_loss": True,
            "actor_rollout_ref.ref.fsdp_config.ulysses_sequence_parallel_size": 2,
        },
        ["ref.fsdp_config.ulysses_sequence_parallel_size=2 does not divide the 1 devices (trainer.n_gpus"],
    ),
    "group of one": ({"actor_rollout_ref.rollout.n": 1}, ["rollout.n=1", "at least 2"]),
    "micro-batch": (
        {
            "actor_rollout_ref.actor.use_dynamic_bsz": False,
            "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu": 48,
        },
        ["ppo_micro_batch_size_per_gpu=48", "128 rows", "use_dynamic_bsz=True"],
    ),
    "vllm on a cpu": ({"actor_rollout_ref.rollout.name": "vllm"}, ["trainer.device=cpu", "vllm", "hardware=cpu"]),
    "no vllm": (
        {"actor_rollout_ref.rollout.name": "vllm", "trainer.device": "cuda"},
        ["vllm is not installed", 'pip install "sdar-verl[vllm]"'],
    ),
    "no panel": ({"data.val_files": "/no/such/panel.parquet"}, ["data.val_files=/no/such/panel.parquet", "prepare"]),
    "a panel that this process does not see": (
        {"data.val_files": "no/such/panel.parquet"},
        ["data.val_files=no/such/panel.parquet does not exist in /", "give an absolute path"],
    ),
    "teacher budget": (
        {
            "actor_rollout_ref.rollout.log_prob_use_dynamic_bsz": True,
            "actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu": 300,
            "sdar.teacher.max_prompt_length": 384,
        },
        ["log_prob_max_token_len_per_gpu=300", "404"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_fault_is_named(recipe, case):
    overrides, words = CASES[case]
    with pytest.raises(ConfigError) as error:
        run_checks(recipe, **overrides)
    for word in words:
        assert word in str(error.value), str(error.value)


@pytest.mark.parametrize(("limit", "told"), [(202, False), (201, True)])
def test_ranks_that_share_a_row_share_its_tokens(recipe, limit, told):
    """Two ranks take a teacher row of 404 tokens with 202 each, as verl counts."""
    config = copy.deepcopy(recipe)
    roles, rollout = config.actor_rollout_ref, config.actor_rollout_ref.rollout
    roles.actor.fsdp_config.ulysses_sequence_parallel_size = 2
    rollout.log_prob_use_dynamic_bsz, rollout.log_prob_max_token_len_per_gpu = True, limit
    config.sdar.teacher.max_prompt_length = 384
    faults = teacher_faults(config, load_config(config.sdar))
    assert [("404 over 2 ranks; raise it to at least 202" in fault) for fault in faults] == [True] * told


def test_a_teacher_with_another_tokenizer_is_named(recipe, tmp_path):
    other = make_tiny_model(tmp_path / "other")
    with pytest.raises(ConfigError, match=r"sdar\.teacher\.path=.*another tokenizer.*\d+ tokens differ"):
        run_checks(recipe, **{"sdar.teacher.source": "reference", "sdar.teacher.path": str(other)})


def test_a_teacher_with_the_same_tokenizer_needs_no_reference(recipe):
    run_checks(
        recipe,
        **{
            "sdar.teacher.source": "reference",
            "sdar.teacher.path": recipe.actor_rollout_ref.model.path,
            "actor_rollout_ref.actor.use_kl_loss": False,
        },
    )


@pytest.mark.parametrize("source", ["lora_base", "reference"])
def test_an_adapter_makes_a_reference_of_its_base(recipe, source):
    run_checks(
        recipe,
        **{
            "sdar.teacher.source": source,
            "actor_rollout_ref.model.lora_rank": 8,
            "actor_rollout_ref.model.lora.merge": True,
            "actor_rollout_ref.actor.use_kl_loss": False,
        },
    )


@pytest.mark.parametrize("installed", [True, False])
def test_vllms_cpu_build_runs_with_a_worker_that_takes_weights(recipe, monkeypatch, installed):
    from sdar_verl.checks import engine

    monkeypatch.setattr(engine.util, "find_spec", lambda name: installed or None)
    overrides = {
        "actor_rollout_ref.rollout.name": "vllm",
        "actor_rollout_ref.rollout.engine_kwargs.vllm.worker_extension_cls": "a.Worker",
    }
    if installed:
        run_checks(recipe, **overrides)
    else:
        with pytest.raises(ConfigError, match="vllm is not installed"):
            run_checks(recipe, **overrides)


def test_all_faults_are_told_at_once(recipe):
    with pytest.raises(ConfigError) as error:
        run_checks(recipe, **{"sdar.loss.gate": "x", "trainer.v1.trainer_mode": "sync"})
    assert len(str(error.value).splitlines()) == 2


@pytest.mark.parametrize("version", ["0.8.9", "0.10.0", "1.0"])
def test_another_verl_is_refused(version):
    with pytest.raises(ConfigError, match=f"verl {version} is installed"):
        check_verl_version(version)


@pytest.mark.parametrize("version", ["0.9.0", "0.9.1", "0.9.7"])
def test_the_supported_verl_is_accepted(version):
    check_verl_version(version)


SOUND = {
    "Skill-GRPO": {"sdar.context.student": "skills", "sdar.teacher.source": "none", "sdar.loss.coef": 0},
    "a teacher that sees more": {"sdar.context.student": "skills", "sdar.context.sources": ["skills", "sibling"]},
    "a frozen teacher": {"sdar.context.student": "skills", "sdar.teacher.source": "reference"},
    "a pool of another size than the trainer's devices": {
        "trainer.n_gpus_per_node": 4,
        "sdar.teacher.source": "reference",
        "sdar.teacher.placement": "pool",
        "sdar.teacher.pool_gpus_per_node": 8,
        "actor_rollout_ref.actor.use_kl_loss": False,
        "actor_rollout_ref.ref.fsdp_config.fsdp_size": 2,
    },
    "a placebo": {"sdar.context.control": "random_text"},
    "skills against their placebo": {
        "sdar.context.contrast.sources": ["skills"],
        "sdar.context.contrast.control": "shuffled",
    },
    "one row per conversation": {
        "sdar.rollout.rows": "trajectory",
        "sdar.rollout.turn_length": 20,
        "sdar.prompt.history_length": 0,
        "sdar.update.mini_batch_rows": 32,
    },
}


@pytest.mark.parametrize("case", SOUND)
def test_a_sound_choice_passes(recipe, case):
    run_checks(recipe, **SOUND[case])


def test_a_task_without_a_context_is_found_before_the_start(recipe, tmp_path):
    skill = tmp_path / "bank" / "put" / "SKILL.md"
    skill.parent.mkdir(parents=True)
    skill.write_text("---\nname: put\ndescription: d\ntask-types: [pick_and_place_simple]\n---\nPut it there.\n")
    panel = tmp_path / "train.parquet"
    types = ["pick_and_place_simple", "look_at_obj_in_light"]
    write_panel([Task("alfworld", f"game-{i:02d}", types[i == 3], "a mug") for i in range(16)], panel, "train")
    settings = {"data.train_files": str(panel), "sdar.skills.bank": str(skill.parents[1])}
    run_checks(recipe, **settings)
    with pytest.raises(ConfigError) as told:
        run_checks(recipe, **settings, **{"sdar.context.on_empty": "error"})
    assert "find nothing for 1 of 16 tasks of data.train_files: game-03. " in str(told.value)
    assert "sdar.context.on_empty=mask" in str(told.value)


def test_files_that_tasks_need_must_be_there(recipe, tmp_path):
    panel, game = tmp_path / "train.parquet", tmp_path / "game.tw-pddl"
    data = {"game_file": str(game)}
    write_panel([Task("alfworld", f"game-{i:02d}", "pick", "put a mug", data) for i in range(16)], panel, "train")
    with pytest.raises(ConfigError) as told:
        run_checks(recipe, **{"data.train_files": str(panel)})
    assert f"data.train_files={panel}: 1 of the files" in str(told.value)
    assert str(game) in str(told.value)
    game.touch()
    run_checks(recipe, **{"data.train_files": str(panel)})


def test_a_home_folder_is_not_expanded_where_verls_dataset_does_not(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    tasks = [Task("alfworld", f"game-{i:02d}", "pick", "put a mug") for i in range(16)]
    write_panel(tasks, tmp_path / "train.parquet", "train")
    with pytest.raises(ConfigError, match=r"data\.train_files=~/train\.parquet does not exist in .*an absolute path"):
        run_checks(recipe, **{"data.train_files": "~/train.parquet"})
