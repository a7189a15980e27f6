"""The SkyPilot file, by SkyPilot's own parser. SkyPilot brings its own versions of much: it lives elsewhere.

python3.11 -m venv sky && sky/bin/pip install skypilot==0.14.1
SDAR_SKY_PYTHON=sky/bin/python bash scripts/test.sh --all tests/integration/test_sky.py
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

PYTHON = os.environ.get("SDAR_SKY_PYTHON")
FILE = Path(__file__).parents[2] / "recipes" / "cloud" / "sky.yaml"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PYTHON is None, reason="SDAR_SKY_PYTHON names no Python with SkyPilot in it"),
]
PARSE = """
import json, sys
import sky, yaml
given = [("MIRROR", "s3://b/r"), ("PRICE", "19"), ("BUDGET", "600")]
task = sky.Task.from_yaml_config(yaml.safe_load(sys.stdin), env_overrides=given)
print(json.dumps([[r.use_spot, r.job_recovery, r.accelerators, r.autostop_config.down] for r in task.resources]))
"""


def parsed(text: str, home: Path) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "HOME": str(home), "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"}
    return subprocess.run(
        [str(PYTHON), "-c", PARSE],
        input=text,
        capture_output=True,
        text=True,
        env=env,
        timeout=300,
        cwd=FILE.parents[2],
    )


def test_the_file_is_a_task(tmp_path):
    done = parsed(FILE.read_text(), tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    resources = json.loads(done.stdout.splitlines()[-1])
    assert {name for _, _, cards, _ in resources for name in cards} == {"H100", "A100-80GB", "H200"}
    for spot, recovery, _, down in resources:
        assert spot and down
        # SkyPilot takes any name here.
        assert recovery == {"strategy": "EAGER_NEXT_REGION", "recover_on_exit_codes": [75], "max_restarts_on_errors": 0}


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("use_spot:", "use_spots:"),
        ("events: [preemption]", "events: [preempted]"),
        ("down:", "dwn:"),
    ],
)
def test_a_fault_in_it_would_be_seen(tmp_path, right, wrong):
    text = FILE.read_text()
    assert right in text
    assert parsed(text.replace(right, wrong), tmp_path).returncode != 0
