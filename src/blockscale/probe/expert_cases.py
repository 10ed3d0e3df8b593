"""Products over experts whose results are known, with NaN in every row that does not count."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate
from math import lcm
from typing import TYPE_CHECKING

import torch

from blockscale.formats import K_MAJOR, BlockFormat, ScaleFormat, ceil_div, round_up
from blockscale.probe import cases
from blockscale.reference import quantize, relayout
from blockscale.tensor import BlockScaledTensor

if TYPE_CHECKING:
    from collections.abc import Callable

    from blockscale.planning.decision import OperandForm

EXPERTS = 8
# Empty experts among others, rows that end a tile and one more; one hot expert; nobody at all.
COUNTS: tuple[tuple[int, ...], ...] = (
    (0, 1, 64, 65, 0, 128, 129, 0),
    (0, 0, 0, 0, 0, 300, 0, 0),
    (0,) * EXPERTS,
)
# Row blocks of nobody, after all others.
IDLE_BLOCKS = 2
# A slot is a multiple of this, and of what the backend says.
SLOT_MULTIPLE = 128
NAN_CODE = 0xFF
UE8M0_NAN = 0xFF

Operand = BlockScaledTensor | torch.Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """An activation of (rows, k), or (experts, slot, k), and where the rows that count lie.

    ``told``: what the kernel gets beside it, ``groups`` or ``counts`` of ``backends.base``.
    ``real``: for each expert with rows, the index of its rows in the activation and the result.
    """

    activation: Operand
    told: torch.Tensor
    real: tuple[tuple[int, tuple[int | slice, ...]], ...]


@dataclass(frozen=True, slots=True)
class Kind:
    """How the values of a case are made, and whether results are exact in float32."""

    name: str
    weight: Callable[[int, int, BlockFormat, str], BlockScaledTensor]
    is_exact: bool


def _stacked(one: Callable[[int, int, BlockFormat, str], BlockScaledTensor]) -> Kind:
    """Experts that differ: each begins a row of blocks later in one taller weight."""

    def weight(n: int, k: int, fmt: BlockFormat, device: str) -> BlockScaledTensor:
        step = fmt.block.mn
        tall = one(round_up(n, fmt.block.mn) + step * (EXPERTS - 1), k, fmt, device)
        blocks = ceil_div(n, fmt.block.mn)
        firsts = range(0, step * EXPERTS, step)
        data = torch.stack([tall.data[first : first + n] for first in firsts])
        scales = torch.stack([tall.scales[first // fmt.block.mn :][:blocks] for first in firsts])
        return BlockScaledTensor(data, scales, fmt, K_MAJOR)

    return Kind(one.__name__.replace("_", " "), weight, one is not cases.normal_weight)


KINDS = (
    _stacked(cases.fingerprint_weight),
    _stacked(cases.integer_weight),
    _stacked(cases.normal_weight),
)


def contiguous_rows(
    counts: tuple[int, ...],
    alignment: int,
    values: Callable[[int], Operand],
    form: OperandForm | None,
) -> Rows:
    """Expert after expert in row blocks of ``alignment``, then blocks of nobody.

    ``values`` makes so many rows; ``form`` is the offer's, None for float activations.
    """
    blocks = [ceil_div(count, alignment) for count in counts]
    starts = [0, *accumulate(size * alignment for size in blocks)]
    rows = starts[-1] + IDLE_BLOCKS * alignment
    real = torch.zeros(rows, dtype=torch.bool)
    places = []
    for expert, count in enumerate(counts):
        where = slice(starts[expert], starts[expert] + count)
        real[where] = True
        if count:
            places.append((expert, (where,)))
    of_blocks = torch.arange(len(counts), dtype=torch.int32)
    groups = of_blocks.repeat_interleave(torch.tensor(blocks))
    groups = torch.cat([groups, torch.full((IDLE_BLOCKS,), -1, dtype=torch.int32)])
    made = values(rows)
    return Rows(_spoiled(made, real, form), groups.to(made.device), tuple(places))


def masked_rows(
    counts: tuple[int, ...],
    alignment: int,
    values: Callable[[int], Operand],
    form: OperandForm | None,
) -> Rows:
    """A slot for each expert, of which the first rows count."""
    slot = round_up(max(1, *counts), lcm(SLOT_MULTIPLE, alignment))
    real = torch.arange(slot)[None, :] < torch.tensor(counts)[:, None]
    flat = values(len(counts) * slot)
    shape = (len(counts), slot, -1)
    made: Operand
    if isinstance(flat, BlockScaledTensor):
        data, scales = flat.data.view(shape), flat.scales.view(shape)
        made = BlockScaledTensor(data, scales, flat.format, K_MAJOR)
    else:
        made = flat.view(shape)
    places = tuple(
        (expert, (expert, slice(0, count))) for expert, count in enumerate(counts) if count
    )
    told = torch.tensor(counts, dtype=torch.int32, device=made.device)
    return Rows(_spoiled(made, real, form), told, places)


def exact_values(
    k: int, form: OperandForm | None, dtype: torch.dtype, device: str
) -> Callable[[int], Operand]:
    """Small integers, in powers of two where quantized; scales in ``K_MAJOR``."""
    return lambda rows: cases.exact_activation(rows, k, _as_stored(form), dtype, device)


def normal_values(
    k: int, form: OperandForm | None, dtype: torch.dtype, device: str
) -> Callable[[int], Operand]:
    """Normal data, quantized by the reference where the kernel wants that; ``K_MAJOR``."""

    def values(rows: int) -> Operand:
        made = cases.normal_activation(rows, k, dtype, device)
        return made if form is None else quantize(made, form.format)

    return values


def _as_stored(form: OperandForm | None) -> OperandForm | None:
    return None if form is None else replace(form, layout=K_MAJOR)


def _spoiled(made: Operand, real: torch.Tensor, form: OperandForm | None) -> Operand:
    """NaN in the rows that do not count; scales moved to where ``form`` wants them."""
    idle = ~real.to(made.device)
    if not isinstance(made, BlockScaledTensor):
        made[idle] = torch.nan
        return made
    assert form is not None
    made.data.view(torch.uint8)[idle] = NAN_CODE
    if made.format.scale is ScaleFormat.UE8M0:
        made.scales.view(torch.uint8)[idle] = UE8M0_NAN
    else:
        made.scales[idle] = torch.nan
    return relayout(made, form.layout)
