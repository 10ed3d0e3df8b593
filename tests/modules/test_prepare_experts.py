"""Stacks of experts: the same values as one weight at a time, in bounded memory."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from blockscale.backends.registry import BACKENDS
from blockscale.errors import PlanError
from blockscale.formats import (
    FP8_128X128_FP32,
    FP8_128X128_UE8M0,
    K_MAJOR,
    BlockFormat,
    DType,
    PowerOfTwo,
)
from blockscale.modules.prepare import prepare_experts, prepare_stack, prepare_weight
from blockscale.planning.device import Device
from blockscale.planning.plan import Conversion, LinearPlan
from blockscale.planning.planner import plan_linear
from blockscale.planning.policy import Exactness, PlanPolicy
from blockscale.planning.request import LinearRequest
from blockscale.reference import dequantize, expert_of, quantize
from blockscale.tensor import BlockScaledTensor

EXPERTS, N, K = 3, 320, 256
LOSSY = PlanPolicy(exactness=Exactness.ALLOW_LOSSY, max_relative_error=0.1)


def plan(
    backend: str,
    fmt: BlockFormat,
    device: str,
    power_of_two: PowerOfTwo = PowerOfTwo.NO,
    experts: int | None = EXPERTS,
) -> LinearPlan:
    request = LinearRequest(
        "w2", N, K, fmt, DType.BFLOAT16, DType.BFLOAT16, power_of_two, experts=experts
    )
    policy = replace(LOSSY, backends=(backend,))
    return plan_linear(request, Device.named(device), policy, BACKENDS)


def stack(fmt: BlockFormat, *, exponents: bool = False) -> BlockScaledTensor:
    values = torch.randn(EXPERTS, N, K, generator=torch.Generator().manual_seed(2))
    made = quantize(values, FP8_128X128_UE8M0 if exponents else fmt)
    if not exponents:
        return made
    return BlockScaledTensor(made.data, made.scales.float(), fmt, K_MAJOR)


def bits(scales: torch.Tensor) -> torch.Tensor:
    return scales.view(torch.uint8) if scales.dtype is torch.float8_e8m0fnu else scales


# None of these plans is run here: conversions depend on forms alone.
CASES = {
    "as stored": ("cpu", FP8_128X128_FP32, "cpu", Conversion.NONE),
    "restated": ("cpu", FP8_128X128_UE8M0, "cpu", Conversion.RELAYOUT),
    "packed": ("deep_gemm", FP8_128X128_UE8M0, "sm_100", Conversion.RELAYOUT),
    "requantized": ("deep_gemm", FP8_128X128_FP32, "sm_100", Conversion.REQUANTIZE),
}


@pytest.mark.parametrize(("backend", "fmt", "device", "conversion"), CASES.values(), ids=CASES)
@pytest.mark.parametrize("parts", [(320,), (128, 192), (256, 64)], ids=str)
def test_expert_by_expert_gives_what_one_weight_gives(
    backend: str,
    fmt: BlockFormat,
    device: str,
    conversion: Conversion,
    parts: tuple[int, ...],
) -> None:
    known = PowerOfTwo.YES if fmt is FP8_128X128_UE8M0 else PowerOfTwo.NO
    whole = stack(fmt)
    grouped, single = (plan(backend, fmt, device, known, experts) for experts in (EXPERTS, None))
    assert grouped.conversion is conversion

    def read(expert: int) -> list[BlockScaledTensor]:
        one = expert_of(whole, expert)
        first, found = 0, []
        for rows in parts:
            blocks = slice(first // 128, -(-(first + rows) // 128))
            data = one.data[first : first + rows]
            found.append(BlockScaledTensor(data, one.scales[blocks], fmt, K_MAJOR))
            first += rows
        return found

    streamed = prepare_experts(replace(grouped, choices=()), read, (), LOSSY, "cpu")
    for expert in range(EXPERTS):
        alone = prepare_weight(replace(single, choices=()), expert_of(whole, expert), (), LOSSY)
        found = expert_of(streamed, expert)
        assert (found.format, found.layout) == (alone.format, alone.layout)
        assert torch.equal(found.data.view(torch.uint8), alone.data.view(torch.uint8))
        assert torch.equal(bits(found.scales), bits(alone.scales))


def test_scales_found_to_be_powers_of_two_are_restated_without_loss() -> None:
    whole = stack(FP8_128X128_FP32, exponents=True)
    grouped = plan("deep_gemm", FP8_128X128_FP32, "sm_100", PowerOfTwo.YES)
    assert grouped.conversion is Conversion.RELAYOUT
    prepared = prepare_stack(replace(grouped, choices=()), whole, (), LOSSY)
    assert prepared.data.data_ptr() == whole.data.data_ptr()
    assert torch.equal(dequantize(prepared), dequantize(whole))


def test_requantizing_is_held_to_the_permitted_error_for_each_expert() -> None:
    grouped = plan("deep_gemm", FP8_128X128_FP32, "sm_100")
    strict = replace(LOSSY, max_relative_error=0.001)
    with pytest.raises(PlanError, match=r"above the limit of 0\.10%"):
        prepare_stack(replace(grouped, choices=()), stack(FP8_128X128_FP32), (), strict)


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ([(100, K), (220, K)], "a part of 220 rows starts at row 100"),
        ([(128, K)], "planned with 320 rows, got 128"),
        ([(320, K), (128, K)], "a part of 128 rows starts at row 320"),
        ([(320, 128)], "planned with K=256"),
    ],
    ids=["inside a block", "too few", "too many", "another K"],
)
def test_parts_that_do_not_fit_are_refused(parts: list[tuple[int, int]], words: str) -> None:
    weights = [quantize(torch.zeros(shape), FP8_128X128_FP32) for shape in parts]
    grouped = replace(plan("cpu", FP8_128X128_FP32, "cpu"), choices=())
    with pytest.raises(PlanError, match=words):
        prepare_experts(grouped, lambda _: weights, (), LOSSY, "cpu")


# Run in a process of its own: the largest resident set since the start of the preparation.
MEASURE = """
import json, sys
from dataclasses import replace
from pathlib import Path
import torch
from blockscale.backends.registry import BACKENDS, runnable_backend_named
from blockscale.formats import FP8_128X128_FP32, FP8_128X128_UE8M0, K_MAJOR, DType, PowerOfTwo
from blockscale.modules.prepare import prepare_experts
from blockscale.planning.device import Device
from blockscale.planning.planner import plan_linear
from blockscale.planning.policy import Exactness, PlanPolicy
from blockscale.planning.request import LinearRequest
from blockscale.tensor import BlockScaledTensor

