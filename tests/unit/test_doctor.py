"""The doctor: a sound set-up has no red line, and each planted fault is named with its remedy."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from sdar_verl.checks.skills import spread
from sdar_verl.cli import main
from sdar_verl.doctor import command, installation
from sdar_verl.doctor.build_tools import Missing
from sdar_verl.doctor.findings import Finding, as_json, as_text, exit_status
from sdar_verl.doctor.installation import check_installation
from sdar_verl.doctor.machine import PACKAGES, Machine
from sdar_verl.doctor.run_checks import check_config
from sdar_verl.envs import registry
from sdar_verl.envs.base import Task
from sdar_verl.panels import write_panel
from tests.support.chatml import qwen_like_tokenizer
from tests.support.toy_panel import write_toy_panels

KNOWN = {
    "plugin": True,
    "trainer_modes": ["sdar", "sync"],
    "estimators": ["grpo", "sdar"],
    "agent_loops": ["sdar_agent"],
}
VERSIONS = dict.fromkeys(PACKAGES, "1.0") | {
    "verl": "0.9.1",
    "torch": "2.11.0+cu130",
    "vllm": "0.24.0",
    "flash-attn": "2.8.3",
    "transformers": "5.9.0",
    "tensordict": "0.10.0",
    "TransferQueue": "0.1.10",
}
PINS = {
    "torch": "==2.11.0",
    "vllm": "==0.24.0",
    "flash-attn": "==2.8.3",
    "transformers": "!=5.6.0,<5.11,>=5.5.3",
    "tensordict": "!=0.9.0,<=0.10.0,>=0.8.0",
}
CLUSTER = Machine((3, 11), VERSIONS, PINS, "13.0", gpus=8, gpu_files=True, fresh=KNOWN, worker=KNOWN)
LAPTOP = replace(
    CLUSTER, cuda_build=None, gpus=0, gpu_files=False, versions=VERSIONS | {"vllm": None, "flash-attn": None}
)


def without(package: str, version: str | None = None) -> dict:
    return {"versions": VERSIONS | {package: version}}


def levels(findings: list[Finding]) -> set[str]:
    return {finding.level for finding in findings}


# ---------------------------------------------------------------- installation


@pytest.mark.parametrize("machine", [CLUSTER, LAPTOP], ids=["cluster", "laptop"])
def test_a_sound_installation_is_green(machine: Machine) -> None:
    findings = check_installation(machine)
    assert levels(findings) == {"ok"}, as_text(findings)


INSTALLATION_FAULTS = {
    "python": ({"python": (3, 9)}, "fail", ["3.9 is not supported", "3.10 to 3.12"]),
    "newer python": ({"python": (3, 13)}, "fail", ["3.13 is not supported"]),
    "no verl": (without("verl"), "fail", ["not installed", 'pip install "verl>=0.9.0,<0.10"']),
    "old verl": (without("verl", "0.8.0"), "fail", ["0.8.0 is installed", ">=0.9.0,<0.10"]),
    "no queue": (without("TransferQueue"), "fail", ["TransferQueue>=0.1.10"]),
    "old queue": (without("TransferQueue", "0.1.2"), "fail", ["0.1.2 is installed", ">=0.1.10"]),
    "transformers": (without("transformers", "5.6.0"), "fail", ["5.6.0 is installed, verl asks for !=5.6.0"]),
    "no plugin": ({"fresh": {**KNOWN, "plugin": False}}, "fail", ["a fresh process", "VERL_USE_EXTERNAL_PLUGINS"]),
    "plugin fails": ({"fresh": {"error": "ImportError: x"}}, "fail", ["cannot be imported", "ImportError: x"]),
    "no plugin in Ray": ({"worker": {**KNOWN, "plugin": False}}, "fail", ["a Ray worker"]),
    "no Ray": ({"worker": {"error": "no memory"}}, "fail", ["a Ray worker: no memory"]),
    "Ray not asked": ({"worker": None}, "warn", ["not looked at", "--no-ray"]),
    "no mode": ({"fresh": {**KNOWN, "trainer_modes": ["sync"]}}, "fail", ["does not know trainer mode sdar"]),
    "no estimator": ({"worker": {**KNOWN, "estimators": []}}, "fail", ["does not know advantage estimator sdar"]),
    "no agent loop": ({"fresh": {**KNOWN, "agent_loops": []}}, "fail", ["does not know agent loop sdar_agent"]),
    "no torch": (without("torch"), "fail", ["pip install torch"]),
    "CUDA build without a GPU": ({"gpus": 0, "gpu_files": False}, "warn", ["CUDA build on a machine without a GPU"]),
    "hidden GPUs": ({"gpus": 0}, "fail", ["torch cannot use them", "CUDA_VISIBLE_DEVICES"]),
    "CPU build beside a GPU": ({"cuda_build": None, "gpus": 0}, "fail", ["CPU build on a machine with NVIDIA"]),
    "no vllm": (without("vllm"), "warn", ['pip install "sdar-verl[vllm]"']),
    "another vllm": (without("vllm", "0.11.0"), "warn", ["0.11.0 is installed, verl is tested with ==0.24.0"]),
    "another flash-attn": (without("flash-attn", "2.7.0"), "warn", ["tested with ==2.8.3"]),
    "another torch": (without("torch", "2.10.0+cu128"), "warn", ["tested with ==2.11.0"]),
    "no ALFWorld": (without("alfworld"), "warn", ["needs alfworld", 'pip install "sdar-verl[alfworld]"']),
    "no ICU": (without("icu4py"), "warn", ["needs icu4py", 'pip install "sdar-verl[search]"']),
    "no stemmer": (without("PyStemmer"), "warn", ["needs PyStemmer"]),
    "no ALFWorld, no compiler": (
        {
            **without("alfworld"),
            "missing_tools": (Missing("g++: not on PATH", "g++"), Missing("make: not on PATH", "make")),
        },
        "warn",
        ["missing: make: not on PATH", "apt-get install -y g++ make", '&& pip install "sdar-verl[alfworld]"'],
    ),
}


@pytest.mark.parametrize("fault", INSTALLATION_FAULTS)
def test_a_fault_of_the_installation_is_named(fault: str) -> None:
    changes, level, words = INSTALLATION_FAULTS[fault]
    findings = check_installation(replace(CLUSTER, **changes))
    found = [finding for finding in findings if finding.level == level]
    text = as_text(found)
    assert found and all(word in text for word in words), as_text(findings)
    assert exit_status(findings) == int(level == "fail")


def test_a_damaged_shipped_bank_is_red(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "mine" / "empty").mkdir(parents=True)
    monkeypatch.setattr("sdar_verl.skills.bank.BANKS_DIR", tmp_path)
    text = as_text([finding for finding in check_installation(CLUSTER) if finding.level == "fail"])
    assert "SKILL.md is missing" in text and "--force-reinstall" in text


# ---------------------------------------------------------------- a run


@pytest.fixture
def toy(tmp_path: Path):
    """The quick start's recipe on the toy environment, whose registration does not outlive the test."""
    yield [*write_toy_panels(tmp_path, train=16), "sdar.update.mini_batch_rows=null"]
    registry._registered.pop("toy_search", None)
    sys.modules.pop("tests.support.toy_env", None)


