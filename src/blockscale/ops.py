"""``torch.ops.blockscale.linear``: the one operator that a planned layer calls.

Opaque to torch.compile on purpose: which backend serves a token count is looked up inside, on the
host, so that traced code has no branch on M (docs/adr/0005). The operator receives a *handle*, an
integer that names a bound plan; a handle keeps its meaning for the life of the process.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias, cast

import torch

from blockscale.errors import BackendError
from blockscale.tensor import torch_dtype

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from blockscale.backends.base import Backend, MultiplyFloat, MultiplyQuantized
    from blockscale.planning.decision import Offer
    from blockscale.planning.plan import LinearPlan
    from blockscale.tensor import BlockScaledTensor

    # (activation (M, k), out (M, n), bias (n) or None), M >= 1: quantize if needed, multiply.
    Step: TypeAlias = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], None]


@dataclass(frozen=True, slots=True)
class BoundLinear:
    """A plan bound to a prepared weight: what a forward pass needs and nothing else.

    ``steps`` are in order of rising M; the last serves everything above the others.
    """

    name: str
    n: int
    k: int
    activation_dtype: torch.dtype
    out_dtype: torch.dtype
    steps: tuple[tuple[int, Step], ...]

    def step_for(self, m: int) -> Step:
        """The step that serves ``m`` tokens."""
        for max_m, step in self.steps:
            if m <= max_m:
                return step
        msg = f"layer {self.name!r}: no backend was planned for M={m}"
        raise BackendError(msg)

    def check(self, activation: torch.Tensor) -> None:
        """Refuse an activation that is not the planned one: kernels read bytes, not intentions."""
        if activation.shape[-1] != self.k or activation.dtype is not self.activation_dtype:
            msg = (
                f"layer {self.name!r} was planned for (..., {self.k}) {self.activation_dtype}, got "
                f"{tuple(activation.shape)} {activation.dtype}; plan it for this dtype"
            )
            raise BackendError(msg)


NO_LIMIT = 2**63 - 1

_BOUND: dict[int, BoundLinear] = {}
_next_handle = 0


def bind(
    plan: LinearPlan, weight: BlockScaledTensor, backends: Sequence[Backend], handle: int | None
) -> int:
    """Register a plan with its prepared weight and return the handle that the operator takes.

    ``backends``: those of ``plan.choices``, in the same order. ``handle``: an existing one to bind
    anew (the layer moved to another device), None for a fresh one.
    """
    global _next_handle
    if handle is None:
        handle, _next_handle = _next_handle, _next_handle + 1
    steps = tuple(
        (
            NO_LIMIT if choice.m_range.max_m is None else choice.m_range.max_m,
            _step(backend, choice.offer, weight),
        )
        for choice, backend in zip(plan.choices, backends, strict=True)
    )
    request = plan.request
    _BOUND[handle] = BoundLinear(
        request.name,
        request.n,
        request.k,
        torch_dtype(request.activation_dtype),
        torch_dtype(request.out_dtype),
        steps,
    )
    return handle


def release(handle: int) -> None:
    """Forget a bound plan, so that its weight can be freed."""
    _BOUND.pop(handle, None)


def _step(backend: Backend, offer: Offer, weight: BlockScaledTensor) -> Step:
    multiply = backend.bind(weight, offer)
    if offer.activation is None:
        return cast("MultiplyFloat", multiply)
    multiply_quantized = cast("MultiplyQuantized", multiply)

    def quantize_and_multiply(
        activation: torch.Tensor, out: torch.Tensor, bias: torch.Tensor | None
    ) -> None:
        multiply_quantized(backend.quantize_activation(activation, offer), out, bias)

    return quantize_and_multiply


def _linear(activation: torch.Tensor, bias: torch.Tensor | None, handle: int) -> torch.Tensor:
    bound = _BOUND[handle]
    bound.check(activation)
    matrix = activation.reshape(-1, bound.k)
    if matrix.stride(-1) != 1:
        matrix = matrix.contiguous()
    m = matrix.shape[0]
    out = torch.empty((m, bound.n), dtype=bound.out_dtype, device=activation.device)
    if m > 0:
        bound.step_for(m)(matrix, out, bias)
    return out.view(*activation.shape[:-1], bound.n)


def _linear_fake(activation: torch.Tensor, bias: torch.Tensor | None, handle: int) -> torch.Tensor:  # noqa: ARG001 - the operator's signature
    bound = _BOUND[handle]
    bound.check(activation)
    return activation.new_empty((*activation.shape[:-1], bound.n), dtype=bound.out_dtype)


# Defined through Library, not @custom_op: the decorator's Python wrapper costs more per call than a
# small GEMM takes.
_LIBRARY = torch.library.Library("blockscale", "DEF")
_LIBRARY.define("linear(Tensor activation, Tensor? bias, int handle) -> Tensor")
_LIBRARY.impl("linear", _linear, "CPU")
_LIBRARY.impl("linear", _linear, "CUDA")
torch.library.register_fake("blockscale::linear", _linear_fake, lib=_LIBRARY)


def linear(activation: torch.Tensor, bias: torch.Tensor | None, handle: int) -> torch.Tensor:
    """Multiply: activation (..., k) x weight^T + bias as (..., n) in the planned output dtype.

    ``handle`` comes from ``bind``. M = 0 gives an empty result and launches nothing. Raises
    BackendError if the activation has another dtype or K than was planned.
    """
    # Only a tracer needs the operator. Called eagerly, its trip through the dispatcher and back
    # costs 50 us (AMD EPYC, 2 vCPU, torch 2.13, 2026-11-23), as much as SmolLM2's layers take.
    if not torch.compiler.is_compiling():
        return _linear(activation, bias, handle)
    result: torch.Tensor = torch.ops.blockscale.linear(activation, bias, handle)
    return result
