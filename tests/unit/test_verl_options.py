"""verl's options, all of them: the table knows the installed verl's schema, and each kind of fault is told by name."""

from __future__ import annotations

import copy
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from sdar_verl.checks import options
from sdar_verl.checks.data import data_faults
from sdar_verl.checks.notes import run_notes
from sdar_verl.checks.options import (
    choice_faults,
    find_entry,
    flat,
    option_faults,
    path_faults,
    table,
    type_faults,
)
from sdar_verl.checks.panel_tasks import panel_tasks
from sdar_verl.checks.run import check_run
from sdar_verl.compose import compose_config
from sdar_verl.config import load_config
from sdar_verl.errors import ConfigError
from tests.support.toy_panel import write_toy_panels

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ("sdar_alfworld", "sdar_webshop", "sdar_search", "sdar_quickstart")
# Read by verl although its schema does not name them, or of another version than the installed one.
HIDDEN = {
    "actor_rollout_ref.actor.fsdp_config.mixed_precision.*",
    "actor_rollout_ref.ref.fsdp_config.mixed_precision.*",
    "actor_rollout_ref.rollout.custom.*",
    "actor_rollout_ref.rollout.enable_sleep_mode",
    "actor_rollout_ref.actor.use_rollout_log_probs",
    "actor_rollout_ref.model.target_parameters",
    "data.cache_dir",
    "data.filter_prompts",
    "data.need_tools_kwargs",
    "data.chat_template_func",
    "trainer.remove_previous_ckpt_in_save",
    "trainer.wandb_proxy",
    "actor_rollout_ref.actor.checkpoint.save_lora_only",
    "actor_rollout_ref.rollout.agent.agent_loop_manager_class",
    "actor_rollout_ref.rollout.moe_tensor_parallel_size",
    "actor_rollout_ref.rollout.repetition_penalty",
    "actor_rollout_ref.rollout.server.*",
    "algorithm.gdpo_reward_keys",
    "algorithm.gdpo_reward_weights",
}


@pytest.fixture(scope="module")
def schema():
    """verl's own config, composed by Hydra: option -> default, interpolations unresolved."""
    return flat(OmegaConf.to_container(compose_config("ppo_trainer"), resolve=False))


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    panels = write_toy_panels(folder)
    overrides = [*panels, f"trainer.default_local_dir={folder}/ck", "sdar.modules=[tests.support.toy_env]"]
    return compose_config("sdar_quickstart", overrides)


def changed(config, **values):
    config = copy.deepcopy(config)
    OmegaConf.set_struct(config, False)
    for option, value in values.items():
        OmegaConf.update(config, option, value)
    return config


# ---------------------------------------------------------------- the table


def test_somebody_has_looked_at_every_option_of_the_installed_verl(schema):
    unknown = [key for key in schema if not key.endswith("_target_") and find_entry(key) is None]
    assert unknown == [], f"verl {version('verl')} has options that verl_options.yaml does not know"


def test_the_defaults_that_are_read_are_those_of_the_schema(schema):
    assert options.verl_defaults() == {key: value for key, value in schema.items() if key != "model_engine"}


def test_an_option_of_a_later_verl_is_not_passed_over():
    for key in (
        "trainer.new",
        "actor_rollout_ref.actor.new",
        "actor_rollout_ref.rollout.new",
        "data.new",
        "algorithm.new",
    ):
        assert find_entry(key) is None


def test_what_works_is_listed_by_name_unless_verl_takes_any_name_there(schema):
    """A later option must not slip in under a star; profilers are verl's own, and a model engine is one word."""
    free = {key for key, value in schema.items() if value == {}}
    starred = {key.removesuffix(".*") for key, entry in table().items() if entry.status in ("works", "verls", "needs")
               and key.endswith(".*")}  # fmt: skip
    held = {node for node in starred if any(key.startswith(f"{node}.") for key in schema)} - free
    assert all("profiler" in node or node.startswith("ray_kwargs.ray_init") for node in held), held


def test_the_table_names_nothing_else(schema):
    names = {key.removesuffix(".*") for key in table() if key not in HIDDEN}
    stale = {name for name in names if not any(key == name or key.startswith(f"{name}.") for key in schema)}
    if version("verl").startswith("0.9.1"):
        assert stale == {
            "actor_rollout_ref.actor.router_replay",
            "actor_rollout_ref.ref.router_replay",
            "data.continuous_token",
        }, "of verl 0.9.0"


