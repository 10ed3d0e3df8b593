"""GB/s of ``blockscale quantize`` beside a plain copy of the same files, on the same disk.

    python benchmarks/quantize_rate.py [--gigabytes 2] [--repeats 3] [--folder DIR] [--record]

A synthetic bf16 checkpoint of shards of 256 MB is quantized by the command with one worker and with
one for each core, and copied file by file with fsync, in turns. Rates count bytes read: a copy
writes as many, quantizing writes half. Sources are in the page cache (they were just written), so
the disk's writing is the limit of all three; ``start_s`` is what the command takes before its first
byte. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from record import append, record

if TYPE_CHECKING:
    from collections.abc import Callable

ROWS, COLUMNS = 8192, 4096  # 64 MiB of bf16
MATRICES_PER_FILE = 4
COPY_BYTES = 8 << 20


def main() -> int:
    """Write, measure in turns, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None, help="where to write (needs 2.6x)")
    parser.add_argument("--record", action="store_true", help="append to benchmarks/results")
    options = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        source, target = Path(scratch) / "source", Path(scratch) / "target"
        total = write_checkpoint(source, options.gigabytes)
        ways: dict[str, Callable[[], None]] = {
            "copy": lambda: copy(source, target),
            "one_worker": lambda: quantize(source, target, 1),
            "all_cores": lambda: quantize(source, target, cores),
        }
        taken: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(options.repeats):
            for name, way in ways.items():
                taken[name].append(seconds(way))
                shutil.rmtree(target)
        start = seconds(lambda: quantize(Path(scratch) / "nothing", target, 1, check=False))
    medians = {name: statistics.median(values) for name, values in taken.items()}
    document = record(
        "quantize_rate",
        gigabytes=round(total / 1e9, 2),
        cores=cores,
        repeats=options.repeats,
        start_s=round(start, 2),
        load_average=round(os.getloadavg()[0], 1),
        **{f"{name}_s": round(value, 2) for name, value in medians.items()},
        **{f"{name}_gb_s": round(total / 1e9 / value, 3) for name, value in medians.items()},
    )
    print(json.dumps(document))
    if options.record:
        append(document)
    return 0


def quantize(source: Path, target: Path, workers: int, *, check: bool = True) -> None:
    """The command, with output files as large as half an input file."""
    program = [sys.executable, "-m", "blockscale.cli.main", "quantize", source, target]
    options = ["--workers", str(workers), "--shard-size", "140MB"]
    subprocess.run([*program, *options], check=check, capture_output=True)  # noqa: S603 - our own command line


def copy(source: Path, target: Path) -> None:
    """Every file, synced to disk."""
    target.mkdir()
    for path in source.iterdir():
        with path.open("rb") as reader, (target / path.name).open("wb") as writer:
            shutil.copyfileobj(reader, writer, COPY_BYTES)
            writer.flush()
            os.fsync(writer.fileno())


def seconds(way: Callable[[], None]) -> float:
    """Wall time, with nothing left to write from before."""
    os.sync()
    started = time.perf_counter()
    way()
    return time.perf_counter() - started


def write_checkpoint(folder: Path, gigabytes: float) -> int:
    """Random bf16 matrices in shards with an index; bytes written."""
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "synthetic", "dtype": "bfloat16"}')
    size = ROWS * COLUMNS * 2
    files = max(1, round(gigabytes * 1e9 / size / MATRICES_PER_FILE))
    values = np.random.default_rng(1).standard_normal((ROWS, COLUMNS), dtype=np.float32)
    data = (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    weight_map = {}
    for number in range(files):
        names = [
            f"model.layers.{number}.mlp.down_proj_{i}.weight" for i in range(MATRICES_PER_FILE)
        ]
        header = {
            name: {
                "dtype": "BF16",
                "shape": [ROWS, COLUMNS],
                "data_offsets": [i * size, (i + 1) * size],
            }
            for i, name in enumerate(names)
        }
        raw = json.dumps(header).encode()
        raw += b" " * (-len(raw) % 8)
        file_name = f"model-{number:05d}.safetensors"
        weight_map.update(dict.fromkeys(names, file_name))
        with (folder / file_name).open("wb") as file:
            file.write(len(raw).to_bytes(8, "little") + raw)
            for _ in names:
                file.write(data)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return files * MATRICES_PER_FILE * size


if __name__ == "__main__":
    sys.exit(main())
