"""The founding case, SGLang PR #22300: MiniMax-M2.5 planned from headers in this process."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import pytest

from blockscale.backends.registry import BACKENDS
from blockscale.checkpoint.read import read_checkpoint
from blockscale.checkpoint.requests import RequestOptions, Requests, requests_of
from blockscale.checkpoint.schema import read_layers
from blockscale.formats import DType, PowerOfTwo, ScaleFormat
from blockscale.planning.decision import Obstacle
from blockscale.planning.device import Device
from blockscale.planning.plan import Conversion, ModelPlan, Severity
from blockscale.planning.planner import plan_model
from blockscale.planning.policy import Exactness, PlanPolicy
from blockscale.planning.sharding import Parallelism
from blockscale.testing.model_shapes import minimax_m25, write_model_headers

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

BF16, FP16 = DType.BFLOAT16, DType.FLOAT16
LOSSY = PlanPolicy(exactness=Exactness.ALLOW_LOSSY)
LAYERS = 62
LEAVES = {"qkv_proj", "o_proj", "w13", "w2"}


class Model:
    """The model's headers, and what was asked of them: once for all devices and policies."""

    def __init__(self, folder: Path) -> None:
        write_model_headers(folder, minimax_m25())
        self.checkpoint = read_checkpoint(folder)
        self.layers = read_layers(self.checkpoint)
        self.wanted = cache(self._wanted)

    def _wanted(
        self, dtype: DType, parallelism: Parallelism, scales: PowerOfTwo | None
    ) -> Requests:
        read = {layer.name: scales for layer in self.layers.quantized} if scales else None
        options = RequestOptions(dtype, parallelism, power_of_two=read)
        return requests_of(self.checkpoint, self.layers, options)


