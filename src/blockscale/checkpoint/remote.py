"""The first bytes of files on a web server that may be slow, broken or lying.

``huggingface_hub`` brings the session, the proxies, the token and the addresses. The reading is
here because its own header reader loads whatever the server sends: a server that ignores ``Range``
would send a shard of gigabytes. Here every answer is streamed, cut at what was asked, and never
decompressed.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

from blockscale.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

_OK, _PARTIAL, _UNAUTHORIZED, _FORBIDDEN, _NOT_FOUND, _TIMEOUT = 200, 206, 401, 403, 404, 408
_OUT_OF_RANGE, _TOO_MANY, _SERVER_FAULT = 416, 429, 500
# A 64-bit number has at most 19 digits; Python itself refuses to parse thousands of them.
_LONGEST_NUMBER = 19


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a server is borne. All waits of one file together are bounded by these numbers.

    ``attempts``: requests for one file; ``first_wait_s`` is doubled after each. ``longest_wait_s``:
    a server that asks for more is not waited for. ``silence_s``: without a byte. ``slowest``: bytes
    a second below which a transfer is given up, after ``grace_s``.
    """

    attempts: int = 5
    first_wait_s: float = 0.5
    longest_wait_s: float = 60.0
    silence_s: float = 15.0
    slowest: int = 10_000
    grace_s: float = 30.0


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """One file on the server: its address and how errors name it."""

    url: str
    name: Path


@dataclass(frozen=True, slots=True)
class Received:
    """Bytes from the file's start. ``size``: of the whole file, None if the server did not say."""

    data: bytes
    size: int | None


@dataclass(frozen=True, slots=True)
class Server:
    """An address, its session and request headers, and the patience with it.

    Safe to use from several threads.
    """

    endpoint: str
    session: Any
    headers: Mapping[str, str]
    patience: Patience = Patience()
    sleep: Callable[[float], None] = time.sleep
    clock: Callable[[], float] = time.monotonic
    failures: tuple[type[BaseException], ...] = (OSError,)

    def first_bytes(self, file: RemoteFile, count: int) -> Received:
        """Exactly the first ``count`` bytes; no later byte of the file is asked for.

        A connection that breaks is resumed where it broke. Raises CheckpointError, with the cure,
        if the bytes do not come within the patience or contradict what was said before.
        """
        return _Transfer(self, file, count, _Wanted.START).run()

    def whole(self, file: RemoteFile, limit: int) -> Received:
        """A file of at most ``limit`` bytes. Raises CheckpointError as ``first_bytes`` does."""
        return _Transfer(self, file, limit, _Wanted.WHOLE).run()


class _Wanted(Enum):
    START = "exactly so many bytes"
    WHOLE = "all of it, at most so many bytes"


