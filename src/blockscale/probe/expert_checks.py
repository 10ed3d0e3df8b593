"""One backend's products over experts, on this machine, against the float64 reference.

As ``checks`` for dense layers: scale fingerprints and integers bit for bit, then the error on
normal data. Results start as NaN; so do the rows that do not count, and no result may show it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch

from blockscale.modules.prepare import prepare_stack
from blockscale.planning.decision import Arrangement
from blockscale.planning.policy import PlanPolicy
from blockscale.probe import expert_cases
from blockscale.probe.outcome import (
    MAX_RELATIVE_ERROR,
    Outcome,
    WrongNumbersError,
    check_same,
    place_of,
)
from blockscale.reference import dequantize, expert_of
from blockscale.tensor import BlockScaledTensor, torch_dtype

if TYPE_CHECKING:
    from collections.abc import Callable

    from blockscale.backends.base import Backend, ContiguousBackend, MaskedBackend
    from blockscale.planning.decision import Offer
    from blockscale.planning.plan import LinearPlan
    from blockscale.probe.expert_cases import Kind, Rows

# A kernel that takes many rows, and one that takes few, may be two.
EXPECTED_ROWS = (1, 256)


def check_experts(backend: Backend, plan: LinearPlan, arrangement: Arrangement) -> Outcome:
    """Run the checks of one arrangement; no shape if the offer has no rows in row blocks.

    Raises WrongNumbersError; whatever the provider raises passes through.
    """
    offer = plan.choices[0].offer
    alignments = sorted({rows.alignment for rows in offer.rows})
    if not alignments:
        return Outcome(0, 0.0)
    where = "row blocks of {}"
    if arrangement is Arrangement.MASKED:
        alignments, where = alignments[-1:], "slots, multiples of {}"
    worst = 0.0
    for kind in expert_cases.KINDS:
        request = plan.request
        weight = kind.weight(request.n, request.k, request.format, place_of())
        prepared = prepare_stack(plan, weight, [backend], PlanPolicy())
        products = _products(backend, prepared, offer, arrangement)
        for alignment in alignments:
            for counts in expert_cases.COUNTS:
                rows = _rows(plan, kind, arrangement, alignment, counts)
                for multiply in products:
                    what = f"{kind.name}, rows {counts} in {where.format(alignment)}"
                    worst = max(worst, _check(multiply, plan, weight, rows, (kind, what)))
    return Outcome(1, worst)


def _products(
    backend: Backend, prepared: BlockScaledTensor, offer: Offer, arrangement: Arrangement
) -> list[Callable[[Rows, torch.Tensor], None]]:
    """The bound product; a masked one for each hint."""
    if arrangement is Arrangement.CONTIGUOUS:
        contiguous = cast("ContiguousBackend", backend).bind_contiguous(prepared, offer)
        return [_product(cast("Callable[..., None]", contiguous))]
    masked = cast("MaskedBackend", backend).bind_masked(prepared, offer)
    return [_product(cast("Callable[..., None]", masked), hint) for hint in EXPECTED_ROWS]


def _product(bound: Callable[..., None], *hint: int) -> Callable[[Rows, torch.Tensor], None]:
    return lambda rows, out: bound(rows.activation, rows.told, out, *hint)


def _rows(
    plan: LinearPlan, kind: Kind, arrangement: Arrangement, alignment: int, counts: tuple[int, ...]
) -> Rows:
    form, dtype = plan.choices[0].offer.activation, torch_dtype(plan.request.activation_dtype)
    make = expert_cases.exact_values if kind.is_exact else expert_cases.normal_values
    values = make(plan.request.k, form, dtype, place_of())
    if arrangement is Arrangement.CONTIGUOUS:
        return expert_cases.contiguous_rows(counts, alignment, values, form)
    return expert_cases.masked_rows(counts, alignment, values, form)


def _check(
    multiply: Callable[[Rows, torch.Tensor], None],
    plan: LinearPlan,
    weight: BlockScaledTensor,
    rows: Rows,
    of: tuple[Kind, str],
) -> float:
    """The relative error; 0 where results are exact, which is checked bit for bit."""
    kind, what = of
    activation = rows.activation
    shape = activation.data.shape if isinstance(activation, BlockScaledTensor) else activation.shape
    dtype = torch_dtype(plan.request.out_dtype)
    out = torch.full((*shape[:-1], plan.request.n), torch.nan, dtype=dtype, device=place_of())
    multiply(rows, out)
    values = dequantize(activation) if isinstance(activation, BlockScaledTensor) else activation
    squares = [0.0, 0.0]
    for expert, where in rows.real:
        exact = values[where].double() @ dequantize(expert_of(weight, expert)).double().T
        found = out[where]
        if kind.is_exact:
            check_same(found, exact.to(dtype), f"{what}, expert {expert}")
            continue
        squares[0] += float((found.double() - exact).norm()) ** 2
        squares[1] += float(exact.norm()) ** 2
    error = (squares[0] / squares[1]) ** 0.5 if squares[1] else 0.0
    limit = MAX_RELATIVE_ERROR[plan.request.out_dtype]
    if not error <= limit:
        msg = f"{what}: relative error {error:.2e}, limit {limit:.1e}"
        raise WrongNumbersError(msg)
    return error