def test_tests_that_are_named_exist():
    named = {entry.why for entry in table().values() if entry.status == "works"}
    assert named and all((ROOT / test).is_file() for test in named)


def test_an_option_has_one_status():
    sections = yaml.safe_load((ROOT / "sdar_verl" / "checks" / "verl_options.yaml").read_text(encoding="utf-8"))
    names = [
        f"{node}.{name}"
        for status in ("works", "verls", "needs", "recipes", "no_effect", "refused")
        for nodes in sections[status].values()
        for node, listed in nodes.items()
        for name in listed.split()
    ]
    assert sorted(names) == sorted(set(names))


@pytest.mark.parametrize("hardware", ["8gpu", "4gpu", "2gpu", "cpu"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_no_recipe_has_such_a_fault(recipe, hardware):
    config = compose_config(recipe, [f"hardware={hardware}"])
    sdar = load_config(config.sdar)
    assert [*option_faults(config, sdar), *type_faults(config, sdar), *path_faults(config, sdar)] == []


# ---------------------------------------------------------------- faults

FAULTS = {
    "actor_rollout_ref.actor.checkpoint.async_save": (
        True,
        "is not supported: verl then does not say which checkpoint",
    ),
    "reward.custom_reward_function.path": ("r.py", "has no effect: the environment pays the reward"),
    "custom_reward_function.path": ("r.py", "is not supported: verl's v1 trainer reads it under reward alone"),
    "reward_model.reward_manager": ("dapo", "reward.custom_reward_function.path, reward.reward_manager.name"),
    "reward.reward_model.enable": (True, "the environment pays the reward"),
    "reward.reward_manager.name": ("dapo", "the environment pays the reward"),
    "actor_rollout_ref.actor.grad_clip": (0.1, "actor_rollout_ref.actor.optim.clip_grad"),
    "actor_rollout_ref.actor.clip_ratio": (0.1, "clip_ratio_low and clip_ratio_high"),
    "actor_rollout_ref.rollout.val_kwargs.temperature": (0.7, "sdar.validation.arms"),
    "actor_rollout_ref.rollout.response_length": (99, "set data.max_prompt_length and data.max_response_length"),
    "actor_rollout_ref.rollout.multi_turn.max_assistant_turns": (3, "turns, tools and their limits are sdar.env's"),
    "actor_rollout_ref.model.lora.rank": (8, "is not supported: verl's FSDP engine reads model.lora_rank"),
    "actor_rollout_ref.model.lora.merge": (True, "has no effect without actor_rollout_ref.model.lora_rank"),
    "actor_rollout_ref.model.mtp.enable": (True, "is not supported"),
    "actor_rollout_ref.actor.fsdp_config.qat.enable": (True, "is not supported"),
    "critic.optim.lr": (1e-6, "there is none"),
    "distillation.teacher_key": ("x", "sdar.teacher"),
    "data.truncation": ("left", "prompts are made turn by turn"),
    "data.custom_cls.path": ("d.py", "panels are read by verl's own dataset"),
    "algorithm.lam": (0.95, "has no effect"),
    "algorithm.kl_ctrl.horizon": (5, "has no effect without algorithm.use_kl_in_reward"),
    "algorithm.filter_groups.enable": (True, "is not supported"),
    "trainer.critic_warmup": (3, "is not supported"),
    "trainer.default_hdfs_dir": ("hdfs://x", "does not copy checkpoints"),
    "trainer.del_local_ckpt_after_load": (True, "deletes what it resumes from"),
    "trainer.v1.separate_async.parameter_sync_step": (2, "without trainer.v1.trainer_mode=sdar_separate_async"),
    "trainer.v1.sampler.max_off_policy_threshold": (2, "sdar_colocate_async or sdar_separate_async"),
    "actor_rollout_ref.hybrid_engine": (False, "without trainer.v1.trainer_mode=sdar_separate_async"),
    "skip.rollout.enable": (True, "is not supported"),
    "trainer.resume_from_path": ("/x/global_step_2", "has no effect without trainer.resume_mode=resume_path"),
    "trainer.sav_freq": (5, "; is trainer.save_freq meant?"),
    "data.train_batchsize": (5, "; is data.train_batch_size meant?"),
    "actor_rollout_ref.ref.entropy_coef": (0.1, "verl has no such option, or nothing in a run reads it"),
    "actor_rollout_ref.rollout.repetition_penalty": (1.1, "verl's agent loops always ask for 1"),
    "actor_rollout_ref.rollout.limit_images": (2, "verl has no such option, or nothing in a run reads it"),
    "actor_rollout_ref.model.load_tokenizer": (False, "verl has no such option, or nothing in a run reads it"),
}


@pytest.mark.parametrize("option", FAULTS)
def test_what_does_nothing_or_breaks_a_run_is_told(quickstart, option):
    value, said = FAULTS[option]
    (fault,) = option_faults(changed(quickstart, **{option: value}), load_config(quickstart.sdar))
    assert fault.startswith((f"{option}={value} ", f"{option}={value}: "))
    assert said in fault


def test_a_switch_makes_its_options_work(quickstart):
    for values in (
        {"algorithm.use_kl_in_reward": True, "algorithm.kl_ctrl.horizon": 5},
        {"trainer.v1.trainer_mode": "sdar_separate_async", "trainer.v1.separate_async.parameter_sync_step": 2},
        {"trainer.v1.trainer_mode": "somebodys", "trainer.v1.separate_async.parameter_sync_step": 2},
    ):
        assert option_faults(changed(quickstart, **values), load_config(quickstart.sdar)) == []


def test_a_default_that_follows_another_option_is_none_of_the_users(quickstart):
    """Also where verl has resolved the config before the trainer checks it."""
    config = changed(quickstart, **{"actor_rollout_ref.rollout.n": 6, "data.max_response_length": 33,
                                    "actor_rollout_ref.model.use_remove_padding": True})  # fmt: skip
    OmegaConf.resolve(config)
    assert option_faults(config, load_config(quickstart.sdar)) == []
    assert config.critic.rollout_n == 6 and config.actor_rollout_ref.rollout.response_length == 33


CHOICES = {
    "trainer.resume_mode": ["atuo", None],
    "trainer.logger": [["console", "wandbb"], "csv"],
    "actor_rollout_ref.actor.checkpoint.load_contents": [["modle"]],
    "actor_rollout_ref.actor.optim.lr_scheduler_type": ["linear"],
    "actor_rollout_ref.actor.kl_loss_type": ["k4"],
    "trainer.v1.sampler.max_off_policy_strategy": ["dorp", None],
    "algorithm.rollout_correction.loss_type": ["ppo_clp"],
}


@pytest.mark.parametrize("option", CHOICES)
def test_a_word_is_one_that_verl_knows(quickstart, option):
    for value in CHOICES[option]:
        (fault,) = choice_faults(changed(quickstart, **{option: value}), load_config(quickstart.sdar))
        assert fault.startswith(f"{option}={'null' if value is None else value} must be of ")


def test_the_words_are_verls_own():
    from verl.utils.tracking import Tracking

    assert set(Tracking.supported_backend) | {"tracking"} == set(options._table("choices")["trainer.logger"].split())


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"algorithm.adv_estimator": "gae"}, "needs a critic, and there is none"),
        ({"algorithm.adv_estimator": "groop"}, "algorithm.adv_estimator=groop: verl knows "),
        ({"actor_rollout_ref.actor.policy_loss.loss_mode": "vanila"}, "loss_mode=vanila: verl knows "),
        ({"algorithm.gamma": 0.9}, "algorithm.gamma=0.9 has no effect with algorithm.adv_estimator=sdar"),
    ],
)
def test_names_that_verl_looks_up_late_are_looked_up_early(quickstart, values, said):
    with pytest.raises(ConfigError, match=said):
        check_run(changed(quickstart, **values), load_config(quickstart.sdar))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"betas": [0.9, 1.5]}, "betas=[0.9, 1.5]"),
        ({"betas": [0.9]}, "betas=[0.9]"),
        ({"optimizer": "AdamX"}, "optimizer=AdamX"),
        ({"optimizer_impl": "torch.optimm"}, "optimizer_impl=torch.optimm"),
        ({"optimizer_impl": "bitsandbytess.optim"}, "optimizer_impl=bitsandbytess.optim: no such package here"),
        ({"override_optimizer_config": {"momentumm": 1}}, "momentumm"),
    ],
)
def test_an_optimizer_that_cannot_be_made_is_told_early(quickstart, values, said):
    config = changed(quickstart, **{f"actor_rollout_ref.actor.optim.{name}": value for name, value in values.items()})
    with pytest.raises(ConfigError) as raised:
        check_run(config, load_config(quickstart.sdar))
    assert said in str(raised.value) and str(raised.value).startswith("actor_rollout_ref.actor.optim")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"tokenizer_path": "/no/such/tokenizer"}, "tokenizer_path=/no/such/tokenizer: there is no model here"),
        ({"hf_config_path": "/no/such/config"}, "hf_config_path=/no/such/config: there is no model here"),
        ({"external_lib": "no_such_lib.models"}, "external_lib=no_such_lib.models: there is no module no_such_lib"),
        ({"external_lib": ["json", "no_such_lib"]}, "there is no module no_such_lib here"),
    ],
)
def test_parts_of_a_model_that_are_not_here_are_told_early(quickstart, values, said):
    config = changed(quickstart, **{f"actor_rollout_ref.model.{name}": value for name, value in values.items()})
    with pytest.raises(ConfigError, match=said):
        check_run(config, load_config(quickstart.sdar))


