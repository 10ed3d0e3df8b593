"""What each rank holds of a layer, in the checkpoint's own coordinates: rows, columns, experts.

``cut`` says what one rank's layer looks like to a kernel; a ``Piece`` says which stored numbers it
is made of. Everything that reads or checks a shard starts from a piece.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import lcm
from typing import TYPE_CHECKING

from blockscale.errors import FormatError
from blockscale.formats import BlockFormat, BlockShape, ceil_div, round_up
from blockscale.planning.request import LinearRequest, RemedyKind, Shard, ShardStyle

if TYPE_CHECKING:
    from blockscale.planning.sharding import Parallelism, WholeLayer


@dataclass(frozen=True, slots=True)
class Span:
    """Part of one axis: ``count`` stored elements from ``first``, between zeros.

    ``before`` and ``after`` are how many zeros are put in front of them and behind them.
    """

    first: int
    count: int
    before: int = 0
    after: int = 0

    @property
    def end(self) -> int:
        """The stored element after the last one."""
        return self.first + self.count

    @property
    def size(self) -> int:
        """Elements of the shard, zeros counted."""
        return self.before + self.count + self.after

    def scale_indices(self, block: int, stored_block: int) -> tuple[int, ...]:
        """For each of the shard's blocks along this axis, the stored block whose scale it has.

        Blocks that hold nothing but zeros take their neighbour's. Raises FormatError unless
        every block of ``block`` elements lies within one stored block.
        """
        start = self.first - self.before
        if stored_block % block or start % block:
            msg = (
                f"a shard from element {start} on in blocks of {block} does not fit stored blocks "
                f"of {stored_block}"
            )
            raise FormatError(msg)
        lowest, highest = self.first // stored_block, (self.end - 1) // stored_block
        return tuple(
            min(max((start + i * block) // stored_block, lowest), highest)
            for i in range(ceil_div(self.size, block))
        )


@dataclass(frozen=True, slots=True)
class Piece:
    """What one rank holds of a layer.

    ``rows``: one span for each merged part, counted within the part. ``block``: the shard's own,
    smaller than the stored one where scales are repeated. ``experts``: which of the stacked ones,
    None for a dense layer.
    """

    rows: tuple[Span, ...]
    columns: Span
    block: BlockShape
    experts: Span | None = None

    @property
    def is_padded(self) -> bool:
        """Whether the shard has zero rows or columns that the checkpoint has not."""
        return any(span.size != span.count for span in (*self.rows, self.columns))


@dataclass(frozen=True, slots=True)
class Holding:
    """How shards are held where a plain cut would split blocks; ``block`` is the shard's own."""

    kind: RemedyKind
    block: BlockShape


def piece_of(
    layer: WholeLayer, parallelism: Parallelism, rank: int, holding: Holding | None = None
) -> Piece:
    """What ``rank`` holds. ``holding`` None: an even cut, wherever it goes.

    Ranks that share experts are neighbours: rank // (tensor / expert) says which experts. The layer
    must be divisible (``cut`` gives no finding). Raises FormatError for a rank that does not exist
    or, if uneven, would hold nothing.
    """
    if not 0 <= rank < parallelism.tensor:
        msg = f"there is no rank {rank} of {parallelism.tensor}"
        raise FormatError(msg)
    request = layer.request
    degree, index, experts = parallelism.tensor, rank, None
    if request.experts is not None:
        degree = parallelism.expert_tensor
        index = rank % degree
        held = request.experts // parallelism.expert
        experts = Span(rank // degree * held, held)
    parts = layer.parts_when_cut(degree)
    rows = tuple(Span(0, size) for size in parts)
    columns = Span(0, request.k)
    stored = request.format.block
    if degree > 1 and layer.style is ShardStyle.COLUMN:
        units = layer.part_units or (None,) * len(parts)
        rows = tuple(
            _Axis(size, pieces_of_part(heads, degree), degree, stored).span(
                index, holding, stored.mn
            )
            for size, heads in zip(parts, units, strict=True)
        )
    elif degree > 1 and layer.style is ShardStyle.ROW:
        columns = _Axis(request.k, degree, degree, stored).span(index, holding, stored.k)
    return Piece(rows, columns, holding.block if holding else stored, experts)


def pieces_of_part(heads: int | None, degree: int) -> int:
    """Different shards that a part is cut into: ranks share heads if there are more of them."""
    return degree if heads is None else min(degree, heads)


def request_of(
    layer: WholeLayer, parallelism: Parallelism, piece: Piece, holding: Holding | None = None
) -> LinearRequest:
    """The request of a piece that splits no block."""
    request = layer.request
    experts = request.experts
    degree = parallelism.tensor
    if piece.experts is not None:
        experts = piece.experts.count
        degree = parallelism.expert_tensor
    parts = tuple(span.size for span in piece.rows)
    is_cut = layer.style is not ShardStyle.WHOLE and degree > 1
    shard = Shard(
        layer.style if is_cut else ShardStyle.WHOLE,
        degree if is_cut else 1,
        remedy=holding.kind if holding else None,
    )
    fmt = BlockFormat(request.format.element, request.format.scale, piece.block)
    return replace(
        request,
        n=sum(parts),
        k=piece.columns.size,
        parts=parts,
        format=fmt,
        experts=experts,
        shard=shard,
    )


@dataclass(frozen=True, slots=True)
class _Axis:
    """An axis of ``size`` elements cut into ``pieces``, which ``degree`` ranks hold."""

    size: int
    pieces: int
    degree: int
    stored: BlockShape

    def span(self, rank: int, holding: Holding | None, block: int) -> Span:
        """What a rank holds; ``block``: the stored one along this axis."""
        index = rank * self.pieces // self.degree
        if holding is not None and holding.kind is RemedyKind.UNEVEN:
            # One unit for rows and columns, so that both layers around an activation agree.
            return self._whole_blocks(index, lcm(self.stored.mn, self.stored.k))
        share = self.size // self.pieces
        span = Span(index * share, share)
        if holding is None or holding.kind is not RemedyKind.PAD:
            return span
        before = span.first % block
        return Span(span.first, share, before, self._padded_size(share, block) - before - share)

    def _whole_blocks(self, index: int, unit: int) -> Span:
        """Lower ranks get one block more where the blocks do not divide evenly."""
        each, more = divmod(ceil_div(self.size, unit), self.pieces)
        if each == 0:
            msg = (
                f"{self.size} elements are {more} blocks of {unit}, which leaves "
                f"{self.pieces - more} of {self.pieces} ranks with nothing"
            )
            raise FormatError(msg)
        first = (index * each + min(index, more)) * unit
        end = min(self.size, ((index + 1) * each + min(index + 1, more)) * unit)
        return Span(first, end - first)

    def _padded_size(self, share: int, block: int) -> int:
        """Up to the blocks that a share touches; the same for every rank."""
        return max(
            round_up((index + 1) * share, block) - index * share // block * block
            for index in range(self.pieces)
        )
