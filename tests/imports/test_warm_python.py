"""A fork of a Python that has imported torch does what the Python itself does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Sequence

PYTHON = sys.executable
POOL = "import sys, concurrent.futures as f; sys.pool = f.ThreadPoolExecutor(1)"
pytestmark = pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="forks need Linux")
SEEN = "import os, sys; print(sys.argv, os.getcwd(), os.environ['WHO'], sys.stdin.read())"
CASES = {
    "code": ["-c", SEEN, "a", "--b"],
    "unbuffered": ["-u", "-c", SEEN],
    "module": ["-m", "program", "a"],
    "file": ["program.py", "-m", "a"],
    "an option that forks do not know": ["-O", "-c", "print(__debug__)"],
    "words and a code": ["-c", "import sys; sys.exit('bad')"],
    "a code": ["-c", "import atexit, sys; atexit.register(print, 'last'); sys.exit(7)"],
    "a signal": ["-c", "import os; os.kill(os.getpid(), 11)"],
    "a thread": ["-c", "import threading; threading.Timer(0.1, print, ['late']).start()"],
    "an executor that nobody ends": ["-c", f"{POOL}; sys.pool.submit(print, 'pooled')"],
    "no such module": ["-m", "no_such_module"],
}


def outcome(program: str, arguments: Sequence[str], folder: Path) -> tuple[int, str, str]:
    done = subprocess.run(
        [program, *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env={**os.environ, "WHO": "us"},
        input="given",
    )
    errors = done.stderr.splitlines() or [""]
    # Where it stands is said by the lines before the last.
    return done.returncode, done.stdout, errors[-1].rpartition(": ")[2]


@pytest.mark.parametrize("arguments", CASES.values(), ids=CASES)
def test_a_fork_does_what_python_does(
    arguments: list[str], warm_program: str, tmp_path: Path
) -> None:
    (tmp_path / "program.py").write_text(SEEN)
    fork = outcome(warm_program, arguments, tmp_path)
    assert fork == outcome(PYTHON, arguments, tmp_path)


def test_it_is_a_fork_with_torch_and_starts_forks(warm_program: str) -> None:
    inner = "import sys; print('torch' in sys.modules)"
    outer = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}]); {inner}"
    done = subprocess.run([warm_program, "-c", outer], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "True"]
    other = {**os.environ, "PYTHONUTF8": "1"}
    done = subprocess.run(
        [warm_program, "-c", inner], env=other, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False"]


def test_a_fork_ends_with_whoever_started_it(warm_program: str) -> None:
    code = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    with subprocess.Popen([warm_program, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        process.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 30
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not Path(f"/proc/{pid}").exists()
