"""Plan documents: round trip, schema, goldens under review, and text."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import blockscale.planning
from blockscale.backends.registry import BACKENDS
from blockscale.errors import FormatError
from blockscale.formats import (
    FP8_128X128_FP32,
    FP8_128X128_UE8M0,
    K_MAJOR,
    MXFP8,
    BlockFormat,
    DType,
    PowerOfTwo,
)
from blockscale.planning.decision import Arrangement, GroupedRows, MRange, Offer, OperandForm
from blockscale.planning.device import KNOWN_DEVICES, Device, Proof, Verdict
from blockscale.planning.explain import explain_model
from blockscale.planning.plan import Finding, ModelPlan, Severity, SkippedLayer
from blockscale.planning.planner import plan_model
from blockscale.planning.policy import PlanPolicy
from blockscale.planning.request import LinearRequest
from blockscale.planning.serialize import plan_document, plan_of_document, plan_schema

GOLDEN = Path(__file__).parent.parent / "golden"
FORMATS = {"fp32": FP8_128X128_FP32, "ue8m0": FP8_128X128_UE8M0, "mxfp8": MXFP8}
# Enough shapes to pass and fail every alignment gate.
SHAPES = ((4096, 7168, None), (2112, 7168, None), (576, 576, None), (3072, 1536, 256))


def golden_plan(device: Device, fmt: BlockFormat) -> ModelPlan:
    known = PowerOfTwo.YES if fmt is not FP8_128X128_FP32 else PowerOfTwo.UNKNOWN
    requests = [
        LinearRequest(f"n{n}_k{k}_{dtype.value}", n, k, fmt, dtype, dtype, known, experts=experts)
        for n, k, experts in SHAPES
        for dtype in DType
    ]
    return plan_model(requests, device, PlanPolicy(), BACKENDS)


def summary(plan: ModelPlan) -> dict[str, Any]:
    """What a reviewer should see change: who serves, in which form, and who is refused for what."""
    return {
        layer.name: {
            "backends": [f"{c.offer.backend} {c.m_range}" for c in layer.choices],
            "weight": f"{layer.weight.format} {layer.weight.layout}" if layer.weight else None,
            "conversion": layer.conversion.value,
            "refused": sorted({f"{r.backend}: {r.obstacle.value}" for r in layer.rejected}),
        }
        for layer in plan.layers
    }


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("device", KNOWN_DEVICES, ids=lambda device: device.name)
def test_golden_plans(device: Device, fmt: str, request: pytest.FixtureRequest) -> None:
    """`pytest tests/planning --update-goldens` rewrites them; review the difference."""
    found = summary(golden_plan(device, FORMATS[fmt]))
    file = GOLDEN / f"{device.name}-{fmt}.json"
    if request.config.getoption("--update-goldens"):
        file.write_text(json.dumps(found, indent=1) + "\n")
    assert found == json.loads(file.read_text())


def full_plan() -> ModelPlan:
    device = replace(
        Device.named("sm_90").with_packages(("torch", "2.11.0"), ("triton", "3.6.0")),
        proofs=(Proof("triton", DType.BFLOAT16, Verdict.PROVEN, "1.2e-3"),),
    )
    plan = golden_plan(device, FP8_128X128_FP32)
    return replace(
        plan,
        skipped=(SkippedLayer("lm_head", "BF16: on the checkpoint's skip list"),),
        findings=(Finding(Severity.WARNING, "code", "message", "layer"), *plan.findings),
    )


def test_documents_lead_back_through_json() -> None:
    plan = full_plan()
    text = json.dumps(plan_document(plan))
    assert plan_of_document(text) == plan
    assert plan_of_document(json.loads(text)) == plan


def test_what_was_offered_and_what_is_served_are_both_kept() -> None:
    """A specialist offers 1 to 31 tokens and serves 0 to 31; both come back."""
    asked = LinearRequest("x", 4096, 4096, FP8_128X128_FP32, DType.BFLOAT16, DType.BFLOAT16)
    policy = PlanPolicy(backends=("flashinfer_sm90", "triton"))
    plan = plan_model([asked], Device.named("sm_90"), policy, BACKENDS)
    few, many = plan_document(plan)["layers"][0]["backends"]
    assert (few["min_m"], few["max_m"]) == (0, 31)
    assert (few["offered_min_m"], few["offered_max_m"]) == (1, 31)
    assert (many["min_m"], many["max_m"]) == (32, None)
    assert plan_of_document(plan_document(plan)) == plan


def test_rows_of_a_grouped_layer_come_back() -> None:
    """And dense layers have no such key: plans of schema 1 from before it stay readable."""

    class Grouped:
        name = "grouped"

        def evaluate(self, request: LinearRequest, device: Device) -> Offer:  # noqa: ARG002
            weight = OperandForm(request.format, K_MAJOR)
            rows = (
                GroupedRows(MRange(0, 64), Arrangement.MASKED, 64),
                GroupedRows(MRange(65), Arrangement.CONTIGUOUS, 128),
            )
            return Offer(self.name, weight, None, rows=rows if request.experts is not None else ())

    experts = LinearRequest(
        "w2", 256, 128, FP8_128X128_FP32, DType.BFLOAT16, DType.BFLOAT16, experts=8
    )
    asked = [experts, replace(experts, name="o_proj", experts=None)]
    plan = plan_model(asked, Device.named("sm_90"), PlanPolicy(), [Grouped()])
    grouped, dense = plan_document(plan)["layers"]
    assert grouped["backends"][0]["rows"] == [
        {"min_m": 0, "max_m": 64, "arrangement": "masked", "alignment": 64},
        {"min_m": 65, "max_m": None, "arrangement": "contiguous", "alignment": 128},
    ]
    assert "rows" not in dense["backends"][0]
    assert plan_of_document(plan_document(plan)) == plan
    text = explain_model(plan)
    assert "rows for 0 <= M <= 64: in a slot for each expert, a multiple of 64" in text
    assert "rows for M >= 65: expert after expert, in row blocks of 128" in text


def test_design_names_are_in_the_document() -> None:
    document = plan_document(full_plan())
    assert document["schema"] == 1
    assert set(document) == {"schema", "device", "policy", "layers", "skipped", "findings"}
    layer = document["layers"][0]
    for key in (
        "name",
        "n",
        "k",
        "backends",
        "weight_scale_layout",
        "activation_scale_layout",
        "conversion",
        "lossless",
        "rejected",
    ):
        assert key in layer
    assert set(layer["backends"][0]) >= {"backend", "min_m", "max_m"}
    assert set(layer["rejected"][0]) == {"backend", "obstacle", "reason"}


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"schema": 2}', '{"schema": 1, "layers": 3}', "nonsense"]
)
def test_what_is_no_plan_is_refused(text: str) -> None:
    with pytest.raises(FormatError, match="not a plan document"):
        plan_of_document(text)


def test_the_committed_schema_is_the_generated_one() -> None:
    file = Path(blockscale.planning.__file__).parent / "plan.schema.json"
    assert json.loads(file.read_text()) == plan_schema()


def test_explain_groups_equal_layers_and_names_every_backend() -> None:
    requests = [
        LinearRequest(
            f"model.layers.{i}.o_proj", 4096, 4096, FP8_128X128_FP32, DType.FLOAT16, DType.FLOAT16
        )
        for i in range(40)
    ]
    text = explain_model(plan_model(requests, Device.named("sm_100"), PlanPolicy(), BACKENDS))
    assert text.count("o_proj") == 1
    assert "model.layers.*.o_proj (40 layers)" in text
    assert "writes bfloat16, not float16" in text
    for backend in BACKENDS:
        assert backend.name in text
