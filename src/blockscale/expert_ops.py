"""``torch.ops.blockscale.experts``: the one operator that a planned layer of experts calls.

Between the tokens and the result lie seven steps: arrange rows, gather (and quantize), w13, SiLU
times up (and quantize), w2, combine. Which backend and which arrangement of rows serve a number of
tokens is looked up here, on the host, as in ``blockscale.ops``; nothing else is decided, and no
step waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Protocol, TypeAlias

import torch

from blockscale import ops
from blockscale.errors import BackendError
from blockscale.ops import NO_LIMIT, Handles
from blockscale.planning.decision import Arrangement, MRange
from blockscale.reference import quantize, relayout
from blockscale.reference.experts import (
    arrange_contiguous,
    arrange_masked,
    combine_rows,
    gather_rows,
    masked_slot,
)
from blockscale.reference.fused import silu_and_multiply
from blockscale.tensor import torch_dtype

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from blockscale.backends.base import Backend
    from blockscale.planning.decision import GroupedRows, Offer, OperandForm
    from blockscale.planning.expert_sets import ExpertsPlan
    from blockscale.reference.experts import ArrangedRows
    from blockscale.tensor import BlockScaledTensor

    Operand: TypeAlias = torch.Tensor | BlockScaledTensor
    # (activation, rows, out): one grouped product.
    Product: TypeAlias = Callable[[Operand, ArrangedRows, torch.Tensor], None]


class RowSteps(Protocol):
    """What happens to rows between the grouped products, for one arrangement and one form."""

    def arrange(self, ids: torch.Tensor) -> ArrangedRows:
        """Where the rows of (tokens, choices) expert ids go."""
        ...

    def gather(self, hidden: torch.Tensor, rows: ArrangedRows) -> Operand:
        """(tokens, k) to the rows of w13's product, in the form that it reads."""
        ...

    def activate(self, gate_up: torch.Tensor, rows: ArrangedRows) -> Operand:
        """(rows, 2 n) of w13's product to silu(gate) * up as w2's product reads it."""
        ...

    def combine(
        self, products: torch.Tensor, rows: ArrangedRows, weights: torch.Tensor, out: torch.Tensor
    ) -> None:
        """(rows, k) of w2's product, weighted and summed, into ``out`` (tokens, k)."""
        ...


class TorchRows:
    """The steps in plain torch, on a CPU: ``reference.experts``, bit for bit.

    Where the backend does not quantize activations, torch's own SiLU serves: it differs from
    ``reference.fused`` in last bits, and takes a tenth of the time.
    """

    def __init__(self, form: OperandForm | None, rows: GroupedRows, experts: int) -> None:
        self._form, self._rows, self._experts = form, rows, experts

    def arrange(self, ids: torch.Tensor) -> ArrangedRows:
        """As ``RowSteps``."""
        alignment = self._rows.alignment
        if self._rows.arrangement is Arrangement.MASKED:
            return arrange_masked(ids, self._experts, masked_slot(ids.shape[0], alignment))
        return arrange_contiguous(ids, self._experts, alignment)

    def gather(self, hidden: torch.Tensor, rows: ArrangedRows) -> Operand:
        """As ``RowSteps``."""
        return self._operand(gather_rows(hidden, rows), rows)

    def activate(self, gate_up: torch.Tensor, rows: ArrangedRows) -> Operand:
        """As ``RowSteps``."""
        if self._form is not None:
            return self._operand(silu_and_multiply(gate_up), rows)
        gate, up = gate_up.chunk(2, dim=-1)
        return self._operand(torch.nn.functional.silu(gate) * up, rows)

    def combine(
        self, products: torch.Tensor, rows: ArrangedRows, weights: torch.Tensor, out: torch.Tensor
    ) -> None:
        """As ``RowSteps``."""
        out.copy_(combine_rows(products, rows, weights, out.dtype))

    def _operand(self, values: torch.Tensor, rows: ArrangedRows) -> Operand:
        if rows.slot is not None:
            values = values.view(self._experts, rows.slot, values.shape[1])
        if self._form is None:
            return values
        return relayout(quantize(values, self._form.format), self._form.layout)


