"""Device code for two-byte floats in pairs: a word is an int32 of two neighbours, the first low.

One instruction adds, multiplies or compares two of them, and rounds as float32 arithmetic with a
rounding to two bytes behind it does: RMSNorm's row is bound by instructions, not by memory. A word
of float32 activations is a value. ``tests/kernels_triton`` tries every pair of mantissas.
"""

from __future__ import annotations

import triton
import triton.language as tl

from blockscale.kernels.triton.arithmetic import (
    INFINITY,
    divide_float,
    divide_half,
    exponent_rounded_up,
    inverse_power,
    larger_or_nan,
    reciprocal_exactly,
    reciprocal_in_two_parts,
    scale_of,
)

HIGH_HALF = tl.constexpr(-65536)
LOW_HALF = tl.constexpr(0xFFFF)


@triton.jit
def joined(low, high):
    """Words of halves."""
    low = low.to(tl.int16, bitcast=True).to(tl.int32) & LOW_HALF
    return low | (high.to(tl.int16, bitcast=True).to(tl.int32) << 16)


@triton.jit
def halves(words, DTYPE: tl.constexpr):
    """The two values of each word, as float32."""
    if DTYPE == tl.bfloat16:
        low = (words << 16).to(tl.float32, bitcast=True)
        high = (words & HIGH_HALF).to(tl.float32, bitcast=True)
    else:
        low = words.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        high = (words >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return low, high


@triton.jit
def rounded_pair(low, high, DTYPE: tl.constexpr):
    """Words of float32 values, each rounded to DTYPE."""
    PTX: tl.constexpr = (
        "cvt.rn.bf16x2.f32 $0, $2, $1;" if DTYPE == tl.bfloat16 else "cvt.rn.f16x2.f32 $0, $2, $1;"
    )
    return tl.inline_asm_elementwise(
        PTX, "=r,r,r", [low, high], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def product_of_pairs(one, other, DTYPE: tl.constexpr):
    """Words of products, each rounded once.

    The float32 product of halves is exact where it does not round to zero in DTYPE, so the
    reference rounds once too. bfloat16 is added a negative zero: SM89 has no other product of it.
    """
    PTX: tl.constexpr = (
        "{ .reg .b32 zeros; mov.b32 zeros, 0x80008000; fma.rn.bf16x2 $0, $1, $2, zeros; }"
        if DTYPE == tl.bfloat16
        else "mul.rn.f16x2 $0, $1, $2;"
    )
    return tl.inline_asm_elementwise(
        PTX, "=r,r,r", [one, other], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def sum_of_pairs(one, other, DTYPE: tl.constexpr):
    """Words of sums, each rounded once.

    The reference rounds twice, to 24 bits and then to p: the same for 24 >= 2 p + 2 (Figueroa
    1995), and p is 8 or 11.
    """
    PTX: tl.constexpr = (
        "{ .reg .b32 ones; mov.b32 ones, 0x3F803F80; fma.rn.bf16x2 $0, $1, ones, $2; }"
        if DTYPE == tl.bfloat16
        else "add.rn.f16x2 $0, $1, $2;"
    )
    return tl.inline_asm_elementwise(
        PTX, "=r,r,r", [one, other], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def larger_bfloat16(one, other):
    """The larger magnitudes of each half, NaN if there is one; the signs mean nothing."""
    return tl.inline_asm_elementwise(
        "max.NaN.xorsign.abs.bf16x2 $0, $1, $2;",
        "=r,r,r",
        [one, other],
        dtype=tl.int32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def larger_float16(one, other):
    """The larger magnitudes of each half, NaN if there is one; the signs mean nothing."""
    return tl.inline_asm_elementwise(
        "max.NaN.xorsign.abs.f16x2 $0, $1, $2;",
        "=r,r,r",
        [one, other],
        dtype=tl.int32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def larger_float32(one, other):
    """The larger magnitude, NaN if there is one."""
    return larger_or_nan(tl.abs(one), tl.abs(other))


@triton.jit
def code_pair(low, high):
    """E4M3 codes of float32 values as int16, the first in the low byte."""
    return tl.inline_asm_elementwise(
        "cvt.rn.satfinite.e4m3x2.f32 $0, $2, $1;",
        "=h,r,r",
        [low, high],
        dtype=tl.int16,
        is_pure=True,
        pack=1,
    )


@triton.jit
def add_words(one, other, DTYPE: tl.constexpr):
    """Sums, rounded to DTYPE."""
    if DTYPE == tl.float32:
        return one + other
    else:
        return sum_of_pairs(one, other, DTYPE)


@triton.jit
def squares(words, DTYPE: tl.constexpr):
    """Squares in float32; of halves, the sum of each word's two.

    Squares of float16 are exact in float32, so a joined multiplication and addition rounds as a
    separate one. Those of tiny bfloat16 are not.
    """
    if DTYPE == tl.float32:
        return words * words
    else:
        low, high = halves(words, DTYPE)
        if DTYPE == tl.float16:
            return tl.fma(high, high, low * low)
        else:
            return low * low + high * high


@triton.jit
def scaled(words, factor, weights, DTYPE: tl.constexpr):
    """Words times float32 ``factor``, rounded to DTYPE, times ``weights``, rounded to DTYPE."""
    if DTYPE == tl.float32:
        return words * factor * weights
    else:
        low, high = halves(words, DTYPE)
        return product_of_pairs(rounded_pair(low * factor, high * factor, DTYPE), weights, DTYPE)


@triton.jit
def quantize_words(words, SPLIT: tl.constexpr, IS_UE8M0: tl.constexpr, DTYPE: tl.constexpr):
    """``arithmetic.quantize_blocks`` of words (spans, 2, words): codes, in pairs if of halves.

    SPLIT: blocks in half a span; 0 if a span is a block. Scale codes come in order of the row.
    """
    if SPLIT == 0:
        largest = _largest(_largest(words, 1, DTYPE), 1, DTYPE)
        return _quantize(words, largest, IS_UE8M0, DTYPE)
    else:
        SPANS: tl.constexpr = words.shape[0]
        blocks = tl.reshape(words, (SPANS, 2, SPLIT, words.shape[2] // SPLIT))
        codes, scale_codes = _quantize(blocks, _largest(blocks, 3, DTYPE), IS_UE8M0, DTYPE)
        return tl.reshape(codes, words.shape), tl.reshape(scale_codes, (SPANS * 2 * SPLIT,))


@triton.jit
def _largest(words, AXIS: tl.constexpr, DTYPE: tl.constexpr):
    if DTYPE == tl.bfloat16:
        return tl.reduce(words, AXIS, larger_bfloat16)
    elif DTYPE == tl.float16:
        return tl.reduce(words, AXIS, larger_float16)
    else:
        return tl.reduce(words, AXIS, larger_float32)


@triton.jit
def _over(scales, words):
    """A number for each block, at each of its words."""
    if len(scales.shape) == 1:
        return tl.broadcast_to(scales[:, None, None], words.shape)
    else:
        return tl.broadcast_to(scales[:, :, :, None], words.shape)


@triton.jit
def _quantize(words, largest, IS_UE8M0: tl.constexpr, DTYPE: tl.constexpr):
    if DTYPE == tl.float32:
        scale = scale_of(tl.abs(largest))
    else:
        low, high = halves(largest, DTYPE)
        scale = scale_of(larger_or_nan(tl.abs(low), tl.abs(high)))
        low, high = halves(words, DTYPE)
    if IS_UE8M0:
        codes = exponent_rounded_up(scale)
        power = _over(inverse_power(codes), words)
        if DTYPE == tl.float32:
            quotient = words * power
        else:
            low, high = low * power, high * power
    elif DTYPE == tl.float32:
        codes = scale
        # A block with an infinity: zeros for its numbers, NaN for its infinities.
        is_infinite = scale == INFINITY
        reciprocal = _over(tl.where(is_infinite, 0.0, reciprocal_exactly(scale)), words)
        divisor = _over(tl.where(is_infinite, 0.0, scale), words)
        quotient = divide_float(words, divisor, reciprocal)
    else:
        codes = scale
        reciprocal, rest = reciprocal_in_two_parts(scale)
        reciprocal, rest = _over(reciprocal, words), _over(rest, words)
        low, high = divide_half(low, reciprocal, rest), divide_half(high, reciprocal, rest)
    if DTYPE == tl.float32:
        return quotient.to(tl.float8e4nv).to(tl.int8, bitcast=True), codes
    else:
        return code_pair(low, high), codes
