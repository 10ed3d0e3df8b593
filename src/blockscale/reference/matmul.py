"""The matrix product that every backend is compared with."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from blockscale.errors import FormatError
from blockscale.reference.quantize import dequantize

if TYPE_CHECKING:
    from blockscale.tensor import BlockScaledTensor


def block_scaled_matmul(
    activation: BlockScaledTensor,
    weight: BlockScaledTensor,
    accumulate: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Activation (M, k) x weight (n, k)^T of the dequantized values, as ``accumulate``, (M, n).

    float64 is the truth that kernel errors are measured against: products of two E4M3 codes and two
    float32 scales are exact in it up to the last of 53 bits. Leading axes broadcast as in
    ``torch.matmul``.

    Raises FormatError if k differs, or ``accumulate`` is neither float32 nor float64.
    """
    if activation.k != weight.k:
        msg = f"activation has K={activation.k} but weight has K={weight.k}"
        raise FormatError(msg)
    if accumulate not in (torch.float32, torch.float64):
        msg = f"the reference accumulates in float32 or float64, not {accumulate}"
        raise FormatError(msg)
    left = dequantize(activation).to(accumulate)
    right = dequantize(weight).to(accumulate)
    return left @ right.transpose(-1, -2)
