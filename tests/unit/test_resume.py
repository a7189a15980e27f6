"""A run claims its checkpoint folder; another experiment's is refused."""

from __future__ import annotations

import copy
import json
import re
import shutil
from importlib import resources

import pytest
from omegaconf import OmegaConf

from sdar_verl.checks.options import _table, find_entry, flat, is_listed, verl_defaults
from sdar_verl.checks.run import _CHECKS
from sdar_verl.compose import compose_config
from sdar_verl.config import SdarConfig
from sdar_verl.errors import ConfigError
from sdar_verl.verl.resume import RUN_FILE, claim_checkpoints, experiment_faults, fingerprint, from_scratch
from tests.support.toy_panel import write_toy_panels
from tests.support.verl_version import IS_VERL_090


def config(folder, mode="auto", **overrides):
    root = OmegaConf.create(
        {
            "sdar": SdarConfig().model_dump(),
            "trainer": {"default_local_dir": str(folder), "resume_mode": mode, "total_training_steps": 10},
            "algorithm": {"adv_estimator": "sdar"},
            "data": {"seed": 0, "train_batch_size": 4, "train_files": str(folder / "train.parquet")},
            "actor_rollout_ref": {
                "model": {"path": "m"},
                "rollout": {"n": 8, "agent": {"default_agent_loop": "sdar_agent"}},
                "actor": {"optim": {"lr": 1e-6}},
            },
        }
    )
    for option, value in overrides.items():
        OmegaConf.update(root, option, value)
    return root


@pytest.fixture(autouse=True)
def panels(tmp_path):
    write_toy_panels(tmp_path)


@pytest.fixture
def folder(tmp_path):
    """A folder with a checkpoint of the default experiment."""
    claim_checkpoints(config(tmp_path))
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("10")
    return tmp_path


def test_the_same_experiment_goes_on(folder):
    claim_checkpoints(config(folder, **{"trainer.total_training_steps": 20, "sdar.env.processes": 9}))


def test_the_teacher_may_move_between_two_runs(folder):
    """Also from a folder whose note still holds such options."""
    note = json.loads((folder / RUN_FILE).read_text())
    (folder / RUN_FILE).write_text(json.dumps({**note, "sdar.teacher.sanity_tolerance": 0.001}))
    claim_checkpoints(config(folder, **{"sdar.teacher.offload": False, "sdar.teacher.sanity_check": False}))
    with pytest.raises(ConfigError, match=r"sdar\.teacher\.ema_decay: None there, 0\.9 here"):
        claim_checkpoints(config(folder, **{"sdar.teacher.ema_decay": 0.9}))


def test_a_bank_and_a_template_are_compared_by_content(tmp_path, panels):
    """Edited in place they are another experiment; copied to another place they are the same one."""
    bank, template = tmp_path / "bank", tmp_path / "mine.jinja"
    (bank / "heat").mkdir(parents=True)
    (bank / "heat" / "SKILL.md").write_text("---\nname: heat\ndescription: d\n---\nUse the microwave.\n")
    template.write_text(resources.files("sdar_verl.rollout").joinpath("templates/alfworld.jinja").read_text())
    used = {"sdar.skills.bank": str(bank), "sdar.prompt.template": str(template)}
    claim_checkpoints(config(tmp_path, **used))
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("10")
    shutil.copytree(bank, tmp_path / "elsewhere")
    claim_checkpoints(config(tmp_path, **used | {"sdar.skills.bank": f"{tmp_path}/elsewhere/"}))
    (bank / "heat" / "SKILL.md").write_text("---\nname: heat\ndescription: d\n---\nUse the oven.\n")
    with pytest.raises(ConfigError, match=r"the content of sdar\.skills\.bank: \w{12} there, \w{12} here"):
        claim_checkpoints(config(tmp_path, **used))
    with template.open("a") as stream:
        stream.write("Think twice.")
    with pytest.raises(ConfigError, match=r"the content of sdar\.prompt\.template: "):
        claim_checkpoints(config(tmp_path, **used | {"sdar.skills.bank": f"{tmp_path}/elsewhere"}))


def test_a_bank_of_the_contrast_and_a_template_of_the_place_are_compared_too(tmp_path, panels):
    bank, place = tmp_path / "bank", tmp_path / "place.jinja"
    (bank / "heat").mkdir(parents=True)
    (bank / "heat" / "SKILL.md").write_text("---\nname: heat\ndescription: d\n---\nUse the microwave.\n")
    place.write_text("{{ prompt }} {{ context }}")
    used = {"sdar.skills.bank": str(bank), "sdar.context.place": str(place), "sdar.context.sources": ["answer"],
            "sdar.context.contrast.sources": ["skills"],
            "actor_rollout_ref.rollout.agent.default_agent_loop": "tool_agent"}  # fmt: skip
    note, recipe = tmp_path / RUN_FILE, config(tmp_path, **used)
    claim_checkpoints(recipe)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("10")
    assert {"sdar.skills.bank (hash)", "sdar.context.place (hash)"} <= {*json.loads(note.read_text())}
    claim_checkpoints(recipe)
    place.write_text("{{ prompt }} Know: {{ context }}")
    with pytest.raises(ConfigError, match=r"the content of sdar\.context\.place: \w{12} there"):
        claim_checkpoints(recipe)


