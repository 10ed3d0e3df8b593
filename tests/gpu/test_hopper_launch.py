"""Calling either Hopper family: graphs, streams, overlap, refusals, the backend's own path."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

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
from blockscale.reference import block_scaled_matmul, quantize, relayout
from blockscale.tensor import BlockScaledTensor

if TYPE_CHECKING:
    from collections.abc import Callable

    from blockscale.kernels.cuda.product import CudaProduct
    from blockscale.kernels.gluon.product import GluonProduct

    Product: TypeAlias = CudaProduct | GluonProduct

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
        reason="both families run on SM90 (H100, H200)",
    ),
]

N = 576


@dataclass(frozen=True, slots=True)
class Family:
    """``k``: long enough that Gluon splits sums."""

    backend: Any
    product: Callable[..., Product]
    k: int

    @property
    def offer(self) -> Offer:
        return Offer(
            self.backend.name,
            OperandForm(FP8_128X128_FP32, K_MAJOR),
            OperandForm(FP8_1X128_FP32, MN_MAJOR_TMA_ALIGNED),
        )

    def weight(self) -> BlockScaledTensor:
        torch.manual_seed(N)
        return quantize(torch.randn(N, self.k, device="cuda"), FP8_128X128_FP32)

    def activation(self, m: int) -> BlockScaledTensor:
        return activation(m, self.k)


@pytest.fixture(params=["gluon", "cuda"])
def family(request: pytest.FixtureRequest) -> Family:
    if request.param == "cuda":
        from blockscale.backends.cuda import Cuda
        from blockscale.kernels.cuda.product import CudaProduct

        return Family(Cuda(), CudaProduct, 1024)
    pytest.importorskip("triton", reason="the Gluon kernels need Triton 3.6")
    from blockscale.backends.gluon import Gluon
    from blockscale.kernels.gluon.product import GluonProduct

    return Family(Gluon(), GluonProduct, 7168)


def activation(m: int, k: int) -> BlockScaledTensor:
    torch.manual_seed(m)
    values = torch.randn(m, k, device="cuda")
    return relayout(quantize(values, FP8_1X128_FP32), MN_MAJOR_TMA_ALIGNED)


def call(product: Product, operand: BlockScaledTensor) -> torch.Tensor:
    out = torch.full((operand.mn, N), float("nan"), dtype=torch.bfloat16, device="cuda")
    product(operand, out, None)
    return out


def assert_close(out: torch.Tensor, a: BlockScaledTensor, b: BlockScaledTensor) -> None:
    """Near the float64 product; ``test_gluon_error`` and ``test_cuda_error`` ask for more."""
    expected = block_scaled_matmul(a, b, torch.float64)
    assert (out.double() - expected).norm() <= 2.5e-3 * expected.norm()


@pytest.mark.parametrize("m", [4, 100, 300])
def test_a_captured_graph_serves_new_values_in_the_same_storages(family: Family, m: int) -> None:
    b, a = family.weight(), family.activation(m)
    product = family.product(b)
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


@pytest.mark.parametrize("m", [4, 100])
def test_calls_on_two_streams_at_once_do_not_mix(family: Family, m: int) -> None:
    """Of Gluon's, split sums and their tickets too."""
    product = family.product(family.weight())
    operands = [family.activation(m), family.activation(m + 1)]
    expected = [call(product, a) for a in operands]
    streams = [torch.cuda.Stream() for _ in operands]
    torch.cuda.synchronize()
    results: list[list[torch.Tensor]] = [[], []]
    for _ in range(50):
        for number, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                results[number].append(call(product, operands[number]))
    torch.cuda.synchronize()
    for found, right in zip(results, expected, strict=True):
        assert all(torch.equal(result, right) for result in found)


@pytest.mark.parametrize("m", [1, 64, 65, 300])
def test_overlapping_launches_give_the_same_bits(family: Family, m: int) -> None:
    """Each launch reads what the one before it wrote: too early a start would show."""
    b = quantize(torch.randn(512, 512, device="cuda"), FP8_128X128_FP32)
    results = []
    for overlap in (False, True):
        product = family.product(b, overlap=overlap)
        a = activation(m, 512)
        out = torch.zeros((m, 512), dtype=torch.bfloat16, device="cuda")
        for _ in range(20):
            product(a, out, None)
            # The next operand is made of this result by a kernel that is launched without overlap,
            # and read by one that is launched with it.
            a.data.copy_(out.clamp(-4, 4).to(torch.float8_e4m3fn))
        results.append(out.clone())
    assert torch.equal(*results)


def test_the_same_bits_on_every_run(family: Family) -> None:
    product, a = family.product(family.weight()), family.activation(200)
    first = call(product, a)
    assert all(torch.equal(call(product, a), first) for _ in range(50))


def test_backend_path_from_floats_to_result(family: Family) -> None:
    pytest.importorskip("triton", reason="the quantizer needs Triton")
    backend, offer = family.backend, family.offer
    prepared = backend.prepare(family.weight(), offer)
    multiply = backend.bind(prepared, offer)
    for m in (1, 17, 200):
        values = torch.randn(m, family.k, device="cuda", dtype=torch.float16)
        quantized = backend.quantize_activation(values, offer)
        out = torch.empty((m, N), dtype=torch.float16, device="cuda")
        multiply(quantized, out, None)
        assert_close(out, quantized, prepared)


def test_operands_that_tma_cannot_reach_are_refused(family: Family) -> None:
    product = family.product(family.weight())
    for m, dtype in ((4, torch.bfloat16), (100, torch.float32)):
        memory = torch.empty(m * N + 1, dtype=dtype, device="cuda")
        with pytest.raises(BackendError, match="16 bytes"):
            product(family.activation(m), memory[1:].view(m, N), None)


def test_a_weight_that_tma_cannot_reach_is_refused_at_prepare(family: Family) -> None:
    odd = torch.zeros((128, 136), device="cuda").to(torch.float8_e4m3fn)
    scales = torch.ones((1, 2), device="cuda")
    with pytest.raises(BackendError, match="16 bytes"):
        family.backend.prepare(
            BlockScaledTensor(odd, scales, FP8_128X128_FP32, K_MAJOR), family.offer
        )
