"""A Python that has imported torch or more, and forks a process for each that is asked for.

``import torch`` costs 2.8 s of CPU time and tests start hundreds of processes: it was most of what
the suite did (2 cores of a shared AMD EPYC, 2026-11-26). A fork is a process like any other: it
has its own folder, environment, standard streams, process group and end. ``warm_client.py`` is what
a test starts in Python's place.

``python warm_server.py SOCKET CLIENT MODULE...`` serves until its standard input ends.
"""

from __future__ import annotations

import array
import atexit
import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import sys
import threading
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

HEADER_BYTES = 8
STREAMS = 3


@dataclass
class Request:
    """What is to run: Python's arguments, in which folder, with which environment."""

    arguments: list[str]
    folder: str
    environ: dict[str, str]
    streams: list[int]

    def become(self) -> None:
        """Make this fork the process that was asked for."""
        os.setpgid(0, 0)
        for number, stream in enumerate(self.streams):
            os.dup2(stream, number)
            os.close(stream)
        # What it starts in turn is forked too.
        sys.executable = sys.argv[2]
        os.environ.clear()
        os.environ.update(self.environ)
        os.chdir(self.folder)
        places = self.environ.get("PYTHONPATH", "")
        sys.path[:0] = [place for place in places.split(os.pathsep) if place]
        importlib.invalidate_caches()
        threads = self.environ.get("OMP_NUM_THREADS", "")
        if threads.isdecimal():
            import torch

            torch.set_num_threads(int(threads))

    def run(self) -> NoReturn:
        """Run and end as Python would, but that nothing is taken apart in memory: that takes 0.5 s.

        Where it is cut short by an exception, the last lines are Python's.
        """
        code: object = None
        try:
            self._run()
        except SystemExit as end:
            code = end.code
        except BaseException:  # noqa: BLE001 - as Python does: printed, and the exit code is 1
            traceback.print_exc()
            code = 1
        if code is not None and not isinstance(code, int):
            sys.stderr.write(f"{code}\n")
            code = 1
        # As multiprocessing's children do: it ends the threads of executors, which wait for work.
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit((code or 0) & 0xFF)

    def _run(self) -> None:
        """``-m MODULE``, ``-c CODE`` or a file, and its arguments; ``-u`` may come before."""
        first, *others = self.arguments
        if first == "-u":
            first, *others = others
            for stream in (sys.stdout, sys.stderr):
                stream.reconfigure(write_through=True)
        if first == "-m":
            module, *others = others
            sys.argv = [module, *others]
            sys.path.insert(0, self.folder)
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        elif first == "-c":
            code, *others = others
            sys.argv = ["-c", *others]
            sys.path.insert(0, "")
            names = {"__name__": "__main__", "__builtins__": __builtins__}
            exec(compile(code, "<string>", "exec"), names)  # noqa: S102 - what `python -c` does
        else:
            sys.argv = [first, *others]
            sys.path.insert(0, str(Path(first).resolve().parent))
            runpy.run_path(first, run_name="__main__")


class Server:
    """Forks what clients ask for, tells them how it ended, and ends it if they end."""

    def __init__(self, address: str) -> None:
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(address)
        self.listener.listen(64)
        self.waiting = selectors.DefaultSelector()
        self.waiting.register(self.listener, selectors.EVENT_READ)
        self.waiting.register(sys.stdin.fileno(), selectors.EVENT_READ)
        self.running: dict[int, tuple[socket.socket, int]] = {}

    def serve(self) -> Request | None:
        """In a fork, what it is to be; in the server None, when its standard input has ended."""
        while True:
            for key, _ in self.waiting.select():
                if key.fileobj == sys.stdin.fileno():
                    for pid in self.running:
                        os.killpg(pid, signal.SIGKILL)
                    return None
                if key.fileobj is self.listener:
                    request = self._accept()
                    if request is not None:
                        return request
                elif key.data in self.running:
                    self._end(key.data, is_over=isinstance(key.fileobj, int))

    def _accept(self) -> Request | None:
        client, _ = self.listener.accept()
        request = received(client)
        if request is None:
            client.close()
            return None
        pid = os.fork()
        if pid == 0:
            for other, handle in self.running.values():
                other.close()
                os.close(handle)
            client.close()
            self.waiting.close()
            self.listener.close()
            return request
        for stream in request.streams:
            os.close(stream)
        handle = os.pidfd_open(pid)
        self.running[pid] = client, handle
        self.waiting.register(client, selectors.EVENT_READ, pid)
        self.waiting.register(handle, selectors.EVENT_READ, pid)
        return None

    def _end(self, pid: int, *, is_over: bool) -> None:
        """A fork is over, or its client has ended: then the fork and what it started end too."""
        client, handle = self.running.pop(pid)
        self.waiting.unregister(client)
        self.waiting.unregister(handle)
        if not is_over:
            try:
                os.killpg(pid, signal.SIGKILL)
            except ProcessLookupError:
                os.kill(pid, signal.SIGKILL)  # It has not yet come to lead its group.
        _, status = os.waitpid(pid, 0)
        os.close(handle)
        if is_over:
            client.sendall(str(os.waitstatus_to_exitcode(status)).encode())
        client.close()


def received(client: socket.socket) -> Request | None:
    """What a client asks for, with its standard streams; None if it ended while it asked."""
    size = array.array("i").itemsize * STREAMS
    header, extra, _, _ = client.recvmsg(HEADER_BYTES, socket.CMSG_SPACE(size))
    streams = array.array("i")
    for _, _, data in extra:
        streams.frombytes(data[:size])
    text = bytearray()
    length = int.from_bytes(header, "little")
    while len(text) < length:
        part = client.recv(length - len(text))
        if not part:
            break
        text += part
    if len(streams) < STREAMS or len(text) < length:
        return None
    said = json.loads(text)
    return Request(said["arguments"], said["folder"], said["environ"], list(streams))


def main() -> Request | None:
    """Serve; in a fork, what it is to be."""
    del sys.path[0]  # This file's folder is not on the path of whoever is asked for.
    address, _, *modules = sys.argv[1:]
    for module in modules:
        importlib.import_module(module)
    gc.freeze()
    server = Server(address)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    return server.serve()


if __name__ == "__main__":
    asked = main()
    if asked is not None:
        asked.become()
        asked.run()
