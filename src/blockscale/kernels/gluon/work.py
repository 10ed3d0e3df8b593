"""What a launch does: which compiled kernel, how many programs, which items. Plain values."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import TypeAlias

# Shared memory that one block may have on SM90 (227 KB), and each of two on one multiprocessor.
SHARED_BYTES = 232_448
HALF_SHARED_BYTES = 115_200
# Barriers, the weight scales' slots and what Triton keeps for itself (measured: up to 400 bytes).
RESERVED_BYTES = 400
# The small-M kernel also turns its results round in shared memory: halves in rounds of 2 KB, floats
# in rounds of up to 16 KB (Triton 3.6's choice).
TURN_HALVES_BYTES = 2_048
TURN_FLOATS_BYTES = 16_384
MAX_STAGES = 8
# With fewer slots a program had better have a multiprocessor to itself.
LEAST_STAGES = 3
# Staging buffers of a consumer that stores its columns in parts.
PART_BUFFERS = 3

# Tiles go down columns in bands of this many rows of tiles: 8 x 256 rows beside 16 x 128 columns
# is about square for 132 multiprocessors.
BAND = 8
# 168 registers for each of 384 threads is all there is; consumers take what the producer gives.
DENSE_REGISTERS = 168
CONSUMER_REGISTERS = 240
PRODUCER_REGISTERS = 24
# Two programs of 256 threads share a multiprocessor's 65536 registers.
SMALL_REGISTERS = 128

K_BLOCK = 128
WAVE_ROWS = 64
CONSUMERS = 2
# A narrow tile takes half the time of a full one.
NARROW_PER_FULL = 2
FLOAT_BYTES = 4
# Where TMA may write in shared memory.
TMA_SHARED_BYTES = 128


@dataclass(frozen=True, slots=True)
class DenseVariant:
    """One compiled form of the dense kernel: tile, depth of the ring, and what it can do.

    ``columns``: a power of two, or half as many again: then a tile has two parts (``dense``).
    ``buffers``: staging buffers of each consumer, each of ``store_columns``. ``beside``: programs
    that share a multiprocessor. ``split``: it can split sums. ``narrow``: a last column of half
    width takes half the time.
    """

    rows: int
    columns: int
    stages: int
    buffers: int
    store_columns: int
    beside: int = 1
    split: bool = False
    narrow: bool = False

    @property
    def consumers(self) -> int:
        """Consumer warpgroups."""
        return consumers(self.rows)

    @property
    def waves(self) -> int:
        """Waves of 64 rows of each consumer."""
        return self.rows // (self.consumers * WAVE_ROWS)

    @property
    def wide(self) -> int:
        """Columns of the wide part: all of them, if their number is a power of two."""
        return widest_power(self.columns)

    @property
    def rest(self) -> int:
        """Columns of the other part, 0 if there is none."""
        return self.columns - self.wide

    def constants(self, *, overlap: bool) -> dict[str, int]:
        """The kernel's compile-time parameters, in order; ``overlap``: see ``build.Form``."""
        return {
            "REST": self.rest,
            "STAGES": self.stages,
            "BUFFERS": self.buffers,
            "BAND": BAND,
            "SPLIT": self.split,
            "NARROW": self.narrow,
            "OVERLAP": overlap,
            "CONSUMER_REGISTERS": CONSUMER_REGISTERS,
            "PRODUCER_REGISTERS": PRODUCER_REGISTERS,
        }

    @property
    def name(self) -> str:
        """``256x128s3b2`` and what it can do."""
        tile = f"{self.rows}x{self.columns}s{self.stages}b{self.buffers}"
        return tile + "+split" * self.split + "+narrow" * self.narrow