def test_a_mini_batch_in_prompts_beside_one_in_rows_is_told(quickstart):
    option = "actor_rollout_ref.actor.ppo_mini_batch_size"
    with pytest.raises(ConfigError, match=f"{option}=2 has no effect with sdar.update.mini_batch_rows="):
        check_run(changed(quickstart, **{option: 2}), load_config(quickstart.sdar))
    by_prompts = changed(quickstart, **{option: 2, "sdar.update.mini_batch_rows": None})
    check_run(by_prompts, load_config(by_prompts.sdar))


NUMBERS = {
    "actor_rollout_ref.rollout.temperature": [0, -1, None, "hot", float("inf"), float("nan")],
    "actor_rollout_ref.rollout.top_p": [0, 1.5, None],
    "actor_rollout_ref.rollout.n": [0, None, 2.5, 4.0, "4"],
    "actor_rollout_ref.rollout.gpu_memory_utilization": [0, 60],
    "actor_rollout_ref.rollout.max_model_len": [0],
    "actor_rollout_ref.actor.ppo_mini_batch_size": [0],
    "actor_rollout_ref.actor.clip_ratio_c": [0, 1.0],
    "actor_rollout_ref.actor.entropy_coeff": [None, "1e-3x"],
    "actor_rollout_ref.actor.optim.lr": [None, -1e-6, "1e-6 "],
    "data.max_prompt_length": [None, 0],
    "data.max_response_length": [None, -1],
    "data.train_batch_size": [0, None, 2.5],
    "data.dataloader_num_workers": [-1, 2.5],
    "data.train_max_samples": [None, 0],
    "data.seed": ["abc", 1.5],
    "data.shuffle": [None, "yes"],
    "trainer.n_gpus_per_node": [0, None, "auto"],
    "actor_rollout_ref.actor.optim.lr_warmup_steps": [0.1],
    "actor_rollout_ref.actor.optim.lr_warmup_steps_ratio": [10, -0.1],
    "actor_rollout_ref.actor.optim.min_lr_ratio": [2],
    "actor_rollout_ref.actor.loss_scale_factor": [0],
    "actor_rollout_ref.actor.fsdp_config.fsdp_size": [0],
    "actor_rollout_ref.model.lora_alpha": [0],
    "actor_rollout_ref.model.lora_rank": [-1, 1.5],
    "algorithm.kl_ctrl.kl_coef": [-0.1],
    "transfer_queue.backend.SimpleStorage.num_data_storage_units": [0],
    "trainer.nnodes": [0],
    "trainer.v1.sampler.max_off_policy_threshold": [0, -1, 1.5],
    "actor_rollout_ref.rollout.nnodes": [-1, 0.5],
    "actor_rollout_ref.rollout.n_gpus_per_node": [-1, 2.5],
    "trainer.save_freq": [None, 1.5],
    "trainer.test_freq": [None, "never"],
    "trainer.total_training_steps": [0, -1, "all"],
    "trainer.total_epochs": [0, None],
    "trainer.val_before_train": [None, 1],
    "actor_rollout_ref.actor.checkpoint.save_contents": [True, None, "model"],
    "actor_rollout_ref.actor.checkpoint.load_contents": [7],
    "actor_rollout_ref.model.external_lib": [1.5],
}


