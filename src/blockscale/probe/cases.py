"""Inputs whose products are known: fingerprints and integers exactly, normal data in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from blockscale.formats import K_MAJOR, BlockFormat, ScaleFormat
from blockscale.reference import quantize, relayout
from blockscale.tensor import BlockScaledTensor

if TYPE_CHECKING:
    from blockscale.planning.decision import OperandForm

TOKENS: tuple[int, ...] = (0, 1, 7, 33, 128, 129)


@dataclass(frozen=True, slots=True, eq=False)
class Operands:
    """A weight as a checkpoint would have it, and an activation in the form an offer asks for.

    ``activation`` is a float matrix where the offer takes unquantized activations.
    """

    weight: BlockScaledTensor
    activation: BlockScaledTensor | torch.Tensor


def fingerprint_weight(n: int, k: int, fmt: BlockFormat, device: str) -> BlockScaledTensor:
    """All codes one, neighbouring blocks under different powers of two: a wrong index shows."""
    rows, columns = fmt.block.grid(n, k)
    exponents = (torch.arange(rows)[:, None] * 3 + torch.arange(columns)[None, :]) % 7
    return _with_exponents(torch.ones(n, k), exponents, fmt, device)


def integer_weight(n: int, k: int, fmt: BlockFormat, device: str) -> BlockScaledTensor:
    """Codes from -4 to 4 under powers of two: every partial sum is exact in float32."""
    generator = torch.Generator().manual_seed(n * 131 + k)
    data = torch.randint(-4, 5, (n, k), generator=generator).float()
    exponents = torch.randint(0, 4, fmt.block.grid(n, k), generator=generator)
    return _with_exponents(data, exponents, fmt, device)


def normal_weight(n: int, k: int, fmt: BlockFormat, device: str) -> BlockScaledTensor:
    """Quantized normal data."""
    generator = torch.Generator().manual_seed(n + k)
    return quantize(torch.randn(n, k, generator=generator).to(device), fmt)


def exact_activation(
    m: int, k: int, form: OperandForm | None, dtype: torch.dtype, device: str
) -> BlockScaledTensor | torch.Tensor:
    """Small integers, where quantized under powers of two that differ from row to row."""
    generator = torch.Generator().manual_seed(m * 17 + k)
    data = torch.randint(-3, 4, (m, k), generator=generator).float()
    if form is None:
        return data.to(device, dtype)
    exponents = torch.randint(0, 3, form.format.block.grid(m, k), generator=generator)
    return relayout(_with_exponents(data, exponents, form.format, device), form.layout)


def normal_activation(m: int, k: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    """Normal data with rows of different magnitude."""
    generator = torch.Generator().manual_seed(m + 3 * k)
    rows = 2.0 ** torch.randint(-4, 4, (m, 1), generator=generator)
    return (torch.randn(m, k, generator=generator) * rows).to(device, dtype)


def _with_exponents(
    data: torch.Tensor, exponents: torch.Tensor, fmt: BlockFormat, device: str
) -> BlockScaledTensor:
    codes = data.to(torch.float8_e4m3fn).to(device)
    if fmt.scale is ScaleFormat.UE8M0:
        scales = (exponents + 127).to(torch.uint8).view(torch.float8_e8m0fnu)
    else:
        scales = 2.0 ** exponents.float()
    return BlockScaledTensor(codes, scales.contiguous().to(device), fmt, K_MAJOR)
