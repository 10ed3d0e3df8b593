"""Writing safetensors as a stream, so that nothing half-written ever carries a final name."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from blockscale.checkpoint.read import SINGLE_NAME
from blockscale.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from types import TracebackType

    from typing_extensions import Self

# The safetensors format pads the header with spaces so that the data starts on eight bytes.
HEADER_ALIGN = 8
# Room for headers, configs and the file system's own needs, beyond the tensors.
SPARE_DISK_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """A tensor that will be written: its header entry is known before its bytes are."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    length: int


@dataclass(frozen=True, slots=True)
class PlannedShard:
    """One output file and its tensors, in order."""

    file_name: str
    tensors: tuple[PlannedTensor, ...]

    @property
    def total_bytes(self) -> int:
        """Bytes of the tensors."""
        return sum(tensor.length for tensor in self.tensors)


def plan_shards(tensors: Iterable[PlannedTensor], max_bytes: int) -> list[PlannedShard]:
    """Tensors in order, a new file whenever ``max_bytes`` would be passed.

    A weight's scale goes where the weight is: a tensor whose name extends its predecessor's stays
    with it.
    """
    files: list[list[PlannedTensor]] = [[]]
    size = 0
    for tensor in tensors:
        follows = bool(files[-1]) and tensor.name.startswith(files[-1][-1].name + "_")
        if files[-1] and size + tensor.length > max_bytes and not follows:
            files.append([])
            size = 0
        files[-1].append(tensor)
        size += tensor.length
    if len(files) == 1:
        return [PlannedShard(SINGLE_NAME, tuple(files[0]))]
    return [
        PlannedShard(f"model-{index:05d}-of-{len(files):05d}.safetensors", tuple(members))
        for index, members in enumerate(files, 1)
    ]


class ShardWriter:
    """Writes one safetensors file front to back; leaving the ``with`` block syncs it to disk.

    Raises CheckpointError, naming the file and tensor, if the disk refuses or a tensor's bytes do
    not come in the planned order and length.
    """

    def __init__(self, path: Path, tensors: Sequence[PlannedTensor]) -> None:
        self._path = path
        self._ends = _ends(tensors)
        self._position = 0
        self._file: BinaryIO | None = None
        self._header = _header(tensors)

    def __enter__(self) -> Self:
        try:
            self._file = self._path.open("wb")
            self._file.write(self._header)
        except OSError as error:
            raise self._refused(error, None) from error
        return self

    def write(self, data: bytes, name: str) -> None:
        """Append bytes of tensor ``name``."""
        assert self._file is not None
        try:
            self._file.write(data)
        except OSError as error:
            raise self._refused(error, name) from error
        self._position += len(data)
        if self._position > self._ends[name]:
            raise CheckpointError(self._path, "got more bytes than planned", tensor=name)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._file is not None
        with self._file as file:
            if kind is not None:
                return
            try:
                file.flush()
                os.fsync(file.fileno())
            except OSError as problem:
                raise self._refused(problem, None) from problem
        planned = max(self._ends.values(), default=0)
        if self._position != planned:
            raise CheckpointError(
                self._path, f"got {self._position} bytes of tensors, planned {planned}"
            )

    def _refused(self, error: OSError, tensor: str | None) -> CheckpointError:
        why = error.strerror or str(error)
        return CheckpointError(self._path, f"cannot be written: {why}", tensor=tensor)


@contextmanager
def staged_directory(target: Path, needed_bytes: int) -> Iterator[Path]:
    """A new directory beside ``target`` that becomes ``target`` if the block ends well.

    If the block raises anything, Ctrl-C included, the directory is removed. Raises CheckpointError
    first if ``target`` exists and is not an empty directory, or the disk lacks ``needed_bytes``.
    """
    parent = target.absolute().parent
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise CheckpointError(target, "already exists; remove it or choose another directory")
    try:
        parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(parent).free
        if free < needed_bytes + SPARE_DISK_BYTES:
            raise CheckpointError(
                target, f"needs {needed_bytes} bytes, but the disk has only {free} free"
            )
        staged = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=parent))
    except OSError as error:
        raise CheckpointError(target, f"cannot be created: {error.strerror or error}") from error
    try:
        yield staged
        staged.chmod(0o755)
        if target.exists():
            target.rmdir()
        staged.rename(target)
        _sync_directory(parent)
    except OSError as error:
        raise CheckpointError(target, f"cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def write_json(path: Path, document: dict[str, object]) -> None:
    """Write and flush to disk, so that a later rename cannot outrun the bytes."""
    with path.open("w", encoding="utf-8") as file:
        json.dump(document, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _header(tensors: Sequence[PlannedTensor]) -> bytes:
    document: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for tensor in tensors:
        end = begin + tensor.length
        document[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(document, separators=(",", ":")).encode()
    text += b" " * (-len(text) % HEADER_ALIGN)
    return len(text).to_bytes(8, "little") + text


def _ends(tensors: Sequence[PlannedTensor]) -> dict[str, int]:
    ends = {}
    position = 0
    for tensor in tensors:
        position += tensor.length
        ends[tensor.name] = position
    return ends
