"""Which elements share a scale."""

from __future__ import annotations

from dataclasses import dataclass

from blockscale.errors import FormatError


def ceil_div(numerator: int, denominator: int) -> int:
    """The quotient rounded up."""
    return -(-numerator // denominator)


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of ``multiple`` that is at least ``value``."""
    return ceil_div(value, multiple) * multiple


@dataclass(frozen=True, slots=True)
class BlockShape:
    """``mn`` rows by ``k`` columns share one scale. Rows are M for activations and N for weights.

    Blocks at the end of a row or column may be partial; they have a scale of their own.
    """

    mn: int
    k: int

    def __post_init__(self) -> None:
        """Refuse empty blocks."""
        if self.mn < 1 or self.k < 1:
            msg = f"a block needs at least one row and one column, not {self.mn}x{self.k}"
            raise FormatError(msg)

    def __str__(self) -> str:
        """``128x128``."""
        return f"{self.mn}x{self.k}"

    def grid(self, mn: int, k: int) -> tuple[int, int]:
        """Blocks along each axis of an (mn, k) matrix, partial ones counted."""
        return ceil_div(mn, self.mn), ceil_div(k, self.k)
