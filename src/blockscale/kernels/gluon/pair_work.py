"""What a launch of pairs of programs does: which compiled kernel, how many pairs. Plain values."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from math import ceil

from blockscale.kernels.gluon.work import (
    BAND,
    CONSUMER_REGISTERS,
    K_BLOCK,
    PRODUCER_REGISTERS,
    DenseVariant,
    dense_variant,
)

# Programs of a pair, on neighbouring multiprocessors.
PAIR = 2


class Shares(IntEnum):
    """What the two tiles of a pair have in common, so that one copy brings it to both."""

    TOKENS = 0
    """Activation: the tiles are neighbours in a row."""
    WEIGHTS = 1
    """Weight: the tiles are neighbours in a column."""


@dataclass(frozen=True, slots=True)
class PairVariant:
    """One compiled form of the paired kernel: each program's tile, and what the two share."""

    tile: DenseVariant
    shares: Shares

    def constants(self, *, overlap: bool) -> dict[str, int]:
        """The kernel's compile-time parameters, in order; ``overlap``: see ``build.Form``."""
        return {
            "REST": self.tile.rest,
            "STAGES": self.tile.stages,
            "BUFFERS": self.tile.buffers,
            "BAND": BAND // PAIR if self.shares is Shares.WEIGHTS else BAND,
            "SHARES_WEIGHTS": self.shares is Shares.WEIGHTS,
            "OVERLAP": overlap,
            "CONSUMER_REGISTERS": CONSUMER_REGISTERS,
            "PRODUCER_REGISTERS": PRODUCER_REGISTERS,
        }

    @property
    def name(self) -> str:
        """``pair256x128s3b2-tokens``."""
        return f"pair{self.tile.name}-{self.shares.name.lower()}"


def pair_variant(rows: int, columns: int, out_bytes: int) -> PairVariant:
    """The variant of a tile, sharing the larger of its operands."""
    shares = Shares.WEIGHTS if columns > rows else Shares.TOKENS
    return PairVariant(dense_variant(rows, columns, out_bytes), shares)


@dataclass(frozen=True, slots=True)
class PairWork:
    """A variant and its items, two tiles each. A tile beyond the edge is computed and not stored.

    ``row_tiles``, ``column_tiles``: of pairs. ``programs``: clusters, each a pair.
    """

    variant: PairVariant
    row_tiles: int
    column_tiles: int
    k_blocks: int
    programs: int

    # As of ``DenseWork``: no sum is split.
    workspace_elements = 0
    tickets = 0

    @property
    def items(self) -> int:
        """Pairs of tiles."""
        return self.row_tiles * self.column_tiles

    def arguments(self, _m: int, n: int, b_scale_stride: int) -> dict[str, int]:
        """The kernel's integer arguments by name, but for ``has_bias``; TMA knows M."""
        return {
            "n": n,
            "b_scale_stride": b_scale_stride,
            "row_tiles": self.row_tiles,
            "column_tiles": self.column_tiles,
            "all_blocks": self.k_blocks,
            "items": self.items,
        }

    @property
    def grid(self) -> tuple[int, int]:
        """Clusters of the launch."""
        return self.programs, 1

    @property
    def name(self) -> str:
        """The variant."""
        return self.variant.name


def pair_work(variant: PairVariant, m: int, n: int, k: int, processors: int) -> PairWork:
    """The items of (m, n, k) on ``processors`` multiprocessors."""
    row_tiles, column_tiles = ceil(m / variant.tile.rows), ceil(n / variant.tile.columns)
    if variant.shares is Shares.WEIGHTS:
        row_tiles = ceil(row_tiles / PAIR)
    else:
        column_tiles = ceil(column_tiles / PAIR)
    programs = min(processors // PAIR, row_tiles * column_tiles)
    return PairWork(variant, row_tiles, column_tiles, ceil(k / K_BLOCK), programs)