@pytest.mark.parametrize("option", NUMBERS)
def test_a_value_is_of_its_kind_before_anything_reads_it(quickstart, option):
    sdar = load_config(quickstart.sdar)
    for value in NUMBERS[option]:
        config = changed(quickstart, **{option: value})
        shown = "null" if value is None else value
        assert any(fault.startswith(f"{option}={shown} must be ") for fault in type_faults(config, sdar)), value
        with pytest.raises(ConfigError, match="must be"):
            check_run(config, sdar)


@pytest.mark.parametrize(
    ("option", "value", "right"),
    [
        ("actor_rollout_ref.model.path", None, "a model's folder or its name on the hub"),
        ("trainer.default_local_dir", None, "a folder"),
        ("trainer.project_name", "", "a name"),
    ],
)
def test_a_text_that_is_always_read_is_there(quickstart, option, value, right):
    config, sdar = changed(quickstart, **{option: value}), load_config(quickstart.sdar)
    assert any(fault.endswith(f" must be {right}") and option in fault for fault in type_faults(config, sdar))
    with pytest.raises(ConfigError, match=f"{option}=.* must be {right}"):
        check_run(config, sdar)


def test_a_node_set_to_nothing_is_told(quickstart):
    config = changed(quickstart, trainer=None)
    faults = type_faults(config, load_config(quickstart.sdar))
    assert "trainer=null is a whole node of verl's; leave it out, or set options within it" in faults


