"""A checkpoint as one table of tensors: a directory with one or many shards, or a single file.

Only headers and JSON are read here; ``read_bytes`` fetches one tensor's bytes. No torch.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blockscale.checkpoint.header import FileHeader, TensorEntry, parse_json_object, read_header
from blockscale.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
SUFFIX = ".safetensors"
CONFIG_NAME = "config.json"
# What ModelOpt declares of its checkpoints, beside config.json or in it.
MODELOPT_NAME = "hf_quant_config.json"
LONGEST_FILE_NAME = 255  # bytes, on every file system of Linux
# Far above any real index or config (DeepSeek-V3's index is 9 MB).
MAX_JSON_BYTES = 200_000_000
_OTHER_INDEX = "index and files are of different versions, download them together"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Tensors by name, the files they lie in, and config.json (empty if there is none).

    ``revision``: the commit of a Hub repository whose headers were fetched (``checkpoint.hub``);
    its data is not on this disk. None for files on this disk. ``modelopt``: hf_quant_config.json,
    None if there is none.
    """

    path: Path
    tensors: Mapping[str, TensorEntry]
    files: tuple[Path, ...]
    config: Mapping[str, Any]
    revision: str | None = None
    modelopt: Mapping[str, Any] | None = None

    def tensor(self, name: str) -> TensorEntry:
        """The entry of that name. Raises CheckpointError if there is none."""
        entry = self.tensors.get(name)
        if entry is None:
            raise CheckpointError(self.path, "is not in this checkpoint", tensor=name)
        return entry

    @property
    def config_path(self) -> Path:
        """Where config.json is, or would be."""
        return (self.path.parent if self.path in self.files else self.path) / CONFIG_NAME

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.length for entry in self.tensors.values())


def read_checkpoint(path: Path | str) -> Checkpoint:
    """Headers and config of a checkpoint directory or a single .safetensors file.

    Raises CheckpointError, naming file and tensor, for anything that contradicts itself: an index
    that points outside the directory or to a missing shard, a tensor in two shards or in another
    shard than the index says, unreadable headers or JSON.
    """
    path = Path(path)
    if not exists(path):
        raise CheckpointError(path, "does not exist; give a directory or a .safetensors file")
    if path.is_dir():
        return _read_directory(path)
    if path.suffix != SUFFIX:
        raise CheckpointError(path, f"is no {SUFFIX} file; give one, or the directory around it")
    tensors = {entry.name: entry for entry in read_header(path).tensors}
    return Checkpoint(path, tensors, (path,), **_documents(path.parent))


def exists(path: Path) -> bool:
    """Whether something is there. Raises CheckpointError if a folder above may not be read."""
    try:
        return path.exists()
    except OSError as error:
        raise CheckpointError(path, f"cannot be read: {error.strerror or error}") from error


def read_bytes(entry: TensorEntry, begin: int = 0, end: int | None = None) -> bytes:
    """Bytes [begin, end) of one tensor, all of them by default.

    Raises CheckpointError if the file has changed since its header was read.
    """
    end = entry.length if end is None else end
    try:
        with entry.path.open("rb", buffering=0) as file:
            pieces = list(_pieces(file.fileno(), entry.offset + begin, end - begin))
    except FileNotFoundError as error:
        raise CheckpointError(
            entry.path,
            "is not on this disk; if its header came from the Hub, download the data first "
            "(`hf download`)",
            tensor=entry.name,
        ) from error
    except OSError as error:
        raise CheckpointError(
            entry.path, f"cannot be read: {error.strerror or error}", tensor=entry.name
        ) from error
    data = b"".join(pieces) if len(pieces) != 1 else pieces[0]
    if len(data) != end - begin:
        raise CheckpointError(
            entry.path, "the file became shorter while it was read", tensor=entry.name
        )
    return data


def read_into(entry: TensorEntry, begin: int, buffer: memoryview) -> None:
    """Fill ``buffer`` with the tensor's bytes from ``begin`` on.

    Raises CheckpointError if the file has changed since its header was read.
    """
    done = 0
    try:
        with entry.path.open("rb", buffering=0) as file:
            while done < len(buffer):
                got = os.preadv(file.fileno(), [buffer[done:]], entry.offset + begin + done)
                if not got:
                    break
                done += got
    except OSError as error:
        raise CheckpointError(
            entry.path, f"cannot be read: {error.strerror or error}", tensor=entry.name
        ) from error
    if done != len(buffer):
        raise CheckpointError(
            entry.path, "the file became shorter while it was read", tensor=entry.name
        )