@pytest.fixture(scope="module")
def minimax(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(tmp_path_factory.mktemp("minimax"))


def planned(
    model: Model,
    device: str,
    dtype: DType,
    *,
    policy: PlanPolicy | None = None,
    parallelism: Parallelism | None = None,
    scales: PowerOfTwo | None = None,
) -> ModelPlan:
    layers = model.layers
    wanted = model.wanted(dtype, parallelism or Parallelism(), scales)
    return plan_model(
        wanted.requests,
        Device.named(device),
        policy or PlanPolicy(),
        BACKENDS,
        skipped=layers.skipped,
        findings=(*layers.findings, *wanted.findings),
    )


def leaf(name: str) -> str:
    return name.rpartition(".")[2]


def codes(plan: ModelPlan) -> list[str]:
    return [finding.code for finding in plan.findings]


def obstacles(plan: ModelPlan, backend: str) -> Iterable[set[Obstacle]]:
    for layer in plan.layers:
        yield {r.obstacle for r in layer.rejected if r.backend == backend}


@pytest.mark.parametrize("policy", [PlanPolicy(), LOSSY], ids=["exact", "lossy"])
@pytest.mark.parametrize("scales", [None, PowerOfTwo.YES, PowerOfTwo.NO], ids=str)
@pytest.mark.parametrize("device", ["sm_100", "sm_103"])
def test_float16_keeps_float32_scales_on_blackwell_whatever_is_permitted(
    minimax: Model, device: str, scales: PowerOfTwo | None, policy: PlanPolicy
) -> None:
    plan = planned(minimax, device, FP16, policy=policy, scales=scales)
    assert len(plan.layers) == LAYERS * len(LEAVES)
    for layer in plan.layers:
        assert layer.weight is not None
        assert layer.weight.format.scale is ScaleFormat.FP32
        assert "deep_gemm" not in layer.backends
        assert layer.is_lossless is True
    assert all(Obstacle.OUT_DTYPE in found for found in obstacles(plan, "deep_gemm"))
    assert "unread_scales" not in codes(plan), "reading the scales would change nothing"


def test_bfloat16_with_unread_scales_converts_nothing_and_says_what_reading_would_change(
    minimax: Model,
) -> None:
    plan = planned(minimax, "sm_100", BF16)
    assert {layer.weight.format.scale for layer in plan.layers if layer.weight} == {
        ScaleFormat.FP32
    }
    assert all(found == {Obstacle.UNVERIFIED_SCALES} for found in obstacles(plan, "deep_gemm"))
    unread = [finding for finding in plan.findings if finding.code == "unread_scales"]
    # Attention goes to TRT-LLM meanwhile, experts to Triton: two things that would change.
    assert len(unread) == 2
    for finding in unread:
        assert finding.severity is Severity.NOTE
        assert "deep_gemm would serve 124 layers" in finding.message
        assert "--read-scales" in finding.message
        assert "--allow-lossy" in finding.message


def test_bfloat16_with_powers_of_two_is_packed_without_touching_the_weights(
    minimax: Model,
) -> None:
    plan = planned(minimax, "sm_100", BF16, scales=PowerOfTwo.YES)
    for layer in plan.layers:
        assert layer.backends == ("deep_gemm",)
        assert (layer.conversion, layer.is_lossless) == (Conversion.RELAYOUT, True)
        assert layer.weight is not None
        assert layer.weight.format.scale is ScaleFormat.UE8M0
    assert "unread_scales" not in codes(plan)


def test_bfloat16_with_other_scales_is_requantized_only_with_permission(
    minimax: Model,
) -> None:
    exact = planned(minimax, "sm_100", BF16, scales=PowerOfTwo.NO)
    assert all(found == {Obstacle.LOSSY_CONVERSION} for found in obstacles(exact, "deep_gemm"))
    lossy = planned(minimax, "sm_100", BF16, scales=PowerOfTwo.NO, policy=LOSSY)
    for layer in lossy.layers:
        assert layer.backends == ("deep_gemm",)
        assert (layer.conversion, layer.is_lossless) == (Conversion.REQUANTIZE, False)
    unread = planned(minimax, "sm_100", BF16, policy=LOSSY)
    assert {layer.is_lossless for layer in unread.layers} == {None}


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_hopper_serves_every_layer_from_the_stored_weight(minimax: Model, dtype: DType) -> None:
    plan = planned(minimax, "sm_90", dtype)
    assert {layer.conversion for layer in plan.layers} == {Conversion.NONE}
    # Gluon's estimate is better than cuda's for some tokens, but by less than it may be off.
    serving = {"deep_gemm"} if dtype is BF16 else {"cuda"}
    attention = [layer for layer in plan.layers if leaf(layer.name) in {"qkv_proj", "o_proj"}]
    assert {backend for layer in attention for backend in layer.backends} == serving


@pytest.mark.parametrize("device", ["sm_90", "sm_100"])
def test_tp8_splits_the_experts_blocks_and_only_theirs(minimax: Model, device: str) -> None:
    plan = planned(minimax, device, BF16, parallelism=Parallelism(8))
    lost = {leaf(layer.name) for layer in plan.unservable}
    assert lost == {"w13", "w2"}
    split = [finding for finding in plan.findings if finding.code == "shard_splits_block"]
    assert len(split) == 2, "one finding for each cause, not one for each layer"
    for finding in split:
        assert f"{LAYERS} layers like" in finding.message
        assert "expert parallelism" in finding.message
    assert "part w1: 192 rows per rank are 1.5 blocks of 128" in split[0].message
    assert "192 columns per rank are 1.5 blocks of 128" in split[1].message
    faults = [finding for finding in plan.findings if finding.severity is Severity.FAULT]
    assert [finding.code for finding in faults] == ["unservable", "unservable"]


@pytest.mark.parametrize(("tensor", "expert"), [(4, 1), (8, 8), (8, 2)])
def test_the_cures_that_the_finding_names_work(minimax: Model, tensor: int, expert: int) -> None:
    plan = planned(minimax, "sm_90", BF16, parallelism=Parallelism(tensor, expert))
    assert plan.unservable == ()
    assert "shard_splits_block" not in codes(plan)


def test_what_stays_unquantized_is_listed_with_the_reason(
    minimax: Model,
) -> None:
    plan = planned(minimax, "sm_90", BF16)
    reasons = {skipped.name: skipped.reason for skipped in plan.skipped}
    assert reasons["lm_head"] == "BF16: on the checkpoint's skip list"
    gate = reasons["model.layers.0.block_sparse_moe.gate"]
    assert gate == "F32: on the checkpoint's skip list"
    assert not any("gate_proj" in name for name in reasons)
