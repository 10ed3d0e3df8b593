"""Rows of several experts x their weights, on a CPU, activations not quantized."""

from __future__ import annotations

from itertools import groupby
from typing import NamedTuple

import torch

from blockscale.kernels.cpu.build import library
from blockscale.kernels.cpu.product import DTYPE_CODES, MAX_DIRECT_TOKENS, WeightOnlyProduct


class Segment(NamedTuple):
    """Rows that follow each other and belong to one expert."""

    expert: int
    first: int
    rows: int


class GroupedWeightOnlyProduct:
    """A prepared stack of experts: each row block of an activation x its expert's weight^T.

    ``data``: (experts, n, k) E4M3 codes, stride 1 along k. ``scales``: float32, contiguous, one per
    ``block``. Experts without rows cost nothing. Those with a few are decoded on the fly, all in
    one call of C; the others one after another, tile by tile.
    """

    def __init__(self, data: torch.Tensor, scales: torch.Tensor, block: tuple[int, int]) -> None:
        self._data, self._scales, self._block = data, scales, block
        self._library = library()
        self._experts = [
            WeightOnlyProduct(weight, scale, block)
            for weight, scale in zip(data, scales, strict=True)
        ]

    def __call__(self, activation: torch.Tensor, groups: torch.Tensor, out: torch.Tensor) -> None:
        """As ``backends.base.ContiguousBackend.bind_contiguous``; rows of -1 are not written."""
        blocks = groups.shape[0]
        if not blocks:
            return
        found = segments(groups.tolist(), activation.shape[0] // blocks)
        few = [segment for segment in found if segment.rows <= MAX_DIRECT_TOKENS]
        if few:
            self._multiply_few(activation, few, out)
        for expert, first, rows in found:
            if rows > MAX_DIRECT_TOKENS:
                here = slice(first, first + rows)
                self._experts[expert](activation[here], out[here], None)

    def _multiply_few(
        self, activation: torch.Tensor, few: list[Segment], out: torch.Tensor
    ) -> None:
        table = torch.tensor(few, dtype=torch.int64)
        _, n, k = self._data.shape
        self._library.blockscale_grouped_product(
            activation.data_ptr(),
            self._data.data_ptr(),
            self._scales.data_ptr(),
            out.data_ptr(),
            table.data_ptr(),
            DTYPE_CODES[out.dtype],
            len(few),
            n,
            k,
            activation.stride(0),
            self._data.stride(1),
            self._data.stride(0),
            self._scales.stride(0),
            *self._block,
            torch.get_num_threads(),
        )


def segments(groups: list[int], alignment: int) -> list[Segment]:
    """Runs of row blocks of one expert, those of -1 left out."""
    found = []
    first = 0
    for expert, run in groupby(groups):
        rows = alignment * sum(1 for _ in run)
        if expert >= 0:
            found.append(Segment(expert, first, rows))
        first += rows
    return found
