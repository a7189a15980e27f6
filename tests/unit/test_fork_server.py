"""What tests run in the place of ``python`` behaves as it does."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.support.verl_run import forked_python


def run(*words: str, **settings: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*forked_python(), *words], capture_output=True, text=True, timeout=60, **settings)


def test_words_folder_environment_streams_and_status_are_those_of_a_process_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(
        "import os, sys, beside\n"
        "print(sys.argv[1:], os.getcwd(), os.environ['MINE'], 'HOME' in os.environ, beside.WORD, sys.stdin.read())\n"
        "print('loud', file=sys.stderr)\n"
        "sys.exit(3)\n"
    )
    (tmp_path / "beside.py").write_text("WORD = 'found'\n")
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    env = {name: value for name, value in os.environ.items() if name != "HOME"} | {"MINE": "1"}
    done = run(str(tmp_path / "script.py"), "a", "b", cwd=folder, env=env, input="told")
    assert done.stdout.strip() == f"['a', 'b'] {folder} 1 False found told"
    assert done.stderr.strip() == "loud" and done.returncode == 3
    assert run("-c", "import sys; print('torch' in sys.modules, 'verl' in sys.modules)").stdout == "True False\n"
    assert run("-m", "json.tool", "--help").returncode == 0
    assert "ZeroDivisionError" in run("-c", "1 / 0").stderr and run("-c", "1 / 0").returncode == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_who_ends_it_ends_the_fork(number: signal.Signals, tmp_path: Path) -> None:
    told = tmp_path / "pid"
    code = f"import os, time; open({str(told)!r} + '.new', 'w').write(str(os.getpid())); " + (
        f"os.rename({str(told)!r} + '.new', {str(told)!r}); time.sleep(60)"
    )
    process = subprocess.Popen([*forked_python(), "-c", code])
    while not told.exists():
        assert process.poll() is None
        time.sleep(0.05)
    pid = int(told.read_text())
    process.send_signal(number)
    assert process.wait(30) == -number
    deadline = time.monotonic() + 30
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < deadline, "the fork outlives its owner"
        time.sleep(0.05)
