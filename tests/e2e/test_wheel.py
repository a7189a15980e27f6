"""A wheel built from this checkout, in an environment of its own, behaves like the editable install."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

ROOT = Path(__file__).parents[2]


def run(*command: str | Path, cwd: Path) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    tracked = run("git", "ls-files", cwd=ROOT).splitlines()
    for name in tracked:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, source, cwd=folder)
    return next(folder.glob("sdar_verl-*.whl"))


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory) -> Path:
    """A fresh environment with the wheel in it; the dependencies are this environment's."""
    venv = tmp_path_factory.mktemp("env") / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", venv, cwd=venv.parent)
    python = venv / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check")
    run(*pip, "install", "--quiet", "--no-deps", wheel, cwd=venv.parent)
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=venv.parent).strip())
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def test_every_file_of_the_package_is_in_the_wheel(wheel):
    shipped = {name for name in zipfile.ZipFile(wheel).namelist() if not name.startswith("sdar_verl-")}
    tracked = set(run("git", "ls-files", "sdar_verl", cwd=ROOT).splitlines())
    tracked |= {f"sdar_verl/{name}" for name in run("git", "ls-files", "hydra_configs", cwd=ROOT).splitlines()}
    assert shipped == tracked


def test_recipes_compose_from_any_folder(python, tmp_path):
    place = run(python, "-c", "import sdar_verl; print(sdar_verl.__file__)", cwd=tmp_path).strip()
    assert Path(place).is_relative_to(python.parents[1])
    for name in ("sdar_alfworld", "sdar_quickstart"):
        composed = run(python, "-m", "verl.trainer.main_ppo", "--config-name", name, "--cfg", "job", cwd=tmp_path)
        assert "trainer_mode: sdar" in composed
        assert "\nsdar:\n" in composed


def test_the_plugin_registers_from_the_wheel(python, tmp_path):
    program = (
        "import verl, sdar_verl.plugin\n"
        "from verl.trainer.ppo.v1.trainer_base import get_trainer_cls\n"
        "import verl.trainer.ppo.v1\n"
        "print(get_trainer_cls('sdar').__module__)\n"
        "from sdar_verl.skills.bank import SkillBank; print(len(list(SkillBank.load('alfworld'))))\n"
        "from sdar_verl.rollout.prompts import PromptTemplate; PromptTemplate.load('alfworld_compact')\n"
        "from transformers import AutoTokenizer; from sdar_verl.local import start_policy\n"
        "print(AutoTokenizer.from_pretrained(start_policy()).vocab_size)\n"
    )
    lines = run(python, "-c", program, cwd=tmp_path).splitlines()
    assert lines[-3] == "sdar_verl.verl.trainer"
    assert int(lines[-2]) >= 6
    assert int(lines[-1]) > 50
    version = run(python.parent / "sdar-verl", "--version", cwd=tmp_path)
    assert version.strip().endswith("0.1.0")
