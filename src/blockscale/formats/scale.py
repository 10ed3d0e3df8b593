"""Scale formats and the one place where a scale is rounded.

A scale is the multiplier that dequantizes: value = data x scale.

UE8M0 is eight exponent bits and nothing else: byte ``b`` is 2**(b - 127), 255 is NaN and zero
cannot be written (OCP MX specification 1.0, E8M0). Blockscale rounds a scale to UE8M0 **up**, on
the bits of its float32: ``exp2(ceil(log2(x)))`` is wrong one ulp above most powers of two, and
rounding to nearest would let the largest element of a block overflow E4M3.
"""

from __future__ import annotations

import struct
from enum import Enum
from fractions import Fraction


class ScaleFormat(Enum):
    """What a scale's bits mean. BF16 is read from checkpoints and never produced."""

    FP32 = "fp32"
    UE8M0 = "ue8m0"
    BF16 = "bf16"


class PowerOfTwo(Enum):
    """Whether every scale of a tensor is a power of two that UE8M0 can hold.

    Safetensors headers do not tell: float32 scales are ``UNKNOWN`` until somebody has read them.
    """

    YES = "yes"
    NO = "no"
    UNKNOWN = "unknown"


# Below this the largest magnitude of a block counts as this: keeps amax / 448 a normal float32
# with a finite reciprocal, and is the floor of SGLang's serving kernels (eps of
# sglang_per_token_group_quant_fp8).
AMAX_FLOOR = 1e-10

# UE8M0 bytes that blockscale produces. Byte 0 is 2**-127, a float32 subnormal that GPUs may flush;
# 255 is NaN.
UE8M0_MIN_BYTE = 1
UE8M0_MAX_BYTE = 254
UE8M0_NAN_BYTE = 255

FLOAT32_MANTISSA_BITS = 23
FLOAT32_INFINITY_BITS = 0x7F800000
FLOAT32_MANTISSA_MASK = (1 << FLOAT32_MANTISSA_BITS) - 1


def ue8m0_byte_rounded_up(scale: float) -> int:
    """The smallest UE8M0 byte in [1, 254] whose value is at least ``scale`` (a positive float32).

    Raises ValueError for NaN, infinity, zero, a negative number, or a value above 2**127.
    """
    bits = _float32_bits(scale)
    if not 0 < bits < FLOAT32_INFINITY_BITS:
        msg = f"a scale must be positive and finite, not {scale!r}"
        raise ValueError(msg)
    byte = (bits >> FLOAT32_MANTISSA_BITS) + bool(bits & FLOAT32_MANTISSA_MASK)
    if byte > UE8M0_MAX_BYTE:
        msg = f"scale {scale!r} is above 2**127, the largest that UE8M0 holds"
        raise ValueError(msg)
    return max(byte, UE8M0_MIN_BYTE)


def ue8m0_value(byte: int) -> float:
    """The multiplier that a UE8M0 byte stands for; NaN for 255."""
    if byte == UE8M0_NAN_BYTE:
        return float("nan")
    return float(Fraction(2) ** (byte - 127))


def is_ue8m0_exact(scale: float) -> bool:
    """Whether ``scale`` is one of 2**-126 ... 2**127, so that storing it as UE8M0 loses nothing."""
    bits = _float32_bits(scale)
    byte = bits >> FLOAT32_MANTISSA_BITS
    return UE8M0_MIN_BYTE <= byte <= UE8M0_MAX_BYTE and not bits & FLOAT32_MANTISSA_MASK


def _float32_bits(value: float) -> int:
    bits: int = struct.unpack("<I", struct.pack("<f", value))[0]
    return bits
