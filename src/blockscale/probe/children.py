"""Child processes that answer line by line, each with a time limit, all ended together."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import tempfile
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import IO

# Providers may print too; the marker tells our lines from theirs.
MARKER = "@probe "


@dataclass(frozen=True, slots=True)
class Ending:
    """How a child ended. ``reason``: None if well. ``is_stopped``: ``stop`` ended it."""

    reason: str | None = None
    is_stopped: bool = False


class Children:
    """Runs children for several threads.

    A child leads a group of processes, which is ended with it: the compilers that it started too.
    """

    def __init__(self, time_limit_s: float) -> None:
        self._time_limit_s = time_limit_s
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[str]] = set()
        self._is_stopped = False

    def run(self, command: Sequence[str], heard: Callable[[dict[str, Any]], None]) -> Ending:
        """Start one, hand each of its lines to ``heard`` as it comes, and say how it ended."""
        late = threading.Event()
        with tempfile.TemporaryFile("w+") as errors:
            process = self._started(command, errors)
            if process is None:
                return Ending(is_stopped=True)

            def end_it() -> None:
                late.set()
                self._kill(process)

            timer = threading.Timer(self._time_limit_s, end_it)
            timer.start()
            try:
                assert process.stdout is not None
                with process.stdout as lines:
                    for line in lines:
                        if line.startswith(MARKER):
                            heard(json.loads(line.removeprefix(MARKER)))
                code = process.wait()
            finally:
                timer.cancel()
                self._kill(process)
                with self._lock:
                    self._running.discard(process)
            errors.seek(0)
            if late.is_set():
                return Ending(f"no answer within {self._time_limit_s:g} s")
            if code != 0 and self._is_stopped:
                return Ending(is_stopped=True)
            return Ending(_death(code, errors.read()))

    def stop(self) -> None:
        """End those that run, and start no more."""
        with self._lock:
            self._is_stopped = True
            running = list(self._running)
        for process in running:
            self._kill(process)

    def _started(self, command: Sequence[str], errors: IO[str]) -> subprocess.Popen[str] | None:
        with self._lock:
            if self._is_stopped:
                return None
            process = subprocess.Popen(  # noqa: S603 - our own interpreter and module
                command,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                errors="replace",
                start_new_session=True,
            )
            self._running.add(process)
            return process

    def _kill(self, process: subprocess.Popen[str]) -> None:
        with self._lock, contextlib.suppress(ProcessLookupError):
            # A group whose leader was waited for may be someone else's by now.
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)


def _death(code: int, errors: str) -> str | None:
    if code == 0:
        return None
    if code < 0:
        return f"the process was killed by {signal.Signals(-code).name}"
    last = (errors.strip().splitlines() or ["no message"])[-1]
    return f"the process ended with code {code}: {last[:200]}"
