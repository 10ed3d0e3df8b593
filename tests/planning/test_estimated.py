"""Backends that can estimate share token counts where nothing was measured."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import pytest

from blockscale.backends.registry import BACKENDS
from blockscale.formats import FP8_128X128_FP32, K_MAJOR, DType
from blockscale.kernels import grouped_times
from blockscale.kernels.grouped_times import Behind
from blockscale.planning.decision import Obstacle, Offer, OperandForm
from blockscale.planning.device import Device, Measurement
from blockscale.planning.explain import explain_linear
from blockscale.planning.planner import plan_experts, plan_linear
from blockscale.planning.policy import PlanPolicy
from blockscale.planning.request import LinearRequest
from blockscale.planning.timed import MOST_RANGES

if TYPE_CHECKING:
    from collections.abc import Callable

    from blockscale.planning.plan import LinearPlan

FP16 = DType.FLOAT16
SM90 = Device.named("sm_90")
PACKAGES = (("torch", "2.11.0"), ("triton", "3.6.0"))


@dataclass(frozen=True)
class Plain:
    """A backend that serves everything and cannot estimate."""

    name: str

    def evaluate(self, request: LinearRequest, device: Device) -> Offer:
        assert request.n
        assert device.name
        return Offer(self.name, OperandForm(FP8_128X128_FP32, K_MAJOR), None)


@dataclass(frozen=True)
class Able(Plain):
    """``few`` microseconds up to 256 tokens, ``many`` above."""

    few: float
    many: float

    def estimate_us(self, request: LinearRequest, device: Device, m: int) -> float:
        assert request.n
        assert device.name
        return self.few if m <= 256 else self.many


SLOW_LATER = Able("slow_later", 10.0, 12.0)
FAST_LATER = Able("fast_later", 11.0, 10.0)


def request(n: int = 4096, k: int = 7168, dtype: DType = FP16) -> LinearRequest:
    return LinearRequest("layer", n, k, FP8_128X128_FP32, dtype, dtype)


def ranges(plan: LinearPlan) -> list[tuple[str, int, int | None]]:
    return [(c.offer.backend, c.m_range.min_m, c.m_range.max_m) for c in plan.choices]


def test_estimates_share_token_counts_and_the_plan_says_so() -> None:
    plan = plan_linear(request(), SM90, PlanPolicy(), [SLOW_LATER, FAST_LATER, Plain("plain")])
    assert ranges(plan) == [("slow_later", 0, 313), ("fast_later", 314, None)]
    assert [choice.reason for choice in plan.choices] == [
        "estimated 1.10 times as fast as fast_later",
        "estimated 1.20 times as fast as slow_later",
    ]
    assert plan.choices[1].reason in explain_linear(plan)
    (rejection,) = plan.rejected
    assert rejection.reason.endswith("slow_later and fast_later were estimated, and it was not")


def test_who_cannot_estimate_and_is_preferred_serves_everything() -> None:
    plan = plan_linear(request(), SM90, PlanPolicy(), [Plain("plain"), SLOW_LATER, FAST_LATER])
    assert ranges(plan) == [("plain", 0, None)]
    assert {r.obstacle for r in plan.rejected} == {Obstacle.OUTRANKED}


def test_one_alone_is_not_estimated() -> None:
    plan = plan_linear(request(), SM90, PlanPolicy(), [SLOW_LATER, Plain("plain")])
    assert ranges(plan) == [("slow_later", 0, None)]
    assert plan.choices[0].reason == ""


def test_a_policy_that_names_backends_orders_them_itself() -> None:
    policy = PlanPolicy(backends=("slow_later", "fast_later"))
    plan = plan_linear(request(), SM90, policy, [SLOW_LATER, FAST_LATER])
    assert ranges(plan) == [("slow_later", 0, None)]


def table(*rows: tuple[str, float], n: int) -> Device:
    measured = tuple(Measurement(name, n, 7168, FP16, 1024, us) for name, us in rows)
    return replace(SM90, measurements=measured)


def test_what_was_measured_on_this_very_shape_is_not_estimated() -> None:
    on = table(("slow_later", 5.0), ("fast_later", 6.0), n=4096)
    plan = plan_linear(request(), on, PlanPolicy(), [SLOW_LATER, FAST_LATER])
    assert ranges(plan) == [("slow_later", 0, None)]
    assert plan.choices[0].reason == "measured 1.20 times as fast as fast_later"


@pytest.mark.parametrize(
    ("rows", "n"),
    [((("slow_later", 6.0),), 4096), ((("slow_later", 6.0), ("fast_later", 7.0)), 4000)],
    ids=["not measured", "measured near"],
)
def test_what_is_missing_follows_from_the_ratio_of_the_estimates(
    rows: tuple[tuple[str, float], ...], n: int
) -> None:
    """6 us x 10 / 12 is less than the 5.5 us of a third backend."""
    on = table(*rows, ("plain", 5.5), n=n)
    backends = [Plain("plain"), SLOW_LATER, FAST_LATER]
    plan = plan_linear(request(), on, PlanPolicy(), backends)
    assert ranges(plan) == [("fast_later", 0, None)]
    assert plan.choices[0].reason == "estimated 1.10 times as fast as plain"


def test_both_of_blockscales_kernels_serve_a_float16_layer() -> None:
    plan = plan_linear(request(2112, 7168), SM90, PlanPolicy(), BACKENDS)
    assert plan.backends[:2] == ("gluon", "cuda")
    assert plan.choices[1].reason.startswith("estimated 1.")


def test_without_nvrtcs_binding_gluon_serves_alone_and_the_plan_says_why() -> None:
    plan = plan_linear(request(), SM90.with_packages(*PACKAGES), PlanPolicy(), BACKENDS)
    assert ranges(plan) == [("gluon", 0, None)]
    (reason,) = [r for r in plan.rejected if r.backend == "cuda"]
    assert reason.obstacle is Obstacle.NOT_INSTALLED


def test_float32_results_are_shared_by_estimates_too() -> None:
    asked = replace(request(2112, 7168), out_dtype=DType.FLOAT32)
    plan = plan_linear(asked, SM90, PlanPolicy(), BACKENDS)
    assert plan.backends[:2] == ("gluon", "cuda")
    assert plan.choices[1].reason.startswith("estimated 1.")


@dataclass(frozen=True)
class From(Plain):
    """Knows nothing of fewer than ``least_m`` tokens."""

    least_m: int
    us: float

    def estimate_us(self, request: LinearRequest, device: Device, m: int) -> float | None:
        assert request.n
        assert device.name
        return self.us if m >= self.least_m else None


def test_below_what_is_estimated_the_preferred_one_serves() -> None:
    """At 16 both know something; 16 speaks for half of it and more."""
    backends = [From("slow", 8, 2.0), From("fast", 16, 1.0)]
    plan = plan_linear(request(), SM90, PlanPolicy(), backends)
    assert ranges(plan) == [("slow", 0, 11), ("fast", 12, None)]
    backends = [From("slow", 8, 2.0), From("fast", 10**6, 1.0)]
    assert ranges(plan_linear(request(), SM90, PlanPolicy(), backends)) == [("slow", 0, None)]


def test_plans_of_the_same_layer_are_equal_and_have_few_ranges() -> None:
    for n, k in ((4096, 7168), (576, 7168), (7168, 2048), (32768, 512), (64, 128)):
        plan = plan_linear(request(n, k), SM90, PlanPolicy(), BACKENDS)
        assert plan == plan_linear(request(n, k), SM90, PlanPolicy(), BACKENDS)
        assert len(plan.choices) <= MOST_RANGES + 1


def weights(experts: int, hidden: int, inner: int) -> list[LinearRequest]:
    shapes = (("w13", 2 * inner, hidden), ("w2", hidden, inner))
    return [
        LinearRequest(f"mlp.{name}", n, k, FP8_128X128_FP32, FP16, FP16, experts=experts)
        for name, n, k in shapes
    ]


OWN = [backend for backend in BACKENDS if backend.name in {"gluon", "cuda"}]


@pytest.fixture
def made_ratio(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts other numbers in place of those that ship, which change with new records."""

    def put(few: float, many: float, per_doubling: float) -> None:
        made = Behind((few, few, few, few, few, many), per_doubling, (1, 1 << 40))
        later = Behind((0.1, 0.1, 0.1, 0.1, 0.1, -0.1), 0.0, (1, 1 << 40))
        monkeypatch.setattr(grouped_times, "shipped", lambda: {"gluon": made, "deep_gemm": later})

    return put


