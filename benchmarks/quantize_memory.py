"""Peak memory of ``blockscale quantize`` on a checkpoint much larger than the limit.

    python benchmarks/quantize_memory.py [--gigabytes 8] [--folder DIR] [--record]

Writes a synthetic bf16 checkpoint (tensors of 1 GB, real random values), quantizes it with the
command line in a child process, and exits with 1 if the child's peak resident memory passes 1.5 GB.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from record import append, record

LIMIT_BYTES = 1_500_000_000
COLUMNS = 8192
ROWS_PER_GIGABYTE = 61_035  # x 8192 columns x 2 bytes = 1 GB
CHUNK_ROWS = 2048


def main() -> int:
    """Write, quantize, measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=int, default=8)
    parser.add_argument("--folder", type=Path, default=None, help="where to write (needs 1.6x)")
    parser.add_argument("--record", action="store_true", help="append to benchmarks/results")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        source, target = Path(scratch) / "source", Path(scratch) / "target"
        write_checkpoint(source, options.gigabytes)
        program = [sys.executable, "-m", "blockscale.cli.main", "quantize", source, target]
        started = time.perf_counter()
        subprocess.run(program, check=True)  # noqa: S603 - our own command line
        seconds = time.perf_counter() - started
    # Linux counts ru_maxrss in KiB; the only child is the command.
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    print(f"peak resident memory {peak / 1e9:.2f} GB, limit {LIMIT_BYTES / 1e9:.1f} GB")
    if options.record:
        document = record(
            "quantize_memory",
            gigabytes=options.gigabytes,
            peak_bytes=peak,
            limit_bytes=LIMIT_BYTES,
            seconds=round(seconds, 1),
        )
        print(json.dumps(document))
        append(document)
    return int(peak > LIMIT_BYTES)


def write_checkpoint(folder: Path, gigabytes: int) -> None:
    """One file of ``gigabytes`` matrices of 1 GB each, written in bands."""
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "synthetic", "dtype": "bfloat16"}')
    size = ROWS_PER_GIGABYTE * COLUMNS * 2
    header = {
        f"model.layers.{index}.mlp.down_proj.weight": {
            "dtype": "BF16",
            "shape": [ROWS_PER_GIGABYTE, COLUMNS],
            "data_offsets": [index * size, (index + 1) * size],
        }
        for index in range(gigabytes)
    }
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    random = np.random.default_rng(1)
    values = random.standard_normal((CHUNK_ROWS, COLUMNS), dtype=np.float32)
    band = (values.view(np.uint32) >> 16).astype(np.uint16)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for _ in range(gigabytes):
            for first in range(0, ROWS_PER_GIGABYTE, CHUNK_ROWS):
                file.write(band[: ROWS_PER_GIGABYTE - first].tobytes())


if __name__ == "__main__":
    sys.exit(main())