def consumers(rows: int) -> int:
    """Consumer warpgroups of a tile of so many rows."""
    return min(CONSUMERS, rows // WAVE_ROWS)


def widest_power(columns: int) -> int:
    """The greatest power of two not above ``columns``."""
    return 1 << (columns.bit_length() - 1)


def dense_variant(
    rows: int, columns: int, out_bytes: int, *, split: bool = False, narrow: bool = False
) -> DenseVariant:
    """The variant of a tile with the deepest ring that fits beside the staging buffers."""
    waves = rows // (consumers(rows) * WAVE_ROWS)
    wide = widest_power(columns)
    if wide < columns:
        store_columns, buffers = columns - wide, PART_BUFFERS if out_bytes < FLOAT_BYTES else 1
    else:
        # Two buffers let the second wave be rounded while the first is still being stored.
        store_columns, buffers = columns, waves if out_bytes < FLOAT_BYTES else 1
    staging = consumers(rows) * buffers * WAVE_ROWS * store_columns * out_bytes
    slot = (rows + columns) * K_BLOCK + rows * FLOAT_BYTES
    beside = CONSUMERS // consumers(rows)
    half = HALF_SHARED_BYTES - RESERVED_BYTES - staging
    if beside > 1 and half // slot < LEAST_STAGES:
        beside = 1
    room = half if beside > 1 else SHARED_BYTES - RESERVED_BYTES - staging
    stages = min(MAX_STAGES, room // slot)
    return DenseVariant(rows, columns, stages, buffers, store_columns, beside, split, narrow)


@dataclass(frozen=True, slots=True)
class DenseWork:
    """A variant and its items: whole tiles first, then pieces of split tiles, then narrow tiles."""

    variant: DenseVariant
    row_tiles: int
    column_tiles: int
    k_blocks: int
    whole_tiles: int
    pieces: int
    piece_blocks: int
    items: int
    narrow_tiles: int
    programs: int

    @property
    def split_tiles(self) -> int:
        """Tiles whose sum is split."""
        return (self.items - self.whole_tiles) // self.pieces

    @property
    def workspace_elements(self) -> int:
        """Float32 elements that the pieces write."""
        return self.split_tiles * self.pieces * self.variant.rows * self.variant.columns

    @property
    def tickets(self) -> int:
        """Counters that the pieces draw from: one a split tile and consumer."""
        return self.split_tiles * self.variant.consumers

    def arguments(self, _m: int, n: int, b_scale_stride: int) -> dict[str, int]:
        """The kernel's integer arguments by name, but for ``has_bias``; TMA knows M."""
        return {
            "n": n,
            "b_scale_stride": b_scale_stride,
            "row_tiles": self.row_tiles,
            "column_tiles": self.column_tiles,
            "all_blocks": self.k_blocks,
            "whole_tiles": self.whole_tiles,
            "pieces": self.pieces,
            "piece_blocks": self.piece_blocks,
            "items": self.items,
            "narrow_tiles": self.narrow_tiles,
        }

    @property
    def grid(self) -> tuple[int, int]:
        """Programs of the launch."""
        return self.programs, 1

    @property
    def name(self) -> str:
        """The variant, and into how many pieces how many tiles are split."""
        split = f" {self.split_tiles}/{self.pieces}" if self.split_tiles else ""
        return self.variant.name + split


def dense_work(
    variant: DenseVariant, m: int, n: int, k: int, processors: int, *, pieces: int = 1,
) -> DenseWork:  # fmt: skip
    """The items of (m, n, k): what does not fill a round is split into ``pieces``, if above 1."""
    k_blocks = ceil(k / K_BLOCK)
    row_tiles = ceil(m / variant.rows)
    column_tiles, rest = divmod(n, variant.columns)
    is_narrow = variant.narrow and 0 < rest <= variant.columns // 2
    column_tiles += int(rest > 0 and not is_narrow)
    narrow_tiles = row_tiles if is_narrow else 0
    tiles = row_tiles * column_tiles
    piece_blocks = ceil(k_blocks / pieces)
    pieces = ceil(k_blocks / piece_blocks)
    places = processors * variant.beside
    whole_tiles = tiles if pieces == 1 else tiles // places * places
    items = whole_tiles + (tiles - whole_tiles) * pieces
    return DenseWork(
        variant,
        row_tiles,
        column_tiles,
        k_blocks,
        whole_tiles,
        pieces,
        piece_blocks,
        items,
        narrow_tiles,
        min(places, items + narrow_tiles),
    )


@dataclass(frozen=True, slots=True)
class SmallVariant:
    """One compiled form of the small-M kernel: tile (weight rows, tokens) and depth of the ring."""

    weights: int
    tokens: int
    stages: int
    split: bool

    def constants(self, *, overlap: bool) -> dict[str, int]:
        """The kernel's compile-time parameters, in order; ``overlap``: see ``build.Form``."""
        return {
            "STAGES": self.stages,
            "SPLIT": self.split,
            "OVERLAP": overlap,
            "PRODUCER_REGISTERS": PRODUCER_REGISTERS,
        }

    @property
    def name(self) -> str:
        """``small64x16s8``, ``+split`` if it can."""
        return f"small{self.weights}x{self.tokens}s{self.stages}" + "+split" * self.split


def small_variant(weights: int, tokens: int, out_bytes: int, *, split: bool) -> SmallVariant:
    """The variant of a tile with the deepest ring that leaves room for a second program."""
    slot = (weights + tokens) * K_BLOCK + scale_box(tokens) * FLOAT_BYTES
    turn = TURN_HALVES_BYTES
    if out_bytes == FLOAT_BYTES:
        turn = min(TURN_FLOATS_BYTES, weights * tokens * FLOAT_BYTES)
    stages = min(MAX_STAGES, (HALF_SHARED_BYTES - RESERVED_BYTES - turn) // slot)
    return SmallVariant(weights, tokens, stages, split)


@dataclass(frozen=True, slots=True)
class SmallWork:
    """A variant and its grid: (``tiles`` of weights x ``token_tiles``) x ``pieces`` programs."""

    variant: SmallVariant
    tiles: int
    token_tiles: int
    k_blocks: int
    pieces: int
    piece_blocks: int

    @property
    def workspace_elements(self) -> int:
        """Float32 elements that the pieces write; none if nothing is split."""
        if not self.variant.split:
            return 0
        return self.parts * self.pieces * self.variant.weights * self.variant.tokens

    @property
    def tickets(self) -> int:
        """Counters that the pieces draw from: one a part."""
        return self.parts if self.variant.split else 0

    @property
    def parts(self) -> int:
        """Tiles of the result."""
        return self.tiles * self.token_tiles

    def arguments(self, m: int, n: int, b_scale_stride: int) -> dict[str, int]:
        """The kernel's integer arguments by name, but for ``has_bias``."""
        return {
            "m": m,
            "n": n,
            "b_scale_stride": b_scale_stride,
            "token_tiles": self.token_tiles,
            "all_blocks": self.k_blocks,
            "pieces": self.pieces,
            "piece_blocks": self.piece_blocks,
        }

    @property
    def grid(self) -> tuple[int, int]:
        """Programs of the launch."""
        return self.parts, self.pieces

    @property
    def name(self) -> str:
        """The variant and the number of pieces."""
        repeated = f" x{self.token_tiles}" if self.token_tiles > 1 else ""
        return f"{self.variant.name}{repeated} /{self.pieces}"


def small_work(variant: SmallVariant, m: int, n: int, k: int, pieces: int) -> SmallWork:
    """The grid of (m, n, k) with K cut into about ``pieces``; 1 unless the variant can split."""
    k_blocks = ceil(k / K_BLOCK)
    piece_blocks = ceil(k_blocks / pieces)
    pieces = ceil(k_blocks / piece_blocks)
    tiles, token_tiles = ceil(n / variant.weights), ceil(m / variant.tokens)
    return SmallWork(variant, tiles, token_tiles, k_blocks, pieces, piece_blocks)


def scale_box(tokens: int) -> int:
    """Activation scales that one copy moves, of which the first ``tokens`` count.

    TMA writes to multiples of 128 bytes of shared memory (CUDA programming guide, tensor copies),
    so a slot is at least that large; with 8 tokens the second slot was misaligned on an H200.
    """
    return max(tokens, TMA_SHARED_BYTES // FLOAT_BYTES)


def aligned_scale_stride(m: int) -> int:
    """From one K block's activation scales to the next, in elements: TMA wants 16 bytes."""
    return (m + 3) // 4 * 4


Work: TypeAlias = DenseWork | SmallWork
