"""A plan runs elsewhere only if everything it was made from is the same there."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from blockscale.backends.registry import BACKENDS, packages_of
from blockscale.errors import FormatError, PlanMismatchError
from blockscale.formats import FP8_128X128_FP32, DType, PowerOfTwo
from blockscale.planning.device import Device, Proof, Verdict
from blockscale.planning.planner import plan_model
from blockscale.planning.policy import PlanPolicy, Proving
from blockscale.planning.request import LinearRequest
from blockscale.planning.saved import (
    Fingerprint,
    SavedPlan,
    Situation,
    fitting_plan,
    mismatches,
    saved_document,
    saved_of_document,
)
from blockscale.planning.warm_up import kernel_document, warm_up_of

FINGERPRINT = Fingerprint("aa", "bb", 3)
PACKAGES = (("torch", "2.11.0"), ("triton", "3.6.0"), ("sgl-deep-gemm", "0.1.5"))
H200 = replace(Device.named("sm_90"), name="NVIDIA H200", packages=PACKAGES)
VERSIONS = (("blockscale", "0.1.0"), *PACKAGES)


def request(name: str, n: int = 4096, k: int = 4096, **changes: object) -> LinearRequest:
    made = LinearRequest(name, n, k, FP8_128X128_FP32, DType.BFLOAT16, DType.BFLOAT16)
    return replace(made, **changes)


REQUESTS = (request("a"), request("b"), request("c", n=512))


def saved_for(device: Device, policy: PlanPolicy | None = None) -> SavedPlan:
    plan = plan_model(REQUESTS, device, policy or PlanPolicy(), BACKENDS)
    versions = VERSIONS if device.packages is not None else VERSIONS[:1]
    return SavedPlan(plan, FINGERPRINT, "engine", 1, 1, versions, "/models/x")


HERE = Situation(FINGERPRINT, REQUESTS, H200, VERSIONS)


def reasons(saved: SavedPlan, here: Situation) -> tuple[str, ...]:
    return mismatches(saved, here, BACKENDS, packages_of)


@pytest.mark.parametrize("device", [H200, Device.named("sm_90")], ids=["there", "invented"])
def test_a_plan_fits_where_everything_is_the_same(device: Device) -> None:
    saved = saved_for(device)
    plan = fitting_plan("x", saved, HERE, BACKENDS, packages_of)
    assert plan.device is H200
    assert plan.layers == saved.plan.layers


@pytest.mark.parametrize("name", ["cpu", "sm_80", "sm_90", "sm_100", "sm_120"])
def test_a_file_gives_back_the_plan(name: str) -> None:
    saved = saved_for(Device.named(name))
    raw = json.dumps(saved_document(saved)).encode()
    assert saved_of_document(raw) == saved_of_document(json.loads(raw)) == saved


def test_another_checkpoint_is_refused_with_what_changed() -> None:
    saved = saved_for(H200)
    other = replace(FINGERPRINT, config="zz")
    (reason,) = reasons(saved, replace(HERE, fingerprint=other))
    assert reason == "config.json is not the one of /models/x that was planned"
    (reason,) = reasons(saved, replace(HERE, fingerprint=replace(FINGERPRINT, tensors="zz")))
    assert "name, dtype or shape" in reason
    other = replace(FINGERPRINT, tensors="zz", tensor_count=4)
    (reason,) = reasons(saved, replace(HERE, fingerprint=other))
    assert "3 were planned, 4 are here" in reason


def test_the_first_layer_that_differs_is_named_with_both_shapes() -> None:
    changed = (REQUESTS[0], request("b", n=8192), request("d"))
    differ, missing = reasons(saved_for(H200), replace(HERE, requests=changed))
    assert differ.startswith("2 layers differ, first 'b': planned as N=4096 K=4096")
    assert "here it is N=8192 K=4096" in differ
    assert missing == "1 layer of the plan are not here, first 'c'"


def test_what_reading_the_scales_found_is_no_difference() -> None:
    read = tuple(replace(r, power_of_two=PowerOfTwo.YES) for r in REQUESTS)
    saved = saved_for(H200)
    assert reasons(saved, replace(HERE, requests=read)) == ()


def test_another_architecture_is_the_only_reason_there() -> None:
    here = replace(HERE, device=Device.named("sm_100"), versions=())
    assert reasons(saved_for(H200), here) == ("planned for sm_90, this is sm_100",)


def test_versions_count_for_the_planned_backends_only() -> None:
    policy = PlanPolicy(backends=("triton",))
    newer = tuple((n, "9.9" if n == "sgl-deep-gemm" else v) for n, v in VERSIONS)
    assert reasons(saved_for(H200, policy), replace(HERE, versions=newer)) == ()
    newer = tuple((n, "9.9" if n in {"triton", "blockscale"} else v) for n, v in VERSIONS)
    assert reasons(saved_for(H200, policy), replace(HERE, versions=newer)) == (
        "triton was planned with blockscale 0.1.0, here is 9.9",
        "triton was planned with triton 3.6.0, here is 9.9",
    )


def test_a_plan_for_an_invented_device_knows_blockscale_alone() -> None:
    newer = tuple((n, "9.9" if n != "blockscale" else v) for n, v in VERSIONS)
    policy = PlanPolicy(backends=("triton",))
    assert reasons(saved_for(Device.named("sm_90"), policy), replace(HERE, versions=newer)) == ()
    newer = (("blockscale", "0.2.0"), *PACKAGES)
    (reason,) = reasons(saved_for(Device.named("sm_90"), policy), replace(HERE, versions=newer))
    assert "blockscale 0.1.0, here is 0.2.0" in reason


def test_a_provider_that_is_missing_here_is_named_once() -> None:
    policy = PlanPolicy(backends=("triton",))
    bare = H200.with_packages(("torch", "2.11.0"))
    (reason,) = reasons(
        saved_for(Device.named("sm_90"), policy),
        replace(HERE, device=bare, versions=(("blockscale", "0.1.0"), ("torch", "2.11.0"))),
    )
    assert reason.startswith("triton would not serve it here: package triton is not installed")
    assert reason.endswith("(3 layers, first 'a')")


def test_a_backend_that_blockscale_cannot_run_is_refused_on_a_real_machine() -> None:
    rtx = replace(Device.named("sm_120"), packages=(("sgl-kernel", "0.4"),))
    policy = PlanPolicy(backends=("sgl_cutlass",))
    found = reasons(
        saved_for(Device.named("sm_120"), policy),
        replace(HERE, device=rtx, versions=(("blockscale", "0.1.0"), ("sgl-kernel", "0.4"))),
    )
    assert any("cannot run it yet" in reason for reason in found)


def test_what_the_probe_found_here_counts() -> None:
    policy = PlanPolicy(backends=("triton",))
    failed = Proof("triton", DType.BFLOAT16, Verdict.FAILED, "error 0.5")
    here = replace(HERE, device=replace(H200, proofs=(failed,)))
    (reason,) = reasons(saved_for(H200, policy), here)
    assert "failed the probe on this device: error 0.5" in reason
    proven = replace(failed, verdict=Verdict.PROVEN)
    with_proof = replace(H200, proofs=(proven,))
    strict = replace(policy, proving=Proving.REQUIRED)
    assert reasons(saved_for(with_proof, strict), replace(HERE, device=with_proof)) == ()
    (reason,) = reasons(saved_for(with_proof, strict), HERE)
    assert "never proven on this device" in reason


def test_all_reasons_are_in_one_line() -> None:
    here = replace(HERE, fingerprint=Fingerprint("x", "y", 9), device=Device.named("cpu"))
    with pytest.raises(PlanMismatchError) as caught:
        fitting_plan("plan.json", saved_for(H200), here, BACKENDS, packages_of)
    assert len(caught.value.reasons) == 3
    assert str(caught.value).startswith("plan.json does not fit: config.json")
    assert str(caught.value).endswith("this is cpu; plan again")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: d.pop("kind"),
        lambda d: d.update(schema=2),
        lambda d: d.update(extra=1),
        lambda d: d["checkpoint"].update(merging="both"),
        lambda d: d["checkpoint"]["fingerprint"].pop("config"),
        lambda d: d["plan"].pop("layers"),
        lambda d: d["plan"]["layers"][0].update(n="many"),
        lambda d: d["plan"]["layers"][0].update(weight_format="fp9"),
        lambda d: d["plan"]["layers"][0].update(weight_scale_layout="heap"),
        lambda d: d["plan"]["layers"][0].update(n=0),
    ],
)
def test_a_damaged_file_is_refused(damage: object) -> None:
    document = saved_document(saved_for(H200))
    damage(document)
    with pytest.raises(FormatError):
        saved_of_document(json.dumps(document).encode())


@pytest.mark.parametrize("raw", [b"", b"[]", b"\xff", b"[" * 100_000, b'{"schema": 1}'])
def test_what_is_no_plan_file_says_how_to_write_one(raw: bytes) -> None:
    with pytest.raises(FormatError, match="plan PATH --save FILE"):
        saved_of_document(raw)


def test_every_backend_says_what_its_numbers_depend_on() -> None:
    for backend in BACKENDS:
        assert packages_of(backend.name)


def test_equal_kernels_are_built_once() -> None:
    plan = saved_for(Device.named("cpu")).plan
    found = warm_up_of(plan)
    assert [(kernel.n, kernel.layers) for kernel in found.kernels] == [(4096, 2), (512, 1)]
    assert [plan.name for plan in found.plans] == ["a", "c"]
    document = kernel_document(found.kernels[0])
    assert json.loads(json.dumps(document)) == document
    assert document["backend"] == "cpu"
    assert document["max_m"] is None


def test_each_range_of_m_is_a_kernel_of_its_own() -> None:
    plan = plan_model(
        [request("a", activation_dtype=DType.FLOAT16, out_dtype=DType.FLOAT16)],
        Device.named("sm_90"),
        PlanPolicy(),
        BACKENDS,
    )
    kernels = warm_up_of(plan).kernels
    assert [k.backend for k in kernels] == list(plan.layers[0].backends)
    assert [k.m_range for k in kernels] == [c.m_range for c in plan.layers[0].choices]
