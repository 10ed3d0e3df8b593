"""The header of one safetensors file, read as if its author meant harm.

A file is eight bytes of header length (little endian), a JSON header, and the tensors' bytes. Every
claim is checked against the file's real size before anything is allocated, so a hostile header
costs at most its own length in memory. Needs neither torch nor the safetensors package.
"""

from __future__ import annotations

import json
import os
import stat
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from blockscale.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

# The safetensors reference reader refuses longer headers too (MAX_HEADER_SIZE, 100 MB).
MAX_HEADER_BYTES = 100_000_000
LENGTH_BYTES = 8
# An object that is parsed takes up to thirty times its bytes ("{}," becomes 72): values are counted
# before. A tensor's entry has about nine, and Kimi-K2 has 140,000 tensors in all its files.
MAX_JSON_VALUES = 3_000_000
MAX_AXES = 64
# Real names have up to a hundred characters.
LONGEST_NAME = 1000
MAX_ELEMENTS = 2**63 - 1
# How a Git LFS pointer and HTML begin.
_NOT_WEIGHTS = (b"version ", b"<!DOCTY", b"<!docty", b"<html", b"<HTML", b"<?xml")
_DOWNLOAD = (
    "a Git LFS pointer or a page that a server answered; download the file itself (git lfs pull, "
    "hf download)"
)
_DAMAGED = "; the file is damaged, download it again"
# Other formats under this one's name, whose first bytes no header length can be.
_OTHER_FORMATS = {
    b"PK\x03\x04": "a zip archive, as torch.save writes it; load it with torch and save it with "
    "safetensors",
    b"GGUF": "a GGUF file; download the safetensors version",
}

