"""What a plan tells a person: one finding for each cause, with numbers and a cure."""

from __future__ import annotations

from dataclasses import replace

import pytest

from blockscale.backends.registry import BACKENDS
from blockscale.formats import FP8_128X128_FP32, FP8_128X128_UE8M0, DType, PowerOfTwo
from blockscale.planning.decision import Obstacle
from blockscale.planning.device import Device
from blockscale.planning.plan import Finding, ModelPlan, Severity
from blockscale.planning.planner import plan_model
from blockscale.planning.policy import PlanPolicy
from blockscale.planning.request import LinearRequest, ShardStyle
from blockscale.planning.sharding import Parallelism, WholeLayer, cut

BF16, FP16 = DType.BFLOAT16, DType.FLOAT16
PLAIN = LinearRequest("model.layers.0.o_proj", 4096, 4096, FP8_128X128_FP32, BF16, BF16)
# A provider-less CPU: nothing but the reference, which is runnable.
BARE_CPU = Device.named("cpu").with_packages()


def layers(count: int, **changes: object) -> list[LinearRequest]:
    return [
        replace(PLAIN, **{"name": f"model.layers.{i}.o_proj", "parts": (), **changes})
        for i in range(count)
    ]


def plan(requests: list[LinearRequest], device: str | Device = "sm_100", *only: str) -> ModelPlan:
    machine = Device.named(device) if isinstance(device, str) else device
    return plan_model(requests, machine, PlanPolicy(only or None), BACKENDS)


def of(found: ModelPlan, code: str) -> list[Finding]:
    return [finding for finding in found.findings if finding.code == code]


def split(request: LinearRequest, style: ShardStyle, degree: int) -> LinearRequest:
    result = cut(WholeLayer(request, style), Parallelism(degree))
    assert isinstance(result, LinearRequest)
    return result


def test_a_plan_that_runs_as_asked_has_no_findings() -> None:
    assert plan(layers(3), BARE_CPU, "reference").findings == ()


def test_layers_that_only_the_reference_serves_are_a_warning() -> None:
    (finding,) = of(plan(layers(3), BARE_CPU), "last_resort")
    assert finding.severity is Severity.WARNING
    assert "only reference serves 3 layers like model.layers.0.o_proj" in finding.message
    (odd,) = of(plan([replace(PLAIN, n=130, k=130, parts=())], "sm_80"), "last_resort")
    assert odd.layer == PLAIN.name
    assert of(plan(layers(3), "sm_90"), "last_resort") == []


def test_equal_layers_share_one_finding_that_counts_them() -> None:
    (finding,) = of(plan(layers(40)), "unread_scales")
    assert finding.severity is Severity.NOTE
    assert finding.layer is None
    assert "deep_gemm would serve 40 layers instead of flashinfer_trtllm" in finding.message


def test_one_layer_is_counted_in_the_singular() -> None:
    (finding,) = of(plan(layers(1)), "unread_scales")
    assert "would serve 1 layer instead of" in finding.message


@pytest.mark.parametrize("known", [PowerOfTwo.YES, PowerOfTwo.NO])
def test_scales_that_were_read_are_not_called_unread(known: PowerOfTwo) -> None:
    assert of(plan(layers(2, power_of_two=known)), "unread_scales") == []


def test_unread_scales_are_no_finding_where_reading_them_changes_nothing() -> None:
    """SM90 reads float32 scales; on SM100 float16 keeps DeepGEMM out whatever the scales are."""
    assert of(plan(layers(2), "sm_90"), "unread_scales") == []
    assert of(plan(layers(2, activation_dtype=FP16, out_dtype=FP16)), "unread_scales") == []


def test_unread_scales_are_no_finding_if_the_policy_prefers_another_backend() -> None:
    found = plan(layers(2), "sm_100", "triton", "deep_gemm")
    assert {r.obstacle for r in found.layers[0].rejected if r.backend == "deep_gemm"} == {
        Obstacle.UNVERIFIED_SCALES
    }
    assert of(found, "unread_scales") == []


def test_unread_scales_that_leave_no_backend_say_so() -> None:
    found = plan(layers(1), "sm_100", "deep_gemm")
    (finding,) = of(found, "unread_scales")
    assert "instead of no backend" in finding.message
    assert [f.severity for f in of(found, "unservable")] == [Severity.FAULT]


def test_a_single_unservable_layer_is_named_and_many_are_counted() -> None:
    odd = {"n": 4100, "k": 4100}
    (one,) = of(plan(layers(1, **odd), "sm_90", "deep_gemm"), "unservable")
    assert one.layer == "model.layers.0.o_proj"
    (many,) = of(plan(layers(7, **odd), "sm_90", "deep_gemm"), "unservable")
    assert many.layer is None
    assert "7 layers like model.layers.0.o_proj (N=4100, K=4100" in many.message
    assert "--explain" in many.message


def test_different_causes_are_different_findings() -> None:
    lost = layers(2, n=4100) + layers(3, k=4100)
    assert len(of(plan(lost, "sm_90", "deep_gemm"), "unservable")) == 2


def test_a_split_block_names_the_cut_and_the_cure() -> None:
    dense = split(replace(PLAIN, k=1536), ShardStyle.ROW, 8)
    (finding,) = of(plan([dense], "sm_90"), "shard_splits_block")
    assert finding.severity is Severity.WARNING
    assert finding.layer == dense.name
    assert "192 columns per rank are 1.5 blocks of 128" in finding.message
    assert "a smaller tensor parallel degree keeps blocks whole" in finding.message
    experts = split(replace(PLAIN, k=1536, experts=8), ShardStyle.ROW, 8)
    (finding,) = of(plan([experts], "sm_90"), "shard_splits_block")
    assert "expert parallelism (--ep) keeps experts whole" in finding.message


def test_each_backend_that_cannot_run_yet_is_noted_once() -> None:
    found = plan(layers(5, format=FP8_128X128_UE8M0, power_of_two=PowerOfTwo.YES), "sm_100")
    (finding,) = of(found, "plan_only")
    assert finding.severity is Severity.NOTE
    assert "deep_gemm is planned for 5 layers" in finding.message


def test_findings_of_the_reader_come_first_and_are_kept() -> None:
    mine = Finding(Severity.WARNING, "mine", "something about a file")
    device = Device.named("sm_100")
    found = plan_model(layers(1), device, PlanPolicy(), BACKENDS, findings=[mine])
    assert found.findings[0] == mine
    assert len(found.findings) > 1