backend, device, scales, experts, n, k = sys.argv[1:4] + [int(a) for a in sys.argv[4:]]
fmt = {"fp32": FP8_128X128_FP32, "ue8m0": FP8_128X128_UE8M0}[scales]
known = PowerOfTwo.YES if scales == "ue8m0" else PowerOfTwo.NO
policy = PlanPolicy((backend,), Exactness.ALLOW_LOSSY, 0.1)

def read(n, k):
    for half in range(2):
        codes = torch.full((n // 2, k), 0x30, dtype=torch.uint8).view(torch.float8_e4m3fn)
        ones = torch.ones(n // 2 // 128, k // 128)
        yield BlockScaledTensor(
            codes, ones if scales == "fp32" else ones.to(torch.float8_e8m0fnu), fmt, K_MAJOR
        )

def prepare(experts, n, k):
    request = LinearRequest("w13", n, k, fmt, DType.BFLOAT16, DType.BFLOAT16, known,
                            (n // 2, n // 2), experts=experts)
    plan = plan_linear(request, Device.named(device), policy, BACKENDS)
    # DeepGEMM's own preparation needs a GPU; the conversion before it does not.
    chosen = [runnable_backend_named("cpu")] if backend == "cpu" else []
    plan = plan if chosen else replace(plan, choices=())
    return prepare_experts(plan, lambda _: read(n, k), chosen, policy, "cpu")

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

prepare(2, 256, 128)
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
made = prepare(experts, n, k)
print(json.dumps({"extra": status("VmHWM") - before - made.nbytes, "result": made.nbytes}))
"""

MB = 1_000_000


@pytest.mark.parametrize(
    ("case", "experts", "n", "k"),
    [
        (("cpu", "cpu", "fp32"), 24, 4096, 2048),
        (("cpu", "cpu", "ue8m0"), 24, 4096, 2048),
        (("deep_gemm", "sm_100", "ue8m0"), 24, 4096, 2048),
        (("deep_gemm", "sm_100", "fp32"), 2, 4096, 4096),
    ],
    ids=["as stored", "restated", "packed", "requantized"],
)
def test_extra_memory_is_one_expert_and_64_mb(
    case: tuple[str, ...], experts: int, n: int, k: int
) -> None:
    """A second stack would take 200 MB; one expert requantized at once, 500 MB."""
    sizes = [str(size) for size in (experts, n, k)]
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, *case, *sizes], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert found["result"] >= experts * n * k
    assert found["extra"] <= n * k + 64 * MB
