"""The GPU's counters under one product of each kernel: what ``gemm.py``'s times are made of.

    python benchmarks/counters.py [--shapes 16:4096x7168,...] [--backends gluon,cuda,deep_gemm]
                                  [--dtypes float16,float32] [--out FILE | --record]

Runs itself under ``ncu`` (Nsight Compute, which must be allowed to read counters), which flushes
the caches before each kernel and leaves the clocks alone. Output: ``--dtypes``; DeepGEMM bfloat16.
Counting repeats a kernel and slows it: compare shares, take times from ``gemm.py``. One JSON line a
kernel and shape.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from blockscale.formats import DType
from gemm_summary import BASELINE
from gemm_variants import Problem, Weights
from record import append, append_to, need_gpu, record

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

# M:NxK, at least one of each range of M, among them those that are furthest behind DeepGEMM.
SHAPES = (
    "16:4096x7168,64:2112x7168,256:3072x6144,512:4096x7168,4096:24576x1536,8192:4096x7168,"
    "4096:32768x512"
)
BACKENDS = "gluon,cuda,deep_gemm"
# What a record calls it, and ncu.
METRICS = {
    "time_ns": "gpu__time_duration.sum",
    "clocks": "sm__cycles_elapsed.max",
    "active_clocks": "sm__cycles_active.avg",
    "tensor_percent": "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed",
    "issue_percent": "sm__inst_issued.avg.pct_of_peak_sustained_active",
    "l2_percent": "lts__throughput.avg.pct_of_peak_sustained_elapsed",
    "l2_hit_percent": "lts__t_sector_hit_rate.pct",
    "l2_bytes": "lts__t_bytes.sum",
    # Between the two halves of L2.
    "fabric_sectors": "lts__t_sectors_srcunit_ltcfabric.sum",
    "memory_percent": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "memory_bytes": "dram__bytes.sum",
    "memory_bytes_written": "dram__bytes_write.sum",
    "warp_instructions": "smsp__inst_executed.sum",
    "shared_wavefronts": "l1tex__data_pipe_lsu_wavefronts_mem_shared.sum",
}
# Before the job of a kernel, in what the counted process prints.
JOB = "product "
SEED_COPIES = 2
PLACES = ("/usr/local/cuda/bin/ncu", "/opt/nvidia/nsight-compute/ncu")


def main() -> int:
    """Count, or in the counted process, launch."""
    options = arguments()
    need_gpu()
    if options.launch:
        launch(options.shapes, options.backends, options.dtypes)
        return 0
    ncu = next((found for name in ("ncu", *PLACES) if (found := shutil.which(name))), None)
    if ncu is None:
        print(
            "counters.py needs ncu, of Nsight Compute, which the CUDA toolkit has", file=sys.stderr
        )
        return 2
    output = counted(ncu, options)
    for line in records_of(output):
        print(words_of(line), flush=True)
        if options.record:
            append(line)
        if options.out:
            append_to(options.out, line)
    return 0


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", default=SHAPES, help="M:NxK, separated by commas")
    parser.add_argument("--backends", default=BACKENDS)
    parser.add_argument("--dtypes", default="float16", help="outputs, but of DeepGEMM")
    parser.add_argument("--out", type=Path, help="JSON lines; --record writes benchmarks/results")
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--launch", action="store_true", help="only launch: what ncu is given")
    return parser.parse_args()


def launch(shapes: str, backends: str, dtypes: str) -> None:
    """Each kernel once where counters are on, after a call that compiles it; its job is printed."""
    for shape in shapes.split(","):
        m, _, weight = shape.partition(":")
        n, k = map(int, weight.split("x"))
        problem = Problem(int(m), Weights(n, k, SEED_COPIES))
        for name in backends.split(","):
            for dtype in [BASELINE[1]] if name == BASELINE[0] else dtypes.split(","):
                variant = problem.variant(name, DType(dtype))
                if variant is None or not problem.is_right(variant):
                    continue
                torch.cuda.synchronize()
                job = {"m": int(m), "n": n, "k": k, "backend": name, "out_dtype": dtype}
                print(f"{JOB}{json.dumps({**job, 'detail': variant.detail})}", flush=True)
                torch.cuda.profiler.start()
                variant.calls[0]()
                torch.cuda.synchronize()
                torch.cuda.profiler.stop()


def counted(ncu: str, options: argparse.Namespace) -> str:
    """What ncu and the process under it print. Ends the program if ncu fails."""
    command = [ncu, "--csv", "--print-units", "base", "--clock-control", "none"]
    command += ["--profile-from-start", "off", "--metrics", ",".join(METRICS.values())]
    command += [sys.executable, __file__, "--launch"]
    command += ["--shapes", options.shapes, "--backends", options.backends]
    command += ["--dtypes", options.dtypes]
    done = subprocess.run(  # noqa: S603 - ncu from PATH or its known places
        command, stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode != 0:
        print("\n".join(done.stdout.splitlines()[-20:]), file=sys.stderr)
        sys.exit(f"counters.py: ncu ended with {done.returncode}")
    return done.stdout


def records_of(output: str) -> list[dict[str, Any]]:
    """One for each job, with the counters of its kernel. Raises ValueError if one has not one."""
    jobs = [json.loads(x[len(JOB) :]) for x in output.splitlines() if x.startswith(JOB)]
    kernels = counters_of(output.splitlines())
    if len(jobs) != len(kernels):
        msg = f"{len(jobs)} products, but counters of {len(kernels)} kernels"
        raise ValueError(msg)
    return [record("counters", **job, **found) for job, found in zip(jobs, kernels, strict=True)]


def counters_of(lines: Sequence[str]) -> list[dict[str, Any]]:
    """The counters of each kernel in ncu's CSV, by our names, in the order of launches."""
    by_kernel: dict[int, dict[str, Any]] = {}
    for row in csv.DictReader(_table(lines)):
        found = by_kernel.setdefault(int(row["ID"]), {"kernel": row["Kernel Name"]})
        for name, metric in METRICS.items():
            value = row["Metric Value"].replace(",", "")
            if row["Metric Name"] == metric and value.replace(".", "").isdigit():
                found[name] = float(value)
    return [by_kernel[number] for number in sorted(by_kernel)]


def _table(lines: Iterable[str]) -> Iterable[str]:
    """The lines of ncu among those of the process under it."""
    return (line for line in lines if line.startswith('"'))


def words_of(line: dict[str, Any]) -> str:
    """A record on one line."""
    found = [f"{name} {line[name]:,.0f}" for name in METRICS if name in line]
    shape = f"{line['m']} x {line['n']} x {line['k']}"
    job = f"{line['backend']} {line['out_dtype']} {line['detail']}"
    return f"{shape} {job}: {', '.join(found)}"


if __name__ == "__main__":
    sys.exit(main())
