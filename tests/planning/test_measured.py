"""Measured times choose among backends that read the same prepared weight."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from blockscale.backends.registry import BACKENDS
from blockscale.formats import FP8_128X128_FP32, K_MAJOR, MN_MAJOR, DType
from blockscale.planning.decision import MRange, Obstacle, Offer, OperandForm
from blockscale.planning.device import Device, Measurement
from blockscale.planning.measured import measured_ranges, ranges_of_set
from blockscale.planning.planner import plan_experts, plan_linear
from blockscale.planning.policy import PlanPolicy
from blockscale.planning.request import LinearRequest
from blockscale.probe.measured import with_measurements

BF16 = DType.BFLOAT16
AS_STORED = OperandForm(FP8_128X128_FP32, K_MAJOR)


@dataclass(frozen=True)
class Invented:
    """A backend that serves everything it is told to."""

    name: str
    form: OperandForm = AS_STORED
    m_range: MRange = field(default_factory=MRange)

    def evaluate(self, request: LinearRequest, device: Device) -> Offer:
        assert request.n
        assert device.name
        return Offer(self.name, self.form, None, self.m_range)


def request(n: int = 4096, k: int = 7168) -> LinearRequest:
    return LinearRequest("layer", n, k, FP8_128X128_FP32, BF16, BF16)


def device(*rows: tuple[str, int, float], n: int = 4096, k: int = 7168) -> Device:
    """Rows are (backend, M, microseconds)."""
    table = tuple(Measurement(name, n, k, BF16, m, time) for name, m, time in rows)
    return replace(Device.named("sm_90"), measurements=table)


def plan(on: Device, policy: PlanPolicy | None = None) -> list[tuple[str, int, int | None]]:
    backends = [Invented("first"), Invented("second"), Invented("third")]
    made = plan_linear(request(), on, policy or PlanPolicy(), backends)
    return [(c.offer.backend, c.m_range.min_m, c.m_range.max_m) for c in made.choices]


TABLE = (
    ("first", 1, 10.0),
    ("second", 1, 8.0),
    ("first", 64, 12.0),
    ("second", 64, 12.5),
    ("first", 4096, 300.0),
    ("second", 4096, 280.0),
)


def test_the_fastest_serves_each_range_up_to_the_geometric_mean() -> None:
    assert plan(device(*TABLE)) == [("second", 0, 8), ("first", 9, 512), ("second", 513, None)]


def test_without_a_table_the_order_of_preference_stands() -> None:
    assert plan(Device.named("sm_90")) == [("first", 0, None)]


def test_unmeasured_backends_are_not_preferred_to_measured_ones() -> None:
    assert plan(device(("third", 1, 5.0))) == [("third", 0, None)]


def test_a_policy_that_names_backends_orders_them_itself() -> None:
    assert plan(device(*TABLE), PlanPolicy(backends=("first", "second"))) == [("first", 0, None)]


def test_who_was_not_chosen_learns_that_it_was_slower_or_not_measured() -> None:
    backends = [Invented("first"), Invented("second"), Invented("third")]
    made = plan_linear(request(), device(*TABLE), PlanPolicy(), backends)
    (rejection,) = made.rejected
    assert (rejection.backend, rejection.obstacle) == ("third", Obstacle.OUTRANKED)
    assert (
        rejection.reason == "would serve it too, but second and first were measured, and it was not"
    )
    slow = device(*TABLE, ("third", 1, 99.0))
    (rejection,) = plan_linear(request(), slow, PlanPolicy(), backends).rejected
    assert rejection.reason == "would serve it too, but second and first were measured faster"


def test_a_fast_backend_on_another_prepared_weight_costs_no_second_copy() -> None:
    other = Invented("other", OperandForm(FP8_128X128_FP32, MN_MAJOR))
    on = device(("first", 1, 10.0), ("other", 1, 1.0))
    made = plan_linear(request(), on, PlanPolicy(), [Invented("first"), other])
    assert made.backends == ("first",)


def test_bounded_offers_stay_within_their_range() -> None:
    small = Invented("small", m_range=MRange(1, 16))
    on = device(("small", 1, 1.0), ("first", 1, 2.0), ("small", 64, 1.0), ("first", 64, 2.0))
    made = plan_linear(request(), on, PlanPolicy(), [Invented("first"), small])
    assert [(c.offer.backend, c.m_range.max_m) for c in made.choices] == [
        ("small", 16),
        ("first", None),
    ]


def test_near_shapes_speak_for_unmeasured_ones_far_shapes_do_not() -> None:
    table = device(*TABLE, n=4096, k=7168).measurements
    assert measured_ranges(request(2112, 7168), table)
    assert measured_ranges(request(2000, 7168), table) == ()
    assert measured_ranges(request(4096, 1536), table) == ()
    assert measured_ranges(replace(request(), out_dtype=DType.FLOAT16), table) == ()


def test_measurements_are_no_part_of_a_devices_identity() -> None:
    assert device(*TABLE) == Device.named("sm_90")


def expert_set() -> list[LinearRequest]:
    """MiniMax-M2.5's: w13 and w2 of 256 experts."""
    w13 = replace(request(3072, 3072), name="mlp.w13", parts=(1536, 1536), experts=256)
    return [w13, replace(w13, name="mlp.w2", n=3072, k=1536, parts=())]