def test_numbers_that_are_fine_are_left_alone(quickstart):
    fine = {"trainer.total_training_steps": None, "trainer.save_freq": -1, "actor_rollout_ref.rollout.temperature": 0.7,
            "data.train_max_samples": -1, "trainer.experiment_name": 7, "data.seed": None,
            "actor_rollout_ref.actor.optim.lr": 0}  # fmt: skip
    assert type_faults(changed(quickstart, **fine), load_config(quickstart.sdar)) == []


@pytest.mark.parametrize(
    "option",
    ["trainer.default_local_dir", "trainer.resume_from_path", "actor_rollout_ref.model.path", "data.train_files",
     "sdar.skills.bank", "sdar.prompt.template", "sdar.teacher.path", "trainer.rollout_data_dir"],
)  # fmt: skip
def test_a_tilde_is_nobodys_home(quickstart, option):
    (fault,) = path_faults(changed(quickstart, **{option: "~/here"}), load_config(quickstart.sdar))
    assert fault == f'{option}=~/here: verl does not expand ~; write "$HOME/here", or the path from / on'
    files = changed(quickstart, **{option: ["/a", "~/b"]})
    assert '"$HOME/b"' in path_faults(files, load_config(quickstart.sdar))[0]


@pytest.mark.parametrize("place", ["s3://bucket/run", "hdfs://name/run"])
def test_checkpoints_go_to_a_folder_and_from_there_to_a_bucket(quickstart, place):
    (fault,) = path_faults(changed(quickstart, **{"trainer.default_local_dir": place}), None)
    assert fault.startswith(f"trainer.default_local_dir={place}: verl writes checkpoints into a folder")
    assert f"sdar.cloud.mirror={place}" in fault


@pytest.mark.parametrize(
    ("option", "value"),
    [("actor_rollout_ref.actor.loss_agg_mode", "mean"), ("actor_rollout_ref.rollout.expert_parallel_size", 3)],
)
def test_what_verls_own_classes_refuse_is_told_before_the_start(quickstart, option, value):
    node = option.rpartition(".")[0]
    with pytest.raises(ConfigError, match=f"{node}: verl does not take these settings"):
        check_run(changed(quickstart, **{option: value}), load_config(quickstart.sdar))


def test_a_path_from_the_environment_is_looked_at_too(quickstart, monkeypatch):
    monkeypatch.setenv("WHERE", "~/ck")
    (fault,) = path_faults(changed(quickstart, **{"trainer.default_local_dir": "${oc.env:WHERE}"}), None)
    assert fault.startswith("trainer.default_local_dir=~/ck: verl does not expand ~")


