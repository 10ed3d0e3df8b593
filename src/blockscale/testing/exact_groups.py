"""Grouped products on a GPU that need no tolerance, whichever kernel computes them.

Small whole numbers with powers of two as scales: each kernel and tile must give the float64
product, rounded once, for any counts. What no row counts in is NaN, before and after.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from blockscale.formats import FP8_1X128_FP32, FP8_128X128_FP32, K_MAJOR, MN_MAJOR_TMA_ALIGNED
from blockscale.tensor import BlockScaledTensor, as_stored

if TYPE_CHECKING:
    from collections.abc import Sequence

    from blockscale.testing.exact_problem import ProductOf

NAN = float("nan")


def nan_codes(*shape: int) -> torch.Tensor:
    """0xFF is NaN in E4M3FN."""
    return torch.full(shape, 0xFF, dtype=torch.uint8, device="cuda").view(torch.float8_e4m3fn)


def nan_scales(rows: int, k: int, leading: tuple[int, ...] = ()) -> torch.Tensor:
    """Stored scales of ``rows`` rows, NaN with their padding."""
    stored = MN_MAJOR_TMA_ALIGNED.stored(rows, k, FP8_1X128_FP32)
    count = stored.elements * (leading[0] if leading else 1)
    return as_stored(torch.full((count,), NAN, device="cuda"), stored, leading)


class Weights:
    """A weight for each group, of small whole numbers with powers of two as scales."""

    def __init__(self, groups: int, n: int, k: int, product_of: ProductOf) -> None:
        self.generator = torch.Generator("cuda").manual_seed(groups + 31 * n + 1009 * k)
        self.groups, self.n, self.k = groups, n, k
        self.blocks = -(-k // 128)
        codes = nan_codes(groups, n, k)
        for group in range(groups):
            codes[group] = self.whole(n, k)
        scales = self.powers(groups, -(-n // 128), self.blocks)
        self.tensor = BlockScaledTensor(codes, scales, FP8_128X128_FP32, K_MAJOR)
        self.product = product_of(self.tensor)

    def whole(self, *shape: int) -> torch.Tensor:
        """Codes of small whole numbers."""
        found = torch.randint(-4, 5, shape, generator=self.generator, device="cuda")
        return found.half().to(torch.float8_e4m3fn)

    def powers(self, *shape: int) -> torch.Tensor:
        """Scales."""
        return 2.0 ** torch.randint(-3, 4, shape, generator=self.generator, device="cuda")

    def expected(self, group: int, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """The product of some rows in float64."""
        rows = self.tensor.scales[group].double().repeat_interleave(128, 0)[: self.n]
        weight = self.tensor.data[group].double() * rows.repeat_interleave(128, 1)[:, : self.k]
        return codes.double() * scales.double().repeat_interleave(128, 1)[:, : self.k] @ weight.T


class Masked:
    """Slots of rows; what lies beyond a slot's count is NaN, in codes, scales and results."""

    def __init__(self, weights: Weights, counts: Sequence[int], slot_rows: int) -> None:
        self.weights, self.counts, self.slot_rows = weights, counts, slot_rows
        codes = nan_codes(weights.groups, slot_rows, weights.k)
        scales = nan_scales(slot_rows, weights.k, (weights.groups,))
        for group, count in enumerate(counts):
            codes[group, :count] = weights.whole(count, weights.k)
            scales[group, :count] = weights.powers(count, weights.blocks)
        self.activation = BlockScaledTensor(codes, scales, FP8_1X128_FP32, MN_MAJOR_TMA_ALIGNED)
        self.device_counts = torch.tensor(counts, dtype=torch.int32, device="cuda")

    def run(self, variant: object | None, dtype: torch.dtype) -> torch.Tensor:
        """The kernel's result; NaN where it wrote nothing, or the product of a NaN."""
        w = self.weights
        out = torch.full((w.groups, self.slot_rows, w.n), NAN, device="cuda").to(dtype)
        w.product.use(variant)
        w.product.masked(self.activation, self.device_counts, out, max(self.counts))
        return out

    def wrong(self, out: torch.Tensor) -> list[int]:
        """Groups whose rows are not the product, or whose slot was written without any."""
        found = []
        for group, count in enumerate(self.counts):
            codes, scales = self.activation.data[group], self.activation.scales[group]
            expected = self.weights.expected(group, codes[:count], scales[:count]).to(out.dtype)
            is_right = torch.equal(out[group, :count], expected)
            if not is_right or (count == 0 and not bool(out[group].isnan().all())):
                found.append(group)
        return found


class Contiguous:
    """Groups one after the other in row blocks; padding rows are NaN, and row blocks of -1."""

    def __init__(self, weights: Weights, counts: Sequence[int], alignment: int) -> None:
        self.weights = weights
        sizes = torch.tensor([-(-count // alignment) for count in counts])
        groups = torch.arange(len(counts), dtype=torch.int32).repeat_interleave(sizes)
        self.groups = torch.cat([groups, torch.full((3,), -1, dtype=torch.int32)]).cuda()
        rows = self.groups.numel() * alignment
        codes, scales = nan_codes(rows, weights.k), nan_scales(rows, weights.k)
        self.parts: list[tuple[int, slice]] = []
        start = 0
        for group, count in enumerate(counts):
            part = slice(start, start + count)
            codes[part] = weights.whole(count, weights.k)
            scales[part] = weights.powers(count, weights.blocks)
            self.parts.append((group, part))
            start += int(sizes[group]) * alignment
        self.used = start
        self.activation = BlockScaledTensor(codes, scales, FP8_1X128_FP32, MN_MAJOR_TMA_ALIGNED)

    def run(self, variant: object | None, dtype: torch.dtype) -> torch.Tensor:
        """The kernel's result; NaN where it wrote nothing, or the product of a NaN."""
        out = torch.full((self.activation.mn, self.weights.n), NAN, device="cuda").to(dtype)
        self.weights.product.use(variant)
        self.weights.product.contiguous(self.activation, self.groups, out)
        return out

    def wrong(self, out: torch.Tensor) -> list[int]:
        """Groups whose rows are not the product; -1 if a row block of nobody was written."""
        found = []
        for group, part in self.parts:
            operands = self.activation.data[part], self.activation.scales[part]
            expected = self.weights.expected(group, *operands).to(out.dtype)
            if not torch.equal(out[part], expected):
                found.append(group)
        return found if bool(out[self.used :].isnan().all()) else [*found, -1]
