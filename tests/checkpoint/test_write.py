"""Checkpoints written by runs that are killed, by several processes, on disks that fill up."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from blockscale.checkpoint import output, write
from blockscale.checkpoint.quantize import QuantizeOptions, QuantizeSummary, quantize_checkpoint
from blockscale.checkpoint.read import read_checkpoint
from blockscale.checkpoint.write import Crew
from blockscale.errors import CheckpointError

SMALL_SHARDS = QuantizeOptions(max_shard_bytes=40_000)


def quantize(
    source: Path, target: Path, crew: Crew | None = None, options: QuantizeOptions = SMALL_SHARDS
) -> QuantizeSummary:
    return quantize_checkpoint(read_checkpoint(source), target, options, None, crew)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def sources(float_checkpoint: Path, fp8_checkpoint: Path) -> dict[str, Path]:
    return {"quantize": float_checkpoint, "convert": fp8_checkpoint}


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize("verb", ["quantize", "convert"])
def test_killed_before_any_step_it_finishes_with_the_same_bytes(
    verb: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "scratch").mkdir()
    program = [sys.executable, Path(__file__).with_name("kill_points.py"), verb, sources[verb]]
    done = subprocess.run(
        [*program, tmp_path / "scratch", "5"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["wrong"] == []
    assert result["kills"] > 30
    assert sum(name.endswith(".safetensors") for name in result["files"]) > 2


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were begun, in order."""
    begun: list[str] = []
    enter = output.ShardWriter.__enter__

    def counted(writer: output.ShardWriter) -> output.ShardWriter:
        begun.append(writer._path.name)
        return enter(writer)

    monkeypatch.setattr(output.ShardWriter, "__enter__", counted)
    return begun


@pytest.mark.parametrize("crew", [(1, 3), (3, 1), (2, 2)], ids=str)
def test_threads_and_processes_share_the_files_and_write_none_twice(
    float_checkpoint: Path, tmp_path: Path, written: list[str], crew: tuple[int, int]
) -> None:
    quantize(float_checkpoint, tmp_path / "alone")
    alone = sorted(written)
    written.clear()
    threads, ranks = crew
    with ThreadPoolExecutor(ranks) as pool:  # Locks are by open file, so threads will do.
        runs = [
            pool.submit(quantize, float_checkpoint, tmp_path / "shared", Crew(threads, rank, ranks))
            for rank in range(ranks)
        ]
        assert {run.result().shards for run in runs} == {len(alone)}
    assert sorted(written) == alone
    assert contents(tmp_path / "shared") == contents(tmp_path / "alone")
    assert not list(tmp_path.glob(".*"))


