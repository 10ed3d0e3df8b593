"""Builds a plan's kernels by running each once, on weights that are made up."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from blockscale.errors import BackendError
from blockscale.formats import K_MAJOR, ScaleFormat
from blockscale.modules.linear import BlockScaledLinear
from blockscale.planning.policy import Exactness, PlanPolicy
from blockscale.tensor import BlockScaledTensor, torch_dtype

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from blockscale.planning.plan import LinearPlan

# GPU kernels are compiled for tiles, which are chosen by M: every power of two that serving meets.
TOKEN_COUNTS = tuple(2**power for power in range(14))
# A CPU library is built once for all shapes; one call of each kind shows that it runs.
CPU_TOKEN_COUNTS = (1, 16)


def warm(
    plans: Iterable[LinearPlan], place: str, progress: Callable[[int], None] | None = None
) -> int:
    """Prepare and run each plan once for each token count, so that no later call compiles.

    ``plans``: those of ``planning.warm_up.warm_up_of``. ``place``: ``cpu`` or ``cuda``. One weight
    is in memory at a time. ``progress`` is called with the plans done since its last call. Gives
    the number of calls made.

    Raises BackendError if a provider fails, or for experts, which this cannot run.
    """
    calls = 0
    for plan in plans:
        if plan.request.experts is not None:
            msg = f"layer {plan.name!r} is a stack of experts, which cannot be warmed yet"
            raise BackendError(msg)
        calls += _run(plan, place)
        if progress is not None:
            progress(1)
    return calls


def token_counts(plan: LinearPlan, place: str) -> tuple[int, ...]:
    """The token counts that ``warm`` runs a plan with: at least one in each range of M."""
    counts = CPU_TOKEN_COUNTS if place == "cpu" else TOKEN_COUNTS
    firsts = {max(1, choice.m_range.min_m) for choice in plan.choices}
    return tuple(sorted({*counts, *firsts}))


def _run(plan: LinearPlan, place: str) -> int:
    # A made-up weight loses nothing worth refusing; the real one is measured when it is loaded.
    policy = PlanPolicy(exactness=Exactness.ALLOW_LOSSY, max_relative_error=1.0)
    request = plan.request
    bias = torch.zeros(request.n, device=place) if request.has_bias else None
    layer = BlockScaledLinear(plan, _ones(plan, place), bias, policy)
    counts = token_counts(plan, place)
    dtype = torch_dtype(request.activation_dtype)
    for count in counts:
        layer(torch.zeros(count, request.k, dtype=dtype, device=place))
    if place != "cpu":
        torch.cuda.synchronize()
    return len(counts)


def _ones(plan: LinearPlan, place: str) -> BlockScaledTensor:
    """A weight of ones, as the checkpoint would have it."""
    request = plan.request
    fmt = request.format
    data = torch.ones(request.n, request.k, device=place).to(torch.float8_e4m3fn)
    grid = fmt.block.grid(request.n, request.k)
    dtypes = {
        ScaleFormat.FP32: torch.float32,
        ScaleFormat.BF16: torch.bfloat16,
        ScaleFormat.UE8M0: torch.float8_e8m0fnu,
    }
    scales = torch.ones(grid, device=place).to(dtypes[fmt.scale])
    return BlockScaledTensor(data, scales, fmt, K_MAJOR)
