"""Prepared weight in, checkpoint weight out: the inverse of ``prepare``, where it has one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from blockscale.errors import ModelError
from blockscale.formats import K_MAJOR, ScaleFormat
from blockscale.planning.plan import Conversion
from blockscale.reference import refine, relayout
from blockscale.reference.layout import scale_codes, store_codes
from blockscale.tensor import BlockScaledTensor

if TYPE_CHECKING:
    from blockscale.formats import BlockFormat
    from blockscale.planning.plan import LinearPlan


def restore_weight(plan: LinearPlan, prepared: BlockScaledTensor) -> BlockScaledTensor:
    """The weight as the checkpoint has it: its codes, its scales, in ``K_MAJOR``.

    BF16 scales come back as the FP32 that they became, exactly. Raises ModelError if the weight
    was requantized: those codes are gone.
    """
    if plan.conversion is Conversion.REQUANTIZE:
        msg = (
            f"layer {plan.name!r} was requantized from {plan.request.format} to {prepared.format}; "
            "the checkpoint's codes cannot be given back, copy the checkpoint instead"
        )
        raise ModelError(msg)
    target = plan.request.format
    if target.scale is ScaleFormat.BF16:
        target = target.with_scale(ScaleFormat.FP32)
    stored = relayout(prepared, K_MAJOR, target.scale)
    return stored if stored.format == target else _coarsened(stored, target)


def _coarsened(tensor: BlockScaledTensor, target: BlockFormat) -> BlockScaledTensor:
    """The inverse of ``refine``: one scale of every group of equal ones.

    Raises ModelError if they are not equal.
    """
    fine, coarse = tensor.format.block, target.block
    codes = scale_codes(tensor)[..., :: coarse.mn // fine.mn, :: coarse.k // fine.k]
    scales = store_codes(codes.contiguous(), tensor.mn, tensor.k, target, K_MAJOR)
    result = BlockScaledTensor(tensor.data, scales, target, K_MAJOR)
    if not bool((scale_codes(refine(result, fine)) == scale_codes(tensor)).all()):
        msg = f"scales differ within one {coarse} block; it cannot be stored as {target}"
        raise ModelError(msg)
    return result
