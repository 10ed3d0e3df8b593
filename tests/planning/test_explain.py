"""The words of a plan: complete, grouped, and true of the plan they describe."""

from __future__ import annotations

from dataclasses import replace

import pytest

from blockscale.backends.registry import BACKENDS
from blockscale.formats import (
    FP8_128X128_FP32,
    FP8_128X128_UE8M0,
    MXFP8,
    DType,
    PowerOfTwo,
)
from blockscale.planning.device import KNOWN_DEVICES, Device, Proof, Verdict
from blockscale.planning.explain import (
    explain_linear,
    explain_model,
    layer_groups,
    reasons_by_backend,
    unservable_message,
)
from blockscale.planning.plan import LinearPlan, SkippedLayer
from blockscale.planning.planner import plan_linear, plan_model
from blockscale.planning.policy import Exactness, PlanPolicy
from blockscale.planning.request import LinearRequest

BF16, FP16 = DType.BFLOAT16, DType.FLOAT16
PLAIN = LinearRequest("model.layers.0.o_proj", 4096, 4096, FP8_128X128_FP32, BF16, BF16)
LOSSY = PlanPolicy(exactness=Exactness.ALLOW_LOSSY)


def plan(device: str | Device, policy: PlanPolicy | None = None, **changes: object) -> LinearPlan:
    machine = Device.named(device) if isinstance(device, str) else device
    asked = replace(PLAIN, **{"parts": (), **changes})
    return plan_linear(asked, machine, policy or PlanPolicy(), BACKENDS)


@pytest.mark.parametrize("device", KNOWN_DEVICES, ids=lambda device: device.name)
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_every_backend_has_one_line_that_says_chosen_or_why_not(
    device: Device, dtype: DType
) -> None:
    lines = explain_linear(plan(device, activation_dtype=dtype, out_dtype=dtype)).splitlines()
    assert lines[0] == PLAIN.name
    for backend in BACKENDS:
        chosen = [line for line in lines if f": {backend.name} (" in line]
        refused = [line for line in lines if line.startswith(f"  not {backend.name}: ")]
        assert (len(chosen) > 0) + len(refused) == 1


def test_all_reasons_of_a_backend_are_on_its_line() -> None:
    found = plan("sm_120", out_dtype=FP16, n=4100)
    reasons = dict(reasons_by_backend(found.rejected))["deep_gemm"]
    assert len(reasons) == 3
    (line,) = [x for x in explain_linear(found).splitlines() if x.startswith("  not deep_gemm: ")]
    for reason in reasons:
        assert reason in line


@pytest.mark.parametrize(
    ("device", "policy", "changes", "words"),
    [
        ("sm_90", None, {}, "weight: none, used as stored"),
        ("sm_120", None, {}, "weight: relayout, lossless: e4m3fn/128x128/fp32 in k_major_transp"),
        (
            "sm_90",
            None,
            {"format": FP8_128X128_UE8M0, "power_of_two": PowerOfTwo.YES},
            "relayout, lossless: e4m3fn/128x128/fp32 in k_major; ue8m0 scales restated as fp32",
        ),
        (
            "sm_100",
            PlanPolicy(backends=("torch_scaled_mm",)),
            {"format": FP8_128X128_UE8M0, "power_of_two": PowerOfTwo.YES},
            "e4m3fn/1x32/ue8m0 in swizzled_32_4_4; each scale repeated for 128x4 smaller blocks",
        ),
        ("sm_100", LOSSY, {}, "lossless only if every scale is a power of two, unread"),
        ("sm_100", LOSSY, {"power_of_two": PowerOfTwo.NO}, "weight: requantize, lossy: "),
        ("sm_80", PlanPolicy(backends=("triton",)), {}, "no backend may serve it"),
    ],
)
def test_what_happens_to_the_weight_is_said(
    device: str, policy: PlanPolicy | None, changes: dict[str, object], words: str
) -> None:
    assert words in explain_linear(plan(device, policy, **changes))


def test_evidence_is_said() -> None:
    proof = Proof("triton", BF16, Verdict.PROVEN, "relative error 1e-3")
    proven = replace(Device.named("sm_90"), proofs=(proof,))
    only = PlanPolicy(backends=("triton",))
    assert "proven on this device" in explain_linear(plan(proven, only))
    assert "documented, unproven here" in explain_linear(plan("sm_100"))
    assert "tested on this architecture" in explain_linear(plan("sm_80"))


def test_layers_are_grouped_by_pattern_only_if_they_are_planned_alike() -> None:
    requests = [
        *(replace(PLAIN, name=f"model.layers.{i}.o_proj") for i in range(3)),
        replace(PLAIN, name="model.layers.3.o_proj", format=MXFP8, power_of_two=PowerOfTwo.YES),
        replace(PLAIN, name="model.layers.4.k_proj"),
    ]
    found = plan_model(requests, Device.named("sm_100"), PlanPolicy(), BACKENDS)
    groups = layer_groups(found.layers)
    assert [group.pattern for group in groups] == [
        "model.layers.*.o_proj",
        "model.layers.3.o_proj",
        "model.layers.4.k_proj",
    ]
    assert groups[0].names == tuple(f"model.layers.{i}.o_proj" for i in range(3))
    assert [name for group in groups for name in group.names] == [r.name for r in requests]


def test_skipped_layers_are_counted_by_reason() -> None:
    skipped = [SkippedLayer(f"gate.{i}", "F32: on the checkpoint's skip list") for i in range(4)]
    skipped.append(SkippedLayer("lm_head", "BF16: has no scale on disk"))
    device = Device.named("sm_90")
    text = explain_model(plan_model([PLAIN], device, PlanPolicy(), BACKENDS, skipped=skipped))
    assert "plan for sm_90: 1 layer, 0 unservable" in text
    assert "not quantized (5 layers)" in text
    assert "  4 layers: F32: on the checkpoint's skip list" in text
    assert "  1 layer: BF16: has no scale on disk" in text


def test_a_real_machine_is_named_with_its_architecture() -> None:
    machine = replace(Device.named("sm_90"), name="NVIDIA H200")
    text = explain_model(plan_model([PLAIN], machine, PlanPolicy(), BACKENDS))
    assert text.startswith("plan for NVIDIA H200, sm_90: ")


def test_the_error_says_what_was_asked() -> None:
    found = plan("sm_90", PlanPolicy(backends=("deep_gemm",)), n=4100, has_bias=True)
    message = unservable_message(found, Device.named("sm_90"))
    for words in ("'model.layers.0.o_proj'", "N=4100", "K=4096", "bfloat16", "bias", "on sm_90"):
        assert words in message
