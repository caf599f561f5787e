"""Python processes that begin with torch imported: real ones, in which medgmae is new, without the seconds of a start.

A server (warm_server.py), one for each process of tests, forks them. They are no substitute where the test is about the
start itself: about what gets imported, the memory of a whole process, threads, or variables that Python or torch read
when they start (PYTHON* but for PYTHONPATH, OMP_NUM_THREADS, locales).
"""

from __future__ import annotations

import array
import atexit
import contextlib
import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

TESTS = Path(__file__).parent
STAND_IN = """#!{python} -IS
import sys
sys.path.append({tests!r})
import warm_python
warm_python.stand_in({socket!r}, {arguments!r} + sys.argv[1:])
"""


class Process:
    """``python ARGUMENTS``, as subprocess.Popen has it. Output goes to the given files, or nowhere."""

    def __init__(
        self,
        *arguments: str | os.PathLike[str] | bytes,
        server: str = "",
        stdin: IO[str] | int = subprocess.DEVNULL,
        stdout: IO[str] | int = subprocess.DEVNULL,
        stderr: IO[str] | int = subprocess.DEVNULL,
        cwd: str | Path = "",
        env: Mapping[str, str] | None = None,
        limits: Mapping[str, int] | None = None,
        new_session: bool = False,
    ) -> None:
        self.returncode: int | None = None
        request = {
            "arguments": [os.fsdecode(argument) for argument in arguments],
            "cwd": str(cwd or os.getcwd()),
            "env": dict(os.environ if env is None else env),
            "limits": dict(limits or {}),
            "new_session": new_session,
        }
        message = json.dumps(request).encode()
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(server or server_address())
        with open(os.devnull, "r+b") as nowhere:
            streams = [nowhere if stream == subprocess.DEVNULL else stream for stream in (stdin, stdout, stderr)]
            numbers = [stream if isinstance(stream, int) else stream.fileno() for stream in streams]
            socket.send_fds(self._socket, [b"%16d" % len(message)], numbers)
        self._socket.sendall(message)
        self.pid = self._number()

    def _number(self) -> int:
        data = self._socket.recv(8, socket.MSG_WAITALL)
        if len(data) < 8:
            raise RuntimeError("the server of warm processes has ended; its error output is above")
        return array.array("q", data)[0]

    def poll(self) -> int | None:
        """The exit code, as subprocess gives it, or None while the process runs."""
        if self.returncode is None and select.select([self._socket], [], [], 0)[0]:
            self.wait()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._socket], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0)
            self.returncode = os.waitstatus_to_exitcode(self._number())
            self._socket.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End the process as the system would, without a chance to clean up; and wait for it."""
        self.send_signal(signal.SIGKILL)
        self.wait()


def run(
    *arguments: str | os.PathLike[str] | bytes,
    timeout: float = 240,
    cwd: str | Path = "",
    env: Mapping[str, str] | None = None,
    limits: Mapping[str, int] | None = None,
) -> subprocess.CompletedProcess[str]:
    """``python ARGUMENTS`` to its end, with what it wrote; ``limits`` are those of the module resource, by name."""
    out, err = os.pipe(), os.pipe()  # not files, to whose size a limit would apply
    process = Process(*arguments, stdout=out[1], stderr=err[1], cwd=cwd, env=env, limits=limits)
    with ThreadPoolExecutor(2) as readers:
        said = [readers.submit(_read, *pipe) for pipe in (out, err)]
        try:
            process.wait(timeout)
        finally:
            process.kill()  # nothing, unless the time is over
    return subprocess.CompletedProcess(arguments, process.wait(), *(text.result() for text in said))


def _read(ours: int, theirs: int) -> str:
    os.close(theirs)
    with open(ours, encoding="utf-8", errors="backslashreplace") as file:
        return file.read()


@functools.cache
def server_address() -> str:
    """The socket of this process's server, which is started once."""
    folder = tempfile.TemporaryDirectory(prefix="medgmae-warm-")
    path = f"{folder.name}/socket"
    server = subprocess.Popen([sys.executable, TESTS / "warm_server.py", path], stdin=subprocess.PIPE, cwd="/")

    def end() -> None:
        server.communicate()
        folder.cleanup()

    atexit.register(end)
    while not os.path.exists(path):
        if server.poll() is not None:
            raise RuntimeError(f"the server of warm processes ended with {server.returncode}")
        time.sleep(0.02)
    for name, arguments in {"python": [], "medgmae": ["-m", "medgmae"]}.items():
        script = Path(folder.name, name)
        script.write_text(STAND_IN.format(python=sys.executable, tests=str(TESTS), socket=path, arguments=arguments))
        script.chmod(0o755)
    return path


def commands() -> str:
    """A folder for PATH with ``python`` and ``medgmae``, which have it done by warm processes."""
    return os.path.dirname(server_address())


def stand_in(server: str, arguments: list[str]) -> None:
    """Be a process of the server: its streams are these, its end is this one's."""
    code = Process(*arguments, server=server, stdin=0, stdout=1, stderr=2).wait()
    if code < 0:
        with contextlib.suppress(OSError):  # of a signal that cannot be caught
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)
