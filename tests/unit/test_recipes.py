"""The recipes resolve to the paper's settings, and verl's checks and ours accept them without a GPU."""

from __future__ import annotations

import os
import re
import subprocess
from importlib import resources, util
from pathlib import Path

import pytest
import verl  # noqa: F401  loads the plugin, which puts our configs on the search path
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from verl.trainer.ppo.utils import need_critic, need_reference_policy
from verl.utils.config import omega_conf_to_dataclass, validate_config

from sdar_verl.checks.options import option_faults
from sdar_verl.checks.recipe import recipe_faults
from sdar_verl.checks.run import check_run
from sdar_verl.compose import compose_config
from sdar_verl.config import load_config
from sdar_verl.envs.base import Task
from sdar_verl.errors import ConfigError
from sdar_verl.panels import write_panel
from sdar_verl.planner.hardware import find_gpu
from sdar_verl.planner.layout import Layout
from sdar_verl.planner.plan import make_plan
from tests.support.recipe_run import command_of

LOOP = "actor_rollout_ref.rollout.agent.default_agent_loop"
RECIPES = Path(__file__).parents[2] / "recipes"
ENVIRONMENTS = ("alfworld", "search", "webshop")
SCRIPTS = sorted(path for env in ENVIRONMENTS for path in (RECIPES / env).glob("run_qwen*.sh"))
MODELS = {
    "qwen2.5-3b": "Qwen/Qwen2.5-3B-Instruct",
    "qwen2.5-7b": "Qwen/Qwen2.5-7B-Instruct",
    "qwen3-1.7b": "Qwen/Qwen3-1.7B",
    "qwen3-4b": "Qwen/Qwen3-4B",
    "qwen3-8b": "Qwen/Qwen3-8B",
    "qwen3-30b-a3b": "Qwen/Qwen3-30B-A3B",
    "qwen3.5-4b": "Qwen/Qwen3.5-4B",
}
GRPO = ("sdar.loss.coef=0", "sdar.teacher.source=none")

# Settings of the paper and, where it is silent, of its released scripts: those of all environments ...
COMMON = {
    "data.max_response_length": 512,
    "actor_rollout_ref.rollout.n": 8,
    "actor_rollout_ref.rollout.name": "vllm",
    "actor_rollout_ref.rollout.temperature": 1.0,
    "actor_rollout_ref.rollout.agent.default_agent_loop": "sdar_agent",
    "actor_rollout_ref.actor.use_kl_loss": True,
    "actor_rollout_ref.actor.kl_loss_type": "low_var_kl",
    "actor_rollout_ref.actor.entropy_coeff": 0.0,
    "actor_rollout_ref.actor.clip_ratio_low": 0.2,
    "actor_rollout_ref.actor.clip_ratio_high": 0.2,
    "actor_rollout_ref.actor.clip_ratio_c": 3.0,
    "actor_rollout_ref.actor.loss_agg_mode": "token-mean",
    "actor_rollout_ref.actor.ppo_epochs": 1,
    "actor_rollout_ref.actor.optim.lr": 1e-6,
    "actor_rollout_ref.actor.optim.weight_decay": 0.01,
    "actor_rollout_ref.model.enable_gradient_checkpointing": True,
    "algorithm.adv_estimator": "sdar",
    "algorithm.norm_adv_by_std_in_grpo": True,
    "algorithm.use_kl_in_reward": False,
    "sdar.loss.coef": 0.01,
    "sdar.loss.beta": 5.0,
    "sdar.loss.gate": "gap",
    "sdar.loss.objective": "sampled",
    "sdar.teacher.source": "actor",
    "sdar.advantage.group_stats": "episode",
    "reward.num_workers": 0,
    "trainer.total_training_steps": 150,
    "transfer_queue.backend.SimpleStorage.total_storage_size": None,
    "trainer.nnodes": 1,
    "trainer.device": "cuda",
    "trainer.v1.trainer_mode": "sdar",
}
GAMES = {
    **COMMON,
    "data.train_batch_size": 16,
    "actor_rollout_ref.rollout.tensor_model_parallel_size": 2,
    "actor_rollout_ref.actor.kl_loss_coef": 0.01,
    "actor_rollout_ref.actor.optim.lr_warmup_steps_ratio": 0.0,
    "sdar.advantage.invalid_action_penalty": 0.1,
    "sdar.env.options.success_reward": 10.0,
    "sdar.prompt.history_length": 2,
    "sdar.validation.arms": {"student": {"context": "none", "temperature": 0.4}},
}
# ... and of each.
PAPER = {
    "alfworld": {
        **GAMES,
        "data.max_prompt_length": 2048,
        "sdar.env.name": "alfworld",
        "sdar.env.max_steps": 50,
        "sdar.update.mini_batch_rows": 256,
        "trainer.n_gpus_per_node": 8,
    },
    "webshop": {
        **GAMES,
        "data.max_prompt_length": 4096,
        "sdar.env.name": "webshop",
        "sdar.env.max_steps": 15,
        "sdar.update.mini_batch_rows": 64,
        "trainer.n_gpus_per_node": 2,
    },
    "search": {
        **COMMON,
        "data.train_batch_size": 128,
        "data.max_prompt_length": 4096,
        "actor_rollout_ref.rollout.tensor_model_parallel_size": 1,
        "actor_rollout_ref.actor.kl_loss_coef": 0.001,
        "actor_rollout_ref.actor.optim.lr_warmup_steps": -1,  # a number here would go before the ratio
        "actor_rollout_ref.actor.optim.lr_warmup_steps_ratio": 0.1,
        "sdar.advantage.invalid_action_penalty": 0.01,
        "sdar.env.name": "search",
        "sdar.env.max_steps": 4,
        "sdar.env.options.success_reward": 1.0,
        "sdar.prompt.history_length": 4,
        "sdar.update.mini_batch_rows": 256,
        "sdar.validation.arms": {"student": {"context": "none", "temperature": 0.0}},
        "trainer.n_gpus_per_node": 4,
    },
}