def test_another_panel_is_another_experiment_and_another_place_of_it_is_not(folder):
    moved = folder / "moved" / "train.parquet"
    moved.parent.mkdir()
    shutil.copy(folder / "train.parquet", moved)
    claim_checkpoints(config(folder, **{"data.train_files": [str(moved)]}))
    with pytest.raises(ConfigError, match=r"data\.train_files \(hashes\): \['[0-9a-f]{64}'\] there"):
        claim_checkpoints(config(folder, **{"data.train_files": str(folder / "validation.parquet")}))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("sdar.loss.beta", 1.0),
        ("sdar.context.teachers.weights", [1.0, 3.0]),
        ("sdar.skills.bank", "mine"),
        ("data.seed", 1),
        ("actor_rollout_ref.model.path", "n"),
        ("actor_rollout_ref.actor.entropy_coeff", 0.1),
        ("actor_rollout_ref.rollout.temperature", 0.7),
        ("actor_rollout_ref.rollout.top_p", 0.9),
        ("actor_rollout_ref.model.lora_rank", 8),
        ("actor_rollout_ref.model.override_config.attention_dropout", 0.1),
        ("actor_rollout_ref.actor.policy_loss.loss_mode", "gspo"),
        ("actor_rollout_ref.actor.optim.betas", [0.9, 0.95]),
        ("algorithm.rollout_correction.rollout_is", "token"),
        ("data.shuffle", False),
        ("data.dataloader_num_workers", 3),
        ("data.train_max_samples", 5),
        ("data.max_response_length", 7),
        ("data.apply_chat_template_kwargs.enable_thinking", True),
        ("trainer.v1.trainer_mode", "sdar_colocate_async"),
        ("sdar.context.options.sibling.choice", "first"),
        ("sdar.modules", ["elsewhere"]),
        ("sdar.on_nonfinite", "drop"),
        ("sdar.rollout.turn_length", 9),
    ],
)
def test_another_experiment_is_refused_by_name(folder, option, value):
    with pytest.raises(ConfigError, match=rf"{option}: .*{re.escape(repr(value))} here.*resume_mode=disable"):
        claim_checkpoints(config(folder, **{option: value}))


def test_starting_over_takes_the_folder(folder):
    claim_checkpoints(config(folder, mode="disable", **{"data.seed": 1}))
    claim_checkpoints(config(folder, **{"data.seed": 1}))


def test_a_folder_without_a_checkpoint_is_free(tmp_path):
    claim_checkpoints(config(tmp_path))
    claim_checkpoints(config(tmp_path, **{"data.seed": 1}))
    assert '"data.seed": 1' in (tmp_path / RUN_FILE).read_text()


def test_a_run_that_died_in_its_first_checkpoint_starts_over_and_says_so(tmp_path):
    assert from_scratch(config(tmp_path)) == ""
    (tmp_path / "global_step_2").mkdir()
    assert "global_step_2, but no latest_checkpointed_iteration.txt" in from_scratch(config(tmp_path))
    assert from_scratch(config(tmp_path, mode="disable")) == ""


def test_all_that_may_change_may_change(folder):
    """Every option in that section, set to something else, in the whole config of a recipe."""
    (folder / RUN_FILE).unlink()
    base = whole(folder)
    claim_checkpoints(base)
    changed = copy.deepcopy(base)
    for key, value in flat(OmegaConf.to_container(base, resolve=True)).items():
        if is_listed("may_change", key) and not key.startswith(
            ("data.train_files", "trainer.resume", "trainer.default")
        ):
            OmegaConf.update(changed, key, f"another {value}", force_add=True)
    assert fingerprint(changed) == fingerprint(base)
    claim_checkpoints(changed)


def test_everything_else_in_a_recipes_config_makes_another_experiment(folder):
    """Each option of verl's and ours is compared, or named in ``may_change``, or does nothing."""
    values = flat(OmegaConf.to_container(whole(folder), resolve=True))
    compared = fingerprint(whole(folder))
    for key in values:
        ours = not key.startswith("hydra.") and not key.endswith("_target_")
        entry = find_entry(key)
        ours &= entry is None or entry.status not in ("no_effect", "refused")
        length = key in ("trainer.total_training_steps", "trainer.total_epochs")
        assert (key in compared) == (ours and not length and not is_listed("may_change", key)), key


