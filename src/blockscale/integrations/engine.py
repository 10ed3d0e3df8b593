"""What the plugins of serving engines share: no engine is imported here.

A loaded layer as this library's values, what every layer of the process is planned on, whether a
layer is taken at all, and the words in the log.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING

from blockscale.backends.registry import all_backends
from blockscale.errors import FormatError
from blockscale.formats import E4M3FN, K_MAJOR, BlockFormat, BlockShape, PowerOfTwo, ScaleFormat
from blockscale.planning.decision import LAST_RESORT
from blockscale.planning.explain import conversion_words, reasons_by_backend, request_words
from blockscale.planning.planner import plan_linear
from blockscale.planning.policy import Strictness
from blockscale.probe import detect_device
from blockscale.settings import read_settings

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from blockscale.planning.device import Device
    from blockscale.planning.plan import LinearPlan
    from blockscale.planning.policy import PlanPolicy
    from blockscale.planning.request import LinearRequest
    from blockscale.tensor import BlockScaledTensor

LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Situation:
    """What every layer of this process is planned on."""

    device: Device
    policy: PlanPolicy


@cache
def situation() -> Situation:
    """This machine and the policy in the environment, read once per process.

    A layer that nothing may serve is left to the engine, so the policy never raises.
    """
    policy = replace(read_settings(os.environ).policy, strictness=Strictness.REPORT)
    return Situation(detect_device(), policy)


def block_format(block_size: Sequence[int], scale_dtype: torch.dtype) -> BlockFormat:
    """E4M3FN codes in blocks of (rows, columns), scales as their dtype says.

    Raises FormatError unless ``scale_dtype`` is float32 or float8_e8m0fnu, and the block positive.
    """
    import torch

    known = {torch.float32: ScaleFormat.FP32, torch.float8_e8m0fnu: ScaleFormat.UE8M0}
    if scale_dtype not in known:
        msg = f"scales are {scale_dtype}; expected torch.float32 or torch.float8_e8m0fnu"
        raise FormatError(msg)
    rows, columns = block_size
    return BlockFormat(E4M3FN, known[scale_dtype], BlockShape(rows, columns))


def block_scaled(
    weight: torch.Tensor, scales: torch.Tensor, block_size: Sequence[int]
) -> BlockScaledTensor:
    """The pair as one value, sharing both storages.

    Raises FormatError for a dtype or shape that contradicts the block.
    """
    from blockscale.tensor import BlockScaledTensor

    fmt = block_format(block_size, scales.dtype)
    return BlockScaledTensor(weight.detach(), scales.detach(), fmt, K_MAJOR)


def powers_of_two(weight: BlockScaledTensor) -> PowerOfTwo:
    """Whether every scale is a power of two, read from the scales: a small copy, never UNKNOWN."""
    from blockscale.reference import relayout

    if weight.format.scale is ScaleFormat.UE8M0:
        return PowerOfTwo.YES
    try:
        relayout(weight, K_MAJOR, ScaleFormat.UE8M0)
    except FormatError:
        return PowerOfTwo.NO
    return PowerOfTwo.YES


def take(request: LinearRequest) -> LinearPlan | str:
    """The plan of a layer, or why blockscale leaves it to the engine."""
    here = situation()
    plan = plan_linear(request, here.device, here.policy, all_backends())
    if not plan.is_servable:
        return "; ".join(f"{name}: {', '.join(why)}" for name, why in _reasons(plan))
    if LAST_RESORT in plan.backends and not here.device.is_cpu:
        return "only the reference could run it, and the engine's own kernels are faster"
    return plan


def log_refusal(name: str, reason: str) -> None:
    """One line for a layer that stays with the engine."""
    LOGGER.info("blockscale: %s stays with the engine: %s", name, reason)


def log_plan(plan: LinearPlan, level: int = logging.INFO) -> None:
    """One line for a planned layer; the reasons against others once for layers that are alike."""
    chosen = ", ".join(f"{c.m_range}: {c.offer.backend}" for c in plan.choices)
    words = request_words(plan.request)
    LOGGER.log(
        level,
        "blockscale: %s: %s -> %s; weight: %s",
        plan.name,
        words,
        chosen,
        conversion_words(plan),
    )
    alike = replace(plan.request, name="")
    if alike not in _EXPLAINED:
        _EXPLAINED.add(alike)
        for name, why in _reasons(plan):
            LOGGER.log(level, "blockscale: %s: not %s: %s", plan.name, name, ", ".join(why))


_EXPLAINED: set[LinearRequest] = set()


def _reasons(plan: LinearPlan) -> tuple[tuple[str, tuple[str, ...]], ...]:
    return reasons_by_backend(plan.rejected)
