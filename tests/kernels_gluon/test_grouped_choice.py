"""The choice for groups: pure, complete, known beforehand, and it fits the multiprocessor."""

from __future__ import annotations

import subprocess
import sys

import pytest

from blockscale.kernels.gluon.grouped_choice import (
    ALIGNMENTS,
    choose_contiguous,
    choose_masked,
    contiguous_variants,
    masked_variants,
    programs,
)
from blockscale.kernels.gluon.grouped_work import (
    MAX_GROUPS,
    AnyGroupedVariant,
    GroupedSmallVariant,
    GroupedVariant,
    held,
    registers,
)
from blockscale.kernels.gluon.work import HALF_SHARED_BYTES, SHARED_BYTES

PROCESSORS = 132
GROUPS = (1, 6, 32, 33, 128, 256, 384, 512)


def ring_bytes(variant: AnyGroupedVariant, out_bytes: int) -> int:
    if isinstance(variant, GroupedVariant):
        slot = (variant.rows + variant.columns) * 128 + variant.rows * 4
        return variant.stages * slot + 2 * variant.buffers * 64 * variant.columns * out_bytes
    scales = max(variant.tokens, 32) * 4
    return variant.stages * ((variant.weights + variant.tokens) * 128 + scales)


@pytest.mark.parametrize("out_bytes", [2, 4])
@pytest.mark.parametrize("groups", GROUPS)
def test_every_variant_fits_with_three_slots_or_more(groups: int, out_bytes: int) -> None:
    found = [*masked_variants(groups, out_bytes)]
    for alignment in ALIGNMENTS:
        found += contiguous_variants(alignment, out_bytes)
    for variant in found:
        limit = SHARED_BYTES if isinstance(variant, GroupedVariant) else HALF_SHARED_BYTES
        assert variant.stages >= 3
        assert ring_bytes(variant, out_bytes) < limit


@pytest.mark.parametrize("out_bytes", [2, 4])
@pytest.mark.parametrize("groups", GROUPS)
def test_what_is_chosen_is_a_known_variant_that_holds_all_groups(
    groups: int, out_bytes: int
) -> None:
    for expected in (0, 1, 4, 20, 64, 65, 192, 1024, 5000):
        for slot_rows in (1, 20, 128, 4096):
            variant = choose_masked(groups, slot_rows, expected, out_bytes)
            assert variant in masked_variants(groups, out_bytes)
            assert variant.groups >= groups
    for alignment in ALIGNMENTS:
        for blocks in (1, 7, groups, 40 * groups):
            variant = choose_contiguous(groups, blocks, alignment, 4096, out_bytes, PROCESSORS)
            assert variant in contiguous_variants(alignment, out_bytes)
            assert variant.groups == 0


@pytest.mark.parametrize("alignment", ALIGNMENTS)
def test_a_row_block_is_one_tile_of_tokens_or_part_of_a_tile(alignment: int) -> None:
    """The kernel for few rows reads the group of a tile; the other one of every 128 rows."""
    for variant in contiguous_variants(alignment, 2):
        if isinstance(variant, GroupedSmallVariant):
            assert variant.tokens == alignment
        else:
            assert alignment == 128
            assert variant.rows % alignment == 0


def test_few_rows_put_weights_into_the_rows_of_the_tensor_core_tile() -> None:
    for rows in (1, 20, 64):
        assert isinstance(choose_masked(32, 4096, rows, 2), GroupedSmallVariant)
    for rows in (65, 192, 1024):
        assert isinstance(choose_masked(32, 4096, rows, 2), GroupedVariant)


def test_a_slot_is_never_cut_into_more_tiles_of_tokens_than_it_needs() -> None:
    variant = choose_masked(256, 8, 8, 2)
    assert isinstance(variant, GroupedSmallVariant)
    assert variant.tokens == 8


def test_programs_are_no_more_than_items_and_fill_the_gpu_when_there_are_enough() -> None:
    few = choose_masked(256, 128, 4, 2)
    assert programs(few, 256, 128, 3072, PROCESSORS) == 2 * PROCESSORS
    assert programs(few, 1, 1, 64, PROCESSORS) == 1
    wide = choose_contiguous(4, 256, 128, 4096, 2, PROCESSORS)
    assert programs(wide, 1, 32768, 4096, PROCESSORS) == PROCESSORS
    assert programs(wide, 1, 128, 128, PROCESSORS) == 1


def test_held_counts_are_a_power_of_two_for_one_warp() -> None:
    assert [held(groups) for groups in (0, 1, 32, 33, 256, 257)] == [0, 32, 32, 64, 256, 512]
    assert held(MAX_GROUPS) == MAX_GROUPS


def test_a_multiprocessors_registers_are_enough() -> None:
    for groups in (0, 32, 256, 512):
        producer, consumer = registers(groups)
        assert producer % 8 == consumer % 8 == 0
        assert 128 * producer + 256 * consumer <= 384 * 168


def test_names_of_all_variants_differ() -> None:
    found = [variant.name for groups in (6, 256) for variant in masked_variants(groups, 2)]
    found += [
        variant.name for alignment in ALIGNMENTS for variant in contiguous_variants(alignment, 2)
    ]
    assert len(set(found)) == len(found)


def test_choosing_needs_neither_torch_nor_triton() -> None:
    program = (
        "import sys; from blockscale.kernels.gluon.grouped_choice import choose_masked; "
        "choose_masked(256, 128, 4, 2); "
        "sys.exit(bool({'torch', 'triton'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
