"""What tests start in Python's place: asks ``warm_server.py`` for a fork and ends as it ends.

Where a fork would differ (Python's own options, variables that torch or Python read only once,
files given by their numbers) it becomes the Python that was asked for.
"""

from __future__ import annotations

import array
import json
import os
import signal
import socket
import sys

# Read when Python starts or torch is imported; OMP_NUM_THREADS is made good by the server.
TORCH = ("PYTHON", "OMP_", "MKL_", "KMP_", "LD_", "GOMP_", "OPENBLAS_", "MALLOC_", "LC_", "LANG")
# And what torch's compiler, Triton and transformers read when they are imported.
TRANSFORMERS = (*TORCH, "TORCH_", "TORCHDYNAMO", "TORCHINDUCTOR", "TRITON", "HF_", "TRANSFORMERS_")
AT_ANY_TIME = ("PYTHONPATH", "OMP_NUM_THREADS", "TORCH_NCCL_ASYNC_ERROR_HANDLING")


def read_once(environ: dict[str, str], prefixes: tuple[str, ...]) -> dict[str, str]:
    """The variables that a fork cannot change."""
    return {
        name: value
        for name, value in environ.items()
        if name.startswith(prefixes) and name not in AT_ANY_TIME
    }


def main(python: str, address: str, prefixes: tuple[str, ...], known: dict[str, str]) -> int:
    """Run the Python that was asked for; gives back its exit code."""
    arguments = sys.argv[1:]
    environ = dict(os.environ)
    first = next((word for word in arguments if word != "-u"), "-")
    is_plain = first in {"-c", "-m"} or not first.startswith("-")
    # Three streams, and the folder that is being listed: other files were given by their numbers.
    is_alone = len(os.listdir("/proc/self/fd")) <= 4  # noqa: PTH208 - pathlib would be imported
    if not is_plain or not is_alone or read_once(environ, prefixes) != known:
        os.execv(python, [python, *arguments])  # noqa: S606 - the Python of the tests
    folder = os.getcwd()  # noqa: PTH109 - as above
    text = json.dumps({"arguments": arguments, "folder": folder, "environ": environ}).encode()
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(address)
        streams = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0, 1, 2]))]
        server.sendmsg([len(text).to_bytes(8, "little")], streams)
        server.sendall(text)
        code = int(server.recv(64) or b"1")
    if code < 0:
        # SIGINT and SIGPIPE are Python's own until here.
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    return code