DTYPE_BITS: dict[str, int] = {
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "I64": 64,
    "U64": 64,
    "F64": 64,
    "C64": 64,
}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies: ``length`` bytes from ``offset`` (counted from the file's start)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class FileHeader:
    """All tensors of one file, in the order of their bytes, and the free-form metadata."""

    path: Path
    tensors: tuple[TensorEntry, ...]
    metadata: tuple[tuple[str, str], ...]


def read_header(path: Path) -> FileHeader:
    """The checked header of ``path``.

    Guarantees: every tensor lies inside the file, no two overlap, no byte is unclaimed, and shape
    times dtype is its length. Raises CheckpointError, naming file and tensor, otherwise.
    """
    raw, size = _raw_header(path)
    return parse_header(path, raw, size)


def parse_header(path: Path, raw: bytes, size: int) -> FileHeader:
    """The checked header ``raw`` (without the length before it) of a file of ``size`` bytes.

    ``path`` names the file in entries and errors. Guarantees and errors as ``read_header``.
    """
    data_start = LENGTH_BYTES + len(raw)
    document = _parsed(path, raw)
    metadata = _metadata(path, document.pop("__metadata__", {}))
    entries = [_entry(path, name, claim, data_start) for name, claim in document.items()]
    entries.sort(key=lambda entry: (entry.offset, entry.length))
    _check_tiling(path, entries, data_start, size - data_start)
    return FileHeader(path, tuple(entries), metadata)


def header_length(path: Path, prefix: bytes, size: int) -> int:
    """Bytes of the JSON header that a file of ``size`` bytes starting with ``prefix`` claims.

    Raises CheckpointError for a claim that is beyond the limit or the file.
    """
    if len(prefix) < LENGTH_BYTES:
        raise CheckpointError(
            path, f"holds {size} bytes, too few for a safetensors file; download it again"
        )
    length = int.from_bytes(prefix[:LENGTH_BYTES], "little")
    if length > MAX_HEADER_BYTES:
        if prefix.startswith(_NOT_WEIGHTS):
            text = prefix[:LENGTH_BYTES].decode("ascii")
            raise CheckpointError(
                path,
                f"holds text ({text!r}...) in place of weights: {_DOWNLOAD}",
            )
        for magic, what in _OTHER_FORMATS.items():
            if prefix.startswith(magic):
                raise CheckpointError(path, f"is {what}")
        raise CheckpointError(
            path,
            f"claims a header of {length} bytes, above the limit of {MAX_HEADER_BYTES}; "
            "it is damaged or not a safetensors file; download it again",
        )
    if length == 0:
        raise CheckpointError(
            path,
            "begins with zeros in place of a header, an unfinished download; download it again",
        )
    if LENGTH_BYTES + length > size:
        raise CheckpointError(
            path,
            f"claims a header of {length} bytes but holds only {size}; "
            "it is truncated, download it again",
        )
    return length


def _raw_header(path: Path) -> tuple[bytes, int]:
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise CheckpointError(path, "is not a regular file")
            length = header_length(path, file.read(LENGTH_BYTES), status.st_size)
            raw = file.read(length)
    except OSError as error:
        raise CheckpointError(path, f"cannot be read: {error.strerror or error}") from error
    if len(raw) < length:
        raise CheckpointError(path, "ended inside its header; it is being written or truncated")
    return raw, status.st_size


def parse_json_object(path: Path, raw: bytes, what: str) -> dict[str, Any]:
    """A JSON object from untrusted bytes: UTF-8, no duplicate keys, bounded in depth and values.

    Raises CheckpointError, naming the file, otherwise.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]  # set.add returns None, which is the point
            raise CheckpointError(path, f"{what} has the key {_short(twice)} twice{_DAMAGED}")
        return result

    values = sum(raw.count(mark) for mark in (b"{", b"[", b","))
    if values > MAX_JSON_VALUES:
        raise CheckpointError(
            path,
            f"{what} holds up to {values} JSON values, above the limit of {MAX_JSON_VALUES}; "
            "no checkpoint has that many tensors in a file",
        )
    try:
        document = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except UnicodeDecodeError as error:
        raise CheckpointError(
            path, f"{what} is not UTF-8 (byte {error.start}); download it again"
        ) from error
    except RecursionError as error:
        raise CheckpointError(path, f"{what} is nested too deeply") from error
    except ValueError as error:
        if raw.startswith(_NOT_WEIGHTS):
            raise CheckpointError(path, f"{what} is not valid JSON: it is {_DOWNLOAD}") from error
        raise CheckpointError(
            path, f"{what} is not valid JSON: {error}; repair it or download it again"
        ) from error
    if not isinstance(document, dict):
        raise CheckpointError(
            path, f"{what} must be a JSON object, not {type(document).__name__}{_DAMAGED}"
        )
    return document


def _parsed(path: Path, raw: bytes) -> dict[str, Any]:
    return parse_json_object(path, raw, "the header")


def _metadata(path: Path, claim: object) -> tuple[tuple[str, str], ...]:
    if not isinstance(claim, dict) or not all(isinstance(v, str) for v in claim.values()):
        raise CheckpointError(path, "__metadata__ must map strings to strings; save the file again")
    return tuple(claim.items())


def _entry(path: Path, name: str, claim: object, data_start: int) -> TensorEntry:
    if len(name) > LONGEST_NAME or not name.isprintable():
        raise CheckpointError(
            path,
            f"has a name of {len(name)} characters, unprintable ones among them or above the limit "
            f"of {LONGEST_NAME}; no loader would print it safely",
            tensor=_cut(name),
        )
    if not isinstance(claim, dict):
        raise CheckpointError(path, f"its entry is not an object{_DAMAGED}", tensor=_cut(name))
    missing = {"dtype", "shape", "data_offsets"} - claim.keys()
    if missing:
        raise CheckpointError(
            path, f"lacks {sorted(missing)} in the header{_DAMAGED}", tensor=_cut(name)
        )
    dtype, shape, offsets = claim["dtype"], claim["shape"], claim["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        known = ", ".join(DTYPE_BITS)
        raise CheckpointError(path, f"has dtype {_short(dtype)}; known: {known}", tensor=_cut(name))
    if not _is_list_of_sizes(shape) or len(shape) > MAX_AXES:
        raise CheckpointError(path, f"has shape {_short(shape)}{_DAMAGED}", tensor=_cut(name))
    if not _is_list_of_sizes(offsets) or len(offsets) != 2:  # noqa: PLR2004 - begin and end
        problem = f"has data_offsets {_short(offsets)}{_DAMAGED}"
        raise CheckpointError(path, problem, tensor=_cut(name))
    elements, (begin, end) = prod(shape), offsets
    if elements > MAX_ELEMENTS:
        problem = f"has shape {_short(shape)}, too large{_DAMAGED}"
        raise CheckpointError(path, problem, tensor=_cut(name))
    needed = -(-elements * DTYPE_BITS[dtype] // 8)
    if end - begin != needed:
        raise CheckpointError(
            path,
            f"{dtype} of shape {tuple(shape)} takes {needed} bytes, but data_offsets "
            f"{offsets} span {end - begin}{_DAMAGED}",
            tensor=_cut(name),
        )
    return TensorEntry(name, dtype, tuple(shape), path, data_start + begin, needed)


def _is_list_of_sizes(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(size, int) and not isinstance(size, bool) and 0 <= size <= MAX_ELEMENTS
        for size in value
    )


def _check_tiling(path: Path, entries: list[TensorEntry], data_start: int, data_bytes: int) -> None:
    position = data_start
    for entry in entries:
        if entry.offset < position:
            raise CheckpointError(
                path,
                "overlaps the tensor before it; the file is damaged, download it again",
                tensor=_cut(entry.name),
            )
        if entry.offset > position:
            raise CheckpointError(
                path,
                f"begins {entry.offset - position} bytes after the tensor before it ends; "
                "unclaimed bytes are not allowed, download it again",
                tensor=_cut(entry.name),
            )
        position = entry.offset + entry.length
        if position > data_start + data_bytes:
            raise CheckpointError(
                path,
                f"ends {position - data_start - data_bytes} bytes beyond the file; "
                "it is truncated, download it again",
                tensor=_cut(entry.name),
            )
    if position < data_start + data_bytes:
        extra = data_start + data_bytes - position
        raise CheckpointError(path, f"holds {extra} bytes after its last tensor; download it again")


LONGEST_SHOWN = 120


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST_SHOWN else text[:LONGEST_SHOWN] + "..."


def _short(value: object) -> str:
    return _cut(repr(value))
