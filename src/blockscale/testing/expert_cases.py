"""Experts whose results are exact in every dtype and on every backend, quantized or not.

Every gate row picks one input times 64: inputs are integers from 1 to 7, so SiLU is the identity to
the last bit (1 / (1 + exp(-64)) is 1 in float32). Every up row picks input 0, which is 1. So the
hidden values are 64 x[p(r)], and quantizing them is exact wherever a block of 128 holds a 7.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from blockscale.backends.registry import BACKENDS
from blockscale.formats import FP8_128X128_FP32, K_MAJOR, BlockFormat, DType, PowerOfTwo
from blockscale.planning.device import Device
from blockscale.planning.expert_sets import ExpertsPlan
from blockscale.planning.planner import plan_experts
from blockscale.planning.policy import PlanPolicy
from blockscale.planning.request import LinearRequest
from blockscale.reference import dequantize
from blockscale.tensor import BlockScaledTensor

if TYPE_CHECKING:
    from blockscale.planning.decision import GroupedRows

EXPERTS, HIDDEN, INNER, CHOICES = 6, 256, 384, 3


def plan_for(
    backend: str = "cpu",
    dtype: DType = DType.FLOAT32,
    fmt: BlockFormat = FP8_128X128_FP32,
    policy: PlanPolicy | None = None,
    device: Device | None = None,
) -> ExpertsPlan:
    """The plan of the experts of this file, by one backend."""
    w13 = LinearRequest(
        "mlp.experts.w13",
        2 * INNER,
        HIDDEN,
        fmt,
        dtype,
        dtype,
        PowerOfTwo.NO,
        parts=(INNER, INNER),
        experts=EXPERTS,
    )
    w2 = replace(w13, name="mlp.experts.w2", n=HIDDEN, k=INNER, parts=())
    policy = replace(policy or PlanPolicy(), backends=(backend,))
    plans = plan_experts([w13, w2], device or Device.named("cpu"), policy, BACKENDS)
    return ExpertsPlan(*plans)


def with_rows(plan: ExpertsPlan, *rows: GroupedRows) -> ExpertsPlan:
    """The same plan with rows arranged in another way."""
    w13, w2 = (
        replace(
            one,
            choices=tuple(replace(c, offer=replace(c.offer, rows=rows)) for c in one.choices),
        )
        for one in (plan.w13, plan.w2)
    )
    return ExpertsPlan(w13, w2)


def exact_weights() -> tuple[BlockScaledTensor, BlockScaledTensor]:
    """w13 (experts, 2 inner, hidden) and w2 (experts, hidden, inner)."""
    generator = torch.Generator().manual_seed(3)
    block = FP8_128X128_FP32.block
    codes = torch.zeros(EXPERTS, 2 * INNER, HIDDEN)
    scales = torch.ones(EXPERTS, *block.grid(2 * INNER, HIDDEN))
    for expert in range(EXPERTS):
        picked = torch.randint(1, HIDDEN, (INNER,), generator=generator)
        # Input 1 is always 7, so that every block of hidden values has the largest one.
        picked[::128] = 1
        codes[expert, torch.arange(INNER), picked] = 32.0
    codes[:, INNER:, 0] = 0.5
    scales[:] = 2.0
    w13 = BlockScaledTensor(codes.to(torch.float8_e4m3fn), scales, FP8_128X128_FP32, K_MAJOR)
    small = torch.randint(-2, 3, (EXPERTS, HIDDEN, INNER), generator=generator)
    exponents = torch.randint(-3, 3, (EXPERTS, *block.grid(HIDDEN, INNER)), generator=generator)
    w2 = BlockScaledTensor(small.to(torch.float8_e4m3fn), 2.0**exponents, FP8_128X128_FP32, K_MAJOR)
    return w13, w2


def exact_tokens(tokens: int, seed: int = 0) -> torch.Tensor:
    """(tokens, hidden) integers: 1, 7, then anything from 1 to 7, and a 7 in every block."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(1, 8, (tokens, HIDDEN), generator=generator).float()
    values[:, 0] = 1
    values[:, 1::128] = 7
    return values


def routing(tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens, choices) ids that differ in a token, and weights that are powers of two."""
    generator = torch.Generator().manual_seed(seed + 100)
    order = torch.rand(tokens, EXPERTS, generator=generator).argsort(1)
    exponents = torch.randint(-3, 0, (tokens, CHOICES), generator=generator)
    return order[:, :CHOICES], 2.0**exponents


def exact_result(hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """What ``reference.experts`` says, one token and choice at a time, SiLU left out."""
    up, down = (dequantize(weight).double() for weight in exact_weights())
    dtype = hidden.dtype
    out = torch.zeros(hidden.shape)
    for token, row in enumerate(hidden.double()):
        for choice, expert in enumerate(ids[token].tolist()):
            if 0 <= expert < EXPERTS:
                gate, other = (up[expert] @ row).to(dtype).double().chunk(2)
                product = (down[expert] @ (gate * other).to(dtype).double()).to(dtype)
                out[token] += product.float() * weights[token, choice]
    return out.to(dtype)
