"""Kills ``blockscale quantize`` and ``convert`` at random moments until they have finished.

    python tools/kill_tests.py [--kills 60] [--seed 1] [--scratch DIR] [--log FILE]

Real commands, one process or two that share the work as under torchrun, real SIGKILL. A run that
was killed is started again, and killed again; when the target is there it is compared with that of
an undisturbed run, byte for byte. Prints one JSON line for each target and one in the end; exits
with 1 if a byte differs, something is left over or a run fails by itself.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, TextIO

import numpy as np

LAYERS = 24
ROWS, COLUMNS = 1024, 2048
SHARD_SIZE = "4MB"
LIMIT_S = 120
KILLED_WHILE_STARTING = 0.15  # of all kills; the others come while files are written
ALL_DIE = 0.7  # of kills of two processes; else one of them must finish alone


class Verb:
    """One of the two commands, with its source and what an undisturbed run gives."""

    def __init__(self, name: str, options: list[str], source: Path, scratch: Path) -> None:
        self.name, self.source, self.scratch = name, source, scratch
        self._options = options
        expected = scratch / f"{name}-expected"
        self.write_s = self._undisturbed(expected)
        self.expected = digests(expected)

    def start(self, target: Path, rank: int, ranks: int) -> subprocess.Popen[bytes]:
        """The command in a process of its own."""
        command = [sys.executable, "-m", "blockscale.cli.main", self.name]
        command += [str(self.source), str(target), *self._options]
        environment = {**os.environ, "RANK": str(rank), "WORLD_SIZE": str(ranks)}
        return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)

    def _undisturbed(self, target: Path) -> float:
        """Seconds from the first file begun to the last finished."""
        process = self.start(target, 0, 1)
        wait_for_work(target, [process])
        began = time.monotonic()
        if process.wait(LIMIT_S):
            sys.exit(f"an undisturbed {self.name} failed")
        return time.monotonic() - began


def main() -> int:
    """Kill until both commands were killed often enough."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=60, help="of each command, at least")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--scratch", type=Path, default=None)
    parser.add_argument("--log", type=Path, default=None, help="append the lines to this file too")
    options = parser.parse_args()
    chance = random.Random(options.seed)  # noqa: S311 - moments to kill at, no secrets
    log = options.log.open("a", encoding="utf-8") if options.log else None
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        scratch = Path(folder)
        write_floats(scratch / "floats")
        small = ["--shard-size", SHARD_SIZE]
        quantize = Verb("quantize", small, scratch / "floats", scratch)
        source = scratch / "quantize-expected"
        verbs = (quantize, Verb("convert", ["--to", "compressed-tensors", *small], source, scratch))
        summary: dict[str, Any] = {"summary": True, "seed": options.seed, "faults": 0}
        for verb in verbs:
            kills = targets = 0
            while kills < options.kills:
                trial = until_done(verb, chance)
                say(trial, log)
                kills += len(trial["killed_at"])
                targets += 1
                summary["faults"] += not trial["same_bytes"] or bool(trial["left_over"])
            summary |= {f"{verb.name}_kills": kills, f"{verb.name}_targets": targets}
        say(summary, log)
    return int(summary["faults"] > 0)


def until_done(verb: Verb, chance: random.Random) -> dict[str, Any]:
    """Start and kill one target's runs until it is complete."""
    target = verb.scratch / f"{verb.name}-target"
    killed_at: list[int] = []
    ranks = chance.choice((1, 2))
    while not target.exists() or list(target.parent.glob(f".{target.name}.partial-*")):
        runs = [verb.start(target, rank, ranks) for rank in range(ranks)]
        if chance.random() < KILLED_WHILE_STARTING:
            time.sleep(chance.uniform(0, 1))
        else:
            wait_for_work(target, runs)
            time.sleep(chance.uniform(0, verb.write_s * 0.8))
        dying = runs if chance.random() < ALL_DIE else runs[:1]
        alive = [run for run in dying if run.poll() is None]
        done = len(list(target.parent.glob(f".{target.name}.partial-*/checkpoint/*.safetensors")))
        for run in alive:
            run.send_signal(signal.SIGKILL)
        killed_at += [len(verb.expected) if target.exists() else done] * len(alive)
        for run in runs:
            if run.wait(LIMIT_S) not in {0, -signal.SIGKILL}:
                sys.exit(f"{verb.name} failed by itself")
    left = [path.name for path in target.parent.glob(f".{target.name}*")]
    same = digests(target) == verb.expected
    shutil.rmtree(target)
    return {
        "command": verb.name,
        "processes": ranks,
        "killed_at": killed_at,  # files finished by then
        "files": len(verb.expected),
        "same_bytes": same,
        "left_over": left,
    }


def wait_for_work(target: Path, runs: list[subprocess.Popen[bytes]]) -> None:
    """Return when a file is begun that was not before, or a run has ended."""
    limit = time.monotonic() + LIMIT_S
    before = begun(target)
    while time.monotonic() < limit and all(run.poll() is None for run in runs):
        if begun(target) != before:
            return
        time.sleep(0.002)


def begun(target: Path) -> set[tuple[str, int]]:
    """Files being written, with the time of their last change."""
    found = set()
    for part in target.parent.glob(f".{target.name}.partial-*/parts/*"):
        with contextlib.suppress(FileNotFoundError):
            found.add((part.name, part.stat().st_mtime_ns))
    return found


def say(line: dict[str, Any], log: TextIO | None) -> None:
    """One JSON line on stdout and in the log."""
    print(json.dumps(line), flush=True)
    if log:
        print(json.dumps(line), file=log, flush=True)


def write_floats(folder: Path) -> None:
    """A float32 checkpoint of random values in one file, 200 MB."""
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "random", "dtype": "float32"}')
    (folder / "tokenizer.json").write_text("{}")
    size = ROWS * COLUMNS * 4
    header = {
        f"model.layers.{layer}.mlp.down_proj.weight": {
            "dtype": "F32",
            "shape": [ROWS, COLUMNS],
            "data_offsets": [layer * size, (layer + 1) * size],
        }
        for layer in range(LAYERS)
    }
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    values = np.random.default_rng(1)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for _ in range(LAYERS):
            file.write(values.standard_normal((ROWS, COLUMNS), dtype=np.float32).tobytes())


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


if __name__ == "__main__":
    sys.exit(main())
