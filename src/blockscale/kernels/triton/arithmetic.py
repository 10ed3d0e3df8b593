"""Device code: the quantization rule of ``blockscale.reference``, bit for bit.

Kernels that use these functions are built without floating-point contraction: a multiplication
and an addition that the compiler joins round once where the reference rounds twice.
"""

from __future__ import annotations

import triton
import triton.language as tl

from blockscale.formats import AMAX_FLOOR as _AMAX_FLOOR
from blockscale.formats import E4M3FN
from blockscale.formats.scale import (
    FLOAT32_MANTISSA_BITS,
    FLOAT32_MANTISSA_MASK,
    UE8M0_NAN_BYTE,
)
from blockscale.reference import fused

AMAX_FLOOR = tl.constexpr(_AMAX_FLOOR)
MANTISSA_BITS = tl.constexpr(FLOAT32_MANTISSA_BITS)
MANTISSA_MASK = tl.constexpr(FLOAT32_MANTISSA_MASK)
NAN_BYTE = tl.constexpr(UE8M0_NAN_BYTE)
NAN_BITS = tl.constexpr(0x7FC00000)
INFINITY = tl.constexpr(float("inf"))
# 1 / 448 as a float32 below it and the rest: both positive, so that infinity times their sum is.
_RECIPROCAL_HIGH = float.fromhex("0x1.249248p-9")
RECIPROCAL_HIGH = tl.constexpr(_RECIPROCAL_HIGH)
RECIPROCAL_LOW = tl.constexpr(1 / E4M3FN.max - _RECIPROCAL_HIGH)
# More than a guessed reciprocal is off.
LOWERED = tl.constexpr(1.0 - 2.0**-20)
MINUS_LOG2_E = tl.constexpr(-fused.LOG2_E)
ROUND_TO_INTEGER = tl.constexpr(fused.ROUND_TO_INTEGER)
EXP2_SMALLEST = tl.constexpr(fused.EXP2_SMALLEST)
SMALLEST_GATE = tl.constexpr(fused.SMALLEST_GATE)
EXP2_1, EXP2_2, EXP2_3, EXP2_4, EXP2_5 = (tl.constexpr(c) for c in fused.EXP2_COEFFICIENTS)