def test_the_weights_of_experts_are_estimated_together(made_ratio: Callable[..., None]) -> None:
    """Alone w13 would go to cuda, by its weight, and w2 to gluon, which has more to lose."""
    made_ratio(-0.05, -0.17, 0.3)
    w13, w2 = weights(8, 7168, 2048)
    assert [c.offer.backend for c in plan_linear(w13, SM90, PlanPolicy(), OWN).choices] == [
        "gluon",
        "cuda",
    ]
    assert ranges(plan_linear(w2, SM90, PlanPolicy(), OWN)) == [("gluon", 0, None)]
    together = plan_experts([w13, w2], SM90, PlanPolicy(), OWN)
    assert ranges(together[0]) == ranges(together[1]) == [("gluon", 0, None)]
    assert all(plan.choices[0].reason.startswith("estimated") for plan in together)


def test_experts_are_shared_by_rows_of_a_group(made_ratio: Callable[..., None]) -> None:
    made_ratio(-0.05, 0.05, 0.0)
    plans = plan_experts(weights(8, 7168, 7168), SM90, PlanPolicy(), OWN)
    assert ranges(plans[0]) == ranges(plans[1])
    (few, many) = plans[0].choices
    assert (few.offer.backend, many.offer.backend) == ("gluon", "cuda")
    # 256 rows of each lie halfway, as a logarithm, and are where the ratio is one; 8 for a token.
    # Near that cuda, which is preferred, takes them.
    assert 200 <= many.m_range.min_m <= 256


def test_deep_gemm_is_estimated_for_experts_only(made_ratio: Callable[..., None]) -> None:
    made_ratio(-0.05, 0.05, 0.0)
    names = {"gluon", "cuda", "deep_gemm"}
    three = [backend for backend in BACKENDS if backend.name in names]
    in_bfloat16 = [
        replace(one, activation_dtype=DType.BFLOAT16, out_dtype=DType.BFLOAT16)
        for one in weights(8, 7168, 7168)
    ]
    few, many = plan_experts(in_bfloat16, SM90, PlanPolicy(), three)[0].choices
    assert (few.offer.backend, many.offer.backend) == ("gluon", "deep_gemm")
    assert few.m_range.min_m == 0
    assert few.reason.startswith("estimated 1.05 times as fast as cuda")
    dense = replace(in_bfloat16[0], experts=None)
    assert ranges(plan_linear(dense, SM90, PlanPolicy(), three)) == [("deep_gemm", 0, None)]


def test_experts_with_float32_results_keep_the_order_of_preference() -> None:
    both = [
        replace(one, activation_dtype=DType.FLOAT32, out_dtype=DType.FLOAT32)
        for one in weights(8, 7168, 7168)
    ]
    plans = plan_experts(both, SM90, PlanPolicy(), OWN)
    assert {(plan.choices[0].offer.backend, plan.choices[0].reason) for plan in plans} == {
        ("cuda", "")
    }
