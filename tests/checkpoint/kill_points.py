"""Kills a run before each of its steps in turn, finishes it, and compares every byte.

    python tests/checkpoint/kill_points.py {quantize,convert} SOURCE SCRATCH [EVERY]

A step is a call that changes the disk or takes a lock: open, write, fsync, flock, rename, mkdir,
remove. A child process sends itself SIGKILL before step n, for every n that a run has (or
each EVERYth); a second child is killed again half-way through what is left; a third finishes.
Prints one JSON line.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from blockscale.checkpoint import output
from blockscale.checkpoint.convert import ConvertOptions, Dialect, convert_checkpoint
from blockscale.checkpoint.quantize import QuantizeOptions, quantize_checkpoint
from blockscale.checkpoint.read import read_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable

STEPS = {
    "open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "fcntl.flock",
    "shutil.rmtree", "shutil.copyfile",
}  # fmt: skip
SHARD_BYTES = 40_000


class Steps:
    """Counts steps once ``armed``; kills this process before number ``deadly``."""

    def __init__(self) -> None:
        self.deadly = -1
        self.count = 0
        self.armed = False

    def step(self) -> None:
        if self.armed:
            self.count += 1
            if self.count == self.deadly:
                os.kill(os.getpid(), signal.SIGKILL)

    def audit(self, event: str, _: tuple[Any, ...]) -> None:
        if event in STEPS:
            self.step()


def main() -> None:
    verb, source, scratch = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    every = int(sys.argv[4]) if len(sys.argv) > 4 else 1
    torch.set_num_threads(1)  # A child that was forked has none of its parent's threads.
    steps = Steps()
    sys.addaudithook(steps.audit)
    append = output.ShardWriter._append

    def counted_append(writer: output.ShardWriter, data: bytes, name: str | None) -> None:
        steps.step()
        append(writer, data, name)
        writer._file.flush()

    output.ShardWriter._append = counted_append
    os.fsync = lambda _: steps.step()  # SIGKILL takes nothing from the page cache.
    run = quantize if verb == "quantize" else convert
    sys.stdout.write(json.dumps(examine(run, source, scratch, steps, every)))


def quantize(source: Path, target: Path) -> None:
    quantize_checkpoint(
        read_checkpoint(source), target, QuantizeOptions(max_shard_bytes=SHARD_BYTES)
    )


def convert(source: Path, target: Path) -> None:
    convert_checkpoint(
        read_checkpoint(source),
        target,
        ConvertOptions(Dialect.COMPRESSED_TENSORS, max_shard_bytes=SHARD_BYTES),
    )


def examine(
    run: Callable[[Path, Path], None], source: Path, scratch: Path, steps: Steps, every: int
) -> dict[str, Any]:
    expected = scratch / "expected"
    total = child(run, source, expected, steps, -1)
    assert total > 0
    kills, wrong = 0, []
    target = scratch / "target"
    for deadly in range(1, total + 1, every):
        kills += child(run, source, target, steps, deadly) < 0
        # Killed when all was done (convert still reads what it wrote), it is not run again: the
        # target exists, which is refused.
        if not is_finished(scratch):
            kills += child(run, source, target, steps, (total - deadly) // 2 + 1) < 0
        if not is_finished(scratch):
            child(run, source, target, steps, -1)
        if not is_finished(scratch) or contents(target) != contents(expected):
            wrong.append(deadly)
        for path in scratch.iterdir():
            if path != expected:
                shutil.rmtree(path)
    return {"steps": total, "kills": kills, "wrong": wrong, "files": sorted(contents(expected))}


def is_finished(scratch: Path) -> bool:
    return {path.name for path in scratch.iterdir()} == {"expected", "target"}


def child(
    run: Callable[[Path, Path], None], source: Path, target: Path, steps: Steps, deadly: int
) -> int:
    """Run in a process of its own: how many steps it took, or -1 if it was killed."""
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        status = 1
        try:
            steps.deadly, steps.armed = deadly, True
            run(source, target)
            steps.armed = False
            os.write(writing, str(steps.count).encode())
            status = 0
        finally:
            os._exit(status)
    os.close(writing)
    _, status = os.waitpid(process, 0)
    answer = os.read(reading, 100)
    os.close(reading)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return -1
    assert status == 0, f"a run failed with {status}"
    return int(answer)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


if __name__ == "__main__":
    main()