@triton.jit
def larger_or_nan(one, other):
    """The maximum; NaN if either is NaN."""
    return tl.maximum(one, other, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def reciprocal_exactly(values):
    """1 / values with IEEE rounding, for float32 values in [2**-126, 2**126).

    One Newton step after the hardware's guess: what ptxas makes of ``rcp.rn.f32`` in this range,
    without its tests of the range. tests/gpu tries every mantissa.
    """
    return tl.inline_asm_elementwise(
        """{
        .reg .f32 guess, error;
        rcp.approx.ftz.f32 guess, $1;
        fma.rn.f32 error, $1, guess, 0fBF800000;
        neg.f32 error, error;
        fma.rn.f32 $0, error, guess, guess;
        }""",
        "=r,r",
        [values],
        dtype=tl.float32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def reciprocal_nearly(values):
    """1 / values within 2 ulp for float32 values in [2**-126, 2**126); 0 for infinity, NaN for NaN.

    PTX ISA, ``rcp.approx.ftz.f32``: off by at most 2**-23 for values in [1, 2].
    """
    return tl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=r,r", [values], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def reciprocal_in_two_parts(scale):
    """(high, low) with high + low = 1 / scale (1 - 2**-39 or less), low >= 0; (0, 0) of infinity.

    high is lowered, so that low is not negative: a negative zero divided stays one. The error of
    high is exact to a rounding, and NaN for infinity; the minimum takes the number then.
    """
    high = reciprocal_nearly(scale) * LOWERED
    one = tl.full(scale.shape, 1.0, tl.float32)
    error = tl.minimum(tl.fma(scale * -1.0, high, one), 1.0)
    return high, error * high


@triton.jit
def divide_half(dividend, high, low):
    """Dividend / scale as exact as E4M3 shows; ``high`` and ``low`` are 1 / scale in two parts.

    For dividends that come from bfloat16 or float16 and the scale of a block with no larger ones:
    such a quotient lies off the borders between codes by more than this one's error, or on one
    and then this one does, or beside one as this one does. tests/kernels_triton/division.c tries
    every pair of mantissas.
    """
    return tl.fma(dividend, high, dividend * low)


@triton.jit
def divide_float(dividend, divisor, reciprocal):
    """Dividend / divisor as exact as E4M3 shows.

    ``reciprocal`` is 1 / divisor, rounded to nearest. After a first guess one correction adds
    the remainder, which an FMA gives without error unless it underflows, which takes a quotient
    far below half of the smallest E4M3 code. The result is the quotient within an ulp, and beside a
    border between codes it is the rounded one: tests/kernels_triton/division.c tries every divisor.
    The remainder is taken with the opposite sign, so that a correction of a negative zero is no
    positive one.
    """
    # A product with -1 becomes a sign of an operand; Triton's minus becomes a subtraction.
    quotient = dividend * reciprocal
    excess = tl.fma(quotient, divisor, dividend * -1.0)
    return tl.fma(excess, reciprocal * -1.0, quotient)


@triton.jit
def scale_of(amax):
    """max(amax, AMAX_FLOOR) / 448, rounded; NaN and infinity stay what they are.

    The sum before rounding is amax / 448 within 2**-47 of it. amax / 7 is a number of 24 bits or
    lies at least 1/14 ulp off the middle between two, so both round alike.
    """
    amax = larger_or_nan(amax, AMAX_FLOOR)
    return tl.fma(amax, tl.full(amax.shape, RECIPROCAL_HIGH, tl.float32), amax * RECIPROCAL_LOW)


@triton.jit
def exponent_rounded_up(scale):
    """The UE8M0 byte of a float32 scale as int32, rounded up; 255 (NaN) for infinity and NaN.

    ``scale`` is at least AMAX_FLOOR / 448, so no byte is below 85, and if it is finite at most
    2**128 / 448, so none is above 247: no clamping, unlike the reference's general rule.
    """
    bits = scale.to(tl.int32, bitcast=True)
    exponent = (bits >> MANTISSA_BITS) + ((bits & MANTISSA_MASK) != 0).to(tl.int32)
    return tl.minimum(exponent, NAN_BYTE)


@triton.jit
def inverse_power(codes):
    """1 / 2**(code - 127), exact, so that a product with it is a quotient; NaN for 255."""
    bits = tl.where(codes == NAN_BYTE, NAN_BITS, (254 - codes) << MANTISSA_BITS)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def quantize_blocks(values, IS_UE8M0: tl.constexpr, IS_HALF: tl.constexpr):
    """Codes of (rows, blocks, elements) float32 values, and one scale code per block.

    IS_HALF: the values come from two bytes each. Scale codes are float32 values, or UE8M0 bytes as
    int32. No clamp before the cast: |value| is at most amax, so the quotient is at most
    448 (1 + 2**-22), and everything below 464 rounds to a finite code.
    """
    scale = scale_of(tl.reduce(tl.abs(values), 2, larger_or_nan))
    if IS_UE8M0:
        codes = exponent_rounded_up(scale)
        quotient = values * inverse_power(codes)[:, :, None]
    elif IS_HALF:
        codes = scale
        high, low = reciprocal_in_two_parts(scale)
        high = tl.broadcast_to(high[:, :, None], values.shape)
        quotient = divide_half(values, high, low[:, :, None])
    else:
        codes = scale
        # A block with an infinity: zeros for its numbers, NaN for its infinities.
        is_infinite = scale == INFINITY
        reciprocal = tl.where(is_infinite, 0.0, reciprocal_exactly(scale))[:, :, None]
        divisor = tl.where(is_infinite, 0.0, scale)[:, :, None]
        quotient = divide_float(values, divisor, reciprocal)
    return quotient.to(tl.float8e4nv), codes


@triton.jit
def rounded_to(values, DTYPE: tl.constexpr):
    """Float32 values as they read back after being stored in ``DTYPE``."""
    return values.to(DTYPE).to(tl.float32)


@triton.jit
def exp2(values):
    """2**values, at most 2**127, as ``reference.fused`` defines it. NaN gives some number."""
    clamped = tl.maximum(values, EXP2_SMALLEST)
    shifted = clamped + ROUND_TO_INTEGER
    fraction = clamped - (shifted - ROUND_TO_INTEGER)
    power = tl.full(fraction.shape, EXP2_5, tl.float32)
    power = tl.fma(power, fraction, tl.full(fraction.shape, EXP2_4, tl.float32))
    power = tl.fma(power, fraction, tl.full(fraction.shape, EXP2_3, tl.float32))
    power = tl.fma(power, fraction, tl.full(fraction.shape, EXP2_2, tl.float32))
    power = tl.fma(power, fraction, tl.full(fraction.shape, EXP2_1, tl.float32))
    power = tl.fma(power, fraction, tl.full(fraction.shape, 1.0, tl.float32))
    exponent = shifted.to(tl.int32, bitcast=True) << MANTISSA_BITS
    return (power.to(tl.int32, bitcast=True) + exponent).to(tl.float32, bitcast=True)


@triton.jit
def silu(gate):
    """SiLU, gate / (1 + exp(-gate)), in float32, as ``reference.fused`` defines it."""
    gate = larger_or_nan(gate, SMALLEST_GATE)
    return gate * reciprocal_exactly(1.0 + exp2(gate * MINUS_LOG2_E))
