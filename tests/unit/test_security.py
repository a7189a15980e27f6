"""What docs/security.md promises: no code from data, no network by itself, safe defaults."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import sdar_verl
from sdar_verl.checks.callback import CheckBeforeStart
from sdar_verl.compose import compose_config
from sdar_verl.config import load_config
from sdar_verl.errors import ConfigError
from sdar_verl.quiet import QUIET, be_quiet

PACKAGE = Path(sdar_verl.__file__).parent
FILES = {path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")}

NETWORK = {"requests", "httpx", "aiohttp", "urllib3", "socket", "smtplib", "ftplib", "http", "urllib.request", "zmq"}
# The doctor's nodes and local weights ask for an address of their own: torch talks there.
MAY_TALK = {"cloud/notice.py", "doctor/nodes.py", "envs/search/client.py", "envs/search/serve.py", "local/weights.py"}
MAY_TALK |= {"writer/endpoint.py"}
CODE = {"pickle", "cloudpickle", "marshal", "shelve", "dill", "joblib"}
MAY_START_PROCESSES = {
    "cloud/guard.py",
    "cloud/processes.py",
    "doctor/build_tools.py",
    "doctor/probe.py",
    "report/evaluation_run.py",
    "report/one_run.py",
}


def imports(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def calls(tree: ast.Module) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def using(names: set[str]) -> set[str]:
    found = set()
    for file, tree in FILES.items():
        for module in imports(tree):
            if module in names or module.split(".")[0] in names:
                found.add(file)
    return found


def test_only_these_talk_over_a_network() -> None:
    assert len(FILES) > 150
    assert using(NETWORK) == MAY_TALK
    assert using({"fastapi", "uvicorn"}) == {"envs/search/server.py", "envs/search/serve.py"}


def test_no_data_is_unpickled_and_no_text_is_run() -> None:
    assert using(CODE) == set()
    assert using({"subprocess"}) == MAY_START_PROCESSES
    for file, tree in FILES.items():
        for name, call in calls(tree):
            keywords = {one.arg: ast.unparse(one.value) for one in call.keywords}
            assert name not in ("eval", "exec", "compile", "os.system", "os.popen", "yaml.unsafe_load"), file
            assert keywords.get("shell") != "True" and keywords.get("allow_pickle") != "True", file
            assert keywords.get("trust_remote_code") != "True", file
            if name == "torch.load":
                assert keywords.get("weights_only") == "True", file
            if name == "yaml.load":
                assert (file, keywords["Loader"]) == ("skills/formats.py", "_PlainLoader")


def test_the_loader_of_skills_makes_plain_values_only() -> None:
    import yaml

    from sdar_verl.skills.formats import _PlainLoader

    assert issubclass(_PlainLoader, yaml.SafeLoader)
    for text in ("!!python/name:os.system", "!!python/object/new:os.system [true]", "!!python/module:os"):
        with pytest.raises(yaml.YAMLError):
            yaml.load(text, Loader=_PlainLoader)


@pytest.mark.parametrize("node", ["loss", "teacher", "env", "skills"])
def test_a_target_in_our_node_is_refused(node: str) -> None:
    with pytest.raises(ConfigError, match="_target_"):
        load_config({node: {"_target_": "os.system"}})


@pytest.mark.parametrize("recipe", ["sdar_alfworld", "sdar_search", "sdar_webshop", "sdar_quickstart"])
def test_recipes_run_no_remote_code_and_log_to_nobody(recipe: str) -> None:
    config = compose_config(recipe, [])
    assert config.actor_rollout_ref.model.trust_remote_code is False
    assert config.data.trust_remote_code is False
    assert set(config.trainer.logger) <= {"console", "file"}
    assert config.sdar.modules == []


def test_statistics_of_ray_are_off_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray._common.usage.usage_lib import usage_stats_enabled

    for name in QUIET:
        monkeypatch.delenv(name, raising=False)
    assert usage_stats_enabled()
    with pytest.raises(SystemExit):
        CheckBeforeStart().on_job_start({"sdar": {"no such": 1}})  # type: ignore[arg-type]
    assert not usage_stats_enabled()
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "1")
    be_quiet()
    assert usage_stats_enabled()
