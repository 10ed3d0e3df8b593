"""Every backend that runs here, through its own three methods.

Exactly where sums are exact, against float64 of the dequantized operands where they are not.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import pytest
import torch

pytest.importorskip("triton", reason="pip install triton: activations are quantized by it")

from blockscale.backends.registry import BACKENDS, runnable_backend_named
from blockscale.formats import (
    E4M3FN,
    FP8_1X128_FP32,
    FP8_128X128_FP32,
    K_MAJOR,
    MN_MAJOR_TMA_ALIGNED,
    BlockFormat,
    BlockShape,
    DType,
    ScaleFormat,
)
from blockscale.modules.prepare import prepare_weight
from blockscale.planning.decision import Obstacle
from blockscale.planning.planner import plan_linear
from blockscale.planning.policy import PlanPolicy
from blockscale.planning.request import LinearRequest
from blockscale.probe import cases
from blockscale.probe.machine import read_machine
from blockscale.reference import dequantize, quantize, relayout
from blockscale.tensor import BlockScaledTensor, torch_dtype

if TYPE_CHECKING:
    from blockscale.backends.base import Backend, Multiply
    from blockscale.planning.plan import LinearPlan

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
        reason="needs SM90 (H100, H200)",
    ),
]

BF16, FP16, FP32 = DType.BFLOAT16, DType.FLOAT16, DType.FLOAT32
OUTPUTS = {
    "triton": (BF16, FP16, FP32),
    "torch_scaled_mm": (BF16, FP16, FP32),
    "deep_gemm": (BF16,),
    "gluon": (BF16, FP16, FP32),
}
WHOLE = ((192, 256), (576, 512), (2112, 768), (64, 2304))
SHAPES = {
    "triton": (*WHOLE, (64, 128), (200, 300), (77, 130)),
    "torch_scaled_mm": (*WHOLE, (64, 128)),
    # DeepGEMM compiles for half a minute per shape.
    "deep_gemm": WHOLE[1:3],
    "gluon": (*WHOLE, (208, 304)),
}
TOKENS = (1, 7, 33, 128, 129, 600)
CASES = [(name, out) for name, outs in OUTPUTS.items() for out in outs]

# Relative Frobenius error against float64 of the dequantized operands, normal data. The first part
# is the tensor core's 13 fraction bits, summed in blocks of 128 (1.3e-4), the
# rest is the rounding of the result.
MAX_RELATIVE_ERROR = {FP32: 3e-4, FP16: 5e-4, BF16: 2.5e-3}
# One element's error, relative to the sum of its products' magnitudes (positive data: 7.7e-4), and
# to itself.
MAX_SUM_ERROR = 1.2e-3
ROUNDING = {FP32: 2.0**-23, FP16: 2.0**-11, BF16: 2.0**-8}


@dataclass(frozen=True, eq=False)
class Bound:
    """A backend with a weight it has prepared."""

    backend: Backend
    plan: LinearPlan
    weight: BlockScaledTensor
    multiply: Multiply

    def __call__(
        self,
        activation: BlockScaledTensor,
        out: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        self.multiply(activation, out, bias)
        return out

    def empty(self, m: int) -> torch.Tensor:
        dtype = torch_dtype(self.plan.request.out_dtype)
        return torch.full((m, self.plan.request.n), float("nan"), dtype=dtype, device="cuda")

    def quantized(self, values: torch.Tensor) -> BlockScaledTensor:
        return self.backend.quantize_activation(values, self.plan.choices[0].offer)


def bound(name: str, out: DType, weight: BlockScaledTensor) -> Bound:
    plan = planned(name, out, weight.mn, weight.k, weight.format)
    backend = runnable_backend_named(name)
    prepared = prepare_weight(plan, weight, (backend,), PlanPolicy())
    return Bound(backend, plan, weight, backend.bind(prepared, plan.choices[0].offer))


@cache
def planned(name: str, out: DType, n: int, k: int, fmt: BlockFormat) -> LinearPlan:
    request = LinearRequest("layer", n, k, fmt, out, out)
    plan = plan_linear(request, read_machine(), PlanPolicy(backends=(name,)), BACKENDS)
    missing = [r.reason for r in plan.rejected if r.obstacle is Obstacle.NOT_INSTALLED]
    if missing:
        pytest.skip("; ".join(missing))
    assert plan.is_servable, plan.rejected
    return plan


def exact(activation: BlockScaledTensor, weight: BlockScaledTensor) -> torch.Tensor:
    return dequantize(activation).double() @ dequantize(weight).double().T


@pytest.mark.parametrize(("name", "out"), CASES)
@pytest.mark.parametrize("make", [cases.fingerprint_weight, cases.integer_weight])
def test_whole_numbers_are_exact(name: str, out: DType, make: object) -> None:
    """A wrong scale, a lost block, a row too many: nothing of it can hide in a tolerance."""
    for n, k in SHAPES[name]:
        call = bound(name, out, make(n, k, FP8_128X128_FP32, "cuda"))
        form = call.plan.choices[0].offer.activation
        for m in TOKENS:
            activation = cases.exact_activation(m, k, form, torch_dtype(out), "cuda")
            found = call(activation, call.empty(m))
            wanted = exact(activation, call.weight).to(found.dtype)
            assert torch.equal(found, wanted), (n, k, m)


@pytest.mark.parametrize(("name", "out"), CASES)
def test_padding_of_activation_scales_does_not_matter(name: str, out: DType) -> None:
    n, k = SHAPES[name][1]
    call = bound(name, out, cases.integer_weight(n, k, FP8_128X128_FP32, "cuda"))
    form = call.plan.choices[0].offer.activation
    for m in (1, 7, 33):
        activation = cases.exact_activation(m, k, form, torch_dtype(out), "cuda")
        stored = form.layout.stored(m, k, form.format)
        memory = activation.scales.as_strided((stored.elements,), (1,)).view(-1, stored.strides[1])
        memory[:, m:] = float("nan")
        found = call(activation, call.empty(m))
        assert torch.equal(found, exact(activation, call.weight).to(found.dtype))


def test_padding_of_torchs_weight_scales_does_not_matter() -> None:
    n, k = 192, 768
    call = bound("torch_scaled_mm", FP32, cases.integer_weight(n, k, FP8_128X128_FP32, "cuda"))
    offer = call.plan.choices[0].offer
    prepared = relayout(call.weight, offer.weight.layout)
    prepared.scales[k // 128 :] = float("nan")
    again = Bound(call.backend, call.plan, call.weight, call.backend.bind(prepared, offer))
    activation = cases.exact_activation(33, k, offer.activation, torch.float32, "cuda")
    assert torch.equal(again(activation, call.empty(33)), exact(activation, call.weight).float())


@pytest.mark.parametrize(("name", "out"), CASES)
def test_nothing_beside_the_result_is_written(name: str, out: DType) -> None:
    n, k = SHAPES[name][0]
    call = bound(name, out, cases.integer_weight(n, k, FP8_128X128_FP32, "cuda"))
    form = call.plan.choices[0].offer.activation
    for m in (1, 7, 129):
        activation = cases.exact_activation(m, k, form, torch_dtype(out), "cuda")
        guard = 4096
        whole = torch.full((m * n + 2 * guard,), 7.0, dtype=torch_dtype(out), device="cuda")
        found = call(activation, whole[guard:-guard].view(m, n))
        assert torch.equal(found, exact(activation, call.weight).to(found.dtype))
        assert (whole[:guard] == 7).all()
        assert (whole[-guard:] == 7).all()


@pytest.mark.parametrize(("name", "out"), CASES)
def test_normal_data(name: str, out: DType) -> None:
    for n, k in SHAPES[name]:
        call = bound(name, out, cases.normal_weight(n, k, FP8_128X128_FP32, "cuda"))
        for m in TOKENS:
            values = cases.normal_activation(m, k, torch_dtype(out), "cuda")
            activation = call.quantized(values)
            found = call(activation, call.empty(m)).double()
            wanted = exact(activation, call.weight)
            error = float((found - wanted).norm() / wanted.norm())
            assert error <= MAX_RELATIVE_ERROR[out], (n, k, m, error)
            assert_each_element(found, activation, call, out)


@pytest.mark.parametrize(("name", "out"), CASES)
@pytest.mark.parametrize("kind", ["positive", "spread scales"])
def test_hard_data(name: str, out: DType, kind: str) -> None:
    """Positive data shows a missing promotion at once; scales that differ by 2**40 a wrong one."""
    n, k = (576, 512) if name == "deep_gemm" else (192, 7168)
    generator = torch.Generator().manual_seed(1)
    weight = quantize(torch.rand(n, k, generator=generator), FP8_128X128_FP32)
    values = torch.rand(65, k, generator=generator)
    if kind == "spread scales":
        exponents = torch.randint(-20, 21, weight.scales.shape, generator=generator)
        # A float16 result must not overflow.
        weight.scales.mul_(2.0 ** (exponents.float() - (20 if out is FP16 else 0)))
    call = bound(name, out, weight.to("cuda"))
    activation = call.quantized(values.to(torch_dtype(out)).cuda())
    found = call(activation, call.empty(65)).double()
    assert_each_element(found, activation, call, out)


def assert_each_element(
    found: torch.Tensor, activation: BlockScaledTensor, call: Bound, out: DType
) -> None:
    wanted = exact(activation, call.weight)
    magnitudes = dequantize(activation).double().abs() @ dequantize(call.weight).double().abs().T
    smallest = 2.0**-24 if out is FP16 else 0.0
    limit = MAX_SUM_ERROR * magnitudes + ROUNDING[out] * wanted.abs() + smallest
    assert ((found - wanted).abs() <= limit).all()


@pytest.mark.parametrize(("name", "out"), CASES)
def test_same_bits_on_every_run(name: str, out: DType) -> None:
    n, k = SHAPES[name][1]
    call = bound(name, out, cases.normal_weight(n, k, FP8_128X128_FP32, "cuda"))
    for m in (1, 33, 600):
        activation = call.quantized(cases.normal_activation(m, k, torch_dtype(out), "cuda"))
        first = call(activation, call.empty(m))
        for _ in range(20):
            assert torch.equal(call(activation, call.empty(m)), first)


@pytest.mark.parametrize(("name", "out"), CASES)
def test_bias(name: str, out: DType) -> None:
    """Our kernels add it before the one rounding, providers' results are rounded first."""
    n, k = SHAPES[name][1]
    call = bound(name, out, cases.integer_weight(n, k, FP8_128X128_FP32, "cuda"))
    form, dtype = call.plan.choices[0].offer.activation, torch_dtype(out)
    bias = (torch.arange(n, device="cuda") / 7).to(dtype)
    for m in (1, 33):
        activation = cases.exact_activation(m, k, form, dtype, "cuda")
        found = call(activation, call.empty(m), bias)
        product = exact(activation, call.weight)
        if name in {"triton", "gluon"}:
            wanted = (product.float() + bias.float()).to(dtype)
        else:
            wanted = product.to(dtype) + bias
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("block", [BlockShape(64, 128), BlockShape(32, 32)], ids=str)
def test_triton_takes_smaller_blocks(block: BlockShape) -> None:
    fmt = BlockFormat(E4M3FN, ScaleFormat.FP32, block)
    for n, k in ((192, 512), (200, 288)):
        call = bound("triton", FP32, cases.integer_weight(n, k, fmt, "cuda"))
        form = call.plan.choices[0].offer.activation
        for m in (1, 33, 300):
            activation = cases.exact_activation(m, k, form, torch.float32, "cuda")
            found = call(activation, call.empty(m))
            assert torch.equal(found, exact(activation, call.weight).float()), (n, k, m)


