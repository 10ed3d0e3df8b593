"""The decision itself: order, policy, conversions, M ranges, and that nothing is forgotten."""

from __future__ import annotations

import csv
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockscale.backends.registry import BACKENDS
from blockscale.errors import BackendError, PlanError, SettingsError
from blockscale.formats import (
    FP8_1X128_FP32,
    FP8_128X128_FP32,
    FP8_128X128_UE8M0,
    K_MAJOR,
    MN_MAJOR,
    MXFP8,
    BlockFormat,
    BlockShape,
    DType,
    PowerOfTwo,
    ScaleFormat,
)
from blockscale.planning.decision import MRange, Obstacle, Offer, OperandForm, Rejection
from blockscale.planning.device import KNOWN_DEVICES, Device
from blockscale.planning.explain import explain_linear, unservable_message
from blockscale.planning.plan import Conversion
from blockscale.planning.planner import conversion_step, plan_linear, plan_model
from blockscale.planning.policy import Exactness, PlanPolicy, Strictness
from blockscale.planning.request import LinearRequest

BF16, FP16 = DType.BFLOAT16, DType.FLOAT16
SHAPES_CSV = Path(__file__).parent.parent / "data" / "shapes.csv"


def request(**changes: object) -> LinearRequest:
    plain = LinearRequest("layer", 4096, 4096, FP8_128X128_FP32, BF16, BF16)
    return replace(plain, **{"parts": (), **changes})


AS_STORED = OperandForm(FP8_128X128_FP32, K_MAJOR)


@dataclass(frozen=True)
class Invented:
    """A backend that offers what it is told to."""

    name: str
    m_range: MRange = field(default_factory=MRange)
    form: OperandForm = AS_STORED

    def evaluate(self, request: LinearRequest, device: Device) -> Offer:
        assert request.n
        assert device.name
        return Offer(self.name, self.form, OperandForm(FP8_1X128_FP32, K_MAJOR), self.m_range)


H200 = Device.named("sm_90")


def ranges(*backends: Invented) -> list[tuple[str, int, int | None]]:
    plan = plan_linear(request(), H200, PlanPolicy(), backends)
    return [(c.offer.backend, c.m_range.min_m, c.m_range.max_m) for c in plan.choices]


@dataclass(frozen=True)
class Answering:
    """Somebody's backend, with a slip of the pen."""

    answer: object
    name: str = "slip"

    def evaluate(self, request: LinearRequest, device: Device) -> object:
        assert request.n
        assert device.name
        return self.answer


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (None, "answers 'None'.*an Offer, or at least one Rejection"),
        ([], r"answers '\[\]'"),
        (["no"], "at least one Rejection"),
        ({"backend": "slip"}, "an Offer"),
        (Offer("other", AS_STORED, None), "backend slip offers as 'other'"),
    ],
)
def test_what_is_no_answer_is_an_error_that_names_the_backend(answer: object, words: str) -> None:
    with pytest.raises(BackendError, match=words):
        plan_linear(request(), H200, PlanPolicy(), [Answering(answer)])  # type: ignore[list-item]  # as somebody's package may have it


def test_first_unbounded_offer_serves_everything() -> None:
    assert ranges(Invented("a"), Invented("b")) == [("a", 0, None)]


def test_small_m_specialist_ahead_of_the_anchor_takes_its_range() -> None:
    small = Invented("small", MRange(1, 16))
    assert ranges(small, Invented("any")) == [("small", 0, 16), ("any", 17, None)]


def test_middle_range_leaves_both_ends_to_the_anchor() -> None:
    middle = Invented("middle", MRange(8, 64))
    assert ranges(middle, Invented("any")) == [
        ("any", 0, 7),
        ("middle", 8, 64),
        ("any", 65, None),
    ]


def test_a_specialist_behind_the_anchor_is_not_used() -> None:
    assert ranges(Invented("any"), Invented("small", MRange(1, 16))) == [("any", 0, None)]


def test_a_second_copy_of_the_weight_is_never_made() -> None:
    other = Invented("other", MRange(1, 16), OperandForm(FP8_128X128_FP32, MN_MAJOR))
    plan = plan_linear(request(), H200, PlanPolicy(), [other, Invented("any")])
    assert plan.backends == ("any",)
    (rejection,) = plan.rejected
    assert rejection.obstacle is Obstacle.WEIGHT_FORM
    assert "copy would cost 4096 bytes" in rejection.reason


