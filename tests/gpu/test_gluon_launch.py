"""Calling the Gluon kernels: graphs, streams, new weights, refusals, the backend's own path."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="the Gluon kernels need Triton 3.6")

from blockscale.backends.gluon import Gluon
from blockscale.errors import BackendError
from blockscale.formats import (
    FP8_1X128_FP32,
    FP8_128X128_FP32,
    K_MAJOR,
    MN_MAJOR_TMA_ALIGNED,
)
from blockscale.kernels.gluon import launch
from blockscale.kernels.gluon.descriptor import promote
from blockscale.kernels.gluon.product import STREAMS, GluonProduct
from blockscale.planning.decision import Offer, OperandForm
from blockscale.reference import block_scaled_matmul, quantize, relayout
from blockscale.tensor import BlockScaledTensor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
        reason="the Gluon kernels run on SM90 (H100, H200)",
    ),
]

N, K = 576, 7168
OFFER = Offer(
    "gluon",
    OperandForm(FP8_128X128_FP32, K_MAJOR),
    OperandForm(FP8_1X128_FP32, MN_MAJOR_TMA_ALIGNED),
)


def weight(n: int = N, k: int = K) -> BlockScaledTensor:
    torch.manual_seed(n)
    return quantize(torch.randn(n, k, device="cuda"), FP8_128X128_FP32)


def activation(m: int, k: int = K) -> BlockScaledTensor:
    torch.manual_seed(m)
    values = torch.randn(m, k, device="cuda")
    return relayout(quantize(values, FP8_1X128_FP32), MN_MAJOR_TMA_ALIGNED)


def call(product: GluonProduct, operand: BlockScaledTensor, n: int = N) -> torch.Tensor:
    out = torch.full((operand.mn, n), float("nan"), dtype=torch.bfloat16, device="cuda")
    product(operand, out, None)
    return out


def assert_close(out: torch.Tensor, a: BlockScaledTensor, b: BlockScaledTensor) -> None:
    """Near the float64 product; other tests ask for more."""
    expected = block_scaled_matmul(a, b, torch.float64)
    assert (out.double() - expected).norm() <= 2.5e-3 * expected.norm()


@pytest.mark.parametrize("m", [4, 100, 300])
def test_a_captured_graph_serves_new_values_in_the_same_storages(m: int) -> None:
    b, a = weight(), activation(m)
    product = GluonProduct(b)
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


def test_capturing_first_thing_on_a_new_stream_works() -> None:
    b, a = weight(), activation(4)
    product = GluonProduct(b)
    expected = call(product, a)
    for _ in range(STREAMS + 3):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            call(product, a)
        torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
        out = call(product, a)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, expected)


def test_tickets_of_new_streams_lie_outside_the_pool_of_a_graph_that_warms_up() -> None:
    product, a = GluonProduct(weight()), activation(4)
    pool = torch.cuda.MemPool()
    with torch.cuda.use_mem_pool(pool):
        for _ in range(STREAMS + 3):
            with torch.cuda.stream(torch.cuda.Stream()):
                call(product, a)
    torch.cuda.synchronize()
    blocks = [block for segment in pool.snapshot() for block in segment["blocks"]]
    assert blocks
    assert not [block for block in blocks if block["state"] == "active_allocated"]


@pytest.mark.parametrize("m", [4, 100])
def test_split_sums_on_two_streams_at_once_do_not_mix(m: int) -> None:
    b = weight()
    product = GluonProduct(b)
    operands = [activation(m), activation(m + 1)]
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
def test_overlapping_launches_give_the_same_bits(m: int) -> None:
    """Each launch reads what the one before it wrote: too early a start would show."""
    b = quantize(torch.randn(512, 512, device="cuda"), FP8_128X128_FP32)
    results = []
    for overlap in (False, True):
        product = GluonProduct(b, overlap=overlap)
        a = activation(m, 512)
        out = torch.zeros((m, 512), dtype=torch.bfloat16, device="cuda")
        for _ in range(20):
            product(a, out, None)
            # The next operand is made of this result by a kernel that is launched without overlap,
            # and read by one that is launched with it.
            a.data.copy_(out.clamp(-4, 4).to(torch.float8_e4m3fn))
        results.append(out.clone())
    assert torch.equal(*results)


def test_backend_path_from_floats_to_result() -> None:
    backend = Gluon()
    prepared = backend.prepare(weight(), OFFER)
    multiply = backend.bind(prepared, OFFER)
    for m in (1, 17, 200):
        values = torch.randn(m, K, device="cuda", dtype=torch.float16)
        quantized = backend.quantize_activation(values, OFFER)
        out = torch.empty((m, N), dtype=torch.float16, device="cuda")
        multiply(quantized, out, None)
        assert_close(out, quantized, prepared)


def test_operands_that_tma_cannot_reach_are_refused() -> None:
    product = GluonProduct(weight())
    a = activation(4)
    memory = torch.empty(4 * N + 1, dtype=torch.bfloat16, device="cuda")
    with pytest.raises(BackendError, match="16 bytes"):
        product(a, memory[1:].view(4, N), None)
    with pytest.raises(BackendError, match="16 bytes"):
        product(activation(100), torch.empty(100 * N + 1, device="cuda")[1:].view(100, N), None)


def test_a_weight_that_tma_cannot_reach_is_refused_at_prepare() -> None:
    odd = torch.zeros((128, 136), device="cuda").to(torch.float8_e4m3fn)
    scales = torch.ones((1, 2), device="cuda")
    with pytest.raises(BackendError, match="16 bytes"):
        Gluon().prepare(BlockScaledTensor(odd, scales, FP8_128X128_FP32, K_MAJOR), OFFER)


def test_tritons_public_launcher_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """What other releases than 3.6 go through."""
    b = weight()
    direct = [call(GluonProduct(b), activation(m)) for m in (4, 100)]
    launch.launcher.cache_clear()
    monkeypatch.setattr(launch, "_c_function", lambda run: None)  # noqa: ARG005 - its signature
    public = [call(GluonProduct(b), activation(m)) for m in (4, 100)]
    launch.launcher.cache_clear()
    assert all(torch.equal(*pair) for pair in zip(direct, public, strict=True))


def test_descriptors_of_codes_promote_to_256_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []

    def spied(*arguments: Any) -> bool:
        found.append(promote(*arguments))
        return found[-1]

    launch.launcher.cache_clear()
    monkeypatch.setattr(launch, "promote", spied)
    call(GluonProduct(weight()), activation(100))
    launch.launcher.cache_clear()
    assert found
    assert all(found)
