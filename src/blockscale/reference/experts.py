"""A layer of experts in plain torch: where rows go, and what comes back to the tokens.

The definition that fused kernels are compared with, and the CPU path. No function reads a tensor
on the host, so all of them could be captured in a CUDA graph.

For token t, choice j and expert e = ids[t, j]::

    hidden  = w13[e] x[t]                      rounded to the activation's dtype
    product = w2[e] silu_and_multiply(hidden)  rounded to the activation's dtype
    out[t]  = sum over j of weights[t, j] * product[t, j]

The sum is float32, in order of j, each product and each sum rounded, then rounded to the dtype. A
choice whose id is no expert of this stack adds nothing: another rank has it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from blockscale.errors import FormatError
from blockscale.formats import ceil_div


@dataclass(frozen=True, slots=True, eq=False)
class ArrangedRows:
    """Where the rows of a grouped product come from, and where each choice of a token went.

    ``source``: (rows,) int32, token * choices + choice of the row, -1 for a padding row.
    ``place``: (tokens, choices) int32, the row of each choice, -1 if its expert is not here.
    ``groups``: what the grouped product takes: the expert of each row block (contiguous), or the
    rows that count in each slot (masked); int32.
    ``slot``: rows of a slot if masked, None if contiguous.
    """

    source: torch.Tensor
    place: torch.Tensor
    groups: torch.Tensor
    slot: int | None

    @property
    def rows(self) -> int:
        """Rows in all, padding included."""
        return self.source.shape[0]

    @property
    def choices(self) -> int:
        """Experts that a token goes to."""
        return self.place.shape[1]


def contiguous_rows(choices: int, experts: int, alignment: int) -> int:
    """Rows that hold ``choices`` rows of any routing, each expert's padded to ``alignment``."""
    padded = choices + min(choices, experts) * (alignment - 1)
    return padded // alignment * alignment


def arrange_contiguous(ids: torch.Tensor, experts: int, alignment: int) -> ArrangedRows:
    """Rows sorted by expert, then by token and choice; each expert starts at a new row block.

    ``ids``: (tokens, choices) integers; those outside [0, experts) are left out. There are always
    ``contiguous_rows`` rows, whatever the routing.
    """
    sort = _sorted(ids, experts)
    padded = (sort.counts + (alignment - 1)) // alignment * alignment
    ends = padded.cumsum(0)
    rows = contiguous_rows(ids.numel(), experts, alignment)
    first_rows = torch.arange(rows // alignment, device=ids.device) * alignment
    groups = torch.searchsorted(ends, first_rows, right=True)
    groups = torch.where(groups < experts, groups, -1).int()
    place = _placed(sort, ends - padded, None)
    return ArrangedRows(_sources(place, rows), place.reshape(ids.shape), groups, None)


def arrange_masked(ids: torch.Tensor, experts: int, slot: int) -> ArrangedRows:
    """A slot of ``slot`` rows for each expert, filled by token and choice.

    ``slot`` must hold all tokens, and a token names an expert once; a choice beyond the slot gets
    place -2, which makes its token NaN.
    """
    sort = _sorted(ids, experts)
    starts = torch.arange(experts, device=ids.device) * slot
    place = _placed(sort, starts, slot)
    counts = sort.counts.clamp(max=slot).int()
    return ArrangedRows(_sources(place, experts * slot), place.reshape(ids.shape), counts, slot)


def gather_rows(values: torch.Tensor, rows: ArrangedRows) -> torch.Tensor:
    """(tokens, k) to (rows, k): each row's token, some token for padding rows."""
    token = rows.source.clamp(min=0) // rows.choices
    return values.index_select(0, token)


def combine_rows(
    products: torch.Tensor, rows: ArrangedRows, weights: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """(rows, n) products and (tokens, choices) weights to (tokens, n), as the module says.

    Raises FormatError if there is not one weight for each choice.
    """
    if weights.shape != rows.place.shape:
        msg = f"{tuple(rows.place.shape)} choices, but weights of shape {tuple(weights.shape)}"
        raise FormatError(msg)
    total = products.new_zeros((weights.shape[0], products.shape[1]), dtype=torch.float32)
    for choice in range(rows.choices):
        place = rows.place[:, choice]
        # Without any row there is nothing to index.
        if not products.shape[0]:
            break
        product = products.index_select(0, place.clamp(min=0)).float()
        added = product * weights[:, choice, None].float()
        added = torch.where((place == OVERFLOW)[:, None], torch.nan, added)
        total = torch.where((place == ABSENT)[:, None], total, total + added)
    return total.to(dtype)


ABSENT, OVERFLOW = -1, -2


@dataclass(frozen=True, slots=True, eq=False)
class _Sorted:
    """Choices in order of their experts: ``order`` (choices,), their ``key`` and ``rank`` in it."""

    order: torch.Tensor
    key: torch.Tensor
    rank: torch.Tensor
    counts: torch.Tensor


def _sorted(ids: torch.Tensor, experts: int) -> _Sorted:
    flat = ids.reshape(-1).long()
    key = torch.where((flat >= 0) & (flat < experts), flat, experts)
    counts = torch.zeros(experts + 1, dtype=torch.int64, device=ids.device)
    counts.scatter_add_(0, key, torch.ones_like(key))
    order = torch.argsort(key, stable=True)
    key = key[order]
    rank = torch.arange(flat.numel(), device=ids.device) - (counts.cumsum(0) - counts)[key]
    return _Sorted(order, key, rank, counts[:experts])


def _placed(sort: _Sorted, starts: torch.Tensor, slot: int | None) -> torch.Tensor:
    """The row of each choice in its original order, (choices,) int32."""
    experts = starts.shape[0]
    row = starts[sort.key.clamp(max=experts - 1)] + sort.rank
    if slot is not None:
        row = torch.where(sort.rank < slot, row, OVERFLOW)
    row = torch.where(sort.key < experts, row, ABSENT)
    return torch.empty_like(row).scatter_(0, sort.order, row).int()


def _sources(place: torch.Tensor, rows: int) -> torch.Tensor:
    """The inverse of ``place``: the choice of each row, -1 for padding."""
    source = torch.full((rows + 1,), -1, dtype=torch.int32, device=place.device)
    choice = torch.arange(place.shape[0], dtype=torch.int32, device=place.device)
    # Choices without a row write into one behind the last.
    source.scatter_(0, torch.where(place >= 0, place, rows).long(), choice)
    return source[:rows]


def masked_slot(tokens: int, alignment: int) -> int:
    """Rows of a slot that holds every token once."""
    return max(1, ceil_div(tokens, alignment)) * alignment