def test_bounded_backends_alone_serve_nothing() -> None:
    plan = plan_linear(request(), H200, PlanPolicy(), [Invented("small", MRange(1, 16))])
    assert not plan.is_servable
    assert [r.obstacle for r in plan.rejected] == [Obstacle.M_RANGE]


@pytest.mark.parametrize("m", [0, 1, 16, 17, 4096])
def test_every_m_has_one_choice(m: int) -> None:
    plan = plan_linear(
        request(), H200, PlanPolicy(), [Invented("small", MRange(1, 16)), Invented("any")]
    )
    assert plan.choice_for(m).offer.backend == ("small" if m <= 16 else "any")


UE8M0_K_MAJOR = OperandForm(FP8_128X128_UE8M0, K_MAJOR)
CONVERSIONS = [
    (FP8_128X128_FP32, PowerOfTwo.UNKNOWN, OperandForm(FP8_128X128_FP32, K_MAJOR), "none", True),
    (FP8_128X128_FP32, PowerOfTwo.NO, OperandForm(FP8_128X128_FP32, MN_MAJOR), "relayout", True),
    (FP8_128X128_FP32, PowerOfTwo.YES, UE8M0_K_MAJOR, "relayout", True),
    (FP8_128X128_FP32, PowerOfTwo.NO, UE8M0_K_MAJOR, "requantize", False),
    (FP8_128X128_FP32, PowerOfTwo.UNKNOWN, UE8M0_K_MAJOR, "requantize", None),
    (FP8_128X128_UE8M0, PowerOfTwo.YES, OperandForm(FP8_128X128_FP32, K_MAJOR), "relayout", True),
    (FP8_128X128_UE8M0, PowerOfTwo.YES, OperandForm(MXFP8, K_MAJOR), "relayout", True),
    (MXFP8, PowerOfTwo.YES, UE8M0_K_MAJOR, "requantize", False),
]


@pytest.mark.parametrize(("source", "known", "target", "conversion", "lossless"), CONVERSIONS)
def test_conversions(
    source: BlockFormat,
    known: PowerOfTwo,
    target: OperandForm,
    conversion: str,
    lossless: bool | None,
) -> None:
    step = conversion_step(request(format=source, power_of_two=known), target)
    assert (step.conversion, step.is_lossless) == (Conversion(conversion), lossless)


def test_founding_rule_fp16_is_not_converted() -> None:
    asked = request(activation_dtype=FP16, out_dtype=FP16, power_of_two=PowerOfTwo.YES)
    plan = plan_linear(asked, Device.named("sm_100"), PlanPolicy(), BACKENDS)
    assert plan.weight is not None
    assert plan.weight.format.scale is ScaleFormat.FP32
    assert any(r.backend == "deep_gemm" and r.obstacle is Obstacle.OUT_DTYPE for r in plan.rejected)


def test_founding_rule_known_powers_of_two_are_packed_losslessly() -> None:
    asked = request(power_of_two=PowerOfTwo.YES)
    plan = plan_linear(asked, Device.named("sm_100"), PlanPolicy(), BACKENDS)
    assert plan.backends == ("deep_gemm",)
    assert (plan.conversion, plan.is_lossless) == (Conversion.RELAYOUT, True)


def test_founding_rule_unknown_scales_wait_for_permission() -> None:
    b200, asked = Device.named("sm_100"), request()
    assert plan_linear(asked, b200, PlanPolicy(), BACKENDS).backends != ("deep_gemm",)
    lossy = PlanPolicy(exactness=Exactness.ALLOW_LOSSY)
    assert plan_linear(asked, b200, lossy, BACKENDS).backends == ("deep_gemm",)


def test_strict_policy_raises_with_every_backend_and_reason() -> None:
    asked = request(n=4100, k=4100, format=FP8_1X128_FP32)
    policy = PlanPolicy(backends=("deep_gemm", "triton", "gluon"), strictness=Strictness.RAISE)
    with pytest.raises(PlanError) as caught:
        plan_linear(asked, H200, policy, BACKENDS)
    for backend in BACKENDS:
        assert backend.name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_backend_in_the_policy_is_a_settings_error() -> None:
    with pytest.raises(SettingsError, match="cutlas"):
        plan_linear(request(), H200, PlanPolicy(backends=("cutlas",)), BACKENDS)


