"""One rank's shard of a stored layer, read without reading what other ranks hold.

Codes are copied, scales are repeated or left out: a remedy changes no value.
"""

from __future__ import annotations

import os
from collections import deque
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch

from blockscale.errors import CheckpointError
from blockscale.formats import K_MAJOR, BlockFormat
from blockscale.planning.pieces import Span
from blockscale.tensor import BlockScaledTensor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from numpy.typing import NDArray

    from blockscale.checkpoint.header import TensorEntry
    from blockscale.checkpoint.read import Checkpoint
    from blockscale.checkpoint.requests import MergedLayer
    from blockscale.checkpoint.schema import QuantizedLayer
    from blockscale.planning.pieces import Piece

    Items: TypeAlias = NDArray[np.unsignedinteger[Any]]

# Linux takes this many buffers in one preadv (UIO_MAXIOV).
MAX_BUFFERS = 1024
_SCALE_ITEMS: dict[str, np.dtype[Any]] = {
    "F32": np.dtype(np.uint32),
    "F16": np.dtype(np.uint16),
    "BF16": np.dtype(np.uint16),
    "F8_E8M0": np.dtype(np.uint8),
    "U8": np.dtype(np.uint8),
}


def read_piece(layer: MergedLayer, piece: Piece) -> BlockScaledTensor:
    """The weight that ``piece`` describes, (n, k) or (experts, n, k), scales in ``K_MAJOR``.

    Reads the piece's codes and the scales of the blocks that it touches, nothing else. Zeros that
    pad it have the code 0. F16 scales become FP32, exactly.

    Raises CheckpointError if a file cannot be read, FormatError if the piece's blocks do not fit
    the stored ones.
    """
    sources = tuple(_experts(layer, piece))
    rows = sum(span.size for span in piece.rows)
    columns = piece.columns
    codes = np.zeros((len(sources), rows, columns.size), np.uint8)
    first = layer.members[0][0]
    grid = piece.block.grid(rows, columns.size)
    scales = np.zeros((len(sources), *grid), _SCALE_ITEMS[first.scale.dtype])
    for expert, parts in enumerate(sources):
        row = 0
        for part, span in zip(parts, piece.rows, strict=True):
            inside = codes[expert, row + span.before :, columns.before :]
            _read_region(part.codes, span, columns, inside[: span.count, : columns.count])
            begin = row // piece.block.mn
            found = _read_scales(part, span, piece)
            scales[expert, begin : begin + len(found)] = found
            row += span.size
    if layer.whole.request.experts is None:
        codes, scales = codes[0], scales[0]
    data = torch.from_numpy(codes).view(torch.float8_e4m3fn)
    stored = first.format
    fmt = BlockFormat(stored.element, stored.scale, piece.block)
    return BlockScaledTensor(data, _scale_tensor(scales, first.scale.dtype), fmt, K_MAJOR)


def expert_reader(layer: MergedLayer, piece: Piece) -> Callable[[int], Iterator[BlockScaledTensor]]:
    """What reads one of the piece's experts, counted on this rank, as (n, k): no more in memory."""
    held = piece.experts
    assert held is not None

    def read(expert: int) -> Iterator[BlockScaledTensor]:
        one = read_piece(layer, replace(piece, experts=Span(held.first + expert, 1)))
        yield BlockScaledTensor(one.data[0], one.scales[0], one.format, one.layout)

    return read


def read_bias_piece(
    checkpoint: Checkpoint, layer: MergedLayer, piece: Piece
) -> torch.Tensor | None:
    """The bias of a dense layer's rows, zero where rows are padded; None if it has none.

    Raises CheckpointError if a file cannot be read, or a merged part lacks the bias others have.
    """
    from blockscale.checkpoint.tensors import read_tensor

    if not layer.whole.request.has_bias:
        return None
    found = []
    for part, span in zip(_parts(layer, piece, 0, layer.members[0]), piece.rows, strict=True):
        whole = read_tensor(checkpoint.tensor(part.name + ".bias"))
        kept = whole[part.first_row + span.first : part.first_row + span.end]
        found.append(torch.nn.functional.pad(kept, (span.before, span.after)))
    return torch.cat(found)


@dataclass(frozen=True, slots=True)
class _Grid:
    """A matrix of items in a file: ``entry`` from row ``first_row`` on."""

    entry: TensorEntry
    first_row: int
    width: int
    item: np.dtype[Any]


