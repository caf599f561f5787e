"""Forks Python processes that have torch imported, for warm_python.py, which starts it: ``warm_server.py SOCKET``.

A connection brings one request: arguments as of ``python``, folder, environment, limits, and the three standard
streams. Back go the number of the process and, when it has ended, the status that the system gives of it.
"""

from __future__ import annotations

import array
import atexit
import contextlib
import json
import os
import resource
import runpy
import select
import signal
import socket
import sys
import threading
import traceback
import types
import warnings
from typing import Any, NoReturn

# What takes long to import, is not ours, and is not set by an environment of the test's own, as huggingface_hub is.
# medgmae itself begins anew in every process.
PRELOADED = ["numpy", "torch", "torch._dynamo", "safetensors.torch", "SimpleITK", "matplotlib.backends.backend_agg"]
PRELOADED += ["torchvision"]  # most of the seconds of timm, which training imports


def serve(path: str) -> None:
    """Fork a process for every request, until standard input ends, which it does with the process of the tests."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal; it is for the forked ones
    awake, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    running: dict[int, socket.socket] = {}
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{path}.new")
        listener.listen(16)
        os.rename(f"{path}.new", path)  # it is there when it answers
        while True:
            ready = select.select([0, awake, listener], [], [])[0]
            if 0 in ready:
                return
            if awake in ready:
                os.read(awake, 4096)
                report_ended(running)
            if listener in ready:
                connection = listener.accept()[0]
                pid = os.fork()
                if pid == 0:
                    signal.set_wakeup_fd(-1)
                    for number in (awake, wake, listener.detach(), *(other.detach() for other in running.values())):
                        os.close(number)
                    become(connection)
                running[pid] = connection
                send(connection, pid)


def report_ended(running: dict[int, socket.socket]) -> None:
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        with running.pop(pid) as connection:
            send(connection, status)


def send(connection: socket.socket, number: int) -> None:
    with contextlib.suppress(OSError):  # whoever asked has gone
        connection.sendall(array.array("q", [number]).tobytes())


def become(connection: socket.socket) -> NoReturn:
    """Do as ``python ARGUMENTS`` does, and end as it does."""
    with connection:
        data, streams, _, _ = socket.recv_fds(connection, 16, 3)
        length = int(data)
        request = json.loads(connection.makefile("rb").read(length))
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    # Those of the server remember what they were opened on.
    sys.stdin, sys.stdout = open(0, closefd=False), open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if request["new_session"]:
        os.setsid()
    for name, value in request["limits"].items():
        resource.setrlimit(getattr(resource, name), (value, value))
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    code = 1
    try:
        code = python(request["arguments"])
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        if code and not isinstance(end.code, int):
            sys.stderr.write(f"{end.code}\n")
    except KeyboardInterrupt:
        traceback.print_exc()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        sys.stdout.flush()
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        traceback.print_exc()
    # As when an interpreter ends, but for taking apart all modules, which with torch lasts half a second.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for file in (sys.stdout, sys.stderr):
        try:
            file.flush()
        except OSError:
            code = 120
    os._exit(code)


def python(arguments: list[str]) -> int:
    """Options -W, then -c CODE, -m MODULE, - for a program on standard input, or a script."""
    sys.path[:1] = ["", *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    sys.dont_write_bytecode = bool(os.environ.get("PYTHONDONTWRITEBYTECODE"))
    while arguments[0] == "-W":
        warnings._setoption(arguments[1])  # type: ignore[attr-defined]
        sys.warnoptions.append(arguments[1])
        arguments = arguments[2:]
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    elif arguments[0] in ("-c", "-"):
        program = sys.stdin.read() if arguments[0] == "-" else arguments[1]
        sys.argv = arguments if arguments[0] == "-" else ["-c", *arguments[2:]]
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(program, "<string>", "exec"), main.__dict__)
    else:
        sys.argv, sys.path[0] = arguments, os.path.dirname(arguments[0])
        runpy.run_path(arguments[0], run_name="__main__")
    return 0


if __name__ == "__main__":
    for name in PRELOADED:
        __import__(name)
    gone: Any = [name for name in ("huggingface_hub", "medgmae", "timm") if name in sys.modules]
    if gone:
        sys.exit(f"{gone} came with {PRELOADED}, though a process has to import them with its own settings")
    serve(sys.argv[1])
