"""The grouped kernels' own source on a pretend GPU: exact results, and no hazard on the way.

``blockscale.testing.gluon_kernels`` raises where a slot or a buffer is used out of turn.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from blockscale.kernels.gluon.grouped_work import (
    GroupedSmallVariant,
    GroupedVariant,
    grouped_small_variant,
    grouped_variant,
)
from blockscale.kernels.gluon.work import aligned_scale_stride, scale_box
from blockscale.testing import gluon_machine
from blockscale.testing.gluon_kernels import load_kernels
from blockscale.testing.gluon_machine import Box, EmulationError, Pointer, launch

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import SimpleNamespace

KERNELS = load_kernels()
PROGRAMS = 3
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDE = ((256, 128), (128, 128), (128, 64))
NAN = float("nan")


def nan_codes(*shape: int) -> torch.Tensor:
    return torch.full(shape, NAN).to(torch.float8_e4m3fn)


class Weights:
    """A weight for each group, of small whole numbers with powers of two as scales."""

    def __init__(self, groups: int, n: int, k: int) -> None:
        self.generator = torch.Generator().manual_seed(groups + 31 * n + 1009 * k)
        self.groups, self.n, self.k = groups, n, k
        self.blocks = -(-k // 128)
        self.codes = self.whole(groups, n, k).to(torch.float8_e4m3fn)
        self.scales = self.powers(groups, -(-n // 128), self.blocks)

    def whole(self, *shape: int) -> torch.Tensor:
        return torch.randint(-4, 5, shape, generator=self.generator).float()

    def powers(self, *shape: int) -> torch.Tensor:
        return 2.0 ** torch.randint(-3, 4, shape, generator=self.generator)

    def wide(self, group: int) -> torch.Tensor:
        """Float64 values of one group's weight."""
        rows = self.scales[group].double().repeat_interleave(128, 0)[: self.n]
        return self.codes[group].double() * rows.repeat_interleave(128, 1)[:, : self.k]

    def rows(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes and scales of activation rows."""
        codes = self.whole(count, self.k).to(torch.float8_e4m3fn)
        return codes, self.powers(count, self.blocks)

    def product(self, group: int, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """In float64."""
        wide = codes.double() * scales.double().repeat_interleave(128, 1)[:, : self.k]
        return wide @ self.wide(group).T


class Masked:
    """Slots of rows; what lies beyond a slot's rows is NaN, in codes and scales."""

    def __init__(self, weights: Weights, counts: Sequence[int], slot_rows: int) -> None:
        self.weights, self.counts, self.slot_rows = weights, counts, slot_rows
        groups = weights.groups
        self.codes = nan_codes(groups, slot_rows, weights.k)
        stride = aligned_scale_stride(slot_rows)
        self.scales = torch.full((groups, weights.blocks, stride), NAN)
        self.expected = torch.full((groups, slot_rows, weights.n), NAN, dtype=torch.float64)
        for group, count in enumerate(counts):
            codes, scales = weights.rows(count)
            self.codes[group, :count] = codes
            self.scales[group, :, :count] = scales.T
            self.expected[group, :count] = weights.product(group, codes, scales)

    def run(
        self,
        variant: GroupedVariant | GroupedSmallVariant,
        dtype: torch.dtype = torch.float32,
        kernels: SimpleNamespace = KERNELS,
    ) -> torch.Tensor:
        """The kernel's result; NaN where it wrote nothing, or the product of a NaN."""
        w = self.weights
        out = torch.full((w.groups, self.slot_rows, w.n), NAN, dtype=dtype)
        arguments = {
            "routing": Pointer(torch.tensor(self.counts, dtype=torch.int32)),
            "slot_rows": self.slot_rows,
            **shared_arguments(variant, w),
        }
        scales = self.scales.view(w.groups * w.blocks, -1)[:, : self.slot_rows]
        codes = self.codes.view(w.groups * self.slot_rows, w.k)
        if isinstance(variant, GroupedVariant):
            arguments["a"] = Box(codes, (128, 128))
            arguments["a_scale_boxes"] = Box(scales, (1, variant.rows))
            arguments["out"] = Box(out, (1, 64, variant.columns))
            launch(kernels.grouped_kernel, (PROGRAMS, 1), arguments)
        else:
            arguments["a"] = Box(codes, (variant.tokens, 128))
            arguments["a_scale_boxes"] = Box(scales, (1, scale_box(variant.tokens)))
            arguments["out"] = Pointer(out.view(-1))
            arguments["slot_stride"] = self.slot_rows * w.n
            launch(kernels.grouped_small_kernel, (PROGRAMS, 1), arguments)
        return out

    def assert_exact(
        self, variant: GroupedVariant | GroupedSmallVariant, dtype: torch.dtype = torch.float32
    ) -> None:
        """Rows that count are the float64 product, rounded once."""
        out = self.run(variant, dtype)
        for group, count in enumerate(self.counts):
            expected = self.expected[group, :count].to(dtype)
            assert torch.equal(out[group, :count], expected), f"group {group}"


class Contiguous:
    """Groups one after the other, each in whole row blocks; padding rows are NaN."""

    def __init__(
        self, weights: Weights, parts: Sequence[tuple[int, int]], alignment: int = 128
    ) -> None:
        """``parts``: (group, rows of it), in order; of group -1, rows of nothing."""
        self.weights = weights
        sizes = [-(-count // alignment) * alignment for _, count in parts]
        self.m = sum(sizes)
        repeats = torch.tensor(sizes) // alignment
        groups = torch.tensor([group for group, _ in parts], dtype=torch.int32)
        self.groups = groups.repeat_interleave(repeats)
        self.codes = nan_codes(self.m, weights.k)
        self.scales = torch.full((weights.blocks, self.m), NAN)
        self.is_row = torch.zeros(self.m, dtype=torch.bool)
        self.expected = torch.full((self.m, weights.n), NAN, dtype=torch.float64)
        start = 0
        for (group, count), size in zip(parts, sizes, strict=True):
            rows = slice(start, start + count)
            start += size
            if group < 0:
                continue
            codes, scales = weights.rows(count)
            self.codes[rows], self.scales[:, rows] = codes, scales.T
            self.is_row[rows] = True
            self.expected[rows] = weights.product(group, codes, scales)

    def run(
        self,
        variant: GroupedVariant | GroupedSmallVariant,
        dtype: torch.dtype = torch.float32,
    ) -> torch.Tensor:
        """The kernel's result; NaN where it wrote nothing, or the product of a NaN."""
        out = torch.full((self.m, self.weights.n), NAN, dtype=dtype)
        arguments = {
            **shared_arguments(variant, self.weights),
            "routing": Pointer(self.groups),
            "slot_rows": self.m,
        }
        if isinstance(variant, GroupedVariant):
            arguments["a"] = Box(self.codes, (128, 128))
            arguments["a_scale_boxes"] = Box(self.scales, (1, variant.rows))
            arguments["out"] = Box(out.unsqueeze(0), (1, 64, variant.columns))
            launch(KERNELS.grouped_kernel, (PROGRAMS, 1), arguments)
        else:
            arguments["a"] = Box(self.codes, (variant.tokens, 128))
            arguments["a_scale_boxes"] = Box(self.scales, (1, scale_box(variant.tokens)))
            arguments["out"] = Pointer(out.view(-1))
            arguments["slot_stride"] = out.numel()
            launch(KERNELS.grouped_small_kernel, (PROGRAMS, 1), arguments)
        return out

    def assert_exact(
        self, variant: GroupedVariant | GroupedSmallVariant, dtype: torch.dtype = torch.float32
    ) -> None:
        """Rows of a group are the float64 product; row blocks of none hold what they held."""
        out = self.run(variant, dtype)
        assert torch.equal(out[self.is_row], self.expected[self.is_row].to(dtype))
        assert out[~self.is_row].isnan().all()


def shared_arguments(
    variant: GroupedVariant | GroupedSmallVariant, weights: Weights
) -> dict[str, Any]:
    columns = variant.columns if isinstance(variant, GroupedVariant) else variant.weights
    flat = weights.codes.view(weights.groups * weights.n, weights.k)
    return {
        **variant.constants(overlap=True),
        "b": Box(flat, (columns, 128)),
        "b_scales": Pointer(weights.scales.flatten()),
        "n": weights.n,
        "groups": weights.groups,
        "all_blocks": weights.blocks,
    }


# Rows that end in each of a tile's waves, empty groups first, last and between, one hot group.
COUNTS = ((0, 1, 64, 0, 65, 200), (128, 129, 0, 0, 0, 7), (0, 0, 330, 0, 0, 0), (0,) * 6)


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("tile", WIDE, ids=str)
def test_masked_is_exact_whatever_the_counts(
    tile: tuple[int, int], counts: tuple[int, ...]
) -> None:
    weights = Weights(len(counts), 2 * tile[1] + 8, 400)
    Masked(weights, counts, 330).assert_exact(grouped_variant(*tile, 4, len(counts)))


@pytest.mark.parametrize("counts", [(0, 1, 8, 0, 9, 20), (0, 0, 0, 0, 40, 0), (0,) * 6], ids=str)
@pytest.mark.parametrize("tokens", [8, 16, 32, 64])
@pytest.mark.parametrize("rows", [64, 128])
def test_few_rows_are_exact_whatever_the_counts(
    rows: int, tokens: int, counts: tuple[int, ...]
) -> None:
    weights = Weights(len(counts), 200, 9 * 128 + 16)
    variant = grouped_small_variant(rows, tokens, 4, len(counts))
    Masked(weights, counts, 40).assert_exact(variant)


@pytest.mark.parametrize("tile", WIDE, ids=str)
@pytest.mark.parametrize(
    "parts",
    [
        ((0, 300), (1, 128), (3, 20), (-1, 128), (2, 512)),
        ((2, 1), (1, 65), (0, 64)),
        ((-1, 128), (-1, 128), (3, 256)),
        ((-1, 128),),
    ],
    ids=str,
)
def test_contiguous_is_exact_whatever_the_groups(
    parts: tuple[tuple[int, int], ...], tile: tuple[int, int]
) -> None:
    weights = Weights(4, 2 * tile[1] + 8, 400)
    Contiguous(weights, parts).assert_exact(grouped_variant(*tile, 4))


@pytest.mark.parametrize("alignment", [8, 16, 32, 64])
@pytest.mark.parametrize("rows", [64, 128])
def test_contiguous_rows_in_small_blocks_are_exact(rows: int, alignment: int) -> None:
    weights = Weights(4, 200, 400)
    parts = ((0, 5), (2, 3 * alignment - 1), (3, alignment), (-1, 2 * alignment))
    variant = grouped_small_variant(rows, alignment, 4)
    Contiguous(weights, parts, alignment).assert_exact(variant)
    Contiguous(weights, ((-1, 2 * alignment),), alignment).assert_exact(variant)


def test_more_row_blocks_than_are_looked_at_in_one_step() -> None:
    weights = Weights(3, 64, 128)
    parts = ((0, 8 * 100), (1, 8 * 30), (2, 8), (-1, 8 * 150))
    Contiguous(weights, parts, 8).assert_exact(grouped_small_variant(64, 8, 4))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_are_rounded_once_to_the_output_dtype(dtype: torch.dtype) -> None:
    weights = Weights(3, 136, 256)
    masked = Masked(weights, (70, 0, 5), 72)
    masked.assert_exact(grouped_variant(128, 128, dtype.itemsize, 3), dtype)
    masked.assert_exact(grouped_small_variant(64, 8, dtype.itemsize, 3), dtype)
    rows = Contiguous(weights, ((1, 200), (2, 128)))
    rows.assert_exact(grouped_variant(256, 128, dtype.itemsize), dtype)


def test_scale_fingerprint() -> None:
    """Ones with a power of two of their own in each block: a wrong scale index would show."""
    weights = Weights(3, 264, 640)
    weights.codes.fill_(1.0)
    block = torch.arange(5)
    column = torch.arange(3)[:, None]
    group = torch.arange(3)[:, None, None]
    weights.scales.copy_(2.0 ** -(block + 5.0 * column + 2.0 * group))
    counts = (130, 3, 201)
    masked = Masked(weights, counts, 204)
    for number, count in enumerate(counts):
        masked.codes[number, :count] = 1.0
        row_scales = 2.0 ** ((torch.arange(count) % 7)[:, None] + block + number)
        masked.scales[number, :, :count] = row_scales.T
        masked.expected[number, :count] = weights.product(
            number, masked.codes[number, :count], row_scales
        )
    for variant in (
        grouped_variant(256, 128, 4, 3),
        grouped_variant(128, 128, 4, 3),
        grouped_small_variant(128, 64, 4, 3),
    ):
        masked.assert_exact(variant)


@pytest.mark.parametrize("slot_rows", [130, 100, 64, 20])
def test_a_partial_last_tile_leaves_the_next_slot_alone(slot_rows: int) -> None:
    """Slots that end inside a tile and inside a wave: the next slot keeps its NaN."""
    count = slot_rows - 3
    masked = Masked(Weights(4, 136, 256), (count, 0, count, 0), slot_rows)
    for variant in (
        grouped_variant(256, 128, 2, 4),
        grouped_variant(128, 64, 2, 4),
        grouped_small_variant(64, 16, 2, 4),
    ):
        masked.assert_exact(variant, torch.bfloat16)
        out = masked.run(variant, torch.bfloat16)
        assert out[1].isnan().all()
        assert out[3].isnan().all()


def test_counts_beyond_the_slot_or_below_zero_are_taken_for_full_and_empty() -> None:
    weights = Weights(3, 64, 128)
    full = Masked(weights, (40, 0, 3), 40)
    full.counts = (4000, -7, 3)
    for variant in (grouped_variant(128, 64, 4, 3), grouped_small_variant(64, 16, 4, 3)):
        out = full.run(variant)
        assert torch.equal(out[0].double(), full.expected[0])
        assert out[1].isnan().all()


BROKEN = {
    "consumers forget the last wave": ("rows > WIDE_OWN + WAVE_ROWS", "rows > WIDE_OWN + 128"),
    "no wait for a message": ("mbarrier.wait(posted.index(place), phase)", "pass"),
    "no wait for a reader": ("mbarrier.wait(read.index(place), phase)", "pass"),
    "one half not awaited": ("fixed + 2 * half", "fixed + half"),
    "the wrong group": ("gl.sum(gl.where(is_before, 1, 0), 0)", "gl.sum(is_before * 0, 0)"),
    "rows of the neighbour": ("group * slot_rows + slot_row", "group * slot_rows"),
    "slots are not given back": (
        "mbarrier.arrive(empty.index(slot), count=1)\n        slot,",
        "slot,",
    ),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_the_pretend_gpu_finds_a_broken_kernel(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gluon_machine, "WAIT_SECONDS", 1.0)
    monkeypatch.setattr(gluon_machine, "LONGEST_DELAY_SECONDS", 5e-3)
    counts = (250, 20, 600)
    # Messages run ahead of readers where an item is one slot of many.
    tile, k = ((128, 64), 128) if fault == "no wait for a reader" else ((256, 128), 256)
    masked = Masked(Weights(3, 392, k), counts, 600)
    try:
        out = masked.run(grouped_variant(*tile, 4, 3), kernels=load_kernels(BROKEN[fault]))
    except EmulationError:
        return
    rows = [(out[g, :c].double(), masked.expected[g, :c]) for g, c in enumerate(counts)]
    assert not all(torch.equal(*pair) for pair in rows)
