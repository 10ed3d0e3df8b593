"""``restore_weight`` gives back what ``prepare_weight`` took, for every form a backend reads."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from blockscale.backends.registry import BACKENDS
from blockscale.errors import ModelError
from blockscale.formats import (
    FP8_32X32_UE8M0,
    FP8_128X128_FP32,
    FP8_128X128_UE8M0,
    K_MAJOR,
    SWIZZLED_32_4_4,
    BlockFormat,
    DType,
    PowerOfTwo,
    ScaleFormat,
)
from blockscale.modules.prepare import prepare_weight
from blockscale.modules.restore import restore_weight
from blockscale.planning.decision import OperandForm
from blockscale.planning.device import KNOWN_DEVICES
from blockscale.planning.plan import Conversion, LinearPlan
from blockscale.planning.planner import plan_linear
from blockscale.planning.policy import Exactness, PlanPolicy
from blockscale.planning.request import LinearRequest
from blockscale.reference import quantize
from blockscale.tensor import BlockScaledTensor

N, K = 384, 512


def weight_of(fmt: BlockFormat) -> BlockScaledTensor:
    return quantize(torch.randn(N, K, generator=torch.Generator().manual_seed(3)), fmt)


def prepared_by(plan: LinearPlan, weight: BlockScaledTensor) -> BlockScaledTensor:
    return prepare_weight(replace(plan, choices=()), weight, (), PlanPolicy(max_relative_error=1))


def assert_same(first: BlockScaledTensor, second: BlockScaledTensor) -> None:
    assert (first.format, first.layout) == (second.format, second.layout)
    assert torch.equal(first.data.view(torch.uint8), second.data.view(torch.uint8))
    assert torch.equal(first.scales.view(torch.uint8), second.scales.view(torch.uint8))


@pytest.mark.parametrize("fmt", [FP8_128X128_FP32, FP8_128X128_UE8M0, FP8_32X32_UE8M0], ids=str)
@pytest.mark.parametrize("device", KNOWN_DEVICES, ids=lambda device: device.name)
def test_every_planned_form_is_restored(fmt: BlockFormat, device: object) -> None:
    known = PowerOfTwo.NO if fmt.scale is ScaleFormat.FP32 else PowerOfTwo.YES
    request = LinearRequest("layer", N, K, fmt, DType.BFLOAT16, DType.BFLOAT16, known)
    tried = 0
    for backend in BACKENDS:
        plan = plan_linear(request, device, PlanPolicy(backends=(backend.name,)), BACKENDS)  # type: ignore[arg-type]
        if plan.is_servable:
            tried += 1
            assert_same(restore_weight(plan, prepared_by(plan, weight_of(fmt))), weight_of(fmt))
    assert tried


def test_refined_blocks_become_coarse_again() -> None:
    source, fine = FP8_128X128_UE8M0, FP8_32X32_UE8M0
    request = LinearRequest("layer", N, K, source, DType.BFLOAT16, DType.BFLOAT16, PowerOfTwo.YES)
    form = OperandForm(fine, SWIZZLED_32_4_4)
    plan = LinearPlan(request, (), form, Conversion.RELAYOUT, is_lossless=True, rejected=())
    assert_same(restore_weight(plan, prepared_by(plan, weight_of(source))), weight_of(source))


def test_bf16_scales_come_back_as_the_float32_they_became() -> None:
    weight = weight_of(FP8_128X128_FP32)
    rounded = weight.scales.to(torch.bfloat16)
    fmt = FP8_128X128_FP32.with_scale(ScaleFormat.BF16)
    stored = BlockScaledTensor(weight.data, rounded, fmt, K_MAJOR)
    request = LinearRequest("layer", N, K, fmt, DType.BFLOAT16, DType.BFLOAT16)
    form = OperandForm(FP8_128X128_FP32, K_MAJOR)
    plan = LinearPlan(request, (), form, Conversion.RELAYOUT, is_lossless=True, rejected=())
    restored = restore_weight(plan, prepared_by(plan, stored))
    assert torch.equal(restored.scales.to(torch.bfloat16), rounded)
    assert torch.equal(restored.scales, rounded.float())


def test_a_requantized_weight_is_gone() -> None:
    lossy = PlanPolicy(exactness=Exactness.ALLOW_LOSSY, backends=("deep_gemm",))
    request = LinearRequest(
        "layer", N, K, FP8_128X128_FP32, DType.BFLOAT16, DType.BFLOAT16, PowerOfTwo.NO
    )
    (sm_100,) = (device for device in KNOWN_DEVICES if device.name == "sm_100")
    plan = plan_linear(request, sm_100, lossy, BACKENDS)
    assert plan.conversion is Conversion.REQUANTIZE
    with pytest.raises(ModelError, match="requantized"):
        restore_weight(plan, prepared_by(plan, weight_of(FP8_128X128_FP32)))


def test_scales_that_differ_within_a_block_are_refused() -> None:
    request = LinearRequest(
        "layer", N, K, FP8_128X128_UE8M0, DType.BFLOAT16, DType.BFLOAT16, PowerOfTwo.YES
    )
    form = OperandForm(FP8_32X32_UE8M0, K_MAJOR)
    plan = LinearPlan(request, (), form, Conversion.RELAYOUT, is_lossless=True, rejected=())
    with pytest.raises(ModelError, match="scales differ within one 128x128 block"):
        restore_weight(plan, weight_of(FP8_32X32_UE8M0))