class _Transfer:
    """One file's requests, until its bytes are there or the patience ends."""

    def __init__(self, server: Server, file: RemoteFile, limit: int, wanted: _Wanted) -> None:
        self.server = server
        self.file = file
        self.limit = limit
        self.wanted = wanted
        self.data = bytearray()
        self.size: int | None = None
        patience = server.patience
        self.deadline = server.clock() + patience.grace_s + limit / patience.slowest

    def run(self) -> Received:
        patience = self.server.patience
        wait, problem = patience.first_wait_s, ""
        for attempt in range(patience.attempts):
            if attempt:
                self.server.sleep(wait)
                wait = min(2 * wait, patience.longest_wait_s)
            try:
                with self._request() as response:
                    asked = self._judge(response)
                    if asked is None:
                        if self._receive(response):
                            return Received(bytes(self.data), self.size)
                        problem = f"the connection ended after {len(self.data)} bytes"
                    else:
                        problem = f"HTTP status {response.status_code}"
                        wait = max(wait, asked)
            except self.server.failures as error:
                problem = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        raise CheckpointError(
            self.file.name,
            f"is not on this disk, and could not be read from {self.server.endpoint} in "
            f"{patience.attempts} attempts ({problem}); try again, or set HF_HUB_OFFLINE=1 to use "
            "headers read before",
        )

    def _request(self) -> Any:  # noqa: ANN401 - httpx or httpx2, as huggingface_hub has it
        headers = {**self.server.headers, "Accept-Encoding": "identity"}
        if self.wanted is _Wanted.START:
            headers["Range"] = f"bytes={len(self.data)}-{self.limit - 1}"
        silence = self.server.patience.silence_s
        return self.server.session.stream("GET", self.file.url, headers=headers, timeout=silence)

    def _judge(self, response: Any) -> float | None:  # noqa: ANN401 - as above
        """None if the body can be read, else the seconds to wait. Raises if waiting is no use."""
        status = response.status_code
        if status in {_OK, _PARTIAL}:
            self._check_answer(response)
            return None
        if status in {_TOO_MANY, _TIMEOUT} or status >= _SERVER_FAULT:
            asked = _seconds_asked(response.headers)
            if asked > self.server.patience.longest_wait_s:
                raise CheckpointError(
                    self.file.name,
                    f"{self.server.endpoint} allows no more requests for {asked:.0f} s; wait, or "
                    "log in (`hf auth login`) for a higher limit",
                )
            return asked
        refusal = self._refusal(status, response.headers.get("x-error-code", ""))
        raise CheckpointError(self.file.name, refusal)

    def _refusal(self, status: int, code: str) -> str:
        endpoint = self.server.endpoint
        if code == "GatedRepo" or (status == _FORBIDDEN and not code):
            return (
                f"is gated on {endpoint}; accept its terms there and log in (`hf auth login`, or "
                "set HF_TOKEN)"
            )
        if code == "RevisionNotFound":
            return f"is no revision on {endpoint}; write org/name@branch, @tag or @commit"
        if code == "EntryNotFound":
            return f"is not in the repository on {endpoint}"
        if code == "RepoNotFound" or status in {_UNAUTHORIZED, _NOT_FOUND}:
            return (
                f"is neither on this disk nor on {endpoint}; check the name, or log in "
                "(`hf auth login`) if the repository is private"
            )
        if status == _OUT_OF_RANGE:
            return f"holds fewer than {self.limit} bytes on {endpoint}; it was uploaded damaged"
        return f"{endpoint} answers with HTTP status {status}"

    def _check_answer(self, response: Any) -> None:  # noqa: ANN401 - as above
        if response.headers.get("content-encoding", "identity") != "identity":
            raise CheckpointError(
                self.file.name, "comes compressed although that was declined; a proxy is in the way"
            )
        begin, size = 0, _number(response.headers.get("content-length"))
        if response.status_code == _PARTIAL:
            begin, size = _content_range(response.headers.get("content-range", ""))
        if begin not in {0, len(self.data)}:
            raise CheckpointError(
                self.file.name,
                f"byte {len(self.data)} was asked for, {self.server.endpoint} sends byte {begin}",
            )
        if begin == 0:
            self.data.clear()
        if self.size is not None and size is not None and size != self.size:
            raise CheckpointError(
                self.file.name,
                f"is said to hold {self.size} bytes and then {size}; it is being replaced, or "
                f"{self.server.endpoint} is wrong",
            )
        self.size = self.size if size is None else size
        if self.wanted is _Wanted.WHOLE and self.size is not None and self.size > self.limit:
            raise CheckpointError(
                self.file.name, f"holds {self.size} bytes; at most {self.limit} are read"
            )

    def _receive(self, response: Any) -> bool:  # noqa: ANN401 - as above
        """Append what comes, never more than was asked; whether that is all of it."""
        # Without a size: httpx would hold pieces back to fill one, and lose them when it breaks.
        for piece in response.iter_raw():
            self.data += piece[: self.limit + 1 - len(self.data)]
            if len(self.data) > self.limit and self.wanted is _Wanted.WHOLE:
                raise CheckpointError(
                    self.file.name, f"is longer than the {self.limit} bytes that are read"
                )
            if len(self.data) >= self.limit and self.wanted is _Wanted.START:
                del self.data[self.limit :]
                return True
            if self.server.clock() > self.deadline:
                raise CheckpointError(
                    self.file.name,
                    f"comes too slowly, {len(self.data)} bytes so far; try again later or from "
                    "another network",
                )
        if self.wanted is _Wanted.WHOLE:
            return self.size is None or len(self.data) == self.size
        return len(self.data) == self.limit


def _seconds_asked(headers: Mapping[str, str]) -> float:
    """``Retry-After`` in seconds; a date or anything else counts as no wish."""
    text = headers.get("retry-after", "")
    return float(_number(text) or 0)


def _number(text: str | None) -> int | None:
    if text is None or len(text) > _LONGEST_NUMBER or not (text.isascii() and text.isdigit()):
        return None
    return int(text)


def _content_range(text: str) -> tuple[int, int | None]:
    """(first byte, size of the file) of ``bytes 0-7/1234``; the size None if not said."""
    span, _, size = text.removeprefix("bytes").strip().partition("/")
    begin = _number(span.partition("-")[0])
    return (-1 if begin is None else begin), _number(size)