@pytest.mark.usefixtures("forked")
def test_torchrun_shares_the_files(float_checkpoint: Path, tmp_path: Path) -> None:
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
        *("--no-python", sys.executable, "-m", "blockscale.cli.main", "quantize"),
        *(str(float_checkpoint), str(tmp_path / "shared"), "--shard-size", "40KB", "--json"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    quantize(float_checkpoint, tmp_path / "alone")
    assert contents(tmp_path / "shared") == contents(tmp_path / "alone")


@pytest.mark.parametrize("moment", ["_prepare", "_check_disk", "_write_all", "_finish"])
def test_a_peer_may_finish_everything_at_any_moment(
    float_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """What it then removes is missed by nobody, and what it could not remove goes too."""
    original, remove = getattr(write._Job, moment), write.shutil.rmtree
    peers = []

    def interrupted(job: write._Job, *arguments: object) -> object:
        if not peers:
            peers.append(job)
            if moment == "_finish":
                # As if a file had been made in the folder while it was removed.
                monkeypatch.setattr(write.shutil, "rmtree", lambda *_, **__: None)
            quantize(float_checkpoint, tmp_path / "out", Crew(1, 1, 2))
            monkeypatch.setattr(write.shutil, "rmtree", remove)
        return original(job, *arguments)

    monkeypatch.setattr(write._Job, moment, interrupted)
    summary = quantize(float_checkpoint, tmp_path / "out", Crew(1, 0, 2))
    assert len(peers) == 1
    monkeypatch.undo()
    quantize(float_checkpoint, tmp_path / "alone")
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")
    assert summary.shards > 2
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("error", [FileNotFoundError, FileExistsError])
def test_a_folder_that_a_peer_removes_while_it_is_made_is_made_again(
    float_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: type[OSError],
) -> None:
    make, failed = Path.mkdir, []

    def mkdir(path: Path, *arguments: object, **options: object) -> None:
        if path.name == "sums" and not failed:
            failed.append(path)
            raise error(errno.ENOENT, "gone", str(path))
        make(path, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    quantize(float_checkpoint, tmp_path / "out", Crew(1, 0, 2))
    assert len(failed) == 1
    assert not list(tmp_path.glob(".*"))


def test_a_file_system_that_makes_no_folders_is_an_error_not_a_wait(
    float_checkpoint: Path,
) -> None:
    with pytest.raises(CheckpointError, match=r"/proc/out: cannot be written"):
        quantize(float_checkpoint, Path("/proc/out"))


def test_a_peer_may_rename_a_file_while_its_size_is_asked(
    float_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    look = write._Job._check_disk

    def with_a_part_that_goes(job: write._Job, found: object) -> None:
        (job._work / "parts" / "gone").symlink_to(tmp_path / "nowhere")
        look(job, found)
        (job._work / "parts" / "gone").unlink()

    monkeypatch.setattr(write._Job, "_check_disk", with_a_part_that_goes)
    assert quantize(float_checkpoint, tmp_path / "out").shards > 2


def test_a_peer_that_comes_late_accepts_what_the_others_finished(
    float_checkpoint: Path, tmp_path: Path, written: list[str]
) -> None:
    quantize(float_checkpoint, tmp_path / "out", Crew(1, 0, 2))
    written.clear()
    summary = quantize(float_checkpoint, tmp_path / "out", Crew(1, 1, 2))
    assert summary.resumed == summary.shards
    assert written == []
    with pytest.raises(CheckpointError, match="already exists"):
        quantize(float_checkpoint, tmp_path / "out")
    (float_checkpoint / "config.json").write_text('{"model_type": "another"}')
    with pytest.raises(CheckpointError, match="already exists"):
        quantize(float_checkpoint, tmp_path / "out", Crew(1, 1, 2))


@pytest.fixture
def interrupted(
    float_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> CheckpointError:
    """The error of a run into ``tmp_path / "out"`` whose disk was full at the third file."""
    fsync, left = os.fsync, [5]

    def full(descriptor: int) -> None:
        left[0] -= 1
        if not left[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(CheckpointError) as caught:
            quantize(float_checkpoint, tmp_path / "out")
    return caught.value


def test_after_an_error_finished_files_stay_and_are_not_written_again(
    float_checkpoint: Path, tmp_path: Path, interrupted: CheckpointError, written: list[str]
) -> None:
    assert "No space left" in str(interrupted)
    assert "the same command goes on" in str(interrupted)
    kept = {path.name for path in tmp_path.glob(".out.partial-*/checkpoint/*")}
    assert kept
    summary = quantize(float_checkpoint, tmp_path / "out")
    assert summary.resumed == len(kept)
    assert kept.isdisjoint(written)
    quantize(float_checkpoint, tmp_path / "alone")
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")


@pytest.mark.usefixtures("interrupted")
def test_unfinished_work_of_another_kind_is_refused_and_kept(
    float_checkpoint: Path, tmp_path: Path
) -> None:
    other = QuantizeOptions(max_shard_bytes=40_000, kept=("o_proj",))
    with pytest.raises(CheckpointError, match="unfinished output of a run with other source"):
        quantize(float_checkpoint, tmp_path / "out", options=other)
    shard = float_checkpoint / "model.safetensors"
    os.utime(shard, ns=(0, shard.stat().st_mtime_ns + 1))
    with pytest.raises(CheckpointError, match="unfinished output of a run with other source"):
        quantize(float_checkpoint, tmp_path / "out")
    assert list(tmp_path.glob(".out.partial-*/checkpoint/*"))


@pytest.mark.usefixtures("interrupted")
def test_a_finished_file_of_the_wrong_size_is_written_again(
    float_checkpoint: Path, tmp_path: Path, written: list[str]
) -> None:
    damaged = min(tmp_path.glob(".out.partial-*/checkpoint/*"))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    quantize(float_checkpoint, tmp_path / "out")
    assert damaged.name in written
    quantize(float_checkpoint, tmp_path / "alone")
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")


def test_an_error_in_one_thread_stops_the_others_and_is_the_one_reported(
    float_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = output.ShardWriter.copy

    def failing(writer: output.ShardWriter, entry: object, name: str) -> None:
        if name == "model.norm.weight":
            raise CheckpointError(tmp_path, "cannot be read", tensor=name)
        copy(writer, entry, name)

    monkeypatch.setattr(output.ShardWriter, "copy", failing)
    with pytest.raises(CheckpointError) as caught:
        quantize(float_checkpoint, tmp_path / "out", Crew(threads=3))
    assert caught.value.tensor == "model.norm.weight"
    assert not (tmp_path / "out").exists()


def test_a_file_system_without_locks_is_named(
    float_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with pytest.raises(CheckpointError, match="without file locks"):
        quantize(float_checkpoint, tmp_path / "out")


def test_a_target_that_appears_meanwhile_is_left_alone(
    float_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = write._Job._last_files

    def intruder(job: write._Job) -> dict[str, bytes]:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "precious").write_text("keep")
        return index(job)

    monkeypatch.setattr(write._Job, "_last_files", intruder)
    with pytest.raises(CheckpointError, match="cannot be written"):
        quantize(float_checkpoint, tmp_path / "out")
    assert contents(tmp_path / "out") == {"precious": b"keep"}


def test_checksums_are_those_of_the_files(float_checkpoint: Path, tmp_path: Path) -> None:
    quantize(float_checkpoint, tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    sums = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in (tmp_path / "out").glob("*.safetensors")
    }
    assert index["metadata"]["sha256"] == sums
    lines = (tmp_path / "out" / "SHA256SUMS").read_text().splitlines()
    assert dict(reversed(line.split("  ")) for line in lines) == sums


def test_a_link_out_of_the_checkpoint_is_not_copied(float_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    (float_checkpoint / "tokenizer.json").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match="leaves the checkpoint"):
        quantize(float_checkpoint, tmp_path / "out")


LIMIT = 700_000_000


def test_memory_stays_under_what_is_allowed(tmp_path: Path) -> None:
    """384 MB of weights in one matrix, four workers, 700 MB for everything, torch included."""
    source = tmp_path / "source"
    source.mkdir()
    big = torch.ones(24_000, 8_000, dtype=torch.bfloat16)
    save_file({"a.weight": big, "b.weight": big[:4_000].clone()}, source / "model.safetensors")
    (source / "config.json").write_text("{}")
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from blockscale.cli.main import run\n"
        "try:\n"
        "    run()\n"
        "finally:\n"
        "    print(Path('/proc/self/status').read_text(), file=sys.stderr)\n"
    )
    options = ["--memory", "700MB", "--workers", "4", "--shard-size", "40MB"]
    done = subprocess.run(
        [sys.executable, "-c", program, "quantize", source, tmp_path / "out", *options],
        capture_output=True,
        text=True,
        check=True,
    )
    # Not ru_maxrss: a child inherits its parent's, and pytest may be larger.
    (peak,) = (line for line in done.stderr.splitlines() if line.startswith("VmHWM:"))
    assert int(peak.split()[1]) * 1024 < LIMIT
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 2


def test_too_little_memory_for_a_row_of_blocks_is_named(
    float_checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match="allow more memory or fewer workers"):
        quantize(float_checkpoint, tmp_path / "out", Crew(memory_bytes=1))
