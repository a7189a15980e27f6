"""A Slurm cluster of one node on loopback, with a throw-away user who logs in by ssh; and SkyPilot beside it.

Everything lies in one folder and ends with the test. The node has no way to where SkyPilot takes its runtime from, so
the folder holds stand-ins for ``curl`` and ``uv``: the runtime is the environment that SkyPilot itself runs in.
"""

from __future__ import annotations

import json
import os
import pwd
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sshd", "ssh-keygen", "useradd", "userdel", "rsync", "curl")
USER = "sdar-test-sky"
_PATH = "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"


def missing_programs() -> list[str]:
    """What this machine lacks (Debian: slurm-wlm, munge, openssh-server, rsync, curl)."""
    return [name for name in PROGRAMS if shutil.which(name, path=_PATH) is None]


def readable_by_all(path: str | Path) -> bool:
    """Whether another user can come to ``path``."""
    real = Path(path).resolve()
    return all(folder.stat().st_mode & 0o001 for folder in (real, *real.parents) if folder.is_dir())


@dataclass(frozen=True)
class Slurm:
    """The running cluster.

    Attributes:
        folder: of everything.
        port: of sshd.
    """

    folder: Path
    port: int

    @property
    def home(self) -> Path:
        """Of the user."""
        return self.folder / "home"

    def command(self, *words: str) -> str:
        """Output of a Slurm command."""
        env = {**os.environ, "PATH": _PATH, "SLURM_CONF": str(self.folder / "slurm.conf")}
        return subprocess.run(words, env=env, check=True, capture_output=True, text=True, timeout=60).stdout

    def jobs(self) -> list[str]:
        """Numbers of the jobs that run."""
        return self.command("squeue", "-h", "-t", "running", "-o", "%i").split()


@contextmanager
def slurm_cluster(folder: Path, runtime: Path) -> Iterator[Slurm]:
    """Start it; stop its processes and delete the user after use.

    Args:
        folder: to lie in; other users must be able to come to it.
        runtime: the environment with SkyPilot in it.
    """
    run = folder / "run"
    run.mkdir(parents=True)
    ports = _free_ports(3)
    subprocess.run(["useradd", "-m", "-d", str(folder / "home"), "-s", "/bin/bash", "-p", "*", USER], check=True)
    processes: list[subprocess.Popen[bytes]] = []
    try:
        _write_files(folder, runtime, ports)
        env = {**os.environ, "PATH": _PATH, "SLURM_CONF": str(folder / "slurm.conf")}
        for words in (
            ["munged", "-F", "--force", "--key-file", f"{folder}/munge.key", "--socket", f"{run}/munge.sock",
             "--pid-file", f"{run}/munged.pid", "--log-file", f"{run}/munged.log", "--seed-file", f"{run}/munge.seed"],
            ["slurmctld", "-D", "-f", f"{folder}/slurm.conf"],
            ["slurmd", "-D", "-f", f"{folder}/slurm.conf"],
            [str(shutil.which("sshd", path=_PATH)), "-D", "-f", f"{folder}/sshd_config"],
        ):  # fmt: skip
            log = (run / f"{Path(words[0]).name}.txt").open("wb")
            processes.append(subprocess.Popen(words, env=env, stdout=log, stderr=log, start_new_session=True))
            time.sleep(1)
        slurm = Slurm(folder, ports[2])
        wait_for(lambda: "idle" in slurm.command("sinfo", "-h"), 60, "Slurm's node is not idle")
        yield slurm
    finally:
        for process in reversed(processes):
            process.send_signal(signal.SIGTERM)
        for process in processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(30)
            process.kill()
        subprocess.run(["pkill", "-9", "-u", USER], check=False)
        time.sleep(1)
        subprocess.run(["userdel", "-r", "-f", USER], check=False, capture_output=True)


def _write_files(folder: Path, runtime: Path, ports: list[int]) -> None:
    name, run, home = socket.gethostname().split(".")[0], folder / "run", folder / "home"
    (folder / "munge.key").write_bytes(os.urandom(1024))
    (folder / "munge.key").chmod(0o400)
    cluster = {
        "ClusterName": "sdar", "SlurmctldHost": f"{name}(127.0.0.1)", "AuthInfo": f"socket={run}/munge.sock",
        "SlurmUser": "root", "SlurmctldPort": ports[0], "SlurmdPort": ports[1], "MpiDefault": "none",
        "ProctrackType": "proctrack/linuxproc", "TaskPlugin": "task/none", "SelectType": "select/cons_tres",
        "SelectTypeParameters": "CR_Core_Memory", "StateSaveLocation": f"{run}/state", "SlurmdSpoolDir": f"{run}/spool",
        "SlurmctldPidFile": f"{run}/slurmctld.pid", "SlurmdPidFile": f"{run}/slurmd.pid", "KillWait": 20,
    }  # fmt: skip
    lines = [f"{key}={value}" for key, value in cluster.items()]
    lines.append(f"NodeName={name} NodeAddr=127.0.0.1 CPUs={os.cpu_count()} RealMemory=12000 State=UNKNOWN")
    lines.append("PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP")
    (folder / "slurm.conf").write_text("\n".join(lines) + "\n")
    for part in ("state", "spool"):
        (run / part).mkdir()
    for key in ("key", "hostkey"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)], check=True)
    tools, script = folder / "bin", folder / "env.sh"
    tools.mkdir()
    script.write_text(f"export PATH={tools}:$PATH\n")
    environment = f"SLURM_CONF={folder}/slurm.conf BASH_ENV={script} PATH={tools}:{_PATH}"
    sshd = {
        "Port": ports[2], "ListenAddress": "127.0.0.1", "HostKey": folder / "hostkey", "PidFile": run / "sshd.pid",
        "AuthorizedKeysFile": folder / "key.pub", "PasswordAuthentication": "no", "UsePAM": "no", "StrictModes": "no",
        "SetEnv": environment, "MaxSessions": 100, "MaxStartups": 100, "Subsystem": "sftp internal-sftp",
    }  # fmt: skip
    (folder / "sshd_config").write_text("".join(f"{key} {value}\n" for key, value in sshd.items()))
    Path("/run/sshd").mkdir(exist_ok=True)
    (tools / "curl").write_text(f'#!/bin/sh\necho \'mkdir -p "$UV_INSTALL_DIR"; cp {tools}/uv "$UV_INSTALL_DIR/uv"\'\n')
    (tools / "uv").write_text(_UV.format(runtime=runtime))
    for tool in tools.iterdir():
        tool.chmod(0o755)
    user = pwd.getpwnam(USER)
    os.chown(home, user.pw_uid, user.pw_gid)


