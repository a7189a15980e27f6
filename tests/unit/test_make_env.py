"""A fresh machine: what an installation needs is told in its first second, and is nothing but what is told."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pip
import pytest

from sdar_verl.doctor.build_tools import Missing, missing_build_tools, missing_python, remedy

ROOT = Path(__file__).resolve().parents[2]
SHELL = ("bash", "cat", "cksum", "cp", "dirname", "ls", "mkdir", "sed")
NO_HOME = "/dev/null/home"  # can neither be written nor made, by root either


@pytest.fixture
def machine(tmp_path):
    """A PATH with the shell's tools and stand-ins for compilers and make, as it is after the remedy."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in SHELL:
        (folder / name).symlink_to(shutil.which(name))
    for name in ("gcc", "g++", "make"):
        (folder / name).write_text("#!/bin/bash\nexit 0\n")
        (folder / name).chmod(0o755)
    return folder


def make_env(tmp_path: Path, path: object, extras: str = "local", **variables: str) -> subprocess.CompletedProcess:
    """Run the script with nothing of this process's environment, and an index that has no packages."""
    index = {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": "/dev/null"}
    env = {"PATH": str(path), "HOME": NO_HOME, "PYTHON": sys.executable, **index, **variables}
    words = ["bash", str(ROOT / "scripts" / "make_env.sh"), str(tmp_path / "venv"), extras]
    return subprocess.run(words, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture
def there_already(tmp_path):
    """The folder of an environment that an interrupted installation has left, with pip; to make one takes seconds."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    site = next((tmp_path / "venv").glob("lib/python*/site-packages"))
    (site / "pip").symlink_to(Path(pip.__file__).parent)


def test_with_the_tools_it_comes_to_the_first_package(tmp_path, machine):
    """No python, pip or home folder; the index is empty, so that is where it ends."""
    done = make_env(tmp_path, machine)
    assert done.returncode == 1
    assert "missing" not in done.stderr, done.stderr
    assert done.stdout == "installing torch ...\n" and "installing torch failed" in done.stderr
    assert "not writable" not in done.stderr, "pip has a cache although there is no home folder"


def test_what_runs_in_the_environment_has_a_home_that_can_be_written(tmp_path):
    """Ray makes ``~/.ray``, matplotlib ``~/.config``; a home that can be written stays the user's."""
    for home, expected in ((NO_HOME, str(ROOT / ".cache" / "home")), (str(tmp_path), str(tmp_path)), ("", None)):
        script = f'set -euo pipefail; source \'{ROOT}/scripts/cpu_env.sh\'; touch "$HOME/x"; rm "$HOME/x"; echo $HOME'
        env = {"PATH": "/usr/bin:/bin", "HOME": home}
        done = subprocess.run(["bash", "-c", script], env=env, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == (expected or str(ROOT / ".cache" / "home"))


@pytest.mark.parametrize(
    ("gone", "command"),
    [(["make"], "make"), (["g++"], "g++"), (["gcc"], "gcc libc6-dev"), (["gcc", "g++", "make"], "g++ make")],
)
def test_what_is_missing_is_told_before_anything_is_made(tmp_path, machine, gone, command):
    for name in gone:
        (machine / name).unlink()
    done = make_env(tmp_path, machine)
    assert done.returncode == 1 and done.stdout == "" and not (tmp_path / "venv").exists()
    assert all(f"missing: {name} to compile ALFWorld's engines" in done.stderr for name in gone)
    assert f"apt-get install -y {command}" in done.stderr


def test_a_compiler_must_work(tmp_path, machine):
    (machine / "g++").write_text("#!/bin/bash\necho 'fatal error: vector: No such file or directory' >&2\nexit 1\n")
    done = make_env(tmp_path, machine)
    assert "g++ to compile ALFWorld's engines: does not work (fatal error: vector" in done.stderr
    done = make_env(tmp_path, machine, CXX="nothere")
    assert "CXX=nothere (unset it" in done.stderr and "apt-get" not in done.stderr


@pytest.mark.parametrize("extras", ["locl,test", "local, test", "", "local test"])
def test_an_extra_that_there_is_none_of_is_told_before_anything_is_made(tmp_path, machine, extras):
    """pip would install the rest, and only warn."""
    done = make_env(tmp_path, machine, extras)
    assert done.returncode == 1 and f"EXTRAS={extras}: no extra " in done.stderr and "local, " in done.stderr
    assert done.stdout == "" and not (tmp_path / "venv").exists()


def test_words_that_the_script_does_not_take_are_told(tmp_path):
    for words in ([], ["venv"], ["venv", "local", "test"]):
        command = ["bash", str(ROOT / "scripts" / "make_env.sh"), *words]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 2 and "make_env.sh takes VENV_DIR and EXTRAS, such as .venv local,test" in done.stderr
    assert not any(tmp_path.iterdir())


@pytest.mark.usefixtures("there_already")
def test_extras_without_an_engine_need_no_compiler(tmp_path, machine):
    for name in ("gcc", "g++", "make"):
        (machine / name).unlink()
    assert "installing torch failed" in make_env(tmp_path, machine, "search,test").stderr


def test_a_python_of_another_version_is_not_exchanged_for_another(tmp_path, machine):
    old = tmp_path / "python3.9"
    old.write_text("#!/bin/bash\nexit 1\n")
    old.chmod(0o755)
    done = make_env(tmp_path, machine, PYTHON=str(old))
    assert done.returncode == 1 and f"PYTHON={old} is not Python 3.10 to 3.12" in done.stderr


def test_a_machine_without_python_is_told_how_to_get_one(tmp_path, machine):
    done = make_env(tmp_path, machine, PYTHON="")
    assert done.returncode == 1 and "apt-get install -y python3 python3-venv g++ make" in done.stderr


def test_a_folder_that_is_no_environment_is_left_alone(tmp_path, machine):
    (tmp_path / "venv").mkdir()
    (tmp_path / "venv" / "thesis.tex").write_text("all of it")
    done = make_env(tmp_path, machine)
    assert done.returncode == 1 and "is no virtual environment" in done.stderr
    assert (tmp_path / "venv" / "thesis.tex").read_text() == "all of it"


def test_an_environment_whose_python_has_gone_is_made_again(tmp_path, machine):
    """A finished one is taken as it is, without a look at compilers, as long as it has its interpreter."""
    bin_ = tmp_path / "venv" / "bin"
    bin_.mkdir(parents=True)
    (tmp_path / "venv" / "pyvenv.cfg").touch()
    files = (ROOT / "setup.cfg").read_bytes() + (ROOT / "scripts" / "constraints-cpu.txt").read_bytes()
    total = subprocess.run(["cksum"], input=files, capture_output=True, check=True).stdout.decode().strip()
    (tmp_path / "venv" / ".sdar_verl_installed").write_text(f"{total} {ROOT} local\n")
    (bin_ / "python").symlink_to(sys.executable)
    (machine / "make").unlink()
    assert make_env(tmp_path, machine).returncode == 0
    (bin_ / "python").unlink()
    (bin_ / "python").symlink_to(tmp_path / "gone")
    assert "missing: make" in make_env(tmp_path, machine).stderr
    (machine / "make").symlink_to(machine / "gcc")
    assert "installing torch failed" in make_env(tmp_path, machine).stderr


@pytest.mark.usefixtures("there_already")
def test_the_plain_path_of_a_system_is_enough(tmp_path):
    """On this machine, with or without compilers: it either comes to the first package or tells what is missing."""
    there = not missing_build_tools("/usr/bin:/bin")
    done = make_env(tmp_path, "/usr/bin:/bin")
    assert ("installing torch failed" in done.stderr) == there != ("mend it: " in done.stderr)


def test_the_doctor_asks_the_same_functions(machine, monkeypatch):
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    assert missing_build_tools(str(machine)) == []
    (machine / "g++").unlink()
    (tool,) = missing_build_tools(str(machine))
    assert remedy([tool]).endswith("apt-get install -y g++") or "elsewhere" in remedy([tool])
    assert "activate the environment" in missing_python(str(machine))[0].text
    assert remedy([Missing("a variable", "")]) == ""


def test_versions_of_python_are_the_same_everywhere():
    from sdar_verl.doctor.installation import PYTHONS

    low, high = PYTHONS
    cfg = (ROOT / "setup.cfg").read_text()
    assert f"python_requires = >={low[0]}.{low[1]},<{high[0]}.{high[1] + 1}" in cfg
    assert (
        f"({low[0]}, {low[1]}) <= sys.version_info[:2] <= ({high[0]}, {high[1]})"
        in (ROOT / "scripts" / "make_env.sh").read_text()
    )


def test_alfworld_is_imported_without_a_home_folder():
    """The package makes its data folder there when it is imported."""
    script = "import sdar_verl.envs.alfworld, alfworld, os; print(os.environ['ALFWORLD_DATA'])"
    env = {"PATH": "/usr/bin:/bin", "HOME": NO_HOME}
    done = subprocess.run(
        [sys.executable, "-c", script], env=env, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_dir()
