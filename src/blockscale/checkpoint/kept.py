"""Headers of a commit, kept on disk. A damaged or unwritable folder counts as an empty one."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

if TYPE_CHECKING:
    from collections.abc import Mapping

MANIFEST = "manifest.json"
REVISIONS = "revisions"


@dataclass(frozen=True, slots=True)
class Kept:
    """What was fetched of one commit: JSON files, and each shard's (header, size of the file)."""

    documents: Mapping[str, bytes]
    headers: Mapping[str, tuple[bytes, int]]


@dataclass(frozen=True, slots=True)
class KeepFolder:
    """The folder of one repository on one server; ``path`` None: nothing can be kept."""

    path: Path | None

    def load(self, commit: str) -> Kept | None:
        """What was stored for this commit, if it is whole."""
        if self.path is None:
            return None
        folder = self.path / commit
        try:
            manifest = json.loads((folder / MANIFEST).read_bytes())
            documents = {
                name: _checked(folder, name, digest)
                for name, digest in manifest["documents"].items()
            }
            headers = {
                name: (_checked(folder, name, digest), int(size))
                for name, (digest, size) in manifest["headers"].items()
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
        return Kept(documents, headers)

    def store(self, commit: str, kept: Kept) -> None:
        """Keep it. The manifest is written last: without it the folder counts as empty."""
        if self.path is None:
            return
        folder = self.path / commit
        manifest = {
            "documents": {name: _digest(raw) for name, raw in kept.documents.items()},
            "headers": {n: (_digest(raw), size) for n, (raw, size) in kept.headers.items()},
        }
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name, raw in kept.documents.items():
                _write(folder / name, raw)
            for name, (raw, _) in kept.headers.items():
                _write(folder / name, raw)
            _write(folder / MANIFEST, json.dumps(manifest).encode())
        except OSError:
            return

    def note(self, revision: str, commit: str) -> None:
        """Remember which commit a revision was, for offline use."""
        if self.path is None:
            return
        try:
            (self.path / REVISIONS).mkdir(parents=True, exist_ok=True)
            _write(self.path / REVISIONS / quote(revision, safe=""), commit.encode())
        except OSError:
            return

    def commit_of(self, revision: str) -> str | None:
        """The commit that the revision was when it was last asked for."""
        if self.path is None:
            return None
        try:
            return (self.path / REVISIONS / quote(revision, safe="")).read_text()
        except OSError:
            return None


def keep_folder(endpoint: str, repository: str) -> KeepFolder:
    """Where headers of this repository are kept: the assets folder of ``huggingface_hub``."""
    from huggingface_hub import cached_assets_path, constants

    server = hashlib.sha256(endpoint.encode()).hexdigest()[:8]
    try:
        path = cached_assets_path(
            "blockscale",
            namespace="headers",
            subfolder=f"{server}--{repository}",
            assets_dir=constants.HF_ASSETS_CACHE,
        )
    except (OSError, ValueError):
        return KeepFolder(None)
    return KeepFolder(Path(path))


def _digest(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()


def _checked(folder: Path, name: str, digest: str) -> bytes:
    raw = (folder / Path(name).name).read_bytes()
    if _digest(raw) != digest:
        raise ValueError(name)
    return raw


def _write(path: Path, raw: bytes) -> None:
    """Beside the target and renamed: parallel processes may all do it, none sees half."""
    descriptor, scratch = tempfile.mkstemp(dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(raw)
        Path(scratch).replace(path)
    except OSError:
        Path(scratch).unlink(missing_ok=True)
        raise