_UV = """#!/bin/sh
# The runtime is on this node already: a new environment is a link to it, and there is nothing to install.
case "$1" in
  -V) echo "uv 0" ;;
  venv)
    shift
    for word; do
      case "$word" in -*) ;; *) [ "$before" = --python ] || target="$word" ;; esac
      before="$word"
    done
    rm -rf "$target"; mkdir -p "$(dirname "$target")"; ln -s {runtime} "$target" ;;
  run)
    shift
    while case "$1" in -*) true ;; *) false ;; esac; do shift; done
    PATH="{runtime}/bin:$PATH" exec "$@" ;;
esac
"""


_ALONE = """
# A controller that sees no sign of its job asks two public addresses whether there is a network; here there is none.
import importlib.abc, importlib.util, sys

NAME = "sky.backends.backend_utils"


async def connected():
    pass


class Patch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name != NAME:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module

        def patched(module):
            run(module)
            module.check_network_connection, module.async_check_network_connection = lambda: None, connected

        spec.loader.exec_module = patched
        return spec


sys.meta_path.insert(0, Patch())
"""


@dataclass(frozen=True)
class SkyPilot:
    """SkyPilot's client and API server, with a home of their own.

    Attributes:
        python: of the environment that has it.
        home: of its files.
    """

    python: Path
    home: Path

    def run(self, *words: str, timeout: float = 300) -> str:
        """Output of ``sky WORDS``. AssertionError when it fails."""
        env = {
            "HOME": str(self.home),
            "PATH": f"{self.python.parent}:{_PATH}",
            "PYTHONPATH": str(self.home / "patch"),
            "SKYPILOT_DISABLE_USAGE_COLLECTION": "1",
        }
        done = subprocess.run(
            [str(self.python.parent / "sky"), *words],
            env=env, cwd=self.home, capture_output=True, text=True, timeout=timeout,
        )  # fmt: skip
        assert done.returncode == 0, f"sky {' '.join(words)}:\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
        return done.stdout

    def job(self) -> dict[str, object]:
        """What is known of the one managed job."""
        (found,) = json.loads(self.run("jobs", "queue", "--output", "json"))
        return dict(found)

    def log(self) -> str:
        """Of the job's controller."""
        logs = sorted((self.home / "sky_logs" / "jobs_controller").glob("[0-9]*.log"))
        return logs[-1].read_text() if logs else ""


@contextmanager
def skypilot(python: Path, home: Path, slurm: Slurm) -> Iterator[SkyPilot]:
    """An API server that knows the Slurm cluster and runs the jobs' controllers in itself; stopped after use."""
    (home / ".slurm").mkdir(parents=True)
    (home / ".sky").mkdir()
    (home / ".slurm" / "config").write_text(
        f"Host local\n  HostName 127.0.0.1\n  Port {slurm.port}\n  User {USER}\n  IdentityFile {slurm.folder}/key\n"
        "  IdentitiesOnly yes\n  StrictHostKeyChecking no\n"
    )
    (home / ".sky" / "config.yaml").write_text("jobs:\n  controller:\n    consolidation_mode: true\n")
    (home / "patch").mkdir()
    (home / "patch" / "sitecustomize.py").write_text(_ALONE)
    sky = SkyPilot(python, home)
    try:
        sky.run("api", "start")
        assert "Slurm [compute]" in sky.run("check", "slurm")
        yield sky
    finally:
        with suppress(AssertionError, subprocess.TimeoutExpired):
            sky.run("jobs", "cancel", "-a", "-y")
        sky.run("api", "stop")


def wait_for(happened: Callable[[], bool], timeout_s: float, otherwise: str) -> None:
    """Wait until ``happened()``; AssertionError ``otherwise``."""
    deadline = time.monotonic() + timeout_s
    while not happened():
        assert time.monotonic() < deadline, otherwise
        time.sleep(1)


def _free_ports(number: int) -> list[int]:
    sockets = [socket.socket() for _ in range(number)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports
