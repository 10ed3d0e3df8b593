"""Properties of every plan, over layers that reach the backends and policies that narrow them.

Sizes are multiples as well as odd numbers, so that most examples pass the alignment gates; machines
have packages, old toolkits and proofs; every policy field varies.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockscale.backends.registry import BACKENDS
from blockscale.errors import PlanError
from blockscale.formats import (
    FP8_1X128_FP32,
    FP8_32X32_UE8M0,
    FP8_128X128_FP32,
    FP8_128X128_UE8M0,
    MXFP8,
    DType,
    PowerOfTwo,
    ScaleFormat,
)
from blockscale.planning.decision import Evidence, Obstacle, Offer, Readiness
from blockscale.planning.device import KNOWN_DEVICES, Device, Measurement, Proof, Verdict
from blockscale.planning.explain import unservable_message
from blockscale.planning.plan import Conversion, LinearPlan
from blockscale.planning.planner import conversion_step, plan_linear, plan_model
from blockscale.planning.policy import Determinism, Exactness, PlanPolicy, Proving, Strictness
from blockscale.planning.request import LinearRequest, ShardStyle
from blockscale.planning.serialize import plan_document, plan_of_document
from blockscale.planning.sharding import Parallelism, WholeLayer, cut

NAMES = [backend.name for backend in BACKENDS]
FORMATS = (
    FP8_128X128_FP32,
    FP8_128X128_FP32.with_scale(ScaleFormat.BF16),
    FP8_128X128_UE8M0,
    FP8_1X128_FP32,
    FP8_32X32_UE8M0,
    MXFP8,
)
PROVIDERS = ("torch", "triton", "sgl-deep-gemm", "flashinfer-python", "sgl-kernel", "c++")

sizes = st.one_of(
    st.integers(1, 64).map(lambda blocks: blocks * 128),
    st.sampled_from([16, 64, 192, 320, 576, 1088, 2112]),
    st.integers(1, 9000),
)


@st.composite
def requests(draw: st.DrawFn) -> LinearRequest:
    """A layer as a rank runs it: merged or not, cut or not, dense or stacked."""
    fmt = draw(st.sampled_from(FORMATS))
    parts = tuple(draw(st.lists(sizes, min_size=1, max_size=3)))
    known = PowerOfTwo.YES
    if fmt.scale is not ScaleFormat.UE8M0:
        known = draw(st.sampled_from(list(PowerOfTwo)))
    dtype = st.sampled_from(list(DType))
    whole = LinearRequest(
        "model.layers.3.mlp",
        sum(parts),
        draw(sizes),
        fmt,
        draw(dtype),
        draw(dtype),
        known,
        parts,
        draw(st.booleans()),
        experts=draw(st.sampled_from([None, None, 8, 64])),
    )
    style = draw(st.sampled_from(list(ShardStyle)))
    degree = draw(st.sampled_from([1, 1, 2, 4, 8]))
    result = cut(WholeLayer(whole, style), Parallelism(degree))
    return result if isinstance(result, LinearRequest) else whole


@st.composite
def devices(draw: st.DrawFn) -> Device:
    """An invented device, or a real-looking one: packages, a CUDA release, proofs, times."""
    device = draw(st.sampled_from(KNOWN_DEVICES))
    if draw(st.booleans()):
        packages = draw(st.sets(st.sampled_from(PROVIDERS)))
        device = device.with_packages(*((name, "3.6.0") for name in sorted(packages)))
    if device.cuda is not None:
        device = replace(device, cuda=draw(st.sampled_from([device.cuda, (12, 0), None])))
    proofs = st.builds(
        Proof,
        st.sampled_from(NAMES),
        st.sampled_from(list(DType)),
        st.sampled_from(list(Verdict)),
        st.just("detail"),
    )
    measurements = st.builds(
        Measurement,
        st.sampled_from(NAMES),
        st.sampled_from([4096, 2048]),
        st.just(4096),
        st.sampled_from(list(DType)),
        st.sampled_from([1, 2, 3, 64, 4096]),
        st.floats(1.0, 1000.0),
    )
    return replace(
        device,
        proofs=tuple(draw(st.lists(proofs, max_size=3))),
        measurements=tuple(draw(st.lists(measurements, max_size=6))),
    )


policies = st.builds(
    PlanPolicy,
    backends=st.one_of(st.none(), st.lists(st.sampled_from(NAMES), min_size=1).map(tuple)),
    exactness=st.sampled_from(list(Exactness)),
    determinism=st.sampled_from(list(Determinism)),
    proving=st.sampled_from([Proving.ANY, Proving.ANY, Proving.REQUIRED]),
)


def plan_of(request: LinearRequest, device: Device, policy: PlanPolicy) -> LinearPlan:
    return plan_linear(request, device, policy, BACKENDS)


PROFILE = settings(max_examples=150, deadline=None, derandomize=True)


@PROFILE
@given(request=requests(), device=devices(), policy=policies)
def test_same_input_same_plan(request: LinearRequest, device: Device, policy: PlanPolicy) -> None:
    assert plan_of(request, device, policy) == plan_of(request, device, policy)


@PROFILE
@given(request=requests(), device=devices(), policy=policies)
def test_each_backend_is_chosen_or_has_a_reason_in_words(
    request: LinearRequest, device: Device, policy: PlanPolicy
) -> None:
    plan = plan_of(request, device, policy)
    refused = {rejection.backend for rejection in plan.rejected}
    assert refused.isdisjoint(plan.backends)
    assert refused.union(plan.backends) == set(NAMES)
    for rejection in plan.rejected:
        assert rejection.reason == rejection.reason.strip()
        assert "None" not in rejection.reason
        assert "\n" not in rejection.reason


@PROFILE
@given(request=requests(), device=devices(), policy=policies, name=st.sampled_from(NAMES))
def test_a_policy_that_names_one_backend_never_gets_another(
    request: LinearRequest, device: Device, policy: PlanPolicy, name: str
) -> None:
    only = replace(policy, backends=(name,))
    plan = plan_of(request, device, only)
    assert set(plan.backends) <= {name}
    excluded = {r.backend for r in plan.rejected if r.obstacle is Obstacle.EXCLUDED_BY_POLICY}
    assert excluded == set(NAMES) - {name}


@PROFILE
@given(request=requests(), device=devices(), policy=policies)
def test_nothing_lossy_without_permission(
    request: LinearRequest, device: Device, policy: PlanPolicy
) -> None:
    plan = plan_of(request, device, replace(policy, exactness=Exactness.EXACT))
    if plan.is_servable:
        assert plan.is_lossless is True
        assert plan.conversion is not Conversion.REQUANTIZE


@PROFILE
@given(request=requests(), device=devices(), policy=policies)
def test_permission_never_costs_a_backend(
    request: LinearRequest, device: Device, policy: PlanPolicy
) -> None:
    """What is served exactly is still served when lossy conversion is allowed."""
    exact = plan_of(request, device, replace(policy, exactness=Exactness.EXACT))
    lossy = plan_of(request, device, replace(policy, exactness=Exactness.ALLOW_LOSSY))
    assert lossy.is_servable >= exact.is_servable


@PROFILE
@given(request=requests(), device=devices(), policy=policies)
def test_the_error_names_every_backend_and_the_layer(
    request: LinearRequest, device: Device, policy: PlanPolicy
) -> None:
    plan = plan_of(request, device, policy)
    strict = replace(policy, strictness=Strictness.RAISE)
    if plan.is_servable:
        assert plan_of(request, device, strict) == plan
        return
    with pytest.raises(PlanError) as caught:
        plan_of(request, device, strict)
    message = str(caught.value)
    assert message == unservable_message(plan, device)
    assert "\n" not in message
    assert repr(request.name) in message
    for name in NAMES:
        assert f"{name}: " in message


@PROFILE
@given(request=requests(), device=devices(), policy=policies)
def test_the_plan_holds_what_the_backend_offered(
    request: LinearRequest, device: Device, policy: PlanPolicy
) -> None:
    """Forms, ranges and readiness are the backend's own; only evidence is the planner's to raise.

    Every M is served once, and all of a layer's backends read one prepared weight.
    """
    plan = plan_of(request, device, policy)
    by_name = {backend.name: backend for backend in BACKENDS}
    for choice in plan.choices:
        offered = by_name[choice.offer.backend].evaluate(request, device)
        assert isinstance(offered, Offer)
        assert replace(choice.offer, evidence=offered.evidence) == offered
        assert choice.offer.weight == plan.weight
        if choice.offer.evidence is not offered.evidence:
            assert choice.offer.evidence is Evidence.PROVEN
        step = conversion_step(request, choice.offer.weight)
        assert (plan.conversion, plan.is_lossless) == (step.conversion, step.is_lossless)
    for m in (0, 1, 31, 32, 8192) if plan.is_servable else ():
        serving = [choice for choice in plan.choices if choice.m_range.contains(m)]
        assert len(serving) == 1
        assert m == 0 or serving[0].offer.m_range.contains(m)


@PROFILE
@given(request=requests(), device=devices(), policy=policies)
def test_nothing_unfit_is_chosen(
    request: LinearRequest, device: Device, policy: PlanPolicy
) -> None:
    """No failed proof, no missing proof where one is required, no promise that cannot be run."""
    for choice in plan_of(request, device, policy).choices:
        proof = device.proof(choice.offer.backend, request.out_dtype)
        assert proof is None or proof.verdict is Verdict.PROVEN
        if policy.proving is Proving.REQUIRED:
            assert choice.offer.evidence is Evidence.PROVEN
        if policy.determinism is Determinism.REQUIRED:
            assert choice.offer.is_deterministic
        if device.packages is not None:
            assert choice.offer.readiness is Readiness.RUNNABLE
        assert request.shard.split_blocks == ()


@PROFILE
@given(
    wanted=st.lists(requests(), max_size=3),
    device=devices(),
    policy=policies,
)
def test_any_plan_survives_its_document(
    wanted: list[LinearRequest], device: Device, policy: PlanPolicy
) -> None:
    named = [replace(request, name=f"layer.{i}") for i, request in enumerate(wanted)]
    plan = plan_model(named, device, policy, BACKENDS)
    assert plan_of_document(plan_document(plan)) == plan
