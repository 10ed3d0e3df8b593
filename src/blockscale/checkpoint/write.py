"""A checkpoint directory written by threads, processes and machines that may die at any moment.

Beside the target stands a work directory while a checkpoint is written::

    .TARGET.partial-ID/
        checkpoint/   finished files under their final names; renamed to TARGET at the end
        parts/        files being written; whoever writes one holds a lock on it
        sums/         SHA-256 of each finished file, on disk before the file gets its name
        lock          held by every process that takes part

Work is claimed file by file with ``flock``, which the kernel gives up for a process that dies, so
no file is written twice at once and none is lost. A file gets its final name only when its bytes
and its checksum are on disk. ID stands for the source files (size, time of change), the planned
bytes and the version of this writer: only a run that would write the same goes on with the work.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, BinaryIO

from blockscale.checkpoint.output import SUMS_NAME, PlannedShard, ShardWriter
from blockscale.checkpoint.read import INDEX_NAME
from blockscale.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    Fill = Callable[[ShardWriter, PlannedShard], None]

# Room for headers, configs and the file system's own needs, beyond the tensors.
SPARE_DISK_BYTES = 64 << 20
POLL_SECONDS = 0.1
# Raise it when a change makes the same source and options give other bytes.
WRITER_VERSION = 1


@dataclass(frozen=True, slots=True)
class Output:
    """What will be written.

    ``documents`` are JSON files, config.json among them; index and checksums are added.
    ``copied`` are taken over as they are. ``sources`` are the files that are read.
    """

    target: Path
    shards: tuple[PlannedShard, ...]
    documents: Mapping[str, Mapping[str, object]]
    copied: tuple[Path, ...]
    sources: tuple[Path, ...]


@dataclass(frozen=True, slots=True)
class Crew:
    """Who writes: ``threads`` of this process, which is number ``rank`` of ``ranks``.

    The other processes must be told the same source, options and target; the file system that
    they share must support file locks. ``memory_bytes`` is what this process may have resident at
    its peak; None allows each thread 72 MiB of buffers.
    """

    threads: int = 1
    rank: int = 0
    ranks: int = 1
    memory_bytes: int | None = None

    def needed_for(self, files: int) -> Crew:
        """This crew without threads that would have no file to write."""
        return replace(self, threads=max(1, min(self.threads, files)))


@dataclass(frozen=True, slots=True)
class Written:
    """Files that this process wrote, and those that an interrupted run had finished before."""

    files: int
    resumed: int


def write_checkpoint(
    output: Output,
    fill: Fill,
    crew: Crew | None = None,
    progress: Callable[[int], None] | None = None,
) -> Written:
    """Write ``output`` to its target, or go on where an interrupted run of the same stopped.

    ``fill`` writes all tensors of one shard, in order; with several threads it is called from
    several at once. ``progress`` is called with bytes of tensors that are done, found ones
    included. Returns when the target is complete, whoever of the crew completed it.

    Raises CheckpointError if the target exists, the disk is too full or refuses, or an unfinished
    output of another run is in the way. What was finished before an error stays for the next run;
    where nothing was, nothing is left behind.
    """
    crew = (crew or Crew()).needed_for(len(output.shards))
    job = _Job(output, fill, crew, progress)
    try:
        return job.run()
    except OSError as error:
        raise CheckpointError(
            output.target, f"cannot be written: {error.strerror or error}"
        ) from error


class _StoppedError(Exception):
    """Another thread failed."""


class _Job:
    def __init__(
        self, output: Output, fill: Fill, crew: Crew, progress: Callable[[int], None] | None
    ) -> None:
        self._output = output
        self._fill = fill
        self._crew = crew
        self._progress = progress
        self._target = output.target.resolve()
        self._work = self._target.parent / f"{_work_prefix(self._target)}{_identity(output)}"
        self._stop = threading.Event()
        self._mutex = threading.Lock()
        self._counted: set[str] = set()
        self._written = 0
        self._sizes = {s.file_name: len(s.header) + s.total_bytes for s in output.shards}

    def run(self) -> Written:
        descriptor = None
        while descriptor is None:
            if _is_occupied(self._target):
                self._accept_or_refuse()
                return Written(0, len(self._output.shards))
            descriptor = self._take_part()
        try:
            found = [shard for shard in self._output.shards if self._is_done(shard)]
            self._check_disk(found)
            self._write_all()
            self._finish()
        except BaseException as error:
            self._leave(descriptor, error)
            raise
        finally:
            os.close(descriptor)
        return Written(self._written, len(found))

    def _accept_or_refuse(self) -> None:
        """A target that exists is ours if this very work was finished, by a peer or a killed run.

        A peer that started late, and a run that was killed between the rename and the removal of
        its work directory, find it complete.
        """
        if (self._crew.ranks > 1 or self._work.is_dir()) and self._is_complete():
            shutil.rmtree(self._work, ignore_errors=True)
            return
        raise CheckpointError(
            self._output.target, "already exists; remove it or choose another directory"
        )

    def _is_complete(self) -> bool:
        try:
            for shard in self._output.shards:
                header, path = shard.header, self._target / shard.file_name
                with path.open("rb") as file:
                    if file.read(len(header)) != header:
                        return False
                if path.stat().st_size != self._sizes[shard.file_name]:
                    return False
            written = (self._target / SUMS_NAME).stat().st_mtime_ns
            newest = max((path.stat().st_mtime_ns for path in self._output.sources), default=0)
            return newest <= written and all(
                (self._target / name).read_bytes() == _encoded(document)
                for name, document in self._output.documents.items()
            )
        except OSError:
            return False

    def _prepare(self) -> None:
        parent = self._target.parent
        parent.mkdir(parents=True, exist_ok=True)
        for other in parent.iterdir():
            if other.name.startswith(_work_prefix(self._target)) and other != self._work:
                raise CheckpointError(
                    other,
                    "is the unfinished output of a run with other source files, options or version;"
                    " repeat that run, or remove it",
                )

    def _take_part(self) -> int | None:
        """The descriptor of the shared lock; None if the work was finished or removed meanwhile."""
        self._prepare()
        path = self._work / "lock"
        # No peer removes the folder above: where it is not found, the file system makes no folders.
        with suppress(FileExistsError):
            self._work.mkdir()
        try:
            for name in ("checkpoint", "parts", "sums"):
                (self._work / name).mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o666)
        except FileNotFoundError:
            return None
        except FileExistsError as error:  # It was there and is gone, or it is no directory.
            if os.path.lexists(error.filename):
                raise
            return None
        try:
            _lock(descriptor, self._work, fcntl.LOCK_SH)
            if _is_at(path, descriptor) and not _is_occupied(self._target):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        return None

    def _check_disk(self, found: list[PlannedShard]) -> None:
        total = sum(shard.total_bytes for shard in self._output.shards)
        done = sum(shard.total_bytes for shard in found)
        begun = 0
        # Peers go on meanwhile: a part gets its final name, and at the end the work goes away.
        with suppress(FileNotFoundError):
            for part in (self._work / "parts").iterdir():
                with suppress(FileNotFoundError):
                    begun += part.stat().st_blocks * 512
        needed = total - done - begun
        free = shutil.disk_usage(self._target.parent).free
        if free < needed + SPARE_DISK_BYTES and not _is_occupied(self._target):
            raise CheckpointError(
                self._output.target, f"needs {needed} bytes, but the disk has only {free} free"
            )

    def _write_all(self) -> None:
        count = self._crew.threads
        if count == 1:
            self._write_until_done(0)
            return
        with ThreadPoolExecutor(count) as pool:
            threads = [pool.submit(self._write_until_done, number) for number in range(count)]
            try:
                for thread in as_completed(threads):
                    thread.result()
            except BaseException:
                self._stop.set()
                raise

    def _write_until_done(self, thread: int) -> None:
        """Claim and write files until all are done, by whomever.

        Everyone begins with files of their own, so that claims rarely meet, and then helps out.
        """
        everyone = self._crew.ranks * self._crew.threads
        me = self._crew.rank * self._crew.threads + thread
        shards = self._output.shards
        order = [shards[i] for i in sorted(range(len(shards)), key=lambda i: (i - me) % everyone)]
        while not _is_occupied(self._target):
            missing = [shard for shard in order if not self._is_done(shard)]
            if not missing:
                return
            wrote = sum(self._write_if_free(shard) for shard in missing)
            if not wrote and self._stop.wait(POLL_SECONDS):
                raise _StoppedError

    def _is_done(self, shard: PlannedShard) -> bool:
        try:
            size = (self._work / "checkpoint" / shard.file_name).stat().st_size
        except FileNotFoundError:
            return False
        done = size == self._sizes[shard.file_name] and self._sum_path(shard).exists()
        if done:
            self._count_found(shard)
        return done

    def _write_if_free(self, shard: PlannedShard) -> bool:
        part = self._work / "parts" / shard.file_name
        with self._claimed(part, shard) as file:
            if file is None:
                return False
            with self._mutex:
                self._counted.add(shard.file_name)
            path = self._output.target / shard.file_name
            writer = ShardWriter(file, path, shard, self._report)
            with writer:
                self._fill(writer, shard)
            _write_durably(self._sum_path(shard), _encoded({"sha256": writer.sha256}))
            part.rename(self._work / "checkpoint" / shard.file_name)
            _sync_directory(self._work / "checkpoint")
        with self._mutex:
            self._written += 1
        return True

    @contextmanager
    def _claimed(self, part: Path, shard: PlannedShard) -> Iterator[BinaryIO | None]:
        """The part file, locked and empty; None if someone else has it or the shard is done."""
        try:
            descriptor = os.open(part, os.O_CREAT | os.O_RDWR, 0o666)
        except FileNotFoundError:  # A peer has finished everything and removed the work.
            yield None
            return
        with os.fdopen(descriptor, "r+b") as file:
            # Its last owner may have renamed it between our open and our lock.
            if not (_try_lock(descriptor, part, fcntl.LOCK_EX) and _is_at(part, descriptor)):
                yield None
                return
            if self._is_done(shard) or _is_occupied(self._target):
                part.unlink(missing_ok=True)
                yield None
                return
            file.truncate(0)
            try:
                yield file
            except BaseException:
                with suppress(OSError):
                    part.unlink()
                raise

    def _count_found(self, shard: PlannedShard) -> None:
        with self._mutex:
            if shard.file_name in self._counted:
                return
            self._counted.add(shard.file_name)
        self._report(shard.total_bytes)

    def _report(self, done: int) -> None:
        if self._stop.is_set():
            raise _StoppedError
        if self._progress is not None:
            with self._mutex:
                self._progress(done)

    def _finish(self) -> None:
        """Add documents and copied files, and let the directory take its name; one process does."""
        try:
            descriptor = os.open(self._work / "finish", os.O_CREAT | os.O_RDWR, 0o666)
        except FileNotFoundError:
            self._expect_finished()
            return
        try:
            _lock(descriptor, self._work, fcntl.LOCK_EX)
            if _is_occupied(self._target):
                self._expect_finished()
                return
            folder, scratch = self._work / "checkpoint", self._work / "parts" / "document"
            for path in self._output.copied:
                shutil.copyfile(path, scratch)
                _sync_file(scratch)
                scratch.rename(folder / path.name)
            for name, data in self._last_files().items():
                _write_durably(folder / name, data, scratch)
            folder.rename(self._target)
            _sync_directory(self._target.parent)
        finally:
            os.close(descriptor)
        shutil.rmtree(self._work, ignore_errors=True)

    def _expect_finished(self) -> None:
        if not self._is_complete():
            raise CheckpointError(self._output.target, "was made by something else meanwhile")
        # Whoever finished could not remove a folder in which we made a file meanwhile.
        shutil.rmtree(self._work, ignore_errors=True)

    def _last_files(self) -> dict[str, bytes]:
        """What is known only when all shards are there: checksums, and the index if there is one.

        The index of several files gives the checksums too. A single file gets none: loaders want
        none, and it would go stale with the file.
        """
        shards = self._output.shards
        sums = {
            shard.file_name: json.loads(self._sum_path(shard).read_bytes())["sha256"]
            for shard in shards
        }
        lines = "".join(f"{digest}  {name}\n" for name, digest in sums.items())
        files = {name: _encoded(document) for name, document in self._output.documents.items()}
        if len(shards) > 1:
            total = sum(shard.total_bytes for shard in shards)
            weight_map = {tensor.name: s.file_name for s in shards for tensor in s.tensors}
            index = {"metadata": {"total_size": total, "sha256": sums}, "weight_map": weight_map}
            files[INDEX_NAME] = _encoded(index)
        return {**files, SUMS_NAME: lines.encode()}

    def _sum_path(self, shard: PlannedShard) -> Path:
        return self._work / "sums" / f"{shard.file_name}.json"

    def _leave(self, descriptor: int, error: BaseException) -> None:
        """After an error: remove the work if nothing in it is finished and nobody else is at it."""
        if not any((self._work / "checkpoint").glob("*.safetensors")):
            with suppress(OSError, CheckpointError):
                if _try_lock(descriptor, self._work, fcntl.LOCK_EX):
                    shutil.rmtree(self._work, ignore_errors=True)
        elif isinstance(error, CheckpointError):
            raise CheckpointError(
                error.path,
                f"{error.problem}; finished files are kept in {self._work}: the same command goes "
                "on from there",
                tensor=error.tensor,
            ) from error


def _work_prefix(target: Path) -> str:
    return f".{target.name}.partial-"


def _is_occupied(target: Path) -> bool:
    try:
        return not (target.is_dir() and not any(target.iterdir())) if target.exists() else False
    except FileNotFoundError:
        return False


def _identity(output: Output) -> str:
    files = []
    for path in (*output.sources, *output.copied):
        status = path.stat()
        files.append([path.name, status.st_size, status.st_mtime_ns])
    shards = [[s.file_name, hashlib.sha256(s.header).hexdigest()] for s in output.shards]
    claims: list[Any] = [WRITER_VERSION, files, shards, dict(output.documents)]
    return hashlib.sha256(json.dumps(claims, sort_keys=True).encode()).hexdigest()[:12]


def _try_lock(descriptor: int, path: Path, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in {errno.EWOULDBLOCK, errno.EACCES}:
            return False
        raise CheckpointError(
            path,
            "is on a file system without file locks, which keep two processes from writing one "
            f"file ({error.strerror}); write to another file system",
        ) from error
    return True


def _lock(descriptor: int, path: Path, kind: int) -> None:
    while not _try_lock(descriptor, path, kind):
        time.sleep(POLL_SECONDS)


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _encoded(document: Mapping[str, object]) -> bytes:
    return (json.dumps(document, indent=2) + "\n").encode()


def _write_durably(path: Path, data: bytes, scratch: Path | None = None) -> None:
    """``path`` holds all of ``data`` on disk, or is not there: never a part."""
    scratch = scratch or path.with_suffix(".new")
    with scratch.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    scratch.rename(path)
    _sync_directory(path.parent)


def _sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_sync_directory = _sync_file
