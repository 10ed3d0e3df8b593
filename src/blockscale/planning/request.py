"""``LinearRequest``: everything about one layer that decides which backend may serve it."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from blockscale.errors import FormatError
from blockscale.formats import BlockFormat, BlockShape, DType, PowerOfTwo


class ShardStyle(Enum):
    """How tensor parallelism cuts a weight of N rows by K columns."""

    WHOLE = "whole"
    """Every rank holds all of it (tensor parallelism of 1, or a replicated layer)."""
    COLUMN = "column"
    """Ranks hold different rows of N (q, k, v, gate, up); each merged part is cut by itself."""
    ROW = "row"
    """Ranks hold different columns of K (o, down); outputs are summed."""


class RemedyKind(Enum):
    """Ways to hold a shard whose cut goes through scale blocks. None changes a value."""

    REFINE = "refine"
    """Each scale is repeated for smaller blocks that no cut goes through."""
    UNEVEN = "uneven"
    """Ranks hold whole blocks, some of them one block more than others."""
    PAD = "pad"
    """Zero rows or columns fill the shard's first and last block."""
    EXPERT = "expert_parallel"
    """Ranks hold fewer experts and more of each: another pair of degrees."""


@dataclass(frozen=True, slots=True)
class Shard:
    """The piece of a layer that one rank holds.

    ``split_blocks`` lists, in words, every scale block that the cut goes through; empty means that
    the shard's own scales are a slice of the checkpoint's. ``unsplit_block``: where some block is
    split, the largest block that divides it and that no cut goes through. Repeating each scale for
    these smaller blocks would be exact, so a backend that takes them could serve the shard.
    ``remedy``: how the shard is held so that no block is split; sizes and format of the request are
    then those of the remedy, and those of the rank with the most work.
    """

    style: ShardStyle = ShardStyle.WHOLE
    degree: int = 1
    split_blocks: tuple[str, ...] = ()
    unsplit_block: BlockShape | None = None
    remedy: RemedyKind | None = None


@dataclass(frozen=True, slots=True)
class LinearRequest:
    """One linear layer, out[M, n] = activation[M, k] x weight[n, k]^T, as one rank will run it.

    ``n`` and ``k`` are the shard's. ``parts`` are the rows of each merged weight in order (q, k,
    v), one entry if nothing is merged; they sum to ``n``. ``format`` and ``power_of_two`` describe
    the checkpoint's weight. ``experts`` is the number of stacked weights of a grouped layer on this
    rank, None for a dense one.
    """

    name: str
    n: int
    k: int
    format: BlockFormat
    activation_dtype: DType
    out_dtype: DType
    power_of_two: PowerOfTwo = PowerOfTwo.UNKNOWN
    parts: tuple[int, ...] = ()
    has_bias: bool = False
    shard: Shard = field(default_factory=Shard)
    experts: int | None = None

    def __post_init__(self) -> None:
        """Fill ``parts`` for an unmerged layer; refuse impossible sizes and foreign dtypes."""
        if self.n < 1 or self.k < 1:
            msg = f"layer {self.name!r} has N={self.n}, K={self.k}; both must be at least 1"
            raise FormatError(msg)
        for dtype in (self.activation_dtype, self.out_dtype):
            if not isinstance(dtype, DType):
                msg = (  # type: ignore[unreachable]  # for callers that are not type-checked
                    f"layer {self.name!r}: {dtype!r} is no DType; blockscale.tensor.dtype_of says "
                    "which a torch dtype is"
                )
                raise FormatError(msg)
        if not self.parts:
            object.__setattr__(self, "parts", (self.n,))
        if sum(self.parts) != self.n:
            msg = f"layer {self.name!r}: parts {self.parts} do not sum to N={self.n}"
            raise FormatError(msg)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the FP8 data on this rank, scales not counted."""
        return self.n * self.k * (self.experts or 1)