def test_what_may_change_is_an_option_of_verls_or_ours():
    known = {*verl_defaults(), *flat({"sdar": SdarConfig().model_dump()})}
    for name in _table("may_change"):
        node = name.removesuffix(".*")
        hidden = {"actor_rollout_ref.rollout.custom", "actor_rollout_ref.rollout.enable_sleep_mode", "data.cache_dir",
                  "trainer.remove_previous_ckpt_in_save"}  # fmt: skip
        if IS_VERL_090:
            hidden |= {"trainer.checkpoint_callback_class"}
        assert node in hidden or any(key == node or key.startswith(f"{node}.") for key in known), name


def test_a_longer_run_is_the_same_unless_its_learning_rate_is_another(folder):
    longer = {"trainer.total_training_steps": 20}
    claim_checkpoints(config(folder, **longer))
    for schedule in ({"lr_scheduler_type": "cosine"}, {"lr_warmup_steps_ratio": 0.1}, {"warmup_style": "cosine"}):
        options = {f"actor_rollout_ref.actor.optim.{name}": value for name, value in schedule.items()}
        (folder / RUN_FILE).unlink()
        claim_checkpoints(config(folder, **options))
        with pytest.raises(ConfigError, match=r"trainer\.total_training_steps: 10 there, 20 here"):
            claim_checkpoints(config(folder, **options, **longer))
    (folder / RUN_FILE).unlink()
    fixed = {
        "actor_rollout_ref.actor.optim.lr_warmup_steps_ratio": 0.1,
        "actor_rollout_ref.actor.optim.lr_warmup_steps": 5,
    }
    claim_checkpoints(config(folder, **fixed))
    claim_checkpoints(config(folder, **fixed, **longer))


def test_an_option_that_a_later_version_brings_has_had_its_default(folder):
    note = json.loads((folder / RUN_FILE).read_text())
    del note["sdar.on_nonfinite"]
    (folder / RUN_FILE).write_text(json.dumps(note))
    claim_checkpoints(config(folder, **{"algorithm.gamma": 1.0, "actor_rollout_ref.rollout.top_p": 1}))
    with pytest.raises(ConfigError, match=r"sdar\.on_nonfinite: None there, 'drop' here"):
        del note["algorithm.adv_estimator"]
        (folder / RUN_FILE).write_text(json.dumps(note))
        claim_checkpoints(config(folder, **{"sdar.on_nonfinite": "drop"}))


def test_an_option_that_is_no_longer_set_is_a_difference(folder):
    claim_checkpoints(config(folder, mode="disable", **{"sdar.env.options.colour": "red"}))
    (folder / "latest_checkpointed_iteration.txt").write_text("10")
    with pytest.raises(ConfigError, match=r"sdar\.env\.options\.colour: 'red' there, None here"):
        claim_checkpoints(config(folder))


def test_what_differs_is_told_before_ray_starts(folder):
    """By the checks that the driver makes, not only by the trainer in its process."""
    other = config(folder, **{"data.seed": 1})
    (fault,) = experiment_faults(other, SdarConfig())
    assert "data.seed: 0 there, 1 here" in fault and f"remove {folder / RUN_FILE}" in fault
    assert experiment_faults in _CHECKS
    many = config(folder, **{f"sdar.env.options.o{i}": i for i in range(20)})
    assert "; and 8 more" in experiment_faults(many, SdarConfig())[0]


def test_a_run_that_started_over_and_died_does_not_go_on_from_the_other(folder):
    """Without a checkpoint of its own yet, the same command again starts from scratch."""
    other = {"data.seed": 1}
    claim_checkpoints(config(folder, mode="disable", **other))
    assert not (folder / "latest_checkpointed_iteration.txt").exists()
    claim_checkpoints(config(folder, **other))


def test_a_run_that_starts_itself_over_keeps_its_checkpoints_until_it_saves(folder):
    claim_checkpoints(config(folder, mode="disable"))
    assert (folder / "latest_checkpointed_iteration.txt").read_text() == "10"


def test_notes_and_checkpoints_lie_in_one_folder(tmp_path, monkeypatch):
    """Relative to where the process runs, as verl's; a tilde is refused before."""
    monkeypatch.chdir(tmp_path)
    run = config(tmp_path)
    run.trainer.default_local_dir = "ck"
    claim_checkpoints(run)
    assert (tmp_path / "ck" / RUN_FILE).is_file()


def whole(folder):
    overrides = [f"data.train_files={folder}/train.parquet", f"trainer.default_local_dir={folder}"]
    recipe = compose_config("sdar_quickstart", overrides)
    OmegaConf.set_struct(recipe, False)
    return recipe
