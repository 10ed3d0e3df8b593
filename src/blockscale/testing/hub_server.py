"""A server on this machine that speaks the Hub's endpoints, and misbehaves when told to.

For tests and documents: ``HF_ENDPOINT=http://127.0.0.1:PORT`` and a folder of checkpoints are all
that it takes to read headers "from the Hub" without a network.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, ClassVar, TypeAlias
from urllib.parse import unquote, urlsplit

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

# What an endless answer sends before it gives up on a reader that never hangs up.
ENDLESS_BYTES = 256 << 20
_PIECE = 1 << 16
_API_PARTS = 5


@dataclass(frozen=True, slots=True)
class Asked:
    """One request. ``file``: ``org/name/file``, or ``org/name`` for a question about it."""

    file: str
    begin: int
    end: int | None
    """The last byte asked for plus one; None: all."""
    authorized: bool
    nth: int
    """How many requests for the same file came before."""


@dataclass(frozen=True, slots=True)
class Answer:
    """How to answer otherwise than truly.

    ``status`` instead of the file, with ``headers`` added or replaced; ``body`` instead of the
    file's bytes; ``cut`` the connection after so many bytes of the body; ``endless``: the body is
    repeated and no length is given; ``ignores_range``: the whole file, status 200.
    """

    status: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | None = None
    cut: int | None = None
    endless: bool = False
    ignores_range: bool = False


Temper: TypeAlias = Callable[[Asked], "Answer | None"]


class HubServer:
    """Serves ``folder/org/name`` as repository ``org/name``, whose only commit is ``COMMIT``.

    ``temper`` may replace any answer. ``asked`` lists all requests, ``sent`` counts the bytes that
    went out for each file. Large files come by a redirect to another host name, as on the Hub.
    """

    COMMIT: ClassVar[str] = hashlib.sha1(b"blockscale", usedforsecurity=False).hexdigest()

    def __init__(self, folder: Path, temper: Temper | None = None) -> None:
        self.folder = folder
        self.temper = temper
        self.asked: list[Asked] = []
        self.sent: dict[str, int] = {}
        self.sizes: dict[str, int] = {}
        """What the server says instead of a file's true size."""
        self._lock = threading.Lock()
        outer = self

        class Handler(_Handler):
            hub = outer

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True

    @property
    def port(self) -> int:
        """Where it listens on 127.0.0.1."""
        return int(self._server.server_address[1])

    @property
    def endpoint(self) -> str:
        """For ``HF_ENDPOINT``."""
        return f"http://127.0.0.1:{self.port}"

    @contextmanager
    def running(self) -> Iterator[HubServer]:
        """Serve until the block ends."""
        thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._server.server_close()
            thread.join()

    def note(self, file: str, begin: int, end: int | None, *, authorized: bool) -> Asked:
        """Record a request."""
        with self._lock:
            nth = sum(asked.file == file for asked in self.asked)
            asked = Asked(file, begin, end, authorized, nth)
            self.asked.append(asked)
        return asked

    def count(self, file: str, sent: int) -> None:
        """Record bytes of a file that went out."""
        with self._lock:
            self.sent[file] = self.sent.get(file, 0) + sent

    def requests_for(self, file: str) -> list[Asked]:
        """The requests for one file, in order."""
        return [asked for asked in self.asked if asked.file == file]


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Say nothing: tests read stderr."""

    def handle(self) -> None:
        """All requests of a connection; that a reader resets it between two is no fault."""
        with suppress(ConnectionResetError):
            super().handle()

    def do_GET(self) -> None:
        try:
            self._get()
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def _get(self) -> None:
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        if parts[:2] == ["api", "models"]:
            self._repository(parts[2:])
        elif parts[0] == "cdn":
            self._file("/".join(parts[1:]))
        elif parts[2:3] == ["resolve"] and parts[-1].endswith(".safetensors"):
            where = f"http://localhost:{self.hub.port}/cdn/{'/'.join(parts[:2] + parts[4:])}"
            self._send(302, {"Location": where}, b"", None)
        else:
            self._file("/".join(parts[:2] + parts[4:]))

    def _repository(self, parts: list[str]) -> None:
        name = "/".join(parts[:2])
        revision = parts[3] if len(parts) > _API_PARTS - 2 else "main"
        asked = self.hub.note(name, 0, None, authorized="authorization" in self.headers)
        folder = self.hub.folder / name
        files = sorted(folder.iterdir()) if folder.is_dir() else []
        siblings = [
            {"rfilename": file.name, "size": self._size(f"{name}/{file.name}", file)}
            for file in files
        ]
        body = json.dumps({"id": name, "sha": self.hub.COMMIT, "siblings": siblings}).encode()
        if self._is_answered(asked, body):
            return
        if not files:
            self._send(404, {"X-Error-Code": "RepoNotFound"}, b"", None)
        elif revision not in {"main", self.hub.COMMIT}:
            self._send(404, {"X-Error-Code": "RevisionNotFound"}, b"", None)
        else:
            self._send(200, {}, body, None)

    def _size(self, name: str, file: Path) -> int:
        return self.hub.sizes.get(name, file.stat().st_size)

    def _file(self, name: str) -> None:
        begin, end = _span(self.headers.get("Range"))
        authorized = "authorization" in self.headers
        asked = self.hub.note(name, begin, end, authorized=authorized)
        path = self.hub.folder / name
        if not path.is_file():
            if not self._is_answered(asked, b""):
                self._send(404, {"X-Error-Code": "EntryNotFound"}, b"", None)
            return
        size = path.stat().st_size
        with path.open("rb") as file:
            file.seek(begin)
            body = file.read((size if end is None else min(end, size)) - begin)
        if self._is_answered(asked, body):
            return
        if end is None:
            self._send(200, {}, body, name)
        else:
            self._send(
                206, {"Content-Range": f"bytes {begin}-{begin + len(body) - 1}/{size}"}, body, name
            )

    def _is_answered(self, asked: Asked, body: bytes) -> bool:
        answer = self.hub.temper(asked) if self.hub.temper else None
        if answer is None:
            return False
        path = self.hub.folder / asked.file
        size = path.stat().st_size if path.is_file() else 0
        body = body if answer.body is None else answer.body
        headers = dict(answer.headers)
        if answer.ignores_range:
            status, body = 200, path.read_bytes()
        elif answer.status is not None:
            status = answer.status
        elif asked.end is None:
            status = 200
        else:
            status = 206
            span = f"bytes {asked.begin}-{asked.begin + len(body) - 1}/{size}"
            headers.setdefault("Content-Range", span)
        if answer.endless:
            self._send_endless(status, headers, body, asked.file)
        elif answer.cut is not None:
            headers.setdefault("Content-Length", str(len(body)))
            self._send(status, headers, body[: answer.cut], asked.file)
            self.close_connection = True
        else:
            self._send(status, headers, body, asked.file)
        return True

    def _send(self, status: int, headers: Mapping[str, str], body: bytes, file: str | None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        # Counted first: the reader may have the bytes, and a test look, before write returns.
        if file is not None:
            self.hub.count(file, len(body))
        self.wfile.write(body)

    def _send_endless(
        self, status: int, headers: Mapping[str, str], body: bytes, file: str
    ) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.close_connection = True
        piece = (body or b" ") * (_PIECE // max(1, len(body)) + 1)
        for _ in range(0, ENDLESS_BYTES, len(piece)):
            self.wfile.write(piece)
            self.hub.count(file, len(piece))


def _span(text: str | None) -> tuple[int, int | None]:
    """(first byte, last byte + 1) of ``bytes=0-7``."""
    if text is None:
        return 0, None
    first, _, last = text.removeprefix("bytes=").partition("-")
    return int(first), int(last) + 1