def diagnose(overrides: list[str], machine: Machine = LAPTOP, resets: int = 2) -> list[Finding]:
    return check_config("sdar_quickstart", overrides, machine, resets)


def test_a_sound_run_has_no_red_line(toy) -> None:
    findings = diagnose(toy)
    assert "fail" not in levels(findings), as_text(findings)
    checks = [finding.check for finding in findings]
    for check in ("config", "training panel", "resource pools", "rows of a step", "model", "context", "skills",
                  "teacher's limit", "environment", "student's prompt", "teacher's prompt"):  # fmt: skip
        assert check in checks, as_text(findings)


SEPARATE = [
    "trainer.v1.trainer_mode=sdar_separate_async",
    "trainer.v1.separate_async.parameter_sync_step=1",
    "actor_rollout_ref.rollout.nnodes=2",
    "actor_rollout_ref.rollout.n_gpus_per_node=2",
]
RUN_FAULTS = {
    "unknown key": (["sdar.loss.lambda=1"], "fail", ["sdar.loss", "lambda"]),
    "out of range": (["sdar.loss.coef=-1"], "fail", ["sdar.loss.coef=-1"]),
    "no effect": (["+sdar.skills.options.ucb.c=1"], "fail", ["sdar.skills.options.ucb has no effect"]),
    "no panel": (["data.train_files=/no/such.parquet"], "fail", ["data.train_files=/no/such.parquet", "prepare"]),
    "no bank": (["sdar.skills.bank=/no/such"], "fail", ["sdar.skills.bank", "/no/such"]),
    "batch": (["data.train_batch_size=17"], "fail", ["data.train_batch_size=17", "16 tasks"]),
    "mini-batch": (["sdar.update.mini_batch_rows=12"], "fail", ["mini_batch_rows=12", "rollout.n=8"]),
    "tensor parallel": (["actor_rollout_ref.rollout.tensor_model_parallel_size=2"], "fail", ["does not divide the 1"]),
    "update larger than a step": (["sdar.update.mini_batch_rows=4096"], "warn", ["larger than a step can be (384"]),
    "no model": (["actor_rollout_ref.model.path=/no/such"], "fail", ["model.path=/no/such holds no model"]),
    "a model elsewhere": (["actor_rollout_ref.model.path=who/what"], "warn", ["who/what is not on this machine"]),
    "positions": (["data.max_prompt_length=99999"], "fail", ["data.max_prompt_length", "positions"]),
    "engine": (["actor_rollout_ref.rollout.max_model_len=99"], "fail", ["max_model_len=99"]),
    "the teacher's limit": (["sdar.teacher.max_prompt_length=330"], "warn", ["may exceed", "max_prompt_length to 3"]),
    "student's prompt": (["data.max_prompt_length=20"], "fail", ["first turn", "longer than data.max_prompt_length"]),
    "teacher's prompt": (["sdar.teacher.max_prompt_length=20"], "fail", ["longer than sdar.teacher.max_prompt_length"]),
    "skills dropped": (["sdar.skills.max_tokens=8"], "warn", ["find more skills than fit", "16 of 16 tasks"]),
    "no skill fits": (["sdar.skills.max_tokens=1"], "fail", ["sdar.skills.max_tokens=1 is less than"]),
    "unmatched": (["sdar.skills.retrieval=[keyword]", "sdar.skills.bank=BANK"], "warn", ["4 of 16 tasks (25%)"]),
    "another environment's bank": (["sdar.skills.bank=search"], "fail", ["is it a bank for another environment"]),
    "GPUs": (["trainer.device=cuda"], "fail", ["asks for 1 GPUs", "this machine has none"]),
    "GPUs of the rollout": (["trainer.device=cuda", *SEPARATE], "fail", ["asks for 5 GPUs", "4 for a rollout"]),
    "environment": (["sdar.env.options={colour: red}"], "fail", ["colour"]),
}  # fmt: skip