@dataclass(frozen=True, slots=True)
class BoundExperts:
    """A planned layer of experts bound to its prepared weights.

    ``steps`` are in order of rising numbers of tokens; the last serves everything above the others.
    """

    name: str
    k: int
    n13: int
    dtype: torch.dtype
    device: torch.device
    steps: tuple[tuple[int, ExpertStep], ...]

    def step_for(self, tokens: int) -> ExpertStep:
        """The step that serves ``tokens`` tokens."""
        for most, step in self.steps:
            if tokens <= most:
                return step
        msg = f"experts {self.name!r}: no backend was planned for {tokens} tokens"
        raise BackendError(msg)

    def check(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> None:
        """Refuse what was not planned: kernels read bytes, not intentions."""
        if hidden.shape[-1:] != (self.k,) or hidden.dtype is not self.dtype:
            msg = (
                f"experts {self.name!r} were planned for (..., {self.k}) {self.dtype}, got "
                f"{tuple(hidden.shape)} {hidden.dtype}; plan them for this dtype"
            )
            raise BackendError(msg)
        tokens = hidden.shape[:-1].numel()
        if ids.is_floating_point():
            msg = f"experts {self.name!r} need integer ids, got {ids.dtype}"
            raise BackendError(msg)
        if ids.ndim != 2 or ids.shape[0] != tokens or weights.shape != ids.shape:  # noqa: PLR2004 - (tokens, choices)
            msg = (
                f"experts {self.name!r} need ids and weights of shape ({tokens}, choices), got "
                f"{tuple(ids.shape)} and {tuple(weights.shape)}"
            )
            raise BackendError(msg)

    def check_devices(self, *operands: torch.Tensor) -> None:
        """Refuse operands on another device than the weights: kernels read addresses."""
        for operand in operands:
            if operand.device != self.device:
                msg = (
                    f"experts {self.name!r} are on {self.device}, but a tensor of "
                    f"{tuple(operand.shape)} {operand.dtype} on {operand.device}; move one of them"
                )
                raise BackendError(msg)


@dataclass(frozen=True, slots=True)
class ExpertStep:
    """One backend and one arrangement: from tokens to the result."""

    rows: RowSteps
    w13: Product
    w2: Product

    def __call__(
        self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, n13: int
    ) -> torch.Tensor:
        """(tokens, k), (tokens, choices) and (tokens, choices) to (tokens, k)."""
        rows = self.rows.arrange(ids)
        gate_up = hidden.new_empty((rows.rows, n13))
        self.w13(self.rows.gather(hidden, rows), rows, gate_up)
        products = hidden.new_empty((rows.rows, hidden.shape[1]))
        self.w2(self.rows.activate(gate_up, rows), rows, products)
        out = hidden.new_empty(hidden.shape)
        self.rows.combine(products, rows, weights, out)
        return out


_BOUND: Handles[BoundExperts] = Handles()
_HANDLES = count()


def bind(
    plan: ExpertsPlan,
    weights: tuple[BlockScaledTensor, BlockScaledTensor],
    backends: Sequence[Backend],
    handle: int | None,
) -> int:
    """Register a plan with its prepared weights and return the handle that the operator takes.

    ``backends``: those of the choices of both plans, in order. ``handle``: an existing one to bind
    anew, None for a fresh one. Raises BackendError if a backend lacks the arrangement it offered.
    """
    if handle is None:
        handle = next(_HANDLES)
    request = plan.w13.request
    steps = [
        step
        for index, backend in enumerate(backends)
        for step in _steps(plan, index, backend, weights)
    ]
    _BOUND[handle] = BoundExperts(
        plan.name,
        request.k,
        request.n,
        torch_dtype(request.activation_dtype),
        weights[0].device,
        tuple(steps),
    )
    return handle


def release(handle: int) -> None:
    """Forget bound experts, so that their weights can be freed."""
    _BOUND.pop(handle, None)


def _steps(
    plan: ExpertsPlan,
    index: int,
    backend: Backend,
    weights: tuple[BlockScaledTensor, BlockScaledTensor],
) -> list[tuple[int, ExpertStep]]:
    """One step for each arrangement that serves some of this choice's numbers of tokens."""
    choice = plan.w13.choices[index]
    found = []
    for rows in choice.offer.rows:
        served = _intersection(choice.m_range, rows.m_range)
        if served is None:
            continue
        w13, w2 = (
            _product(backend, one.choices[index].offer, weight, rows.arrangement)
            for one, weight in zip((plan.w13, plan.w2), weights, strict=True)
        )
        steps = _row_steps(plan, choice.offer, rows, weights[0].device)
        most = NO_LIMIT if served.max_m is None else served.max_m
        found.append((most, ExpertStep(steps, w13, w2)))
    return found


def _row_steps(
    plan: ExpertsPlan, offer: Offer, rows: GroupedRows, device: torch.device
) -> RowSteps:
    """On a GPU the steps are kernels, elsewhere plain torch."""
    form = offer.activation
    if device.type != "cuda" or form is None:
        return TorchRows(form, rows, plan.experts)
    try:
        from blockscale.kernels.triton.quantize import (  # noqa: PLC0415 - only where a GPU runs it
            OVERLAPPING,
        )
        from blockscale.kernels.triton.rows import (  # noqa: PLC0415 - as above
            ContiguousRows,
            MaskedRows,
            RowsSpec,
        )
    except ImportError as error:
        msg = f"experts need Triton on a GPU (pip install triton): {error}"
        raise BackendError(msg) from error
    request = plan.w2.request
    index = torch.cuda.current_device() if device.index is None else device.index
    spec = RowsSpec(
        form.format,
        form.layout,
        rows.alignment,
        plan.experts,
        torch_dtype(request.activation_dtype),
        request.n,
        request.k,
        index,
        overlaps=torch.cuda.get_device_capability(index) >= OVERLAPPING,
    )
    return MaskedRows(spec) if rows.arrangement is Arrangement.MASKED else ContiguousRows(spec)


def _product(
    backend: Backend, offer: Offer, weight: BlockScaledTensor, arrangement: Arrangement
) -> Product:
    name = "bind_masked" if arrangement is Arrangement.MASKED else "bind_contiguous"
    bind_grouped = getattr(backend, name, None)
    if bind_grouped is None:
        msg = f"backend {offer.backend!r} offers {arrangement.value} rows, but has no {name}"
        raise BackendError(msg)
    multiply = bind_grouped(weight, offer)
    if arrangement is Arrangement.CONTIGUOUS:

        def contiguous(activation: Operand, rows: ArrangedRows, out: torch.Tensor) -> None:
            multiply(activation, rows.groups, out)

        return contiguous
    experts, n = weight.data.shape[0], weight.mn

    def masked(activation: Operand, rows: ArrangedRows, out: torch.Tensor) -> None:
        expected = -(-rows.place.numel() // experts)
        multiply(activation, rows.groups, out.view(experts, -1, n), expected)

    return masked


def _intersection(one: MRange, other: MRange) -> MRange | None:
    ends = [m for m in (one.max_m, other.max_m) if m is not None]
    both = MRange(max(one.min_m, other.min_m), min(ends) if ends else None)
    return both if both.max_m is None or both.min_m <= both.max_m else None


def _experts(
    hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, handle: int
) -> torch.Tensor:
    bound = _BOUND[handle]
    bound.check(hidden, ids, weights)
    bound.check_devices(hidden, ids, weights)
    matrix = hidden.reshape(-1, bound.k)
    if matrix.stride(-1) != 1:
        matrix = matrix.contiguous()
    tokens = matrix.shape[0]
    if not tokens or not ids.shape[1]:
        return torch.zeros_like(hidden, memory_format=torch.contiguous_format)
    out = bound.step_for(tokens)(matrix, ids, weights, bound.n13)
    return out.view(hidden.shape)


def _experts_fake(
    hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, handle: int
) -> torch.Tensor:
    bound = _BOUND[handle]
    bound.check(hidden, ids, weights)
    return hidden.new_empty(hidden.shape)


_LIBRARY = torch.library.Library("blockscale", "FRAGMENT")
_LIBRARY.define("experts(Tensor hidden, Tensor ids, Tensor weights, int handle) -> Tensor")
_LIBRARY.impl("experts", _experts, "CPU")
_LIBRARY.impl("experts", _experts, "CUDA")
torch.library.register_fake("blockscale::experts", _experts_fake, lib=_LIBRARY)


def experts(
    hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, handle: int
) -> torch.Tensor:
    """A layer of experts: hidden (..., k) to (..., k), in the planned dtype.

    ``ids`` and ``weights``: (tokens, choices); an id outside the stack adds nothing. ``handle``
    comes from ``bind``. Raises BackendError for another dtype or shape than was planned, or another
    device than the weights'.
    """
    # As in ops.linear: only a tracer needs the operator.
    if not torch.compiler.is_dynamo_compiling() and not ops.is_watched(hidden):
        return _experts(hidden, ids, weights, handle)
    result: torch.Tensor = torch.ops.blockscale.experts(hidden, ids, weights, handle)
    return result
