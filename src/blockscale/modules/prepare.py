"""Checkpoint weight and plan in, prepared weight out: the only conversion a weight ever sees."""

from __future__ import annotations

from typing import TYPE_CHECKING

from blockscale.errors import FormatError, PlanError
from blockscale.formats import K_MAJOR
from blockscale.planning.plan import Conversion
from blockscale.reference import refine, relayout, requantize

if TYPE_CHECKING:
    from collections.abc import Sequence

    from blockscale.backends.base import Backend
    from blockscale.planning.decision import OperandForm
    from blockscale.planning.plan import LinearPlan
    from blockscale.planning.policy import PlanPolicy
    from blockscale.tensor import BlockScaledTensor


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

    Raises PlanError if the layer has no backend, if the weight is not the one that was planned, or
    if requantizing costs more than ``policy.max_relative_error``.
    """
    if plan.weight is None:
        reasons = "; ".join(f"{r.backend}: {r.reason}" for r in plan.rejected)
        msg = f"layer {plan.name!r} has no backend: {reasons}"
        raise PlanError(msg)
    _check_is_planned(plan, weight)
    prepared = _converted(plan, plan.weight, weight, policy)
    for choice, backend in zip(plan.choices, backends, strict=True):
        prepared = backend.prepare(prepared, choice.offer)
    return prepared


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


def _converted(
    plan: LinearPlan, form: OperandForm, weight: BlockScaledTensor, policy: PlanPolicy
) -> BlockScaledTensor:
    if plan.conversion is Conversion.REQUANTIZE:
        result = requantize(weight, form.format)
        if result.relative_error > policy.max_relative_error:
            msg = (
                f"layer {plan.name!r}: requantizing to {form.format} changes its values by "
                f"{result.relative_error:.2%}, above the limit of {policy.max_relative_error:.2%}; "
                "raise max_relative_error or plan with exactness 'exact'"
            )
            raise PlanError(msg)
        return relayout(result.tensor, form.layout)
    try:
        if form.format.block != weight.format.block:
            weight = refine(weight, form.format.block)
        if form.format.scale is weight.format.scale and form.layout == K_MAJOR == weight.layout:
            return weight
        return relayout(weight, form.layout, form.format.scale)
    except FormatError as error:
        msg = f"layer {plan.name!r} was planned as losslessly convertible, but {error}"
        raise PlanError(msg) from error
