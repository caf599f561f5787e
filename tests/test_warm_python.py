"""Forked processes (warm_python.py) are to tests what fresh ones would be."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import warm_python

ENDS = {
    "well": "import sys; sys.stdout.write('well')",
    "code": "import sys; sys.exit(3)",
    "text": "import sys; sys.exit('no')",
    "error": "print(1 / 0)",
    "abort": "import os; os.abort()",
    "interrupt": "import signal; signal.raise_signal(signal.SIGINT)",
    "atexit": "import atexit, sys; atexit.register(sys.stdout.write, 'last'); sys.stdout.write('first')",
    "thread": "import threading, sys; threading.Timer(0.1, sys.stdout.write, ['later']).start()",
    "warning": "import warnings; warnings.warn('none', UserWarning)",
}


@pytest.mark.parametrize("code", ENDS.values(), ids=ENDS)
def test_a_process_ends_as_python_does(code: str) -> None:
    arguments = ["-W", "error::UserWarning", "-c", code]
    warm = warm_python.run(*arguments)
    fresh = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
    assert (warm.returncode, warm.stdout) == (fresh.returncode, fresh.stdout)
    assert warm.stderr.splitlines()[-1:] == fresh.stderr.splitlines()[-1:]


def test_torch_is_there_and_what_a_test_may_set_is_not() -> None:
    code = "import sys; sys.stdout.write(str([n in sys.modules for n in ('torch', 'medgmae', 'huggingface_hub')]))"
    assert warm_python.run("-c", code).stdout == "[True, False, False]"


def test_folder_environment_and_limits_are_its_own(tmp_path: Path) -> None:
    (tmp_path / "module_here.py").write_text("VALUE = 7\n")
    script = tmp_path / "script.py"
    code = "import os, sys, module_here\nsys.stdout.write(f'{os.getcwd()} {sys.argv[1:]} {dict(os.environ)}')"
    script.write_text(code)
    environment = {"ONLY": "this"}
    done = warm_python.run(script, os.fsdecode(b"M\xfcller"), cwd=tmp_path, env=environment)
    assert done.stdout == f"{tmp_path} ['M\\udcfcller'] {{'ONLY': 'this'}}"
    code = "import pathlib; pathlib.Path('file').write_bytes(bytes(200))"
    assert "File too large" in warm_python.run("-c", code, cwd=tmp_path, limits={"RLIMIT_FSIZE": 100}).stderr
    assert warm_python.run("-c", code, cwd=tmp_path).returncode == 0


def test_a_process_is_signalled_and_waited_for() -> None:
    process = warm_python.Process("-c", "import time; time.sleep(60)", new_session=True)
    assert process.poll() is None
    while os.getsid(process.pid) != process.pid:  # soon after the fork
        time.sleep(0.01)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == -signal.SIGTERM
    process.kill()  # nothing is left to kill


def test_commands_of_a_shell() -> None:
    with tempfile.TemporaryDirectory() as folder:
        script = "echo 'import sys; sys.stdout.write(sys.stdin.read().upper())' > up.py\n"
        script += "echo text | python up.py | cat\n"
        script += "medgmae info nothing || echo $?; python -c 'import os; os.kill(os.getpid(), 9)' || echo $?"
        paths = {"PATH": f"{warm_python.commands()}:{os.environ['PATH']}", "PYTHONPATH": str(warm_python.TESTS.parent)}
        done = subprocess.run(
            ["bash", "-c", script], cwd=folder, env=os.environ | paths, capture_output=True, text=True, check=False
        )
    assert done.stdout.split() == ["TEXT", "2", "137"]
    assert "unknown model 'nothing'" in done.stderr


def test_a_program_on_standard_input() -> None:
    path = f"{warm_python.commands()}:{os.environ['PATH']}"
    script = "python - one <<'EOF'\nimport sys\nsys.stdout.write(str(sys.argv))\nEOF"
    done = subprocess.run(
        ["bash", "-ec", script], env=os.environ | {"PATH": path}, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "['-', 'one']"), done.stderr