def _pieces(descriptor: int, offset: int, length: int) -> Iterator[bytes]:
    while length > 0:
        # pread returns at most 2 GiB on Linux, whatever is asked.
        piece = os.pread(descriptor, min(length, 1 << 30), offset)
        if not piece:
            return
        yield piece
        offset, length = offset + len(piece), length - len(piece)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a regular file of bounded size. Raises CheckpointError otherwise."""
    check_inside(path.parent, path)
    if not path.is_file():
        kind = "a link to a file that is missing" if path.is_symlink() else "no regular file"
        raise CheckpointError(path, f"is {kind}; download it again")
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise CheckpointError(path, f"holds {size} bytes; no {path.name} is that large")
        raw = path.read_bytes()
    except OSError as error:
        raise CheckpointError(path, f"cannot be read: {error.strerror or error}") from error
    return parse_json_object(path, raw, "the file")


def _read_directory(directory: Path) -> Checkpoint:
    index, single = directory / INDEX_NAME, directory / SINGLE_NAME
    if os.path.lexists(index):
        weight_map = weight_map_of(index, read_json(index))
        if single.exists() and SINGLE_NAME not in weight_map.values():
            raise CheckpointError(
                directory,
                f"holds {SINGLE_NAME} and an index of other files; transformers reads the first, "
                "other engines the second: remove one",
            )
        headers = [read_header(shard) for shard in _shards(directory, index, weight_map)]
        tensors = merged_tensors(headers)
        check_index(index, weight_map, tensors)
    elif single.is_file():
        check_inside(directory, single)
        headers = [read_header(single)]
        tensors = merged_tensors(headers)
    else:
        raise CheckpointError(directory, _no_weights(directory))
    files = tuple(header.path for header in headers)
    return Checkpoint(directory, tensors, files, **_documents(directory))


def _documents(folder: Path) -> dict[str, Any]:
    """What is declared beside the weights, as arguments of ``Checkpoint``."""
    config, modelopt = folder / CONFIG_NAME, folder / MODELOPT_NAME
    return {
        "config": read_json(config) if os.path.lexists(config) else {},
        "modelopt": read_json(modelopt) if os.path.lexists(modelopt) else None,
    }


def weight_map_of(index: Path, document: Mapping[str, Any]) -> dict[str, str]:
    """Shard by tensor name, from an index document.

    Raises CheckpointError, naming ``index``, if it is no such map, or a shard would lie anywhere
    but beside the index.
    """
    weight_map = document.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(index, "has no weight_map that names the shards; download it again")
    checked: set[str] = set()
    for name, shard in weight_map.items():
        if not isinstance(shard, str):
            raise CheckpointError(index, "maps to no file name", tensor=name)
        if shard in checked:
            continue
        checked.add(shard)
        if len(shard.encode(errors="replace")) > LONGEST_FILE_NAME or not shard.isprintable():
            raise CheckpointError(
                index, f"names a shard that no file can be called: {shard[:40]!r}...", tensor=name
            )
        if Path(shard).name != shard or shard in {"", ".", ".."}:
            raise CheckpointError(
                index, f"names the shard {shard!r}; shards lie beside the index, in no other folder"
            )
    return weight_map


def _shards(directory: Path, index: Path, weight_map: Mapping[str, str]) -> list[Path]:
    shards, missing = [], []
    for name in sorted(set(weight_map.values())):
        shard = directory / name
        if not shard.is_file():
            missing.append(name)
            continue
        check_inside(directory, shard)
        shards.append(shard)
    if missing:
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(
            index, f"names the shard {missing[0]!r}{others}, which is missing; download it again"
        )
    return shards


def _no_weights(directory: Path) -> str:
    """What is wrong with a directory without weights, by what it holds instead."""
    if (directory / SINGLE_NAME).is_symlink():
        return f"{SINGLE_NAME} is a link to a file that is missing; download it again"
    try:
        names = sorted(entry.name for entry in os.scandir(directory))
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    weights = [name for name in names if name.endswith(SUFFIX) and (directory / name).is_file()]
    others = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".gguf"))]
    inside = [
        name
        for name in names
        if any((directory / name / file).is_file() for file in (SINGLE_NAME, INDEX_NAME))
    ]
    cure = "; give the directory that holds the weights"
    if len(weights) == 1:
        cure = f"; give the file itself, {directory / weights[0]}"
    elif weights:
        cure = f" but {len(weights)} {SUFFIX} files; download the index of them too"
    elif others:
        cure = f" but {others[0]}; blockscale reads safetensors only: save it so first"
    elif inside:
        cure = f"; did you mean {directory / inside[0]}?"
    return f"holds neither {INDEX_NAME} nor {SINGLE_NAME}{cure}"


def check_inside(directory: Path, shard: Path) -> None:
    """Raise CheckpointError if ``shard`` is a link that leads out of ``directory``."""
    # The Hub's cache stores a snapshot as links to ../../blobs; anything further away is refused.
    # realpath, unlike Path.resolve, raises nothing for a link in a circle.
    root = Path(os.path.realpath(directory))
    allowed = root.parent.parent / "blobs" if root.parent.name == "snapshots" else root
    real = Path(os.path.realpath(shard))
    if not (real.is_relative_to(root) or real.is_relative_to(allowed)):
        raise CheckpointError(shard, f"is a link that leaves the checkpoint, to {real}")


def merged_tensors(headers: Iterable[FileHeader]) -> dict[str, TensorEntry]:
    """All tensors of several files. Raises CheckpointError if two files hold the same one."""
    tensors: dict[str, TensorEntry] = {}
    for header in headers:
        for entry in header.tensors:
            other = tensors.setdefault(entry.name, entry)
            if other is not entry:
                raise CheckpointError(
                    header.path,
                    f"is also in {other.path.name}; remove one, or download both again",
                    tensor=entry.name,
                )
    return tensors


def check_index(
    index: Path, weight_map: Mapping[str, str], tensors: Mapping[str, TensorEntry]
) -> None:
    """Raises CheckpointError unless every tensor is in the very shard that the index names."""
    for name, shard in weight_map.items():
        entry = tensors.get(name)
        if entry is None:
            raise CheckpointError(
                index, f"is said to be in {shard}, but is not; {_OTHER_INDEX}", tensor=name
            )
        if entry.path.name != shard:
            raise CheckpointError(
                index,
                f"is said to be in {shard}, but is in {entry.path.name}; {_OTHER_INDEX}",
                tensor=name,
            )
    extra = tensors.keys() - weight_map.keys()
    if extra:
        name = min(extra)
        raise CheckpointError(
            index,
            f"is in {tensors[name].path.name} but not in the index; {_OTHER_INDEX}",
            tensor=name,
        )
