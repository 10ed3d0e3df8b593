"""FlashInfer's SM90 GEMM on a real GPU: ``tools/flashinfer_wheels.py`` makes what it needs."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch

pytest.importorskip("triton", reason="pip install triton: activations are quantized by it")
pytest.importorskip("flashinfer", reason="pip install flashinfer-python")

from blockscale.backends.registry import runnable_backend_named
from blockscale.formats import FP8_128X128_FP32, DType
from blockscale.modules.linear import BlockScaledLinear
from blockscale.planning.device import Proof, Verdict
from blockscale.planning.planner import plan_linear
from blockscale.planning.policy import PlanPolicy
from blockscale.planning.request import LinearRequest
from blockscale.probe import cases
from blockscale.probe.checks import check_item, plan_of
from blockscale.probe.items import Item
from blockscale.probe.machine import read_machine
from blockscale.reference import dequantize

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
        reason="needs SM90 (H100, H200)",
    ),
]

NAME, BF16 = "flashinfer_sm90", DType.BFLOAT16
# FlashInfer compiles for each.
SHAPES = ((192, 256), (576, 512), (2112, 768))
TOKENS = (1, 2, 7, 8, 15, 16, 17, 24, 31)


def bound(n: int, k: int, make: Callable[..., object]) -> tuple[object, object, object]:
    """Its product with a weight, that weight, and the offer."""
    backend = runnable_backend_named(NAME)
    plan = plan_of(backend, read_machine(), Item(BF16, n, k))
    assert plan is not None
    offer = plan.choices[0].offer
    weight = make(n, k, FP8_128X128_FP32, "cuda")
    return backend.bind(backend.prepare(weight, offer), offer), weight, offer


@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("make", [cases.fingerprint_weight, cases.integer_weight])
def test_whole_numbers_are_exact_and_nothing_else_is_written(
    n: int, k: int, make: Callable[..., object]
) -> None:
    multiply, weight, offer = bound(n, k, make)
    for m in TOKENS:
        activation = cases.exact_activation(m, k, offer.activation, torch.bfloat16, "cuda")
        # Padding of the scales' columns is any bits.
        stored = offer.activation.layout.stored(m, k, offer.activation.format)
        memory = activation.scales.as_strided((stored.elements,), (1,)).view(-1, stored.strides[1])
        memory[:, m:] = float("nan")
        whole = torch.full((m * n + 8192,), 7.0, dtype=torch.bfloat16, device="cuda")
        out = whole[4096:-4096].view(m, n)
        multiply(activation, out, None)
        wanted = dequantize(activation).double() @ dequantize(weight).double().T
        assert torch.equal(out, wanted.to(torch.bfloat16)), m
        assert (whole[:4096] == 7).all()
        assert (whole[-4096:] == 7).all()


def test_the_probe_proves_it() -> None:
    outcome = check_item(runnable_backend_named(NAME), read_machine(), Item(BF16, 576, 512))
    assert outcome.shapes == 1


def test_a_layer_planned_with_it_replays_in_a_graph() -> None:
    """Few tokens by it, others by Triton, on one prepared weight; ahead of the capture."""
    proof = Proof(NAME, BF16, Verdict.PROVEN, "by this file")
    device = replace(read_machine(), proofs=(proof,))
    request = LinearRequest("layer", 576, 512, FP8_128X128_FP32, BF16, BF16)
    backends = tuple(map(runnable_backend_named, (NAME, "triton")))
    policy = PlanPolicy(backends=(NAME, "triton"))
    plan = plan_linear(request, device, policy, backends)
    assert plan.backends == (NAME, "triton")
    layer = BlockScaledLinear(plan, cases.normal_weight(576, 512, FP8_128X128_FP32, "cuda"))
    values = cases.normal_activation(7, 512, torch.bfloat16, "cuda")
    eager = layer(values)
    static = values.clone()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = layer(static)
    static.copy_(values * 2)
    graph.replay()
    torch.cuda.synchronize()
    # Twice the values are the same codes with twice the scales.
    assert torch.equal(replayed, eager * 2)