@dataclass(frozen=True, slots=True)
class _Part:
    """One merged weight of one expert: where its codes and scales lie."""

    name: str
    first_row: int
    codes: _Grid
    scales: _Grid
    stored: BlockFormat


def _experts(layer: MergedLayer, piece: Piece) -> Iterator[tuple[_Part, ...]]:
    """The parts of each expert that the piece has; of the one matrix, if the layer is dense."""
    if piece.experts is None:
        yield _parts(layer, piece, 0, layer.members[0])
        return
    for expert in range(piece.experts.first, piece.experts.end):
        stacked = layer.members[0][0].stacked is not None
        yield _parts(
            layer, piece, expert if stacked else 0, layer.members[0 if stacked else expert]
        )


def _parts(
    layer: MergedLayer, piece: Piece, expert: int, members: Sequence[QuantizedLayer]
) -> tuple[_Part, ...]:
    """``expert``: its place in stacked tensors. Parts that lie fused follow one another."""
    if len(members) == len(piece.rows):
        return tuple(_part(member, expert, 0) for member in members)
    (member,) = members
    starts = np.cumsum((0, *layer.whole.fused_parts[:-1])).tolist()
    return tuple(_part(member, expert, start) for start in starts)


def _part(member: QuantizedLayer, expert: int, first_row: int) -> _Part:
    block = member.format.block
    grid_rows, grid_columns = block.grid(member.n, member.k)
    item = _SCALE_ITEMS[member.scale.dtype]
    return _Part(
        member.name,
        first_row,
        _Grid(member.weight, expert * member.n + first_row, member.k, np.dtype(np.uint8)),
        _Grid(member.scale, expert * grid_rows, grid_columns, item),
        member.format,
    )


def _read_scales(part: _Part, span: Span, piece: Piece) -> Items:
    """One scale for each of the shard's blocks in this part."""
    stored = part.stored.block
    below = Span(span.first + part.first_row, span.count, span.before, span.after)
    rows = np.array(below.scale_indices(piece.block.mn, stored.mn))
    columns = np.array(piece.columns.scale_indices(piece.block.k, stored.k))
    region = np.zeros((np.ptp(rows) + 1, np.ptp(columns) + 1), part.scales.item)
    _read_region(
        part.scales,
        Span(int(rows[0]), region.shape[0]),
        Span(int(columns[0]), region.shape[1]),
        region,
    )
    return region[np.ix_(rows - rows[0], columns - columns[0])]


def _read_region(grid: _Grid, rows: Span, columns: Span, target: Items) -> None:
    """Stored rows and columns into ``target``, of that shape and contiguous along its rows."""
    raw = target.view(np.uint8)
    row_bytes = grid.width * grid.item.itemsize
    begin = grid.entry.offset + (grid.first_row + rows.first) * row_bytes
    try:
        with grid.entry.path.open("rb", buffering=0) as file:
            if columns.count == grid.width:
                rows_at_once = [raw.reshape(-1)] if raw.flags.c_contiguous else raw
                _read_rows(grid.entry, file.fileno(), begin, rows_at_once)
                return
            offset = begin + columns.first * grid.item.itemsize
            for index, row in enumerate(raw):
                _read_rows(grid.entry, file.fileno(), offset + index * row_bytes, [row])
    except OSError as error:
        raise CheckpointError(
            grid.entry.path, f"cannot be read: {error.strerror or error}", tensor=grid.entry.name
        ) from error


def _read_rows(
    entry: TensorEntry, descriptor: int, offset: int, rows: Iterable[NDArray[np.uint8]]
) -> None:
    """Bytes that follow one another in the file, into buffers that need not."""
    pending = deque(row.data for row in rows if row.nbytes)
    while pending:
        got = os.preadv(descriptor, list(islice(pending, MAX_BUFFERS)), offset)
        if got == 0:
            raise CheckpointError(
                entry.path, "the file became shorter while it was read", tensor=entry.name
            )
        offset += got
        while got:
            buffer = pending.popleft()
            if got < buffer.nbytes:
                pending.appendleft(buffer[got:])
            got -= min(got, buffer.nbytes)


def _scale_tensor(codes: Items, dtype: str) -> torch.Tensor:
    if dtype in {"F8_E8M0", "U8"}:
        return torch.from_numpy(codes).view(torch.float8_e8m0fnu)
    if dtype == "BF16":
        return torch.from_numpy(codes.view(np.int16)).view(torch.bfloat16)
    if dtype == "F16":
        return torch.from_numpy(codes.view(np.float16).astype(np.float32))
    return torch.from_numpy(codes.view(np.float32))
