"""Calling ``gemm.cu``: accuracy, graphs, streams, overlap, refusals, the backend's own path."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from blockscale.errors import BackendError
from blockscale.formats import (
    FP8_1X128_FP32,
    FP8_128X128_FP32,
    K_MAJOR,
    MN_MAJOR_TMA_ALIGNED,
)
from blockscale.planning.decision import Offer, OperandForm
from blockscale.reference import block_scaled_matmul, dequantize, quantize, relayout
from blockscale.tensor import BlockScaledTensor

if TYPE_CHECKING:
    from blockscale.kernels.cuda.product import CudaProduct

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
        reason="gemm.cu runs on SM90 (H100, H200)",
    ),
]

N, K = 576, 1024
OFFER = Offer(
    "cuda",
    OperandForm(FP8_128X128_FP32, K_MAJOR),
    OperandForm(FP8_1X128_FP32, MN_MAJOR_TMA_ALIGNED),
)
# facts/kernels.md 8, as in test_gluon_error.py.
RELATIVE = {torch.float32: 3e-4, torch.float16: 4e-4, torch.bfloat16: 2.5e-3}
TRUNCATION, SMALLEST = 1.2e-3, 2.0**-25
ROUNDING = {torch.float32: 2.0**-22, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def weight(n: int = N, k: int = K) -> BlockScaledTensor:
    torch.manual_seed(n)
    return quantize(torch.randn(n, k, device="cuda"), FP8_128X128_FP32)


def activation(m: int, k: int = K) -> BlockScaledTensor:
    torch.manual_seed(m)
    values = torch.randn(m, k, device="cuda")
    return relayout(quantize(values, FP8_1X128_FP32), MN_MAJOR_TMA_ALIGNED)


def product_of(operand: BlockScaledTensor, *, overlap: bool = True) -> CudaProduct:
    from blockscale.kernels.cuda.product import CudaProduct

    return CudaProduct(operand, overlap=overlap)


def call(product: CudaProduct, operand: BlockScaledTensor, n: int = N) -> torch.Tensor:
    out = torch.full((operand.mn, n), float("nan"), dtype=torch.bfloat16, device="cuda")
    product(operand, out, None)
    return out


def assert_close(out: torch.Tensor, a: BlockScaledTensor, b: BlockScaledTensor) -> None:
    """Near the float64 product; ``test_error_against_float64`` asks for more."""
    expected = block_scaled_matmul(a, b, torch.float64)
    assert (out.double() - expected).norm() <= 2.5e-3 * expected.norm()


@pytest.mark.parametrize("dtype", RELATIVE, ids=str)
@pytest.mark.parametrize("shape", [(1, 512, 7168), (128, 576, 7168), (300, 4096, 1024)], ids=str)
@pytest.mark.parametrize("kind", ["normal", "positive"])
def test_error_against_float64(kind: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    m, n, k = shape
    torch.manual_seed(m + n + k)
    make = torch.randn if kind == "normal" else torch.rand
    a = relayout(quantize(make(m, k, device="cuda"), FP8_1X128_FP32), MN_MAJOR_TMA_ALIGNED)
    b = quantize(make(n, k, device="cuda"), FP8_128X128_FP32)
    expected = block_scaled_matmul(a, b, torch.float64)
    out = torch.full((m, n), float("nan"), dtype=dtype, device="cuda")
    product_of(b)(a, out, None)
    error = (out.double() - expected).abs()
    magnitudes = dequantize(a).double().abs() @ dequantize(b).double().abs().T
    limit = TRUNCATION * magnitudes + ROUNDING[dtype] * expected.abs() + SMALLEST
    assert (error <= limit).all()
    if kind == "normal":
        assert error.norm() <= RELATIVE[dtype] * expected.norm()


@pytest.mark.parametrize("m", [4, 100, 300])
def test_a_captured_graph_serves_new_values_in_the_same_storages(m: int) -> None:
    b, a = weight(), activation(m)
    product = product_of(b)
    call(product, a)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(product, a)
    for factor in (1.0, 2.0, 3.0):
        a.scales.mul_(factor)
        b.scales.mul_(0.5)
        for _ in range(3):
            graph.replay()
        torch.cuda.synchronize()
        assert_close(out, a, b)
        assert torch.equal(out, call(product, a))


def test_calls_on_two_streams_at_once_do_not_mix() -> None:
    product = product_of(weight())
    operands = [activation(100), activation(101)]
    expected = [call(product, a) for a in operands]
    streams = [torch.cuda.Stream() for _ in operands]
    torch.cuda.synchronize()
    results: list[list[torch.Tensor]] = [[], []]
    for _ in range(20):
        for number, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                results[number].append(call(product, operands[number]))
    torch.cuda.synchronize()
    for found, right in zip(results, expected, strict=True):
        assert all(torch.equal(result, right) for result in found)


@pytest.mark.parametrize("m", [1, 64, 65, 300])
def test_overlapping_launches_give_the_same_bits(m: int) -> None:
    """Each launch reads what the one before it wrote: too early a start would show."""
    b = quantize(torch.randn(512, 512, device="cuda"), FP8_128X128_FP32)
    results = []
    for overlap in (False, True):
        product = product_of(b, overlap=overlap)
        a = activation(m, 512)
        out = torch.zeros((m, 512), dtype=torch.bfloat16, device="cuda")
        for _ in range(10):
            product(a, out, None)
            a.data.copy_(out.clamp(-4, 4).to(torch.float8_e4m3fn))
        results.append(out.clone())
    assert torch.equal(*results)


def test_the_same_bits_on_every_run() -> None:
    product, a = product_of(weight()), activation(200)
    first = call(product, a)
    assert all(torch.equal(call(product, a), first) for _ in range(50))


def test_backend_path_from_floats_to_result() -> None:
    pytest.importorskip("triton", reason="the quantizer needs Triton")
    from blockscale.backends.cuda import Cuda

    backend = Cuda()
    prepared = backend.prepare(weight(), OFFER)
    multiply = backend.bind(prepared, OFFER)
    for m in (1, 17, 200):
        values = torch.randn(m, K, device="cuda", dtype=torch.float16)
        quantized = backend.quantize_activation(values, OFFER)
        out = torch.empty((m, N), dtype=torch.float16, device="cuda")
        multiply(quantized, out, None)
        assert_close(out, quantized, prepared)


def test_operands_that_tma_cannot_reach_are_refused() -> None:
    product = product_of(weight())
    memory = torch.empty(4 * N + 1, dtype=torch.bfloat16, device="cuda")
    with pytest.raises(BackendError, match="16 bytes"):
        product(activation(4), memory[1:].view(4, N), None)


def test_a_weight_that_tma_cannot_reach_is_refused_at_prepare() -> None:
    from blockscale.backends.cuda import Cuda

    odd = torch.zeros((128, 136), device="cuda").to(torch.float8_e4m3fn)
    scales = torch.ones((1, 2), device="cuda")
    with pytest.raises(BackendError, match="16 bytes"):
        Cuda().prepare(BlockScaledTensor(odd, scales, FP8_128X128_FP32, K_MAJOR), OFFER)
