"""Products with a stack of experts: what every grouped kernel is compared with.

Which rows count and how they lie: ``backends.base``. Rows that do not count come back as NaN, so
that whoever reads them sees it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from blockscale.errors import FormatError
from blockscale.reference.quantize import dequantize
from blockscale.tensor import BlockScaledTensor

if TYPE_CHECKING:
    from collections.abc import Iterator


def contiguous_matmul(
    activation: BlockScaledTensor,
    weight: BlockScaledTensor,
    groups: torch.Tensor,
    accumulate: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Each row block of ``activation`` (rows, k) x its expert of ``weight`` (experts, n, k)^T.

    ``groups``: the expert of each of the equally tall row blocks, or -1. Gives (rows, n) as
    ``accumulate``. Dequantizes one expert at a time; the host reads ``groups``.

    Raises FormatError if rows are no multiple of the row blocks, or an expert does not exist.
    """
    _check_grouped(activation, weight)
    blocks, rows = groups.numel(), activation.mn
    if rows % max(1, blocks) or (rows and not blocks):
        msg = f"{rows} rows cannot be {blocks} equally tall row blocks"
        raise FormatError(msg)
    values = dequantize(activation).reshape(max(1, blocks), -1, activation.k)
    out = values.new_full((*values.shape[:2], weight.mn), torch.nan, dtype=accumulate)
    for expert, which in _members(groups, weight.leading[0]):
        out[which] = values[which].to(accumulate) @ _transposed(weight, expert, accumulate)
    return out.reshape(rows, weight.mn)


def masked_matmul(
    activation: BlockScaledTensor,
    weight: BlockScaledTensor,
    counts: torch.Tensor,
    accumulate: torch.dtype = torch.float32,
) -> torch.Tensor:
    """The first counts[e] rows of ``activation`` (experts, slot, k) x ``weight`` (experts, n, k)^T.

    Gives (experts, slot, n) as ``accumulate``. Raises FormatError if a count exceeds the slot.
    """
    _check_grouped(activation, weight)
    experts, slot = weight.leading[0], activation.mn
    if activation.leading != (experts,) or counts.shape != (experts,):
        msg = f"{experts} experts need as many slots and counts, got {activation!r}, {counts.shape}"
        raise FormatError(msg)
    if bool(((counts < 0) | (counts > slot)).any()):
        msg = f"counts of {int(counts.min())} to {int(counts.max())} rows in slots of {slot}"
        raise FormatError(msg)
    out = torch.full(
        (experts, slot, weight.mn), torch.nan, dtype=accumulate, device=activation.device
    )
    values = dequantize(activation)
    for expert, count in enumerate(counts.tolist()):
        if count:
            rows = values[expert, :count].to(accumulate)
            out[expert, :count] = rows @ _transposed(weight, expert, accumulate)
    return out


def expert_of(weight: BlockScaledTensor, expert: int) -> BlockScaledTensor:
    """One (n, k) weight of a stack, sharing its memory."""
    return BlockScaledTensor(
        weight.data[expert], weight.scales[expert], weight.format, weight.layout
    )


def _transposed(weight: BlockScaledTensor, expert: int, dtype: torch.dtype) -> torch.Tensor:
    return dequantize(expert_of(weight, expert)).to(dtype).T


def _members(groups: torch.Tensor, experts: int) -> Iterator[tuple[int, torch.Tensor]]:
    """Every expert that has row blocks, with their positions."""
    for expert in sorted(set(groups.tolist())):
        if expert >= experts or expert < -1:
            msg = f"a row block of expert {expert}, but there are {experts}"
            raise FormatError(msg)
        if expert >= 0:
            yield expert, (groups == expert).nonzero().squeeze(1)


def _check_grouped(activation: BlockScaledTensor, weight: BlockScaledTensor) -> None:
    if len(weight.leading) != 1 or activation.k != weight.k:
        msg = f"a grouped product needs one stack of experts and one K: {activation!r}, {weight!r}"
        raise FormatError(msg)
