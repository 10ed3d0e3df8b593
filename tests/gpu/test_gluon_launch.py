"""Calling the Gluon kernels, beyond ``test_hopper_launch``: tickets, launchers, descriptors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

pytest.importorskip("triton", reason="the Gluon kernels need Triton 3.6")

from blockscale.formats import (
    FP8_1X128_FP32,
    FP8_128X128_FP32,
    MN_MAJOR_TMA_ALIGNED,
)
from blockscale.kernels.gluon import launch
from blockscale.kernels.gluon.descriptor import promote
from blockscale.kernels.gluon.product import STREAMS, GluonProduct
from blockscale.reference import quantize, relayout

if TYPE_CHECKING:
    from blockscale.tensor import BlockScaledTensor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
        reason="the Gluon kernels run on SM90 (H100, H200)",
    ),
]

N, K = 576, 7168


def weight() -> BlockScaledTensor:
    torch.manual_seed(N)
    return quantize(torch.randn(N, K, device="cuda"), FP8_128X128_FP32)


def activation(m: int) -> BlockScaledTensor:
    torch.manual_seed(m)
    values = torch.randn(m, K, device="cuda")
    return relayout(quantize(values, FP8_1X128_FP32), MN_MAJOR_TMA_ALIGNED)


def call(product: GluonProduct, operand: BlockScaledTensor) -> torch.Tensor:
    out = torch.full((operand.mn, N), float("nan"), dtype=torch.bfloat16, device="cuda")
    product(operand, out, None)
    return out


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
