"""What a producer of activations computes before it quantizes: the twins of the fused kernels.

``quantize(silu_and_multiply(x), fmt)`` and ``quantize(add_and_normalize(...).normalized, fmt)`` are
the bits that the fused kernels must give. Every step is an IEEE float32 operation that is named
below, so any machine gives the same bits; ``exp`` of a math library is none. Results are rounded to
the activation's dtype exactly where the unfused layers of a model round them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from blockscale.errors import FormatError
from blockscale.formats.scale import FLOAT32_MANTISSA_BITS

if TYPE_CHECKING:
    from collections.abc import Iterator

LOG2_E = 1.4426950408889634

# 2**x on [-1/2, 1/2] as 1 + x (c1 + x (c2 + ...)): minimax, relative error 1.1e-7 as float32
# coefficients (fitted by iteratively reweighted least squares on 4001 Chebyshev points).
EXP2_COEFFICIENTS = (
    float.fromhex("0x1.62e42ap-1"),
    float.fromhex("0x1.ebf9bcp-3"),
    float.fromhex("0x1.c6b752p-5"),
    float.fromhex("0x1.3cea88p-7"),
    float.fromhex("0x1.5bba14p-10"),
)

# Adding it to a float32 below 2**22 in magnitude rounds that to an integer, kept in the low bits.
ROUND_TO_INTEGER = 12582912.0  # 1.5 * 2**23

# 2**-125 is the smallest power whose product with a number in [1/2, 2] is normal.
EXP2_SMALLEST = -125.0

# exp(87) is below 2**126, so its reciprocal is normal; SiLU of anything lower is above -1.5e-36.
SMALLEST_GATE = -87.0


@dataclass(frozen=True, slots=True, eq=False)
class Normalized:
    """A normalized activation, and the sum that the next block adds to (the new residual)."""

    normalized: torch.Tensor
    summed: torch.Tensor


def silu_and_multiply(gate_up: torch.Tensor) -> torch.Tensor:
    """SiLU of the left half times the right half: (..., 2 n) to (..., n), in the same dtype.

    In float32: ``gate`` is raised to -87 if it is lower; ``e = exp2(gate * -log2(e))`` by
    ``_exp2``; ``silu = gate * (1 / (1 + e))``, rounded to the dtype; ``silu * up``, rounded to the
    dtype. Before the first rounding within 4e-6 relative of the exact SiLU while that is above
    1e-30: what torch's own ``silu(gate) * up`` gives, but for a few last bits.

    Raises FormatError if the last axis is odd or the dtype is not floating point.
    """
    if gate_up.shape[-1] % 2 or not gate_up.is_floating_point():
        msg = (
            "SiLU-and-multiply needs a float tensor with an even last axis, not "
            f"{gate_up.dtype} {tuple(gate_up.shape)}"
        )
        raise FormatError(msg)
    gate, up = (half.float() for half in gate_up.chunk(2, dim=-1))
    gate = gate.clamp(min=SMALLEST_GATE)
    sigmoid = gate.new_ones(1) / (1.0 + _exp2(gate * -LOG2_E))
    rounded = (gate * sigmoid).to(gate_up.dtype).float()
    return (rounded * up).to(gate_up.dtype)


def add_and_normalize(
    values: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, epsilon: float
) -> Normalized:
    """RMSNorm of ``values`` (..., k), after adding ``residual`` if there is one.

    In float32: ``summed = values + residual``, rounded to the dtype; ``square = summed**2``;
    ``mean = pairwise sum of square / k``; ``inverse = 1 / sqrt(mean + epsilon)``;
    ``summed * inverse``, rounded to the dtype; times ``weight`` (k), rounded to the dtype. That
    is where Llama's layers round. The pairwise sum adds neighbours, then neighbouring sums, over
    squares padded with zeros to a power of two.

    Raises FormatError if the dtypes differ or ``weight`` does not have k elements.
    """
    parts = [values, weight] if residual is None else [values, residual, weight]
    if len({part.dtype for part in parts}) != 1 or weight.shape != values.shape[-1:]:
        found = ", ".join(f"{part.dtype} {tuple(part.shape)}" for part in parts)
        msg = f"RMSNorm needs one dtype and a weight as long as the last axis, not {found}"
        raise FormatError(msg)
    dtype, k = values.dtype, values.shape[-1]
    summed = values if residual is None else (values.float() + residual.float()).to(dtype)
    wide = summed.float()
    # CUDA divides by a Python number as a product with its reciprocal, so divisors are tensors.
    mean = _pairwise_sum(wide * wide) / wide.new_full((1,), float(k))
    # torch's float32 square root is an ulp off now and then (torch 2.13, CPU); by way of float64 it
    # is rounded correctly (Figueroa 1995: 53 bits are at least 2 * 24 + 2).
    inverse = wide.new_ones(1) / torch.sqrt((mean + epsilon).double()).float()
    scaled = (wide * inverse).to(dtype).float()
    return Normalized((scaled * weight.float()).to(dtype), summed)


def _exp2(values: torch.Tensor) -> torch.Tensor:
    """2**values, at most 2**127: integer part to the exponent, fraction by a polynomial of FMAs."""
    clamped = values.clamp(min=EXP2_SMALLEST)
    shifted = clamped + ROUND_TO_INTEGER
    fraction = clamped - (shifted - ROUND_TO_INTEGER)
    power = torch.full_like(fraction, EXP2_COEFFICIENTS[-1])
    for coefficient in _remaining_coefficients():
        power = _fma(power, fraction, torch.full_like(fraction, coefficient))
    exponent = shifted.contiguous().view(torch.int32) << FLOAT32_MANTISSA_BITS
    return (power.contiguous().view(torch.int32) + exponent).view(torch.float32)


def _remaining_coefficients() -> Iterator[float]:
    yield from reversed(EXP2_COEFFICIENTS[:-1])
    yield 1.0


def _fma(one: torch.Tensor, other: torch.Tensor, addend: torch.Tensor) -> torch.Tensor:
    """Fused multiply and add: one * other + addend of float32, rounded once.

    The product is exact in float64. The sum is rounded to odd there (toward zero, then the last
    bit set if anything was lost), which makes the second rounding right: Boldo and Melquiond,
    "Emulation of FMA and correctly rounded sums", 2008.
    """
    product = one.double() * other.double()
    wide = addend.double()
    total = product + wide
    from_wide = total - product
    lost = (product - (total - from_wide)) + (wide - from_wide)
    bits = total.view(torch.int64)
    is_even = (bits & 1) == 0
    toward = torch.where((lost > 0) == (total > 0), 1, -1)
    odd = torch.where((lost != 0) & is_even, bits + toward, bits)
    return odd.view(torch.float64).float()


def _pairwise_sum(values: torch.Tensor) -> torch.Tensor:
    """The sum over the last axis, kept as size 1: neighbours first, then neighbouring sums."""
    k = values.shape[-1]
    padded = 1 << max(0, k - 1).bit_length()
    values = torch.nn.functional.pad(values, (0, padded - k))
    while values.shape[-1] > 1:
        values = values[..., 0::2] + values[..., 1::2]
    return values
