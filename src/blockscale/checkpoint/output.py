"""Planning and writing safetensors files as a stream: header first, then bytes in planned order."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO

from blockscale.checkpoint.read import INDEX_NAME, SINGLE_NAME, check_inside, read_bytes
from blockscale.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path
    from types import TracebackType

    from typing_extensions import Self

    from blockscale.checkpoint.header import TensorEntry
    from blockscale.checkpoint.read import Checkpoint

# The safetensors format pads the header with spaces so that the data starts on eight bytes.
HEADER_ALIGN = 8
COPY_BYTES = 8 << 20
# Written bytes after which the kernel is told to start writing them to disk. Without it the whole
# file waits for fsync, and a disk that stood idle becomes the limit.
WRITEBACK_BYTES = 64 << 20
# `sha256sum --check SHA256SUMS` reads it.
SUMS_NAME = "SHA256SUMS"
# Files beside the weights that are not copied: other weights would contradict the result.
WEIGHT_LIKE = (
    ".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", INDEX_NAME,
    SUMS_NAME,
)  # fmt: skip


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

    @property
    def header(self) -> bytes:
        """The file's first bytes: length of the header, header, padding."""
        document: dict[str, object] = {"__metadata__": {"format": "pt"}}
        begin = 0
        for tensor in self.tensors:
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


def files_beside_weights(source: Checkpoint) -> tuple[Path, ...]:
    """Tokenizer, code, licence: the files of a checkpoint directory that are no weights.

    Raises CheckpointError if one is a link that leads out of the directory.
    """
    if not source.path.is_dir():
        return ()
    files = [path for path in sorted(source.path.iterdir()) if path.is_file()]
    found = tuple(path for path in files if not path.name.endswith(WEIGHT_LIKE))
    for path in found:
        check_inside(source.path, path)
    return found


class ShardWriter:
    """Writes one safetensors file front to back; leaving the ``with`` block syncs it to disk.

    ``file`` is open for writing and at its start; ``path`` is its name in messages. ``report`` is
    called with the bytes of tensors written since the last call. Raises CheckpointError, naming
    the file and tensor, if the disk refuses or a tensor's bytes do not come in the planned order
    and length.
    """

    def __init__(
        self, file: BinaryIO, path: Path, shard: PlannedShard, report: Callable[[int], None]
    ) -> None:
        self._file = file
        self._path = path
        self._ends = _ends(shard.tensors)
        self._header = shard.header
        self._report = report
        self._position = 0
        self._digest = hashlib.sha256()
        self._handed_over = 0

    @property
    def sha256(self) -> str:
        """Hexadecimal SHA-256 of everything written so far, header included."""
        return self._digest.hexdigest()

    def __enter__(self) -> Self:
        self._append(self._header, None)
        return self

    def write(self, data: bytes | memoryview, name: str) -> None:
        """Append bytes of tensor ``name``."""
        self._append(data, name)
        self._position += len(data)
        if self._position > self._ends[name]:
            raise CheckpointError(self._path, "got more bytes than planned", tensor=name)
        self._start_writeback()
        self._report(len(data))

    def copy(self, entry: TensorEntry, name: str) -> None:
        """Append a stored tensor's bytes as tensor ``name``."""
        for begin in range(0, entry.length, COPY_BYTES):
            self.write(read_bytes(entry, begin, min(begin + COPY_BYTES, entry.length)), name)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            return
        planned = max(self._ends.values(), default=0)
        if self._position != planned:
            raise CheckpointError(
                self._path, f"got {self._position} bytes of tensors, planned {planned}"
            )
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as problem:
            raise self._refused(problem, None) from problem

    def _append(self, data: bytes | memoryview, name: str | None) -> None:
        try:
            self._file.write(data)
        except OSError as error:
            raise self._refused(error, name) from error
        self._digest.update(data)

    def _start_writeback(self) -> None:
        done = len(self._header) + self._position
        if done - self._handed_over < WRITEBACK_BYTES or not hasattr(os, "posix_fadvise"):
            return
        self._file.flush()
        # On Linux DONTNEED starts writing dirty pages and forgets clean ones; it does not wait.
        begin, length = self._handed_over, done - self._handed_over
        os.posix_fadvise(self._file.fileno(), begin, length, os.POSIX_FADV_DONTNEED)
        self._handed_over = done

    def _refused(self, error: OSError, tensor: str | None) -> CheckpointError:
        why = error.strerror or str(error)
        return CheckpointError(self._path, f"cannot be written: {why}", tensor=tensor)


def _ends(tensors: Sequence[PlannedTensor]) -> dict[str, int]:
    ends = {}
    position = 0
    for tensor in tensors:
        position += tensor.length
        ends[tensor.name] = position
    return ends
