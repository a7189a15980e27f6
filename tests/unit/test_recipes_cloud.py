"""The engines' files, by the engines' own schemas where these can be had."""

from __future__ import annotations

import copy
import json
import re
import shlex
import warnings
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from sdar_verl.cli import _parser
from sdar_verl.compose import compose_config
from sdar_verl.config import load_config
from tests.support.s3 import s3_server

ROOT = Path(__file__).parents[2]
CLOUD = ROOT / "recipes" / "cloud"


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    """RayJob's, closed: a name that it does not know is an error."""

    def closed(node: Any) -> Any:
        if isinstance(node, list):
            return [closed(item) for item in node]
        if not isinstance(node, dict):
            return node
        found = {key: closed(value) for key, value in node.items()}
        if "properties" in found and isinstance(found["properties"], dict) and found.get("type") == "object":
            found.setdefault("additionalProperties", False)
        if found.get("x-kubernetes-int-or-string"):
            found.pop("type", None)
        return found

    whole = closed(json.loads((ROOT / "tests" / "data" / "rayjob.schema.json").read_text()))
    whole["properties"]["metadata"] = {"type": "object"}
    return whole


def rayjob() -> dict[str, Any]:
    return yaml.safe_load((CLOUD / "rayjob.yaml").read_text())


def test_the_rayjob_is_one(schema):
    jsonschema.validate(rayjob(), schema)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("spec.backoffLimits", 3),
        ("spec.activeDeadlineSeconds", "a day"),
        ("spec.rayClusterSpec.headGroupSpec.template.spec.terminationGracePeriod", 120),
        ("spec.rayClusterSpec.headGroupSpec.template.spec.volumes.0.emptyDir.sizelimit", "1Gi"),
    ],
)
def test_a_fault_in_it_would_be_seen(schema, path, value):
    job = copy.deepcopy(rayjob())
    *parents, last = path.split(".")
    node: Any = job
    for name in parents:
        node = node[int(name)] if name.isdecimal() else node[name]
    node[last] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(job, schema)


def test_the_rayjob_ends_with_its_run_and_has_shared_memory():
    spec = rayjob()["spec"]
    assert spec["shutdownAfterJobFinishes"] and spec["backoffLimit"] > 0 and spec["activeDeadlineSeconds"] > 0
    pod = spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    assert any(volume.get("emptyDir", {}).get("medium") == "Memory" for volume in pod["volumes"])
    env = {one["name"]: one["value"] for one in pod["containers"][0]["env"]}
    assert float(env["RAY_JOB_STOP_WAIT_TIME_S"]) < pod["terminationGracePeriodSeconds"]


def commands(text: str) -> list[list[str]]:
    """Every call of sdar-verl in a shell text, as words."""
    found = []
    for call in re.split(r"&&|\bexec\b", text):
        words = shlex.split(call.replace("'", ""))
        if "sdar-verl" in words:
            found.append(words[words.index("sdar-verl") + 1 :])
    return found


def test_the_rayjobs_commands_parse_and_compose():
    spec = rayjob()["spec"]
    env = yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"]
    text = spec["entrypoint"]
    for name, value in env.items():
        text = text.replace(f"${name}", value)
    doctor, guard = commands(text)
    assert _parser().parse_args(doctor).cloud
    at = guard.index("--")
    options = _parser().parse_args(guard[:at])
    assert options.price == 55.04 and options.budget == 800 and options.grace < 120
    words = guard[at + 1 :]
    assert words[:3] == ["python", "-m", "verl.trainer.main_ppo"]
    config = compose_config(words[words.index("--config-name") + 1], words[words.index("--config-name") + 2 :])
    assert load_config(config.sdar).cloud.mirror == "s3://BUCKET/alfworld-7b"


def test_the_template_has_no_fault_that_cfn_lint_knows():
    api = pytest.importorskip("cfnlint.api", reason="cfn-lint is not installed")
    found = api.lint((CLOUD / "aws.yaml").read_text(), regions=["us-east-1"])
    assert [str(match) for match in found] == []


def test_moto_makes_of_the_template_what_it_can_make(monkeypatch):
    """Its CloudFormation leaves budgets, alarms and two policies out with a warning; all else must come without one."""
    import boto3

    text = (CLOUD / "aws.yaml").read_text()
    with s3_server() as server:
        for name, value in server.env.items():
            monkeypatch.setenv(name, value)
        clients = {name: boto3.client(name, endpoint_url=server.address) for name in ("cloudformation", "s3", "sns")}
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            clients["cloudformation"].create_stack(
                StackName="sdar",
                TemplateBody=text,
                Parameters=[{"ParameterKey": "Mail", "ParameterValue": "you@example.org"}],
                Capabilities=["CAPABILITY_IAM"],
            )
        skipped = {word for warning in told for word in re.findall(r"AWS::\w+::\w+", str(warning.message))}
        known = ("Budgets::Budget", "CloudWatch::Alarm", "S3::BucketPolicy", "SNS::TopicPolicy")
        assert skipped == {f"AWS::{name}" for name in known}
        (stack,) = clients["cloudformation"].describe_stacks(StackName="sdar")["Stacks"]
        outputs = {one["OutputKey"]: one["OutputValue"] for one in stack["Outputs"]}
        bucket = outputs["Mirror"].removeprefix("s3://")
        assert bucket in {one["Name"] for one in clients["s3"].list_buckets()["Buckets"]}
        assert len(clients["sns"].list_subscriptions()["Subscriptions"]) == 1


@pytest.mark.parametrize("file", ["sky.yaml", "rayjob.yaml"])
def test_panels_are_those_that_prepare_writes(file):
    from sdar_verl.envs.alfworld.prepare import PANELS

    named = re.findall(r"data\.(?:train|val)_files=\S+/(\w+)\.parquet", (CLOUD / file).read_text())
    assert len(named) == 2 and {*named} <= {*PANELS}
