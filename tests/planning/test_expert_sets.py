"""One decision for the weights of one set of experts."""

from __future__ import annotations

from dataclasses import replace

import pytest

from blockscale.errors import PlanError
from blockscale.formats import FP8_128X128_FP32, FP8_128X128_UE8M0, K_MAJOR, DType, PowerOfTwo
from blockscale.planning.decision import (
    Arrangement,
    GroupedRows,
    MRange,
    Obstacle,
    Offer,
    OperandForm,
    Readiness,
    Rejection,
)
from blockscale.planning.device import Device
from blockscale.planning.expert_sets import expert_sets
from blockscale.planning.planner import plan_experts, plan_model
from blockscale.planning.policy import PlanPolicy, Strictness
from blockscale.planning.request import LinearRequest

W13 = LinearRequest(
    "model.layers.0.experts.w13",
    3072,
    2048,
    FP8_128X128_FP32,
    DType.BFLOAT16,
    DType.BFLOAT16,
    PowerOfTwo.NO,
    experts=8,
)
W2 = replace(W13, name="model.layers.0.experts.w2", n=2048, k=1536, parts=())
DENSE = replace(W13, name="model.layers.0.o_proj", experts=None)
CPU = Device.named("cpu")
ANY = (GroupedRows(MRange(), Arrangement.CONTIGUOUS, 128),)


class Backend:
    """Offers everything but what ``refuses`` says; ``serves`` gives the range of each K."""

    def __init__(
        self, name: str, refuses: tuple[int, ...] = (), serves: dict[int, MRange] | None = None
    ) -> None:
        self.name, self.refuses, self.serves = name, refuses, serves or {}

    def evaluate(self, request: LinearRequest, device: Device) -> Offer | list[Rejection]:  # noqa: ARG002
        if request.k in self.refuses:
            return [Rejection(self.name, Obstacle.ALIGNMENT, f"no K={request.k}")]
        m_range = self.serves.get(request.k, MRange())
        form = OperandForm(request.format, K_MAJOR)
        return Offer(self.name, form, None, m_range, readiness=Readiness.RUNNABLE, rows=ANY)


def test_a_backend_that_cannot_run_one_weight_gets_neither() -> None:
    backends = [Backend("fast", refuses=(1536,)), Backend("slow")]
    w13, w2 = plan_experts([W13, W2], CPU, PlanPolicy(), backends)
    assert w13.backends == w2.backends == ("slow",)
    assert [(r.obstacle, r.backend) for r in w13.rejected] == [(Obstacle.EXPERT_SET, "fast")]
    assert "N=2048 K=1536" in w13.rejected[0].reason
    assert [r.obstacle for r in w2.rejected] == [Obstacle.ALIGNMENT]


def test_a_backend_that_serves_the_weights_for_other_tokens_gets_neither() -> None:
    few = {2048: MRange(0, 64), 1536: MRange(0, 32)}
    plans = plan_experts([W13, W2], CPU, PlanPolicy(), [Backend("few", serves=few), Backend("all")])
    for plan in plans:
        assert plan.backends == ("all",)
        assert [r.obstacle for r in plan.rejected] == [Obstacle.EXPERT_SET]


def test_a_specialist_for_few_tokens_takes_them_for_both() -> None:
    few = dict.fromkeys((2048, 1536), MRange(0, 64))
    plans = plan_experts([W13, W2], CPU, PlanPolicy(), [Backend("few", serves=few), Backend("all")])
    for plan in plans:
        assert [(c.offer.backend, c.m_range.max_m) for c in plan.choices] == [
            ("few", 64),
            ("all", None),
        ]


def test_no_backend_for_one_is_no_backend_for_both() -> None:
    only = [Backend("fast", refuses=(2048,))]
    assert not any(plan.is_servable for plan in plan_experts([W13, W2], CPU, PlanPolicy(), only))
    with pytest.raises(PlanError, match="experts' other weight"):
        plan_experts([W2, W13], CPU, PlanPolicy(strictness=Strictness.RAISE), only)


def test_sets_are_told_by_name_number_and_dtype() -> None:
    other_layer = replace(W13, name="model.layers.1.experts.w13")
    shared = replace(W2, name="model.layers.0.experts.shared", experts=1)
    sets = expert_sets([W13, DENSE, other_layer, W2, shared])
    assert sets == ((W13, W2), (DENSE,), (other_layer,), (shared,))


def test_a_model_keeps_the_order_of_its_layers_and_decides_sets_once() -> None:
    second = [replace(r, name=r.name.replace("layers.0", "layers.1")) for r in (W13, W2)]
    asked = [W13, DENSE, W2, *second]
    backends = [Backend("fast", refuses=(1536,)), Backend("slow")]
    plan = plan_model(asked, CPU, PlanPolicy(), backends)
    assert [layer.request for layer in plan.layers] == asked
    assert [layer.backends[0] for layer in plan.layers] == ["slow", "fast", "slow", "slow", "slow"]


def test_scales_that_are_unread_in_one_weight_keep_the_backend_from_both() -> None:
    """A set with w13 unread and w2 known: reading would change both, and the finding says so."""

    class Ue8m0(Backend):
        def evaluate(self, request: LinearRequest, device: Device) -> Offer | list[Rejection]:
            offer = super().evaluate(request, device)
            assert isinstance(offer, Offer)
            return replace(offer, weight=OperandForm(FP8_128X128_UE8M0, K_MAJOR))

    unread = replace(W13, power_of_two=PowerOfTwo.UNKNOWN)
    known = replace(W2, power_of_two=PowerOfTwo.YES)
    plan = plan_model([unread, known], CPU, PlanPolicy(), [Ue8m0("exponents"), Backend("any")])
    assert [layer.backends for layer in plan.layers] == [("any",), ("any",)]
    found = [finding.message for finding in plan.findings]
    assert len(found) == 1
    assert found[0].startswith("exponents would serve 2 layers instead of any")
