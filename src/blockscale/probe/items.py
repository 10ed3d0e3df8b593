"""What a probe consists of: items, each of which one process checks and answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from blockscale.formats import DType
from blockscale.planning.decision import Arrangement

if TYPE_CHECKING:
    from collections.abc import Sequence

# Each size occurs; pairs are chosen so that every kernel gate is met by some and missed by others.
# 576, 2112: rows that end inside a block. 768, 2304: K blocks that are no multiple of four.
SHAPES: tuple[tuple[int, int], ...] = ((64, 128), (192, 256), (576, 512), (2112, 768), (64, 2304))

# Of each of eight experts: rows that end inside a block, K blocks that are no multiple of four.
EXPERT_SHAPES: tuple[tuple[int, int], ...] = ((576, 512), (192, 768))


@dataclass(frozen=True, slots=True)
class Item:
    """One shape in one output dtype: of a dense layer, or of a stack of experts.

    ``arrangement``: how the rows of experts lie, None for a dense layer.
    """

    dtype: DType
    n: int
    k: int
    arrangement: Arrangement | None = None

    def __str__(self) -> str:
        """``float32/64x128`` or ``float32/64x128/masked``; ``parsed`` reads it."""
        experts = f"/{self.arrangement.value}" if self.arrangement is not None else ""
        return f"{self.dtype.value}/{self.n}x{self.k}{experts}"

    @staticmethod
    def parsed(text: str) -> Item:
        """What ``str`` wrote."""
        dtype, shape, *experts = text.split("/")
        n, _, k = shape.partition("x")
        return Item(DType(dtype), int(n), int(k), Arrangement(experts[0]) if experts else None)

    @property
    def words(self) -> str:
        """For people: ``float32 N=64 K=128``."""
        experts = f", {self.arrangement.value} experts" if self.arrangement is not None else ""
        return f"{self.dtype.value} N={self.n} K={self.k}{experts}"


def items_of(backend: object, dtypes: Sequence[DType]) -> list[Item]:
    """All items of a backend that has ``bind``, the ones of an output dtype together."""
    arranged = [
        arrangement
        for arrangement, method in (
            (Arrangement.CONTIGUOUS, "bind_contiguous"),
            (Arrangement.MASKED, "bind_masked"),
        )
        if hasattr(backend, method)
    ]
    return [
        item
        for dtype in dtypes
        for item in (
            *(Item(dtype, n, k) for n, k in SHAPES),
            *(Item(dtype, n, k, how) for how in arranged for n, k in EXPERT_SHAPES),
        )
    ]
