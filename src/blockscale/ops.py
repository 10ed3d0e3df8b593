"""``torch.ops.blockscale.linear``: the one operator that a planned layer calls.

Opaque to torch.compile on purpose: which backend serves a token count is looked up inside, on the
host, so that traced code has no branch on M (docs/adr/0005). The operator receives a *handle*, an
integer that names a bound plan; a handle keeps its meaning for the life of the process.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, TypeVar, cast

import torch

from blockscale.errors import BackendError
from blockscale.tensor import torch_dtype

if TYPE_CHECKING:
    from collections.abc import Sequence

    from blockscale.backends.base import Backend, MultiplyFloat, MultiplyQuantized
    from blockscale.kernels.step import Step, Steps
    from blockscale.planning.decision import Offer
    from blockscale.planning.plan import LinearPlan
    from blockscale.tensor import BlockScaledTensor


@dataclass(frozen=True, slots=True)
class Call:
    """What follows from an activation's shape: nothing is left to be decided in a forward pass."""

    step: Step
    template: torch.Tensor
    """One element, expanded to the result's shape. ``empty_like`` reads shape, dtype and device
    from it in C++; ``torch.empty``, which is told them in Python, takes twice as long (2.2 and
    1.2 us, AMD EPYC, torch 2.13, 2026-11-25)."""


@dataclass(frozen=True, slots=True)
class BoundLinear:
    """A plan bound to a prepared weight: what a forward pass needs and nothing else.

    ``ranges`` are in order of rising M; the last serves everything above the others. ``calls``: by
    the activation's shape, as met. ``one``: an element of the result's dtype and device, in which
    every call's template lies: a forward allocates nothing that outlives it, since what the pool of
    a CUDA graph holds after a warm-up must be a result (torch/_inductor/cudagraph_trees.py).
    """

    name: str
    n: int
    k: int
    activation_dtype: torch.dtype
    out_dtype: torch.dtype
    device: torch.device
    ranges: tuple[tuple[int, Steps], ...]
    calls: dict[torch.Size, Call]
    one: torch.Tensor

    def new_call(self, activation: torch.Tensor) -> Call:
        """What serves activations of this shape; kept.

        Raises BackendError if the activation has another dtype or K than was planned.
        """
        self.check(activation)
        shape = activation.shape
        m = math.prod(shape[:-1])
        step = _nothing if m == 0 else self.steps_for(m)(m)
        call = Call(step, self.one.expand(*shape[:-1], self.n))
        if len(self.calls) >= MAX_CALLS:
            self.calls.clear()
        self.calls[shape] = call
        return call

    def steps_for(self, m: int) -> Steps:
        """What the backend planned for ``m`` tokens bound."""
        for max_m, steps in self.ranges:
            if m <= max_m:
                return steps
        msg = f"layer {self.name!r}: no backend was planned for M={m}"
        raise BackendError(msg)

    def check(self, activation: torch.Tensor) -> None:
        """Refuse an activation that is not the planned one: kernels read bytes, not intentions."""
        if activation.shape[-1:] != (self.k,) or activation.dtype is not self.activation_dtype:
            msg = (
                f"layer {self.name!r} was planned for (..., {self.k}) {self.activation_dtype}, got "
                f"{tuple(activation.shape)} {activation.dtype}; plan it for this dtype"
            )
            raise BackendError(msg)

    def other_bias(self, bias: torch.Tensor) -> BackendError:
        """What to raise for a bias that is not (n,) in the planned output dtype."""
        msg = (
            f"layer {self.name!r} was planned for a bias of ({self.n},) {self.out_dtype}, got "
            f"{tuple(bias.shape)} {bias.dtype}"
        )
        return BackendError(msg)

    def elsewhere(self, activation: torch.Tensor) -> BackendError:
        """What to raise for an activation on another device: kernels read addresses."""
        msg = (
            f"layer {self.name!r} is on {self.device}, its activation on {activation.device}; "
            "move one of them"
        )
        return BackendError(msg)


_Named = TypeVar("_Named")


class Handles(dict[int, _Named]):
    """What the handles of this process name."""

    def __missing__(self, handle: int) -> _Named:
        """Raise BackendError: the module is gone, or lives in another process."""
        msg = (
            f"no layer has the handle {handle} in this process: its module was deleted, or a "
            "traced graph came from another process; trace it again"
        )
        raise BackendError(msg)


# Shapes of activations that one layer remembers.
MAX_CALLS = 4096
NO_LIMIT = 2**63 - 1

_BOUND: Handles[BoundLinear] = Handles()
_HANDLES = count()


