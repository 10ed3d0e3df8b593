"""Order of preference, and what a second prepared copy of a weight would cost."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest

from blockscale.backends.registry import BACKENDS
from blockscale.formats import (
    FP8_1X128_FP32,
    FP8_128X128_FP32,
    FP8_128X128_UE8M0,
    K_BY_MN,
    K_MAJOR,
    MN_MAJOR_TMA_ALIGNED_PACKED_PER_ROW,
    DType,
    PowerOfTwo,
)
from blockscale.planning.decision import MRange, Obstacle, Offer, OperandForm
from blockscale.planning.device import Device
from blockscale.planning.planner import plan_linear, plan_model
from blockscale.planning.policy import Exactness, PlanPolicy
from blockscale.planning.request import LinearRequest
from blockscale.planning.serialize import plan_document, plan_of_document

REQUEST = LinearRequest("layer", 256, 512, FP8_128X128_FP32, DType.BFLOAT16, DType.BFLOAT16)
H200 = Device.named("sm_90")
AS_STORED = OperandForm(FP8_128X128_FP32, K_MAJOR)
PACKED = OperandForm(FP8_128X128_UE8M0, MN_MAJOR_TMA_ALIGNED_PACKED_PER_ROW)


@dataclass(frozen=True)
class FewTokens:
    """An invented backend that serves up to 16 tokens from a weight in some form."""

    form: OperandForm
    name: str = "few_tokens"

    def evaluate(self, request: LinearRequest, device: Device) -> Offer:
        assert request.n
        assert device.name
        return Offer(self.name, self.form, OperandForm(FP8_1X128_FP32, K_MAJOR), MRange(1, 16))


@pytest.mark.parametrize(
    "order", [("gluon", "triton"), ("triton", "gluon"), ("reference", "deep_gemm", "gluon")]
)
def test_the_policys_order_is_the_order_of_preference(order: tuple[str, ...]) -> None:
    plan = plan_linear(REQUEST, H200, PlanPolicy(backends=order), BACKENDS)
    assert plan.backends == order[:1]
    outranked = [r for r in plan.rejected if r.obstacle is Obstacle.OUTRANKED]
    assert [rejection.backend for rejection in outranked] == list(order[1:])
    assert all(f"but {order[0]} comes earlier" in rejection.reason for rejection in outranked)


def test_the_registrys_order_holds_without_a_policy() -> None:
    plan = plan_linear(REQUEST, H200, PlanPolicy(), BACKENDS)
    outranked = [r.backend for r in plan.rejected if r.obstacle is Obstacle.OUTRANKED]
    names = [backend.name for backend in BACKENDS]
    assert [*plan.backends, *outranked] == [n for n in names if n in {*plan.backends, *outranked}]


def test_a_backend_named_twice_is_asked_once() -> None:
    twice = PlanPolicy(backends=("triton", "triton"))
    plan = plan_linear(REQUEST, H200, twice, BACKENDS)
    assert plan.backends == ("triton",)


def test_two_backends_on_one_weight_outrank_the_rest_together() -> None:
    policy = PlanPolicy(backends=("flashinfer_sm90", "triton", "reference"))
    plan = plan_linear(REQUEST, H200, policy, BACKENDS)
    assert plan.backends == ("flashinfer_sm90", "triton")
    (outranked,) = [r for r in plan.rejected if r.backend == "reference"]
    assert "flashinfer_sm90 and triton come earlier" in outranked.reason


def copy_cost(form: OperandForm, request: LinearRequest, policy: PlanPolicy) -> str:
    backends = [FewTokens(form), *BACKENDS]
    plan = plan_linear(request, H200, policy, backends)
    assert "few_tokens" not in plan.backends
    (rejection,) = [r for r in plan.rejected if r.backend == "few_tokens"]
    assert rejection.obstacle is Obstacle.WEIGHT_FORM
    return rejection.reason.rpartition("would cost ")[2]


def test_another_layout_costs_its_scales_only() -> None:
    """2 x 4 float32 scales; the codes are the same bytes."""
    assert copy_cost(OperandForm(FP8_128X128_FP32, K_BY_MN), REQUEST, PlanPolicy()) == "32 bytes"


def test_packed_powers_of_two_cost_their_scales_only() -> None:
    """One int32 for each of 256 rows: four exponents in a word."""
    known = replace(REQUEST, power_of_two=PowerOfTwo.YES)
    assert copy_cost(PACKED, known, PlanPolicy()) == "1024 bytes"


def test_a_requantized_copy_costs_the_codes_as_well() -> None:
    lossy = PlanPolicy(exactness=Exactness.ALLOW_LOSSY)
    other = replace(REQUEST, power_of_two=PowerOfTwo.NO)
    assert copy_cost(PACKED, other, lossy) == f"{1024 + 256 * 512} bytes"


def test_a_copy_of_experts_costs_as_many_times_more() -> None:
    experts = replace(REQUEST, experts=8)
    form = OperandForm(FP8_128X128_FP32, K_BY_MN)
    assert copy_cost(form, experts, PlanPolicy()) == f"{8 * 32} bytes"


def test_what_second_copies_of_all_layers_would_cost_is_a_finding() -> None:
    """Two layers, 2 x 4 float32 scales each; documents carry the number."""
    backends = [FewTokens(OperandForm(FP8_128X128_FP32, K_BY_MN)), *BACKENDS]
    layers = [replace(REQUEST, name=name) for name in ("first", "second")]
    plan = plan_model(layers, H200, PlanPolicy(), backends)
    (finding,) = [finding for finding in plan.findings if finding.code == "second_copy"]
    assert "few_tokens would serve some numbers of tokens in 2 layers" in finding.message
    assert "64 bytes" in finding.message
    rejections = plan_of_document(plan_document(plan)).layers[0].rejected
    assert [r.copy_bytes for r in rejections if r.backend == "few_tokens"] == [32]


def test_a_plan_without_other_forms_speaks_of_no_second_copies() -> None:
    plan = plan_model([REQUEST], H200, PlanPolicy(), BACKENDS)
    assert "second_copy" not in {finding.code for finding in plan.findings}