@pytest.fixture(scope="module", params=PAPER)
def env(request) -> str:
    return request.param


TASK_TYPES = {"alfworld": "pick_and_place_simple", "search": "nq", "webshop": "fashion"}


@pytest.fixture(scope="module")
def panels(env, tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("panels")
    files = {"train_files": folder / "train.parquet", "val_files": folder / "validation.parquet"}
    for file in files.values():
        tasks = [Task(env, f"task-{i:03d}", TASK_TYPES[env], "do something") for i in range(128)]
        write_panel(tasks, file, file.stem)
    overrides = [f"data.{option}={file}" for option, file in files.items()]
    if env == "search":
        (folder / "corpus.jsonl").write_text('{"id": "1", "contents": "A passage."}\n')
        overrides.append(f"sdar.env.options.retriever={folder / 'corpus.jsonl'}")
    return overrides


@pytest.fixture(scope="module")
def compose_recipe():
    def composed(env, *overrides):
        # Each by itself: what composes a config in between ends the one that is open.
        with initialize_config_module("verl.trainer.config", version_base=None):
            return compose(f"sdar_{env}", overrides=list(overrides))

    return composed


@pytest.fixture(scope="module")
def recipe(env, compose_recipe):
    return lambda *overrides: compose_recipe(env, *overrides)


def faults(config) -> list[str]:
    try:
        check_run(config, load_config(config.sdar))
    except ConfigError as error:
        return str(error).splitlines()
    return []


def test_every_shipped_model_is_tested():
    folder = resources.files("sdar_verl.hydra_configs") / "model"
    assert {Path(str(file)).stem for file in folder.iterdir()} == set(MODELS)


@pytest.mark.parametrize("model", MODELS)
def test_settings_are_the_papers(env, recipe, model):
    config = recipe(f"model={model}")
    resolved = {name: OmegaConf.select(config, name) for name in PAPER[env]}
    resolved = {
        name: OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
        for name, value in resolved.items()
    }
    assert resolved == PAPER[env]
    assert config.actor_rollout_ref.model.path == MODELS[model]
    thinking = config.data.apply_chat_template_kwargs.get("enable_thinking")
    assert thinking is (False if model.startswith("qwen3") else None)


@pytest.mark.parametrize("overrides", [(), GRPO], ids=["sdar", "grpo"])
@pytest.mark.parametrize("model", MODELS)
def test_verl_and_we_accept_it_up_to_the_missing_gpu_stack(recipe, panels, model, overrides):
    config = recipe(f"model={model}", *panels, *overrides)
    found = faults(config)
    # A cluster has both.
    expected = [] if util.find_spec("vllm") else ["actor_rollout_ref.rollout.name=vllm"]
    expected += [] if util.find_spec("flash_attn") else ["flash-attn is not installed"]
    assert [fault.split(",")[0] for fault in found] == expected
    assert need_reference_policy(config)
    assert not need_critic(config)
    validate_config(config, use_reference_policy=True, use_critic=False)
    for node in ("actor", "rollout"):  # what the workers build; an unknown key ends here
        omega_conf_to_dataclass(config.actor_rollout_ref[node])


def test_panels_that_do_not_exist_are_named(env, recipe):
    found = [fault for fault in faults(recipe()) if fault.startswith("data.")]
    assert [fault.split(" ")[0] for fault in found] == [
        f"data.train_files=data/{env}/train.parquet",
        f"data.val_files=data/{env}/validation.parquet",
    ]


def test_the_same_recipe_is_sound_on_a_cpu(recipe, panels):
    assert faults(recipe("hardware=cpu", *panels)) == []


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_scripts_are_thin_and_compose(compose_recipe, script, tmp_path):
    env = script.parent.name
    command = command_of(script, tmp_path, "sdar.env.options={success_reward: 5.0}")
    assert command[:4] == ["-m", "verl.trainer.main_ppo", "--config-name", f"sdar_{env}"]
    config = compose_recipe(env, *command[4:])
    assert config.sdar.env.options.success_reward == 5.0, "further arguments are not passed on"
    model, method = script.stem.removeprefix("run_").rsplit("_", 1)
    assert config.actor_rollout_ref.model.path == MODELS[model]
    assert (config.sdar.loss.coef, config.sdar.teacher.source) == {"sdar": (0.01, "actor"), "grpo": (0, "none")}[method]
    assert config.sdar.method == method, "compare tells methods apart by it"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_scripts_fit_on_the_cards_they_ask_for(compose_recipe, script, tmp_path):
    """By the planner's arithmetic, on cards of 80 GB."""
    config = compose_recipe(script.parent.name, *command_of(script, tmp_path)[4:])
    plan = make_plan(Layout.from_config(config, load_config(config.sdar)), find_gpu("h100-80gb"))
    assert plan.faults == []
    told = re.search(r"(\d+) GPUs", script.read_text())
    assert told is None or int(told[1]) == plan.cards


def test_the_script_for_gsm8k_is_verls_with_two_flags(tmp_path):
    command = command_of(RECIPES / "gsm8k" / "run.sh", tmp_path, "algorithm.adv_estimator=rloo")
    assert command[:4] == ["-m", "verl.trainer.main_ppo", "--config-name", "sdar_ppo"]
    config = compose_config("sdar_ppo", command[4:])
    sdar = load_config(config.sdar)
    assert config.actor_rollout_ref.model.path == MODELS["qwen2.5-3b"]
    assert config.algorithm.adv_estimator == "rloo", "further arguments are not passed on"
    assert config.data.train_files.endswith("/data/gsm8k/train.parquet")
    assert (sdar.context.sources, sdar.context.options) == (["column"], {"column": {"path": "extra_info.answer"}})
    told = [f for f in (*option_faults(config, sdar), *recipe_faults(config, sdar)) if "does not exist" not in f]
    assert told == []


TOOL = "actor_rollout_ref.rollout.multi_turn.function_tool_path"


@pytest.mark.parametrize(
    "arguments",
    [
        ["method=opsd"],
        ["method=sdpo"],
        ["method=rlsd"],
        ["method=grpo"],
        [f"{LOOP}=tool_agent", f"{TOOL}={RECIPES}/gsm8k/calculator.py"],
    ],
)
def test_the_script_for_gsm8k_takes_methods_models_and_tools(monkeypatch, tmp_path, arguments):
    monkeypatch.setenv("MODEL", "qwen3-4b")
    config = compose_config("sdar_ppo", command_of(RECIPES / "gsm8k" / "run.sh", tmp_path, *arguments)[4:])
    sdar = load_config(config.sdar)
    assert config.actor_rollout_ref.model.path == MODELS["qwen3-4b"]
    assert config.trainer.experiment_name == f"qwen3-4b-{sdar.method}"
    told = [f for f in (*option_faults(config, sdar), *recipe_faults(config, sdar)) if "does not exist" not in f]
    assert told == []


def test_scripts_do_not_share_a_checkpoint_folder(compose_recipe, tmp_path):
    """With resume_mode=auto, one run would go on from another's weights."""
    configs = [compose_recipe(script.parent.name, *command_of(script, tmp_path)[4:]) for script in SCRIPTS]
    folders = [config.trainer.default_local_dir for config in configs]
    assert len(set(folders)) == len(SCRIPTS) >= 8


def test_every_environment_has_scripts_and_its_readme_names_them(env):
    text = (RECIPES / env / "README.md").read_text()
    scripts = [script for script in SCRIPTS if script.parent.name == env]
    assert scripts
    assert all(script.name in text for script in scripts)


@pytest.mark.parametrize("name", ["run_alfworld.sh", "run_quickstart.sh"])
def test_control_scripts_sweep_and_compare(name, tmp_path):
    """With a stand-in for the command that writes down how it was called, and the parser that would have read it."""
    from sdar_verl.cli import _parser

    bin_, out, calls = tmp_path / "bin", tmp_path / "out", tmp_path / "calls"
    bin_.mkdir()
    (tmp_path / "data").mkdir()
    fake = bin_ / "sdar-verl"
    fake.write_text(f"#!/usr/bin/env bash\n[ $1 = sweep ] && mkdir -p {out}/grpo-0\nprintf '%s\\n' \"$*\" >> {calls}\n")
    fake.chmod(0o755)
    env = {**os.environ, "PATH": f"{bin_}:{os.environ['PATH']}", "SDAR_VENV": str(tmp_path), "SDAR_OUT": str(tmp_path)}
    words = ["bash", str(RECIPES / "controls" / name), str(out), "trainer.test_freq=7"]
    subprocess.run(words, check=True, env=env, cwd=tmp_path)
    (sweep, rest), (compare, _) = (_parser().parse_known_args(line.split()) for line in calls.read_text().splitlines())
    placebo = [method for method in sweep.methods if "+" in method]
    assert placebo == [f"{sweep.methods[1]}+shuffled"] and sweep.methods[0] == "grpo" == compare.baseline
    assert sweep.seeds == [0, 1, 2] and [*sweep.overrides, *rest][-1] == "trainer.test_freq=7"
    assert compare.runs == [f"{out}/grpo-0"]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], 1),
        (["trainer.n_gpus_per_node=2"], 2),
        (["actor_rollout_ref.rollout.nnodes=1", "actor_rollout_ref.rollout.n_gpus_per_node=3"], 4),
        (["sdar.teacher.pool_gpus_per_node=2", "actor_rollout_ref.rollout.nnodes=1"], 4),
    ],
)
def test_on_a_cpu_ray_is_told_of_as_many_devices_as_the_run_asks_for(overrides, expected):
    config = compose_config("sdar_quickstart", overrides)
    assert config.ray_kwargs.ray_init.num_gpus == expected


def test_a_ray_cluster_that_runs_is_told_of_none(monkeypatch):
    """``ray.init`` refuses numbers for a cluster that it joins."""
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    ray = compose_config("sdar_quickstart", ["trainer.nnodes=2"]).ray_kwargs.ray_init
    assert ray.num_gpus is None
    assert ray.num_cpus is None