def bind(
    plan: LinearPlan, weight: BlockScaledTensor, backends: Sequence[Backend], handle: int | None
) -> int:
    """Register a plan with its prepared weight and return the handle that the operator takes.

    ``backends``: those of ``plan.choices``, in the same order. ``handle``: an existing one to bind
    anew (the layer moved to another device), None for a fresh one.
    """
    if handle is None:
        handle = next(_HANDLES)
    activation_dtype = torch_dtype(plan.request.activation_dtype)
    out_dtype = torch_dtype(plan.request.out_dtype)
    ranges = tuple(
        (
            NO_LIMIT if choice.m_range.max_m is None else choice.m_range.max_m,
            _steps(backend, weight, choice.offer, (activation_dtype, out_dtype)),
        )
        for choice, backend in zip(plan.choices, backends, strict=True)
    )
    request = plan.request
    _BOUND[handle] = BoundLinear(
        request.name,
        request.n,
        request.k,
        activation_dtype,
        out_dtype,
        weight.device,
        ranges,
        {},
        torch.empty(1, dtype=out_dtype, device=weight.device),
    )
    return handle


def bound(handle: int) -> BoundLinear:
    """What a handle names."""
    return _BOUND[handle]


def release(handle: int) -> None:
    """Forget a bound plan, so that its weight can be freed."""
    _BOUND.pop(handle, None)


def _steps(
    backend: Backend,
    weight: BlockScaledTensor,
    offer: Offer,
    dtypes: tuple[torch.dtype, torch.dtype],
) -> Steps:
    bind_steps = getattr(backend, "bind_steps", None)
    if bind_steps is not None:
        found: Steps = bind_steps(weight, offer, dtypes)
        return found
    return two_calls(backend, weight, offer)


def two_calls(backend: Backend, weight: BlockScaledTensor, offer: Offer) -> Steps:
    """The steps of a backend that has no ``bind_steps``: quantize if needed, multiply."""
    multiply = backend.bind(weight, offer)

    def step(
        activation: torch.Tensor,
        row_stride: int,  # noqa: ARG001 - ``Step``'s signature
        out: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> None:
        # One of them may be a matrix already: ``_rows`` makes one of what is not contiguous.
        if activation.ndim != 2:  # noqa: PLR2004 - backends take matrices
            activation = activation.view(-1, activation.shape[-1])
        if out.ndim != 2:  # noqa: PLR2004 - as above
            out = out.view(-1, out.shape[-1])
        if offer.activation is None:
            cast("MultiplyFloat", multiply)(activation, out, bias)
        else:
            quantized = backend.quantize_activation(activation, offer)
            cast("MultiplyQuantized", multiply)(quantized, out, bias)

    return lambda _: step


def _nothing(
    activation: torch.Tensor, row_stride: int, out: torch.Tensor, bias: torch.Tensor | None
) -> None:
    """The step for no tokens."""


def _linear(activation: torch.Tensor, bias: torch.Tensor | None, handle: int) -> torch.Tensor:
    named = _BOUND[handle]
    call = named.calls.get(activation.shape)
    if call is None or activation.dtype is not named.activation_dtype:
        call = named.new_call(activation)
    if activation.device != named.device:
        raise named.elsewhere(activation)
    if bias is not None and (bias.dtype is not named.out_dtype or bias.numel() != named.n):
        raise named.other_bias(bias)
    row_stride = named.k
    if not activation.is_contiguous():
        activation, row_stride = _rows(activation)
    out = torch.empty_like(call.template)
    call.step(activation, row_stride, out, bias)
    return out


def _rows(activation: torch.Tensor) -> tuple[torch.Tensor, int]:
    """As a matrix with stride 1 along k, copied only if need be; elements from row to row."""
    matrix = activation.reshape(-1, activation.shape[-1])
    if matrix.stride(-1) != 1:
        matrix = matrix.contiguous()
    return matrix, matrix.stride(0)


def _linear_fake(activation: torch.Tensor, bias: torch.Tensor | None, handle: int) -> torch.Tensor:  # noqa: ARG001 - the operator's signature
    named = _BOUND[handle]
    named.check(activation)
    return activation.new_empty((*activation.shape[:-1], named.n), dtype=named.out_dtype)


_dispatch_modes = torch._C._len_torch_dispatch_stack  # noqa: SLF001 - no public one
_functorch_transform = torch._C._functorch.peek_interpreter_stack  # noqa: SLF001 - no public one

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
    BackendError if the activation has another dtype or K than was planned, or is on another device,
    and for a bias that is not (n,) in the planned output dtype.
    """
    if torch.compiler.is_dynamo_compiling() or is_watched(activation):
        result: torch.Tensor = torch.ops.blockscale.linear(activation, bias, handle)
        return result
    return _linear(activation, bias, handle)


def is_watched(activation: torch.Tensor) -> bool:
    """Whether something must see operators instead of memory, so that the dispatcher is needed.

    That is a tensor of another class (fake, distributed), a dispatch mode (``make_fx``, fake
    tensors, counters of operations) or a transform of functorch (``vmap``). The dispatcher's trip
    to a Python kernel and back costs 15 us and more (AMD EPYC, torch 2.13, 2026-11-25).
    """
    return (
        type(activation) is not torch.Tensor
        or _dispatch_modes() > 0
        or _functorch_transform() is not None
    )
