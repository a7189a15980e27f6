"""Forks of a process that has imported torch and the like already: a run through verl starts in half of the time.

A run has some nine processes, and each spends four seconds of CPU on the same imports. ``fork_server.py SOCKET SCRIPT``
(``-m MODULE``, ``-c CODE``) does what ``python SCRIPT`` would, with the same arguments, environment, folder, streams,
signals and exit status, in a fork of the server. Ray, verl and this package are not imported beforehand: Ray reads its
settings from the environment when it is imported, and the order of the others' imports is worth testing.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import json
import os
import shutil
import signal
import socket
import socketserver
import struct
import subprocess
import sys
import tempfile
import threading
from functools import cache
from pathlib import Path
from typing import Any

LIBRARIES = (
    *("torch._dynamo", "torch.distributed.checkpoint", "torch.distributed.fsdp", "torch.distributed.rpc", "tensordict"),
    *("torchdata.stateful_dataloader", "transformers", "datasets", "peft", "hydra", "fastapi", "uvicorn", "aiohttp"),
)
NUMBER = struct.Struct("i")


class Forks(socketserver.ForkingMixIn, socketserver.UnixStreamServer):
    """One process per connection, which forks the one that was asked for and waits for it."""

    max_children = 10_000
    request_queue_size = 100


class Fork(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        (size,) = NUMBER.unpack(self.request.recv(NUMBER.size, socket.MSG_WAITALL))
        first, streams, _, _ = socket.recv_fds(self.request, 1, 3)
        asked = json.loads(first + self.request.recv(size - 1, socket.MSG_WAITALL))
        pid = os.fork()
        if pid == 0:
            self.request.close()
            become(**asked, streams=streams)
        for stream in streams:
            os.close(stream)
        self.request.sendall(NUMBER.pack(pid))
        threading.Thread(target=self.follow, args=(pid,), daemon=True).start()
        status = os.waitpid(pid, 0)[1]
        with contextlib.suppress(OSError):
            self.request.sendall(NUMBER.pack(status))

    def follow(self, pid: int) -> None:
        """Kill the process when nobody waits for it any more."""
        if not self.request.recv(1):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def serve(path: str) -> None:
    """Fork whatever is asked for at ``path``, until the other end of stdin is closed."""
    sys.path.pop(0)  # this file's folder
    for name in LIBRARIES:
        importlib.import_module(name)
    with Forks(path + ".new", Fork) as server:
        os.rename(path + ".new", path)
        # Not by sys.stdin, whose lock the forks would inherit.
        threading.Thread(target=lambda: (os.read(0, 1), os._exit(0)), daemon=True).start()
        server.serve_forever()


def become(words: list[str], environment: dict[str, str], folder: str, streams: list[int]) -> None:
    """Be ``python WORDS`` from here on. Never returns."""
    import random
    import runpy
    import traceback

    import numpy

    status = 1
    try:
        os.setsid()
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(folder)
        random.seed()
        numpy.random.seed()
        sys.path[:0] = [entry for entry in environment.get("PYTHONPATH", "").split(os.pathsep) if entry]
        if words[0] in ("-m", "-c"):
            sys.path.insert(0, folder)
            sys.argv = words[1:]
            if words[0] == "-m":
                runpy.run_module(words[1], run_name="__main__", alter_sys=True)
            else:
                exec(words[1], {"__name__": "__main__"})
        else:
            sys.path.insert(0, os.path.dirname(words[0]))
            sys.argv = words
            runpy.run_path(words[0], run_name="__main__")
        status = 0
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        status = end.code if isinstance(end.code, int) else end.code is not None
    except BaseException:
        traceback.print_exc()
    with contextlib.suppress(BaseException):
        threading._shutdown()
        atexit._run_exitfuncs()
    for output in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            output.flush()
    os._exit(status)


def ask(path: str, words: list[str]) -> None:
    """Be the process that the server forks, for whoever started this one. Never returns."""
    server = socket.socket(socket.AF_UNIX)
    server.connect(path)
    asked = json.dumps({"words": words, "environment": dict(os.environ), "folder": os.getcwd()}).encode()
    server.sendall(NUMBER.pack(len(asked)))
    socket.send_fds(server, [asked[:1]], [0, 1, 2])
    server.sendall(asked[1:])
    (pid,) = NUMBER.unpack(server.recv(NUMBER.size, socket.MSG_WAITALL))
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: os.kill(pid, number))
    (status,) = NUMBER.unpack(server.recv(NUMBER.size, socket.MSG_WAITALL))
    if os.WIFSIGNALED(status):
        with contextlib.suppress(OSError):
            signal.signal(os.WTERMSIG(status), signal.SIG_DFL)
        os.kill(os.getpid(), os.WTERMSIG(status))
    os._exit(os.WEXITSTATUS(status))


@cache
def forking(**settings: str) -> list[str]:
    """What stands in the place of ``python`` in a command line, to have it forked.

    The server is started by the first call, and ends with this process.

    Args:
        **settings: environment variables that the libraries read when they are imported.
    """
    folder = tempfile.mkdtemp(prefix="sdar-fork-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = str(Path(folder) / "socket")
    environment: dict[str, Any] = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    server = subprocess.Popen(
        [sys.executable, __file__, path, "serve"], stdin=subprocess.PIPE, env=environment | settings, cwd="/"
    )
    while not os.path.exists(path):
        assert server.poll() is None, "the fork server has ended; see its output"
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(0.1)
    return [sys.executable, "-S", "-E", __file__, path]


if __name__ == "__main__":
    if sys.argv[2:] == ["serve"]:
        serve(sys.argv[1])
    else:
        ask(sys.argv[1], sys.argv[2:])
