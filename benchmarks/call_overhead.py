"""Host time of one planned layer, from bare launches upwards.

    python benchmarks/call_overhead.py [--out FILE] [--backends NAME ...] [--without-gpu]

Times are of the calling thread, microseconds, M = 4, N = K = 256, bfloat16; kernels are so small
that a GPU keeps up. DeepGEMM is measured if it is named: it builds for half a minute before. Rungs
of the ladder, each with what is below it:

- ``bare``: both kernels called with every argument ready, our Triton and Gluon kernels by the call
  into C, other products by the backend's function
- ``allocated``: with the allocations that a call cannot do without, result and scratch memory
- ``step``: with the choice of device, stream and descriptors, without the result's allocation
- ``operator``: ``ops.linear``, the result's allocation and the look-up of the shape included
- ``layer``: the module called; ``layer_3d`` with (2, 2, K)
- ``dispatched``: ``torch.ops.blockscale.linear``, as compiled code calls it

Beside them the backend's two calls: ``quantize``, ``multiply`` and both, ``direct``. ``python`` is
``operator`` less ``allocated``: what it costs to choose by M, and to find what was prepared.

``--without-gpu`` runs on a CUDA driver that does nothing (``blockscale.testing.idle_gpu``) and
takes the thread's CPU time, so that other work on the machine counts little. Rungs are timed in
turns.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from blockscale import ops
from blockscale.backends.registry import BACKENDS, runnable_backend_named
from blockscale.formats import FP8_128X128_FP32, DType
from blockscale.kernels.step import Scratch, device_index
from blockscale.modules.linear import BlockScaledLinear
from blockscale.planning.device import Device
from blockscale.planning.planner import plan_linear
from blockscale.planning.policy import PlanPolicy
from blockscale.planning.request import LinearRequest
from blockscale.probe.machine import installed_packages, read_machine
from blockscale.reference import quantize
from record import append_to, record

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from blockscale.planning.plan import LinearPlan

    Rungs = dict[str, Callable[[], object]]

N, K, M = 256, 256, 4
CALLS, ROUNDS = 500, 40
NAMES = ("gluon", "cuda", "triton", "torch_scaled_mm")
SLOW_TO_BUILD = ("deep_gemm",)
OWN = ("triton", "gluon")


def main() -> int:
    """Measure every backend that runs here; each is printed and written as it comes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--backends", nargs="+", default=NAMES, choices=NAMES + SLOW_TO_BUILD)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--without-gpu", action="store_true")
    options = parser.parse_args()
    if options.out:
        options.out.write_text("")
    measure = without_gpu if options.without_gpu else on_gpu
    for line in measure(options.backends, options.rounds):
        print(f"{line['backend']}: {words(line)}\n{json.dumps(line)}", flush=True)
        if options.out:
            append_to(options.out, line)
    return 0


def words(line: dict[str, Any]) -> str:
    """A record's answer to the question that it was made for."""
    return ", ".join(
        f"{of} {line[f'{of}_us']} us (p10 {line[f'{of}_p10_us']})"
        for of in ("python", "layer", "direct", "bare")
    )


def on_gpu(names: Sequence[str], rounds: int) -> Iterator[dict[str, Any]]:
    """Every backend that serves this machine."""
    device = read_machine()
    for name in names:
        started = time.perf_counter()
        line = overhead(name, device, rounds)
        if line is None:
            print(f"{name}: does not run here", flush=True)
            continue
        yield record("call_overhead", **line)
        print(f"{name}: done in {time.perf_counter() - started:.1f} s", flush=True)


def without_gpu(names: Sequence[str], rounds: int) -> Iterator[dict[str, Any]]:
    """Our own backends on an idle GPU."""
    from blockscale.testing import idle_gpu

    idle = idle_gpu.start()
    device = replace(Device.named("sm_90"), packages=installed_packages())
    for name in names:
        if name in OWN:
            before = idle.launches
            line = overhead(name, device, rounds)
            assert idle.launches > before, "nothing was launched"
            yield record("call_overhead_without_gpu", **(line or {}))


def overhead(name: str, device: Device, rounds: int) -> dict[str, object] | None:
    """Microseconds of every rung, median and tenth percentile; None if nothing can run here."""
    dtype = DType.BFLOAT16
    request = LinearRequest("layer", N, K, FP8_128X128_FP32, dtype, dtype)
    plan = plan_linear(request, device, PlanPolicy(backends=(name,)), BACKENDS)
    if not plan.is_servable:
        return None
    times = timed(rungs(plan), rounds)
    for suffix in ("us", "p10_us"):
        python = times[f"operator_{suffix}"] - times[f"allocated_{suffix}"]
        times[f"python_{suffix}"] = round(python, 2)
    return {"backend": name, "m": M, "n": N, "k": K, **times}


