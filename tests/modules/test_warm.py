"""Warming runs every distinct kernel of a plan, and nothing else."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from blockscale.backends.registry import BACKENDS
from blockscale.errors import BackendError
from blockscale.formats import (
    FP8_128X128_FP32,
    FP8_128X128_UE8M0,
    BlockFormat,
    DType,
    ScaleFormat,
)
from blockscale.modules.warm import CPU_TOKEN_COUNTS, TOKEN_COUNTS, token_counts, warm
from blockscale.planning.decision import Arrangement, GroupedRows, MRange
from blockscale.planning.device import Device
from blockscale.planning.planner import plan_linear
from blockscale.planning.policy import PlanPolicy
from blockscale.planning.request import LinearRequest
from blockscale.probe import detect_device
from blockscale.testing import expert_cases

if TYPE_CHECKING:
    from blockscale.planning.plan import LinearPlan


def planned(fmt: BlockFormat, backend: str, **changes: object) -> LinearPlan:
    request = LinearRequest("x", 200, 320, fmt, DType.BFLOAT16, DType.BFLOAT16, **changes)
    return plan_linear(request, detect_device(), PlanPolicy(backends=(backend,)), BACKENDS)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    "fmt",
    [FP8_128X128_FP32, FP8_128X128_UE8M0, FP8_128X128_FP32.with_scale(ScaleFormat.BF16)],
    ids=str,
)
def test_each_plan_is_run_for_each_token_count(fmt: BlockFormat, backend: str) -> None:
    done: list[int] = []
    plans = [planned(fmt, backend), planned(fmt, backend, has_bias=True)]
    assert warm(plans, "cpu", done.append) == 2 * len(CPU_TOKEN_COUNTS)
    assert done == [1, 1]


def test_every_range_of_m_is_run() -> None:
    plan = planned(FP8_128X128_FP32, "cpu")
    choice = plan.choices[0]
    split = replace(
        plan,
        choices=(
            replace(choice, m_range=MRange(0, 2)),
            replace(choice, m_range=MRange(3, 99)),
            replace(choice, m_range=MRange(100, None)),
        ),
    )
    assert token_counts(split, "cpu") == (1, 3, 16, 100)
    assert token_counts(split, "cuda") == tuple(sorted({*TOKEN_COUNTS, 3, 100}))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_experts_are_run_with_both_weights(backend: str) -> None:
    done: list[int] = []
    experts = expert_cases.plan_for(backend, DType.BFLOAT16)
    plans = [experts.w13, planned(FP8_128X128_FP32, backend), experts.w2]
    assert warm(plans, "cpu", done.append) == 2 * len(CPU_TOKEN_COUNTS)
    assert done == [2, 1]


def test_every_arrangement_of_rows_is_run() -> None:
    experts = expert_cases.plan_for("reference")
    rows = (
        GroupedRows(MRange(0, 4), Arrangement.MASKED, 8),
        GroupedRows(MRange(5), Arrangement.CONTIGUOUS, 16),
    )
    arranged = expert_cases.with_rows(experts, *rows)
    assert token_counts(arranged.w13, "cpu") == (1, 5, 16)
    assert warm([arranged.w13, arranged.w2], "cpu") == 3


def test_one_weight_of_experts_alone_is_refused_by_name() -> None:
    request = LinearRequest(
        "moe.w2", 256, 256, FP8_128X128_FP32, DType.BFLOAT16, DType.BFLOAT16, experts=4
    )
    plan = plan_linear(request, Device.named("sm_90"), PlanPolicy(), BACKENDS)
    with pytest.raises(BackendError, match=r"moe\.w2"):
        warm([plan], "cpu")
