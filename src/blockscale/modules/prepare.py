"""Checkpoint weight and plan in, prepared weight out: the only conversion a weight ever sees."""

from __future__ import annotations

from math import hypot, lcm
from typing import TYPE_CHECKING

import torch

from blockscale.errors import FormatError, PlanError
from blockscale.formats import K_MAJOR
from blockscale.planning.plan import Conversion
from blockscale.reference import dequantize, expert_of, refine, relayout, requantize
from blockscale.tensor import BlockScaledTensor, as_stored, torch_dtype

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from blockscale.backends.base import Backend
    from blockscale.planning.decision import OperandForm
    from blockscale.planning.plan import LinearPlan
    from blockscale.planning.policy import PlanPolicy

# Values of an expert that are requantized at a time: about 30 bytes each in temporaries.
BAND_ELEMENTS = 1 << 19


def prepare_weight(
    plan: LinearPlan,
    weight: BlockScaledTensor,
    backends: Sequence[Backend],
    policy: PlanPolicy,
) -> BlockScaledTensor:
    """The weight in the form that every choice of ``plan`` reads.

    ``weight``: as the checkpoint has it, (n, k), scales in ``K_MAJOR``. ``backends``: those of
    ``plan.choices`` in order; each gets to compile what it needs. The argument is not written to;
    its data is shared with the result unless the plan requantizes.

    Raises PlanError if the layer has no backend, if the weight is not the one that was planned or
    is on the meta device, or if requantizing costs more than ``policy.max_relative_error``.
    """
    form = _planned_form(plan)
    _check_is_planned(plan, weight)
    prepared = _converted(plan, form, weight, policy)
    return _by_backends(plan, prepared, backends)


def prepare_stack(
    plan: LinearPlan,
    weight: BlockScaledTensor,
    backends: Sequence[Backend],
    policy: PlanPolicy,
) -> BlockScaledTensor:
    """As ``prepare_weight``, for a stack that is in memory already: (experts, n, k).

    Its codes are shared with the result unless the plan requantizes; then a second stack is made,
    one expert at a time. Raises as ``prepare_weight`` does.
    """
    experts = plan.request.experts
    if weight.leading != (experts,):
        msg = f"layer {plan.name!r} was planned for {experts} experts, got {weight!r}; plan again"
        raise PlanError(msg)
    if plan.conversion is not Conversion.REQUANTIZE:
        return prepare_weight(plan, weight, backends, policy)
    return prepare_experts(
        plan, lambda expert: (expert_of(weight, expert),), backends, policy, weight.device
    )


def prepare_experts(
    plan: LinearPlan,
    read: Callable[[int], Iterable[BlockScaledTensor]],
    backends: Sequence[Backend],
    policy: PlanPolicy,
    device: torch.device | str,
) -> BlockScaledTensor:
    """A stack of experts in the form that every choice of ``plan`` reads, on ``device``.

    ``read`` gives one expert's weight as the checkpoint has it, on any device: parts of some rows
    by k, scales in ``K_MAJOR``, that follow each other (gate, then up). It is called once for each
    expert, in order. If it reads parts when they are asked for, memory holds, beside the result,
    one part and less than 64 MB, whatever the conversion.

    Raises as ``prepare_weight`` does.
    """
    form = _planned_form(plan)
    request = plan.request
    experts = request.experts or 0
    stored = form.layout.stored(request.n, request.k, form.format)
    scales = torch.zeros(experts * stored.elements, dtype=torch_dtype(stored.dtype), device=device)
    prepared = BlockScaledTensor(
        torch.empty(
            (experts, request.n, request.k), dtype=torch_dtype(form.format.element), device=device
        ),
        as_stored(scales, stored, (experts,)),
        form.format,
        form.layout,
    )
    for expert in range(experts):
        convert_into(expert_of(prepared, expert), plan, read(expert), policy)
    return _by_backends(plan, prepared, backends)


def _by_backends(
    plan: LinearPlan, prepared: BlockScaledTensor, backends: Sequence[Backend]
) -> BlockScaledTensor:
    try:
        for choice, backend in zip(plan.choices, backends, strict=True):
            prepared = backend.prepare(prepared, choice.offer)
    except FormatError as error:
        msg = f"layer {plan.name!r}: {error}"
        raise FormatError(msg) from error
    return prepared


def _planned_form(plan: LinearPlan) -> OperandForm:
    if plan.weight is None:
        reasons = "; ".join(f"{r.backend}: {r.reason}" for r in plan.rejected)
        msg = f"layer {plan.name!r} has no backend: {reasons}"
        raise PlanError(msg)
    return plan.weight


