"""The one call that a planned layer makes gives the bits of its backend's two calls."""

from __future__ import annotations

import pytest
import torch

from blockscale.backends.registry import BACKENDS
from blockscale.backends.triton import Triton
from blockscale.formats import FP8_128X128_FP32, DType
from blockscale.planning.device import Device
from blockscale.planning.planner import plan_linear
from blockscale.planning.policy import PlanPolicy
from blockscale.planning.request import LinearRequest
from blockscale.reference import quantize

pytest.importorskip("triton", reason="pip install triton")

N, K = 80, 200


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(("m", "row_stride"), [(1, K), (3, K), (5, K + 8), (5, K + 1)])
def test_a_step_gives_the_bits_of_both_calls(m: int, row_stride: int, *, has_bias: bool) -> None:
    request = LinearRequest("layer", N, K, FP8_128X128_FP32, DType.BFLOAT16, DType.FLOAT16)
    device = Device.named("sm_90").with_packages(("triton", "3.6.0"))
    plan = plan_linear(request, device, PlanPolicy(backends=("triton",)), BACKENDS)
    offer, backend = plan.choices[0].offer, Triton()
    generator = torch.Generator().manual_seed(0)
    weight = quantize(torch.randn(N, K, generator=generator), FP8_128X128_FP32)
    x = torch.randn(m, row_stride, generator=generator).bfloat16()[:, :K]
    bias = torch.randn(N, generator=generator).half() if has_bias else None
    wanted, found = torch.full((2, m, N), float("nan"), dtype=torch.float16)
    backend.bind(weight, offer)(backend.quantize_activation(x, offer), wanted, bias)  # type: ignore[arg-type]  # the union of two calls
    step = backend.bind_steps(weight, offer, (torch.bfloat16, torch.float16))(m)
    step(x, row_stride, found, bias)
    assert torch.equal(found, wanted)
    assert not found.isnan().any()