requests = st.builds(
    request,
    n=st.integers(1, 9000),
    k=st.integers(1, 9000),
    format=st.sampled_from([FP8_128X128_FP32, FP8_128X128_UE8M0, MXFP8]),
    out_dtype=st.sampled_from(list(DType)),
    activation_dtype=st.sampled_from(list(DType)),
    power_of_two=st.sampled_from(list(PowerOfTwo)),
    has_bias=st.booleans(),
    experts=st.one_of(st.none(), st.integers(1, 8)),
)
devices = st.sampled_from(KNOWN_DEVICES)
policies = st.builds(
    PlanPolicy,
    backends=st.one_of(
        st.none(), st.lists(st.sampled_from([b.name for b in BACKENDS]), min_size=1).map(tuple)
    ),
    exactness=st.sampled_from(list(Exactness)),
)


@settings(max_examples=300, deadline=None)
@given(asked=requests, device=devices, policy=policies)
def test_properties_of_any_plan(asked: LinearRequest, device: Device, policy: PlanPolicy) -> None:
    plan = plan_linear(asked, device, policy, BACKENDS)
    assert plan == plan_linear(asked, device, policy, BACKENDS)
    chosen = set(plan.backends)
    explained = {rejection.backend for rejection in plan.rejected}
    assert chosen | explained == {backend.name for backend in BACKENDS}
    assert not chosen & explained
    assert all(rejection.reason.strip() for rejection in plan.rejected)
    if policy.backends is not None:
        assert chosen <= set(policy.backends)
    if plan.is_servable:
        assert plan.choices[0].m_range.min_m == 0
        assert plan.choices[-1].m_range.max_m is None
        for left, right in zip(plan.choices, plan.choices[1:], strict=False):
            assert left.m_range.max_m is not None
            assert right.m_range.min_m == left.m_range.max_m + 1
        assert {choice.offer.weight for choice in plan.choices} == {plan.weight}
    if policy.exactness is Exactness.EXACT and plan.is_servable:
        assert plan.is_lossless is True
        assert plan.conversion is not Conversion.REQUANTIZE
    text = explain_linear(plan) + unservable_message(plan, device)
    assert all(backend.name in text for backend in BACKENDS)


def rows() -> list[dict[str, str]]:
    with SHAPES_CSV.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_deep_gemm_gate_agrees_with_the_table_of_real_shapes() -> None:
    """467 GEMMs of real models at real tensor-parallel degrees (tests/data/shapes.csv)."""
    policy = PlanPolicy(backends=("deep_gemm",))
    checked = 0
    for row in rows():
        plan = plan_linear(request(n=int(row["N"]), k=int(row["K"])), H200, policy, BACKENDS)
        assert plan.is_servable == (row["deepgemm_N64_K128"] == "1"), row
        checked += 1
    assert checked == 467


def test_every_real_shape_is_servable_on_hopper_in_fp16() -> None:
    for n, k in {(int(row["N"]), int(row["K"])) for row in rows()}:
        asked = request(n=n, k=k, activation_dtype=FP16, out_dtype=FP16)
        plan = plan_linear(asked, H200, PlanPolicy(), BACKENDS)
        assert plan.is_servable, (n, k)
        assert plan.conversion in {Conversion.NONE, Conversion.RELAYOUT}


def test_layers_that_differ_in_name_only_are_decided_once() -> None:
    calls = []

    class Counting(Invented):
        def evaluate(self, request: LinearRequest, device: Device) -> Offer:
            calls.append(request.name)
            return super().evaluate(request, device)

    wanted = [request(name=f"layers.{index}") for index in range(50)]
    plan = plan_model(wanted, H200, PlanPolicy(), [Counting("only")])
    assert [layer.name for layer in plan.layers] == [r.name for r in wanted]
    assert len(calls) == 1


def test_model_findings_name_what_the_policy_gave_up() -> None:
    plan = plan_model([request()], Device.named("sm_100"), PlanPolicy(), BACKENDS)
    assert "unread_scales" in {finding.code for finding in plan.findings}


def test_a_rejection_is_a_value() -> None:
    assert Rejection("a", Obstacle.TOOLKIT, "x") == Rejection("a", Obstacle.TOOLKIT, "x")


def test_blocks_of_another_size_reach_only_backends_that_take_them() -> None:
    fmt = BlockFormat(FP8_128X128_FP32.element, ScaleFormat.FP32, BlockShape(64, 64))
    plan = plan_linear(request(format=fmt), H200, PlanPolicy(), BACKENDS)
    assert plan.backends == ("reference",)
