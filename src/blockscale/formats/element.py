"""Element formats: what one stored number means."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class DType(Enum):
    """A floating-point type of activations, outputs or unquantized weights.

    The value is the name that torch, numpy and Hugging Face configs use.
    """

    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"

    @property
    def bytes(self) -> int:
        """Bytes of one element."""
        return 4 if self is DType.FLOAT32 else 2

    @property
    def max(self) -> float:
        """Largest finite value."""
        return _LARGEST[self]


_LARGEST = {
    DType.BFLOAT16: float.fromhex("0x1.fep127"),
    DType.FLOAT16: 65504.0,
    DType.FLOAT32: float.fromhex("0x1.fffffep127"),
}


@dataclass(frozen=True, slots=True)
class ElementFormat:
    """A small float. ``max`` is its largest finite magnitude; ``torch_name`` its torch dtype."""

    name: str
    exponent_bits: int
    mantissa_bits: int
    bias: int
    max: float
    torch_name: str


# OCP 8-bit floating point (OFP8) E4M3: no infinities, one NaN code per sign (0x7f, 0xff).
E4M3FN = ElementFormat("e4m3fn", 4, 3, 7, 448.0, "float8_e4m3fn")
