"""Starts ``warm_server.py`` and writes the program that tests start in Python's place."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from warm_client import read_once

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

HERE = Path(__file__).parent
# Of a socket's address; a first line that names a program has no room for a space (Linux).
LONGEST_SOCKET = 108


@contextmanager
def warm_python(modules: Sequence[str], prefixes: tuple[str, ...]) -> Iterator[str]:
    """A program to call in place of ``sys.executable``; that itself where it cannot be replaced.

    ``modules`` are imported already; ``prefixes`` of the variables that they read at that time.
    """
    with tempfile.TemporaryDirectory() as folder:
        address, client = Path(folder) / "socket", Path(folder) / "python"
        is_named = len(str(address)) < LONGEST_SOCKET and " " not in sys.executable
        if not is_named or not hasattr(os, "pidfd_open"):
            yield sys.executable
            return
        known = read_once(dict(os.environ), prefixes)
        client.write_text(
            f"#!{sys.executable} -IS\n"
            f"import sys; sys.path.insert(0, {str(HERE)!r})\n"
            "from warm_client import main\n"
            f"sys.exit(main({sys.executable!r}, {str(address)!r}, {prefixes!r}, {known!r}))\n"
        )
        client.chmod(0o755)
        clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        command = [sys.executable, str(HERE / "warm_server.py"), str(address), str(client)]
        command += modules
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=clean, cwd=HERE
        ) as server:
            assert server.stdout is not None
            assert server.stdout.readline() == b"ready\n"
            yield str(client)
            assert server.stdin is not None
            server.stdin.close()
