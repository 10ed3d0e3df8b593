"""Time to plan DeepSeek-V3 (90,427 tensors, 45,032 FP8 weights) once its headers are read.

    python benchmarks/plan_time.py [--device sm_100] [--repeats 9] [--record]

From tensors to a ``ModelPlan`` for one rank: which tensors form quantized layers, which of those
are merged and how they are cut, and the decision for each. Reading the headers from disk is timed
beside it and not counted: it depends on the disk. Prints one JSON line; exits with 1 above the
limit of two seconds.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blockscale.backends.registry import BACKENDS
from blockscale.checkpoint.read import Checkpoint, read_checkpoint
from blockscale.checkpoint.requests import RequestOptions, requests_of
from blockscale.checkpoint.schema import read_layers
from blockscale.formats import DType
from blockscale.planning.device import Device
from blockscale.planning.planner import plan_model
from blockscale.planning.policy import PlanPolicy
from blockscale.planning.sharding import Parallelism
from blockscale.testing.model_shapes import deepseek_v3, write_model_headers

if TYPE_CHECKING:
    from collections.abc import Callable

    from blockscale.planning.plan import ModelPlan

LIMIT_SECONDS = 2.0


def main() -> int:
    """Measure, print, and fail above the limit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="sm_100", help="an invented device")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--ep", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--record", action="store_true", help="append to benchmarks/results")
    arguments = parser.parse_args()
    device, parallelism = Device.named(arguments.device), Parallelism(arguments.tp, arguments.ep)
    measured = measure(device, parallelism, arguments.repeats)
    # Only now: finding the machine's name may import torch, which planning does without.
    torch_free = "torch" not in sys.modules
    from record import append, record

    document = record(
        "plan_time",
        model="DeepSeek-V3",
        device=device.name,
        tp=parallelism.tensor,
        ep=parallelism.expert,
        repeats=arguments.repeats,
        torch_free=torch_free,
        **measured,
    )
    print(json.dumps(document))
    if arguments.record:
        append(document)
    return 0 if document["plan_s"] < LIMIT_SECONDS and torch_free else 1


def measure(device: Device, parallelism: Parallelism, repeats: int) -> dict[str, Any]:
    """Median seconds of reading, of planning, and of planning's slowest repeat."""
    with tempfile.TemporaryDirectory() as folder:
        write_model_headers(Path(folder), deepseek_v3())
        reading = [seconds(lambda: read_checkpoint(folder))[0] for _ in range(3)]
        checkpoint = read_checkpoint(folder)
    planning: list[float] = []
    for _ in range(repeats):
        took, planned = seconds(lambda: plan(checkpoint, device, parallelism))
        planning.append(took)
    return {
        "tensors": len(checkpoint.tensors),
        "layers": len(planned.layers),
        "read_headers_s": round(statistics.median(reading), 4),
        "plan_s": round(statistics.median(planning), 4),
        "plan_worst_s": round(max(planning), 4),
    }


def plan(checkpoint: Checkpoint, device: Device, parallelism: Parallelism) -> ModelPlan:
    """What ``blockscale plan`` does between reading headers and printing."""
    layers = read_layers(checkpoint)
    wanted = requests_of(checkpoint, layers, RequestOptions(DType.BFLOAT16, parallelism))
    return plan_model(
        wanted.requests,
        device,
        PlanPolicy(),
        BACKENDS,
        skipped=layers.skipped,
        findings=(*layers.findings, *wanted.findings),
    )


def seconds(call: Callable[[], Any]) -> tuple[float, Any]:
    """Wall time of one call and its result; garbage of earlier calls is not counted."""
    gc.collect()
    started = time.perf_counter()
    result = call()
    return time.perf_counter() - started, result


if __name__ == "__main__":
    sys.exit(main())
