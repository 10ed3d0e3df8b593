"""A checkpoint on the Hugging Face Hub: its headers and config, never its data.

Three kinds of request: what commit a revision is and which files it has (one), the small JSON files
(whole, of bounded size), and of each shard its first eight bytes and then its header, by HTTP range
requests. What a commit holds cannot change, so it is kept: in ``huggingface_hub``'s assets folder,
with checksums, and used again without asking. The network is read through ``checkpoint.remote``;
``HF_ENDPOINT``, ``HF_TOKEN``, ``HF_HOME`` and ``HF_HUB_OFFLINE`` mean what they mean there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blockscale.checkpoint.header import (
    LENGTH_BYTES,
    FileHeader,
    header_length,
    parse_header,
    parse_json_object,
)
from blockscale.checkpoint.kept import Kept, keep_folder
from blockscale.checkpoint.read import (
    CONFIG_NAME,
    INDEX_NAME,
    MAX_JSON_BYTES,
    MODELOPT_NAME,
    SINGLE_NAME,
    Checkpoint,
    check_index,
    exists,
    merged_tensors,
    read_checkpoint,
    weight_map_of,
)
from blockscale.checkpoint.remote import Patience, Received, RemoteFile, Server
from blockscale.errors import CheckpointError, SettingsError

if TYPE_CHECKING:
    from collections.abc import Callable

# All headers of one checkpoint together. DeepSeek-V3's 163 take 12 MB.
MAX_HEADERS_BYTES = 400_000_000
MAX_LISTING_BYTES = 50_000_000
# More than a few connections at once are answered with 429 by the Hub.
CONNECTIONS = 8
_REPOSITORY = re.compile(
    r"(?P<name>[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})(@(?P<revision>[\w./-]{1,200}))?",
    re.ASCII,
)
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class Repository:
    """``org/name`` and a branch, tag or commit."""

    name: str
    revision: str = "main"

    @property
    def path(self) -> Path:
        """How errors and reports name it, as if it lay here."""
        return Path(self.name)


@dataclass(frozen=True, slots=True)
class _Listing:
    commit: str
    sizes: Mapping[str, int | None]


def repository_named(text: str) -> Repository | None:
    """``org/name`` or ``org/name@revision``; None if the text has another form."""
    match = _REPOSITORY.fullmatch(text)
    if match is None or ".." in text:
        return None
    return Repository(match["name"], match["revision"] or "main")


def read_headers(
    path: Path | str, progress: Callable[[int, int], None] | None = None
) -> Checkpoint:
    """A checkpoint to inspect or plan: a directory, a .safetensors file or a Hub repository.

    What lies on this disk comes first; else ``org/name``, or ``org/name@revision``, is looked up on
    the Hub. ``progress`` is called with (shards read, shards in all) while headers are fetched.

    Raises CheckpointError, with the cure, if it is neither, or as ``read_checkpoint`` does.
    """
    path = Path(path)
    repository = repository_named(str(path))
    if repository is None or exists(path):
        if not exists(path):
            problem = "does not exist; give a directory, a .safetensors file or a Hub id (org/name)"
            raise CheckpointError(path, problem)
        return read_checkpoint(path)
    return read_repository(repository, progress=progress)


def read_repository(
    repository: Repository,
    patience: Patience | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Checkpoint:
    """Headers and config of a repository on the Hub that ``huggingface_hub`` is set to.

    ``Checkpoint.revision`` is the commit; paths are relative, ``org/name/file``, and exist nowhere.

    Raises CheckpointError, in one line with the cure, for whatever the network or the repository
    does; SettingsError if ``huggingface_hub`` is not installed.
    """
    try:
        from huggingface_hub import constants
    except ImportError as error:
        msg = (
            f"{repository.name} is not on this disk, and to read it from the Hub huggingface_hub "
            "is needed (pip install 'blockscale[hub]')"
        )
        raise SettingsError(msg) from error
    server = _server(patience or Patience())
    folder = keep_folder(server.endpoint, repository.name)
    known = folder.commit_of(repository.revision)
    if _COMMIT.fullmatch(repository.revision):
        known = repository.revision
    if constants.HF_HUB_OFFLINE or known == repository.revision:
        kept = folder.load(known) if known else None
        if kept is not None:
            return _checkpoint(repository, known or "", kept)
        if constants.HF_HUB_OFFLINE:
            problem = (
                f"headers of {repository.revision} were never kept on this disk; read them once "
                "without HF_HUB_OFFLINE"
            )
            raise CheckpointError(repository.path, problem)
    listing = _list(server, repository)
    kept = folder.load(listing.commit)
    checkpoint = None if kept is None else _checkpoint(repository, listing.commit, kept)
    if checkpoint is None:
        kept = _fetch(server, repository, listing, progress)
        checkpoint = _checkpoint(repository, listing.commit, kept)
        # Only what has been read through without a fault is worth keeping.
        folder.store(listing.commit, kept)
    folder.note(repository.revision, listing.commit)
    return checkpoint


def _server(patience: Patience) -> Server:
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import (  # type: ignore[attr-defined]  # documented there
        build_hf_headers,
        get_session,
    )

    # Its first base is HTTPError of httpx (huggingface_hub 1) or httpx2 (2): all that can go wrong
    # on the way.
    transport = HfHubHTTPError.__mro__[1]
    headers = build_hf_headers(library_name="blockscale")
    return Server(
        constants.ENDPOINT, get_session(), headers, patience, failures=(OSError, transport)
    )


def _file(server: Server, repository: Repository, commit: str, name: str) -> RemoteFile:
    from huggingface_hub import hf_hub_url

    url = hf_hub_url(repository.name, name, revision=commit, endpoint=server.endpoint)
    return RemoteFile(url, repository.path / name)


def _list(server: Server, repository: Repository) -> _Listing:
    """The commit of the revision and the sizes of its files."""
    from urllib.parse import quote

    revision = quote(repository.revision, safe="")
    url = f"{server.endpoint}/api/models/{repository.name}/revision/{revision}?blobs=true"
    shown = repository.path
    if repository.revision != "main":
        shown = Path(f"{repository.name}@{repository.revision}")
    raw = server.whole(RemoteFile(url, shown), MAX_LISTING_BYTES).data
    document = parse_json_object(shown, raw, f"what {server.endpoint} says about it")
    commit, siblings = document.get("sha"), document.get("siblings")
    if not (isinstance(commit, str) and _COMMIT.fullmatch(commit) and isinstance(siblings, list)):
        raise CheckpointError(
            shown, f"{server.endpoint} does not answer like a Hub; check HF_ENDPOINT"
        )
    sizes = {}
    for sibling in siblings:
        if isinstance(sibling, Mapping) and isinstance(sibling.get("rfilename"), str):
            size = sibling.get("size")
            sizes[sibling["rfilename"]] = size if isinstance(size, int) else None
    return _Listing(commit, sizes)


def _fetch(
    server: Server,
    repository: Repository,
    listing: _Listing,
    progress: Callable[[int, int], None] | None,
) -> Kept:
    names = [name for name in (CONFIG_NAME, MODELOPT_NAME, INDEX_NAME) if name in listing.sizes]
    documents = {
        name: server.whole(_file(server, repository, listing.commit, name), MAX_JSON_BYTES).data
        for name in names
    }
    shards = _shard_names(repository, documents.get(INDEX_NAME), listing)

    def fetch(name: str) -> tuple[bytes, int]:
        file = _file(server, repository, listing.commit, name)
        return _raw_header(server, file, listing.sizes[name])

    pool = ThreadPoolExecutor(min(CONNECTIONS, len(shards)))
    headers: dict[str, tuple[bytes, int]] = {}
    left = MAX_HEADERS_BYTES
    try:
        for name, header in zip(shards, pool.map(fetch, shards), strict=True):
            headers[name] = header
            left -= len(header[0])
            if left < 0:
                problem = f"has headers of more than {MAX_HEADERS_BYTES} bytes together"
                raise CheckpointError(repository.path, problem)
            if progress is not None:
                progress(len(headers), len(shards))
    finally:
        pool.shutdown(cancel_futures=True)
    return Kept(documents, headers)


def _shard_names(repository: Repository, index: bytes | None, listing: _Listing) -> list[str]:
    if index is None:
        if SINGLE_NAME not in listing.sizes:
            raise CheckpointError(repository.path, f"holds neither {INDEX_NAME} nor {SINGLE_NAME}")
        return [SINGLE_NAME]
    path = repository.path / INDEX_NAME
    weight_map = weight_map_of(path, parse_json_object(path, index, INDEX_NAME))
    shards = sorted(set(weight_map.values()))
    for name in shards:
        if name not in listing.sizes:
            raise CheckpointError(path, f"names the shard {name!r}, which is missing")
    return shards


def _raw_header(server: Server, file: RemoteFile, listed: int | None) -> tuple[bytes, int]:
    """(JSON header, size of the file); two requests, none for a byte beyond the header."""
    if listed is not None and listed < LENGTH_BYTES:
        header_length(file.name, b"", listed)
    prefix = server.first_bytes(file, LENGTH_BYTES)
    size = _agreed_size(server, file, prefix, listed)
    length = header_length(file.name, prefix.data, size)
    both = server.first_bytes(file, LENGTH_BYTES + length)
    _agreed_size(server, file, both, size)
    if both.data[:LENGTH_BYTES] != prefix.data:
        raise CheckpointError(file.name, "changed while its header was read; try again")
    return both.data[LENGTH_BYTES:], size


def _agreed_size(server: Server, file: RemoteFile, received: Received, expected: int | None) -> int:
    size = expected if received.size is None else received.size
    if size is None:
        problem = f"{server.endpoint} does not say how long it is; check HF_ENDPOINT"
        raise CheckpointError(file.name, problem)
    if expected is not None and size != expected:
        raise CheckpointError(
            file.name,
            f"is said to hold {expected} bytes and then {size}; it is being replaced, or "
            f"{server.endpoint} is wrong",
        )
    return size


def _checkpoint(repository: Repository, commit: str, kept: Kept) -> Checkpoint:
    root = repository.path

    def document(name: str) -> dict[str, Any]:
        raw = kept.documents.get(name)
        return {} if raw is None else parse_json_object(root / name, raw, name)

    headers: list[FileHeader] = [
        parse_header(root / name, raw, size) for name, (raw, size) in kept.headers.items()
    ]
    tensors = merged_tensors(headers)
    if INDEX_NAME in kept.documents:
        index = root / INDEX_NAME
        check_index(index, weight_map_of(index, document(INDEX_NAME)), tensors)
    files = tuple(header.path for header in headers)
    modelopt = document(MODELOPT_NAME) if MODELOPT_NAME in kept.documents else None
    return Checkpoint(root, tensors, files, document(CONFIG_NAME), commit, modelopt)
