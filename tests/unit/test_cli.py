"""The command line as a whole: it works with any set of extras, and answers quickly to --help."""

from __future__ import annotations

import subprocess
import sys

import pytest

from sdar_verl.cli import main

OPTIONAL = ("rapidfuzz", "bm25s", "Stemmer", "matplotlib", "playwright", "alfworld", "textworld", "urllib3", "vllm")

WITHOUT_EXTRAS = f"""
import importlib.abc, sys

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {OPTIONAL!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name.split(".")[0] in {OPTIONAL!r} else found(name, *rest)
from sdar_verl.cli import main
sys.exit(main(sys.argv[1:]))
"""


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", WITHOUT_EXTRAS, *arguments], capture_output=True, text=True)


def test_every_command_is_there_without_any_extra():
    done = run("--help")
    assert done.returncode == 0, done.stderr
    for command in ("prepare", "plan", "doctor", "skills", "report", "compare", "sweep", "serve-retriever"):
        assert command in done.stdout
    done = run("prepare", "--help")
    assert done.returncode == 0, done.stderr
    for environment in ("alfworld", "webshop", "search"):
        assert environment in done.stdout


def test_a_command_that_lacks_its_extra_names_the_pip_command(tmp_path):
    done = run("prepare", "webshop", "--generate", "--out", str(tmp_path / "webshop"))
    assert done.returncode == 2
    assert 'pip install "sdar-verl[webshop]"' in done.stderr


@pytest.mark.parametrize(
    ("words", "help_of"),
    [
        ("prepare search --out x --datta y", "prepare search"),
        ("skills list --bnk x", "skills list"),
        ("report x --a", "report"),
    ],
)
def test_an_unknown_option_is_named_with_the_help_of_its_command(words, help_of, capsys):
    with pytest.raises(SystemExit):
        main(words.split())
    said = capsys.readouterr().err
    assert "unrecognized arguments: --" in said and f"`sdar-verl {help_of} --help`" in said


def test_an_interrupted_command_says_so(monkeypatch, capsys):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("sdar_verl.skills.command._load", stop)
    assert main(["skills", "show", "--bank", "alfworld"]) == 130
    assert capsys.readouterr().err == "sdar-verl: interrupted\n"


def test_help_loads_neither_torch_nor_verl():
    script = (
        "import sys; from sdar_verl.cli import _parser; _parser(); print('torch' in sys.modules, 'verl' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.split() == ["False", "False"], done.stdout + done.stderr
