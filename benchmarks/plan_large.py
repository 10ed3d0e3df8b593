"""Plans a sparse 700 GB checkpoint with DeepSeek-V3's shapes by the command, on at most two cores.

    python benchmarks/plan_large.py [--layers 64] [--folder DIR] [--record]

Headers are real, the data are holes; three layers more than DeepSeek-V3's own 61 make 700 GB.
``blockscale plan`` runs for sm_90 and sm_100 in processes of
its own; start of Python, reading of all headers and printing are counted. Prints one JSON line a
device; exits with 1 above 10 seconds or 500 MB of resident memory.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from blockscale.testing.model_shapes import deepseek_v3, write_model_headers

LIMIT_SECONDS = 10.0
LIMIT_BYTES = 500_000_000
CORES = 2
PROGRAM = (
    "import sys\n"
    "from pathlib import Path\n"
    "from blockscale.cli.main import run\n"
    "try:\n"
    "    run()\n"
    "finally:\n"
    "    print(Path('/proc/self/status').read_text(), file=sys.stderr)\n"
)


def main() -> int:
    """Write the directory, plan it for both devices."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=64, help="61 are DeepSeek-V3's own")
    parser.add_argument("--folder", type=Path, default=None, help="a file system with holes")
    parser.add_argument("--record", action="store_true", help="append to benchmarks/results")
    options = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        folder = Path(scratch) / "checkpoint"
        write_model_headers(folder, deepseek_v3(options.layers))
        results = [planned(folder, device) for device in ("sm_90", "sm_100")]
    from record import append, record

    for values in results:
        document = record("plan_large", model="DeepSeek-V3", model_layers=options.layers, **values)
        print(json.dumps(document))
        if options.record:
            append(document)
    fine = all(r["seconds"] < LIMIT_SECONDS and r["peak_bytes"] < LIMIT_BYTES for r in results)
    return int(not fine)


def planned(folder: Path, device: str) -> dict[str, Any]:
    """Seconds and peak memory of one run of the command."""
    command = [sys.executable, "-c", PROGRAM, "plan", str(folder), "--device", device, "--json"]
    cpu_before, started = cpu_seconds(), time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603 - our own command line
    seconds = time.perf_counter() - started
    # VmHWM, not ru_maxrss: a child inherits the latter from its parent.
    (peak,) = (line for line in done.stderr.splitlines() if line.startswith("VmHWM:"))
    files = list(folder.glob("*.safetensors"))
    return {
        "device": device,
        "checkpoint_bytes": sum(file.stat().st_size for file in files),
        "files": len(files),
        "layers": len(json.loads(done.stdout)["layers"]),
        "cores": len(os.sched_getaffinity(0)),
        "seconds": round(seconds, 2),
        "cpu_seconds": round(cpu_seconds() - cpu_before, 2),
        "load_average": round(os.getloadavg()[0], 1),
        "peak_bytes": int(peak.split()[1]) * 1024,
    }


def cpu_seconds() -> float:
    """Of all children that have ended: on a busy machine the wall shows the others' work."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    sys.exit(main())