@pytest.mark.parametrize("fault", RUN_FAULTS)
def test_a_fault_of_a_run_is_named(fault: str, toy, tmp_path: Path) -> None:
    overrides, level, words = RUN_FAULTS[fault]
    bank = tmp_path / "bank"
    for name in ("apple", "egg", "mug"):
        (bank / name).mkdir(parents=True)
        (bank / name / "SKILL.md").write_text(f"---\nname: {name}\ndescription: d\nkeywords: [{name}]\n---\nlook\n")
    findings = diagnose([*toy, *(text.replace("BANK", str(bank)) for text in overrides)])
    text = as_text([finding for finding in findings if finding.level == level])
    for word in words:
        assert word in text, as_text(findings)


def test_an_unknown_recipe_is_red() -> None:
    (finding,) = check_config("sdar_nowhere", [], LAPTOP, 0)
    assert finding.level == "fail" and "sdar_nowhere" in finding.text


def test_too_few_gpus_are_red_and_a_cluster_is_not_judged(toy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    wanted = [*toy, "trainer.device=cuda", "trainer.n_gpus_per_node=16"]
    assert "set trainer.n_gpus_per_node to at most 8" in as_text(diagnose(wanted, CLUSTER, 0))
    pool = ["sdar.teacher.placement=pool", "sdar.teacher.pool_gpus_per_node=8", "trainer.n_gpus_per_node=1"]
    assert "start it on a machine with 9 GPUs" in as_text(diagnose([*wanted, *pool], CLUSTER, 0))
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    found = [finding for finding in diagnose(wanted, CLUSTER, 0) if finding.check == "resource pools"]
    assert [finding.level for finding in found] == ["warn"] and "cluster not looked at" in found[0].text


def test_games_that_were_moved_and_panels_that_overlap_are_named(toy, tmp_path: Path) -> None:
    tasks = [
        Task(
            "toy_search",
            f"t{i:02d}",
            "pick_and_place_simple",
            "put some mug in fridge",
            {"game_file": "/gone", "place": "x"},
        )
        for i in range(16)
    ]
    write_panel(tasks, tmp_path / "lost.parquet", "train")
    files = f"{tmp_path / 'lost.parquet'}"
    text = as_text(diagnose([*toy, f"data.train_files={files}", f"data.val_files={files}"], resets=0))
    assert "1 of the files or folders that its tasks need are not there, such as /gone" in text
    assert "run the `sdar-verl prepare toy_search` command that made the panel again" in text
    assert "16 of 16 validation tasks are training tasks too" in text


def test_roles_that_a_text_can_imitate_are_told(toy, monkeypatch: pytest.MonkeyPatch) -> None:
    from sdar_verl.verl import recipe_prompts

    assert "no text from outside can write <assistant>, <eos>, <user>" in as_text(diagnose(toy, resets=0))
    tokenizer = qwen_like_tokenizer(
        template="{% for m in messages %}{{ m.role | upper }}: {{ m.content }}\n{% endfor %}"
    )
    monkeypatch.setattr(recipe_prompts, "policy_tokenizer", lambda config: tokenizer)
    text = as_text([finding for finding in diagnose(toy, resets=0) if finding.check == "roles"])
    assert "warn" in text and "an observation can imitate a turn" in text
    tokenizer.chat_template = "{% for m in messages %}{{ m.content | replace('< ', '<') }}{% endfor %}"
    text = as_text([finding for finding in diagnose(toy, resets=0) if finding.check == "prompts"])
    assert "FAIL" in text and "changes the control tokens of a prompt" in text


def test_an_environment_that_cannot_start_a_task_is_red(toy, tmp_path: Path) -> None:
    tasks = [Task("toy_search", f"t{i:02d}", "pick_and_place_simple", "put some mug in fridge") for i in range(16)]
    write_panel(tasks, tmp_path / "broken.parquet", "train")
    text = as_text(diagnose([*toy, f"data.train_files={tmp_path / 'broken.parquet'}"]))
    assert "FAIL  environment" in text and "t00" in text and "KeyError" in text


# ---------------------------------------------------------------- the command


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sdar_verl.doctor.machine.look_around", lambda ray: LAPTOP)


def test_the_command_prints_lines_or_json_and_its_status_tells_red_from_the_rest(quick, capsys, toy) -> None:
    assert main(["doctor"]) == 0
    assert "0 to mend" in capsys.readouterr().out
    assert main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["exit_status"] == 0
    arguments = ["doctor", "--config-name", "sdar_quickstart", "--resets", "0", *toy]
    assert main([*arguments, "data.train_batch_size=17"]) == 1
    assert "FAIL  config" in capsys.readouterr().out
    assert main(arguments) == 0


def test_options_without_effect_are_refused(quick, capsys) -> None:
    assert main(["doctor", "sdar.loss.coef=1"]) == 2
    assert "have no effect without --config-name" in capsys.readouterr().err
    assert main(["doctor", "--resets", "2"]) == 2
    assert "--resets 2: no effect without --config-name" in capsys.readouterr().err
    assert main(["doctor", "--config-name", "sdar_quickstart", "--resets", "-1"]) == 2
    assert "--resets -1: at least 0" in capsys.readouterr().err


@pytest.mark.parametrize("there", [3, 6, 20])
def test_as_many_tasks_are_looked_at_as_asked_for(there: int) -> None:
    tasks = [Task("toy", str(at), "t", "d") for at in range(there)]
    for count in range(1, 24):
        found = spread(tasks, count)
        places = [tasks.index(task) for task in found]
        assert len(found) == min(count, there) and places == sorted({*places})


def test_a_finding_shows_its_remedy_and_json_is_plain() -> None:
    findings = [Finding("fail", "verl", "not installed", "pip install it"), Finding("ok", "python", "3.11")]
    assert "FAIL  verl" in as_text(findings) and "-> pip install it" in as_text(findings)
    assert "\033[31mFAIL" in as_text(findings, colour=True)
    assert json.loads(json.dumps(as_json(findings)))["findings"][0]["remedy"] == "pip install it"
    assert command.run and installation.PYTHONS[0] == (3, 10)