def test_a_weight_of_more_than_2_to_the_31_elements() -> None:
    from blockscale.kernels.triton.product import TritonProduct

    n, k, m = 300_032, 7168, 17
    codes = torch.ones((n, k), device="cuda", dtype=torch.uint8)
    last = cases.integer_weight(128, k, FP8_128X128_FP32, "cuda")
    codes[-128:] = last.data.view(torch.uint8)
    scales = torch.ones(FP8_128X128_FP32.block.grid(n, k), device="cuda")
    scales[-1:] = last.scales
    weight = BlockScaledTensor(codes.view(torch.float8_e4m3fn), scales, FP8_128X128_FP32, K_MAJOR)
    form = planned("triton", FP32, 128, k, FP8_128X128_FP32).choices[0].offer.activation
    activation = cases.exact_activation(m, k, form, torch.float32, "cuda")
    out = torch.empty((m, n), device="cuda")
    TritonProduct(weight)(activation, out, None)
    assert torch.equal(out[:, -128:], exact(activation, last).float())


def test_codes_whose_storage_ends_with_the_matrix_are_padded_for_torch() -> None:
    """An activation that another quantizer made has no spare rows behind it."""
    n, k = 192, 512
    call = bound("torch_scaled_mm", BF16, cases.normal_weight(n, k, FP8_128X128_FP32, "cuda"))
    values = cases.normal_activation(7, k, torch.bfloat16, "cuda")
    tight = relayout(quantize(values, FP8_1X128_FP32), MN_MAJOR_TMA_ALIGNED)
    assert torch.equal(call(tight, call.empty(7)), call(call.quantized(values), call.empty(7)))
