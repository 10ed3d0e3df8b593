"""Builds a plan's kernels by running each once, on weights that are made up."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from blockscale.errors import BackendError
from blockscale.formats import K_MAJOR, ScaleFormat
from blockscale.modules.experts import BlockScaledExperts
from blockscale.modules.linear import BlockScaledLinear
from blockscale.planning.expert_sets import W2, W13, ExpertsPlan, expert_sets
from blockscale.planning.policy import Exactness, PlanPolicy
from blockscale.tensor import BlockScaledTensor, torch_dtype

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from blockscale.planning.plan import LinearPlan

# GPU kernels are compiled for tiles, which are chosen by M: every power of two that serving meets.
TOKEN_COUNTS = tuple(2**power for power in range(14))
# A CPU library is built once for all shapes; one call of each kind shows that it runs.
CPU_TOKEN_COUNTS = (1, 16)

# Experts that a token goes to in nearly all models; another number needs no other kernel.
MOST_CHOICES = 8
# 1.0 in E4M3.
ONE_CODE = 0x38
# A made-up weight loses nothing worth refusing; the real one is measured when it is loaded.
ANY_ERROR = PlanPolicy(exactness=Exactness.ALLOW_LOSSY, max_relative_error=1.0)


def warm(
    plans: Iterable[LinearPlan], place: str, progress: Callable[[int], None] | None = None
) -> int:
    """Prepare and run each plan once for each token count, so that no later call compiles.

    ``plans``: those of ``planning.warm_up.warm_up_of``. ``place``: ``cpu`` or ``cuda``. One weight
    is in memory at a time, or the two of a set of experts. ``progress`` is called with the plans
    done since its last call. Gives the number of calls made.

    Raises BackendError if a provider fails, or for one weight of experts without the other.
    """
    calls = 0
    by_request = {plan.request: plan for plan in plans}
    for requests in expert_sets(by_request):
        members = [by_request[request] for request in requests]
        is_dense = requests[0].experts is None
        calls += _run(members[0], place) if is_dense else _run_experts(members, place)
        if progress is not None:
            progress(len(members))
    return calls


def token_counts(plan: LinearPlan, place: str) -> tuple[int, ...]:
    """The token counts that ``warm`` runs a plan with: at least one in each range of M."""
    counts = CPU_TOKEN_COUNTS if place == "cpu" else TOKEN_COUNTS
    firsts = {max(1, choice.m_range.min_m) for choice in plan.choices}
    for choice in plan.choices:
        served = [rows.m_range.min_m for rows in choice.offer.rows]
        firsts.update(first for first in served if choice.m_range.contains(first) and first > 0)
    return tuple(sorted({*counts, *firsts}))


def _run_experts(members: Sequence[LinearPlan], place: str) -> int:
    """A set of experts, each token going to as many different ones as there are, up to eight."""
    by_leaf = {plan.name.rpartition(".")[2]: plan for plan in members}
    if set(by_leaf) != {W13, W2}:
        names = " and ".join(plan.name for plan in members)
        msg = f"experts are warmed with both of their weights, {W13} and {W2}; here is {names}"
        raise BackendError(msg)
    plan = ExpertsPlan(by_leaf[W13], by_leaf[W2])
    stacks = [_ones(one, place) for one in (plan.w13, plan.w2)]
    layer = BlockScaledExperts(plan, stacks[0], stacks[1], ANY_ERROR)
    counts = token_counts(plan.w13, place)
    dtype = torch_dtype(plan.w13.request.activation_dtype)
    choices = min(MOST_CHOICES, plan.experts)
    for count in counts:
        hidden = torch.zeros(count, plan.w13.request.k, dtype=dtype, device=place)
        ids = torch.arange(count * choices, device=place).view(count, choices) % plan.experts
        layer(hidden, ids, torch.ones(count, choices, device=place))
    if place != "cpu":
        torch.cuda.synchronize()
    return len(counts)


def _run(plan: LinearPlan, place: str) -> int:
    request = plan.request
    bias = torch.zeros(request.n, device=place) if request.has_bias else None
    layer = BlockScaledLinear(plan, _ones(plan, place), bias, ANY_ERROR)
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
    leading = () if request.experts is None else (request.experts,)
    shape = (*leading, request.n, request.k)
    data = torch.full(shape, ONE_CODE, dtype=torch.uint8, device=place).view(torch.float8_e4m3fn)
    grid = (*leading, *fmt.block.grid(request.n, request.k))
    dtypes = {
        ScaleFormat.FP32: torch.float32,
        ScaleFormat.BF16: torch.bfloat16,
        ScaleFormat.UE8M0: torch.float8_e8m0fnu,
    }
    scales = torch.ones(grid, device=place).to(dtypes[fmt.scale])
    return BlockScaledTensor(data, scales, fmt, K_MAJOR)