def of_experts(*rows: tuple[str, int, int, float], experts: int = 256) -> tuple[Measurement, ...]:
    """Rows are (backend, K, M, microseconds)."""
    return tuple(Measurement(name, 3072, k, BF16, m, time, experts) for name, k, m, time in rows)


def test_the_products_of_a_set_of_experts_count_together() -> None:
    """One is faster in w13, the other by more in w2: one backend serves both."""
    rows = [("first", 3072, 1, 9.0), ("second", 3072, 1, 10.0)]
    rows += [("first", 1536, 1, 9.0), ("second", 1536, 1, 7.0)]
    on = replace(Device.named("sm_90"), measurements=of_experts(*rows))
    backends = [Invented("first"), Invented("second")]
    for made in plan_experts(expert_set(), on, PlanPolicy(), backends):
        assert made.backends == ("second",)
        (rejection,) = made.rejected
        assert rejection.reason == "would serve it too, but second was measured faster"


def test_a_backend_that_was_measured_for_one_product_of_a_set_is_not_measured() -> None:
    rows = [("first", 3072, 1, 9.0), ("second", 3072, 1, 1.0), ("first", 1536, 1, 9.0)]
    (found,) = ranges_of_set(expert_set(), of_experts(*rows))
    assert found.time_us == {"first": 18.0}


def test_times_of_experts_speak_for_about_as_many_experts_and_for_no_dense_layer() -> None:
    table = of_experts(("first", 3072, 1, 9.0))
    w13 = expert_set()[0]
    assert measured_ranges(replace(w13, experts=128), table)
    assert not measured_ranges(replace(w13, experts=60), table)
    assert not measured_ranges(replace(w13, experts=None, parts=()), table)
    assert not measured_ranges(w13, device(*TABLE, n=3072, k=3072).measurements)


def test_the_records_of_an_h100_have_our_kernels_run_minimaxs_experts() -> None:
    """Though DeepGEMM comes first in the order of preference: Gluon few tokens, gemm.cu many."""
    h100 = with_measurements(replace(Device.named("sm_90"), name="NVIDIA H100 80GB HBM3"))
    for device, word in ((h100, "measured"), (Device.named("sm_90"), "estimated")):
        for made in plan_experts(expert_set(), device, PlanPolicy(), BACKENDS):
            assert made.backends[:2] == ("gluon", "cuda")
            assert set(made.backends) == {"gluon", "cuda"}
            said = {r.backend: r.reason for r in made.rejected if r.obstacle is Obstacle.OUTRANKED}
            assert said["deep_gemm"].endswith(f"gluon and cuda were {word} faster")