def test_the_config_that_hydra_hands_to_its_callback_is_read():
    """With Hydra's own node in it, which is not whole, and a node of the user's that an option follows."""
    import verl  # noqa: F401  loads the plugin
    from hydra import compose, initialize_config_module

    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("sdar_quickstart", overrides=["+mine.lr=0.5", "actor_rollout_ref.actor.optim.lr=${mine.lr}"],
                         return_hydra_config=True)  # fmt: skip
    assert "hydra" in config
    values = options.options_of(config)
    assert values["actor_rollout_ref.actor.optim.lr"] == 0.5
    assert not any(key.startswith(("hydra", "mine")) for key in values)
    sdar = load_config(config.sdar)
    assert option_faults(config, sdar) + type_faults(config, sdar) + path_faults(config, sdar) == []


# ---------------------------------------------------------------- steps and epochs


def test_epochs_must_be_enough_for_the_steps(quickstart):
    config = changed(quickstart, **{"trainer.total_training_steps": 6, "trainer.total_epochs": 1})
    sdar = load_config(config.sdar)
    tasks = len(panel_tasks(config, "train_files"))
    steps = tasks // config.data.train_batch_size
    assert 0 < steps < 6
    (fault,) = data_faults(config, sdar)
    assert f"trainer.total_epochs=1 ends the run after {steps} steps, before trainer.total_training_steps=6" in fault
    needed = -(-6 // steps)
    assert f"Set total_epochs to at least {needed}" in fault
    assert data_faults(changed(config, **{"trainer.total_epochs": needed}), sdar) == []
    assert data_faults(changed(config, **{"trainer.total_training_steps": None}), sdar) == []


def test_a_panel_that_is_cut_below_a_batch_is_told(quickstart):
    batch = quickstart.data.train_batch_size
    config = changed(quickstart, **{"data.train_max_samples": batch - 1})
    (fault,) = data_faults(config, load_config(config.sdar))
    assert f"data.train_batch_size={batch}, but data.train_max_samples={batch - 1} leaves {batch - 1} tasks" in fault


def test_files_that_are_no_list_are_told(quickstart):
    with pytest.raises(ConfigError, match=r"data\.train_files=3 does not exist"):
        check_run(changed(quickstart, **{"data.train_files": 3}), load_config(quickstart.sdar))


def test_a_warm_up_over_the_whole_run_and_checkpoints_of_nothing_are_noted(quickstart):
    sdar, steps = load_config(quickstart.sdar), quickstart.trainer.total_training_steps
    (note,) = run_notes(changed(quickstart, **{"actor_rollout_ref.actor.optim.lr_warmup_steps": steps}), sdar)
    assert f"lr_warmup_steps={steps}: the learning rate rises over all of trainer.total_training_steps={steps}" in note
    (note,) = run_notes(changed(quickstart, **{"actor_rollout_ref.actor.checkpoint.save_contents": []}), sdar)
    assert "save_contents=[] leaves out model, optimizer, extra" in note


def test_notes_before_the_start(quickstart, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    sdar = load_config(quickstart.sdar)
    assert run_notes(quickstart, sdar) == []
    (note,) = run_notes(changed(quickstart, **{"actor_rollout_ref.rollout.top_p": 0.9}), sdar)
    assert "rollout.top_p=0.9" in note and "gap" in note
    (note,) = run_notes(changed(quickstart, **{"actor_rollout_ref.rollout.top_k": 20}), sdar)
    assert "rollout.top_k=20" in note
    (note,) = run_notes(changed(quickstart, **{"trainer.total_epochs": 30}), sdar)
    assert "trainer.total_epochs=30 has no effect" in note
    contents = {"actor_rollout_ref.actor.checkpoint.save_contents": ["hf_model"], "trainer.save_freq": 5}
    (note,) = run_notes(changed(quickstart, **contents), sdar)
    assert "leaves out model, optimizer, extra" in note
    (note,) = run_notes(changed(quickstart, **{"trainer.max_actor_ckpt_to_keep": 1}), sdar)
    assert "keep 2" in note
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    (note,) = run_notes(changed(quickstart, **{"trainer.default_local_dir": "ck"}), sdar)
    assert "absolute path" in note