def rungs(plan: LinearPlan) -> Rungs:
    """What is timed, by its name."""
    where = "cuda" if torch.cuda.is_available() else "cpu"
    weight = quantize(torch.randn(N, K), FP8_128X128_FP32).to(where)
    layer = BlockScaledLinear(plan, weight)
    backend, offer = runnable_backend_named(plan.backends[0]), plan.choices[0].offer
    multiply: Any = backend.bind(layer.weight, offer)
    x = torch.randn(M, K, device=where).to(torch.bfloat16)
    x_3d = x.view(2, 2, K)
    out = torch.empty((M, N), dtype=torch.bfloat16, device=where)
    quantized = backend.quantize_activation(x, offer)
    layer(x)
    call = ops.bound(layer.handle).calls[x.shape]
    return bare_rungs(plan, layer, x, out) | {
        "step": lambda: call.step(x, K, out, None),
        "operator": lambda: ops.linear(x, None, layer.handle),
        "layer": lambda: layer(x),
        "layer_3d": lambda: layer(x_3d),
        "dispatched": lambda: torch.ops.blockscale.linear(x, None, layer.handle),
        "quantize": lambda: backend.quantize_activation(x, offer),
        "multiply": lambda: multiply(quantized, out, None),
        "direct": lambda: multiply(backend.quantize_activation(x, offer), out, None),
        "empty": lambda: torch.empty((M, N), dtype=torch.bfloat16, device=where),
    }


def bare_rungs(
    plan: LinearPlan, layer: BlockScaledLinear, x: torch.Tensor, out: torch.Tensor
) -> Rungs:
    """Both kernels with all arguments at hand, without and with the allocations of a call."""
    from blockscale.kernels.triton.quantize import rows_quantizer

    name, offer = plan.backends[0], plan.choices[0].offer
    form = offer.activation
    assert form is not None
    index = device_index(x)
    quantizer = rows_quantizer(form.format, form.layout, x.dtype, K, index)
    backend = runnable_backend_named(name)
    product: Any = backend.bind(layer.weight, offer)
    workspace = product.workspace_bytes(M, out.dtype) if name in OWN else 0
    scratch = Scratch.of(*quantizer.sizes(M), workspace)
    memory = torch.empty(scratch.nbytes, dtype=torch.uint8, device=x.device)
    stream = torch._C._cuda_getCurrentRawStream(index)  # noqa: SLF001 - as kernels.step
    base = memory.data_ptr()
    first = recorded(
        quantizer.launcher(0),
        lambda: quantizer.start_for(M, scratch)(stream, x.data_ptr(), K, base),
    )
    if name in OWN:
        second = recorded(
            product.launcher_for(M, out.dtype),
            lambda: product.start_for(M, out.dtype, scratch)(stream, base, out.data_ptr(), None),
        )
    else:
        second = partial(product, backend.quantize_activation(x, offer), out, None)
    one = torch.empty(1, dtype=out.dtype, device=x.device).expand(M, N)

    def bare(kept: object = memory) -> None:  # noqa: ARG001 - the addresses must stay valid
        first()
        second()

    def allocated() -> tuple[torch.Tensor, torch.Tensor]:
        both = memory.new_empty(scratch.nbytes), torch.empty_like(one)
        first()
        second()
        return both

    return {"bare": bare, "allocated": allocated}


def recorded(launcher: Any, launch: Callable[[], None]) -> Callable[[], None]:  # noqa: ANN401 - either kind
    """The one call into C that ``launch`` makes through ``launcher``, with its arguments."""
    start, found = launcher.start, []
    launcher.start = lambda *arguments: found.append(arguments)
    launch()
    launcher.start = start
    (arguments,) = found
    return partial(start, *arguments)


def timed(rungs: Rungs, rounds: int) -> dict[str, float]:
    """Microseconds of the calling thread, rungs in turns."""
    on_gpu = torch.cuda.is_available()
    clock = time.perf_counter_ns if on_gpu else time.thread_time_ns
    taken: dict[str, list[float]] = {name: [] for name in rungs}
    gc.disable()
    for turn in range(rounds + 1):
        for name, call in rungs.items():
            if on_gpu:
                torch.cuda.synchronize()
            started = clock()
            for _ in range(CALLS):
                call()
            if turn > 0:  # The first warms up.
                taken[name].append((clock() - started) / CALLS / 1e3)
        gc.collect()
    gc.enable()
    medians = {f"{name}_us": round(statistics.median(us), 2) for name, us in taken.items()}
    tenths = {f"{name}_p10_us": round(sorted(us)[rounds // 10], 2) for name, us in taken.items()}
    return medians | tenths


if __name__ == "__main__":
    sys.exit(main())