def convert_into(
    target: BlockScaledTensor,
    plan: LinearPlan,
    parts: Iterable[BlockScaledTensor],
    policy: PlanPolicy,
) -> None:
    """Write one expert, row part after row part as the checkpoint has them, as planned.

    ``target``: (n, k), prepared, its padding zero already. Raises as ``prepare_weight`` does.
    """
    form = _planned_form(plan)
    scales, change, norm, first = [], 0.0, 0.0, 0
    source = plan.request.format
    for part in parts:
        _check_part(plan, part, first)
        bands = _bands(part, form) if plan.conversion is Conversion.REQUANTIZE else (part,)
        for band in bands:
            written = band
            if plan.conversion is Conversion.REQUANTIZE:
                result = requantize(band, form.format)
                old = float(dequantize(band).double().norm())
                change, norm = hypot(change, result.relative_error * old), hypot(norm, old)
                written, source = result.tensor, form.format
            target.data[first : first + band.mn].copy_(written.data)
            scales.append(written.scales)
            first += band.mn
    if first != plan.request.n:
        msg = f"layer {plan.name!r} was planned with {plan.request.n} rows, got {first}; plan again"
        raise PlanError(msg)
    _check_error(plan, change / norm if norm else 0.0, policy)
    joined = torch.cat(scales).to(target.device)
    whole = BlockScaledTensor(target.data, joined, source, K_MAJOR)
    target.scales.copy_(_restated(plan, form, whole).scales)


def check_parts(plan: LinearPlan, parts: Iterable[BlockScaledTensor]) -> None:
    """Raise PlanError, with nothing written, unless ``convert_into`` can take these parts."""
    first = 0
    for part in parts:
        _check_part(plan, part, first)
        first += part.mn
    if first != plan.request.n:
        msg = f"layer {plan.name!r} was planned with {plan.request.n} rows, got {first}; plan again"
        raise PlanError(msg)


def _check_part(plan: LinearPlan, part: BlockScaledTensor, first: int) -> None:
    request = plan.request
    if (part.k, part.format, part.layout, part.leading) != (request.k, request.format, K_MAJOR, ()):
        msg = (
            f"layer {plan.name!r} was planned with K={request.k} and {request.format}, but part of "
            f"an expert is {part!r}; plan again"
        )
        raise PlanError(msg)
    if first % request.format.block.mn or first + part.mn > request.n:
        msg = (
            f"layer {plan.name!r} was planned with {request.n} rows in blocks of "
            f"{request.format.block.mn}, but a part of {part.mn} rows starts at row {first}"
        )
        raise PlanError(msg)


def _bands(weight: BlockScaledTensor, form: OperandForm) -> Iterator[BlockScaledTensor]:
    """Bands of rows that are whole blocks before and after."""
    block = weight.format.block.mn
    whole = lcm(block, form.format.block.mn)
    rows = max(1, BAND_ELEMENTS // (whole * weight.k)) * whole
    for first in range(0, weight.mn, rows):
        data = weight.data[first : first + rows]
        begin = first // block
        scales = weight.scales[begin : begin - (-len(data) // block)]
        yield BlockScaledTensor(data, scales, weight.format, K_MAJOR)


def _check_error(plan: LinearPlan, relative_error: float, policy: PlanPolicy) -> None:
    if relative_error > policy.max_relative_error:
        assert plan.weight is not None
        msg = (
            f"layer {plan.name!r}: requantizing to {plan.weight.format} changes its values by "
            f"{relative_error:.2%}, above the limit of {policy.max_relative_error:.2%}; "
            "raise max_relative_error or plan with exactness 'exact'"
        )
        raise PlanError(msg)


def _check_is_planned(plan: LinearPlan, weight: BlockScaledTensor) -> None:
    request = plan.request
    planned = (request.n, request.k, request.format)
    found = (weight.mn, weight.k, weight.format)
    if planned != found:
        msg = (
            f"layer {plan.name!r} was planned as {planned[0]}x{planned[1]} {planned[2]}, but its "
            f"weight is {found[0]}x{found[1]} {found[2]}; plan again"
        )
        raise PlanError(msg)
    if weight.data.is_meta:
        msg = f"layer {plan.name!r}: its weight is on the meta device and has no values; load it"
        raise PlanError(msg)


def _converted(
    plan: LinearPlan, form: OperandForm, weight: BlockScaledTensor, policy: PlanPolicy
) -> BlockScaledTensor:
    if plan.conversion is Conversion.REQUANTIZE:
        result = requantize(weight, form.format)
        _check_error(plan, result.relative_error, policy)
        return relayout(result.tensor, form.layout)
    return _restated(plan, form, weight)


def _restated(plan: LinearPlan, form: OperandForm, weight: BlockScaledTensor) -> BlockScaledTensor:
    """The same values and codes; scales repeated, restated and moved as ``form`` says."""
    try:
        if form.format.block != weight.format.block:
            weight = refine(weight, form.format.block)
        if form.format.scale is weight.format.scale and form.layout == K_MAJOR == weight.layout:
            return weight
        return relayout(weight, form.layout, form.format.scale)
    except FormatError as error:
        msg = f"layer {plan.name!r} was planned as losslessly convertible, but {error}"
        raise PlanError(msg) from error
