"""Which grouped form serves some rows: what an H100 ran fastest, and what any choice keeps to."""

from __future__ import annotations

import subprocess
import sys

import pytest

from blockscale.formats import DType
from blockscale.kernels.cuda import corrections
from blockscale.kernels.cuda.grouped_choice import (
    LOW_BOXES,
    TILES,
    choose_contiguous,
    choose_masked,
    contiguous_forms,
    contiguous_works,
    likely_tiles,
    masked_forms,
    masked_works,
)
from blockscale.kernels.cuda.work import (
    HALF_SHARED_BYTES,
    MAX_COLUMNS,
    OUTPUTS,
    SHARED_BYTES,
    WAVE_ROWS,
    Share,
)
from blockscale.kernels.cuda.writing import LEAST_STAGES

BF16, FP32 = DType.BFLOAT16, DType.FLOAT32
H100 = 132
SHAPES = ((4096, 7168), (7168, 2048), (6144, 7168), (7168, 3072))


@pytest.mark.parametrize("out", OUTPUTS)
def test_every_form_fits_into_shared_memory(out: DType) -> None:
    for form in (*contiguous_forms(out), *masked_forms(out)):
        assert form.stages >= LEAST_STAGES
        assert form.shared_bytes <= (SHARED_BYTES if form.beside == 1 else HALF_SHARED_BYTES)
        assert form.columns <= MAX_COLUMNS[form.rows]


def test_the_sweep_has_a_factor_of_every_tile_of_several_waves() -> None:
    """Without one a tile looks up to 1.5 times as fast as it is."""
    factors = corrections.shipped_in_boxes().factors
    tiles = {f"{rows}x{width}" for rows, widths in TILES.items() for width in widths}
    assert {tile for tile in tiles if not tile.startswith(f"{WAVE_ROWS}x")} <= set(factors)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_slots_rows_are_one_tile_where_one_can_hold_them(shape: tuple[int, int]) -> None:
    """256x128 with a deeper ring took 14 to 30 % less than 128x192 for 192 rows (2026-11-26)."""
    form = choose_masked((32, 4096, 192), shape, BF16, H100).form
    assert (form.rows, form.columns, form.stages) == (256, 128, 4)
    assert form.stores == LOW_BOXES


@pytest.mark.parametrize("shape", SHAPES)
def test_slots_of_many_rows_take_the_tile_that_leaves_fewer_of_them_empty(
    shape: tuple[int, int],
) -> None:
    """128x192 took 2 to 6 % less than 256x128 for 1024 rows (H100, 2026-11-26)."""
    form = choose_masked((6, 4096, 1024), shape, BF16, H100).form
    assert (form.rows, form.columns) == (128, 192)


@pytest.mark.parametrize("shape", SHAPES)
def test_many_row_blocks_take_the_largest_tile_in_pairs(shape: tuple[int, int]) -> None:
    """The fastest in 4 of 8 cases, at most 3.6 % behind it in the others (H100, 2026-11-26)."""
    name = choose_contiguous((4, 238, 128), shape, BF16, H100).form.name
    assert name == "contiguous-256x128s4+ab128r8x3-late"


def test_the_deeper_ring_is_for_results_of_16_bits() -> None:
    rings = {(form.out, form.stages) for form in contiguous_forms(FP32) if form.rows == 256}
    assert rings <= {(FP32, 3), (FP32, 4)}
    assert all(form.stores != LOW_BOXES for form in contiguous_forms(FP32))


@pytest.mark.parametrize("masked", [(3, 64, 64), (8, 8, 1), (256, 128, 33)])
def test_few_rows_take_tiles_of_one_wave(masked: tuple[int, int, int]) -> None:
    works = masked_works(masked, (3072, 3072), BF16, H100)
    assert {work.form.rows for work in works} == {WAVE_ROWS}


def test_likely_tiles_are_a_mean_over_counts_about_the_likely_one() -> None:
    assert likely_tiles(256, (1, 4096, 192)) == 1
    assert likely_tiles(128, (1, 4096, 192)) == 2
    assert likely_tiles(128, (1, 100, 192)) == 1
    assert 1 < likely_tiles(128, (1, 4096, 128)) < 2


def test_large_tiles_of_many_turns_have_one_wave_in_flight() -> None:
    """As the dense kernel's: see ``writing.written``."""
    flights = {
        blocks: {
            work.form.flight
            for work in contiguous_works((4, blocks, 128), (4096, 7168), BF16, H100)
            if (work.form.rows, work.form.columns) == (128, 128)
        }
        for blocks in (8, 256)
    }
    assert flights == {8: {2}, 256: {1}}


@pytest.mark.parametrize("processors", [1, 78, 132, 144])
@pytest.mark.parametrize("out", OUTPUTS)
def test_the_choice_is_total(processors: int, out: DType) -> None:
    for shape in ((16, 16), (128, 256), (7168, 18432), (512, 4096)):
        for rows in ((1, 1, 64), (256, 300, 64), (1, 1, 128), (256, 375, 128), (8, 256, 128)):
            work = choose_contiguous(rows, shape, out, processors)
            assert 1 <= work.blocks <= processors
            assert work.form.rows <= 128 or rows[2] == 128
        for slots in ((1, 1, 1), (256, 128, 5), (32, 4096, 192), (512, 331, 1000)):
            work = choose_masked(slots, shape, out, processors)
            assert 1 <= work.blocks <= processors * work.form.beside


def test_choosing_needs_neither_torch_nor_a_compiler() -> None:
    program = (
        "import sys; from blockscale.formats import DType; "
        "from blockscale.kernels.cuda.grouped_choice import choose_masked; "
        "choose_masked((8, 4096, 300), (512, 512), DType.BFLOAT16, 132); "
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], check=False)
    assert done.returncode == 0


def test_two_row_blocks_of_a_group_share_its_weight_where_k_is_long() -> None:
    for blocks, k, share in (
        (512, 3072, Share.WEIGHT),
        (330, 7168, Share.WEIGHT),
        (256, 7168, Share.NOTHING),
        (1024, 3072, Share.NOTHING),
        (512, 1536, Share.NOTHING),
    ):
        work = choose_contiguous((256, blocks, 128), (3072, k), DType.BFLOAT16, 132)
        assert work.form.share is share, (blocks, k)
    # One row block has none beside it.
    alone = choose_contiguous((1, 1, 128), (3072, 7168), DType.FLOAT16, 132)
    assert alone.form.share is not Share.WEIGHT


def test_a_band_is_no_higher_than_a_groups_rows_of_units() -> None:
    for blocks, high in ((256, 1), (700, 3), (256 * 20, 3)):
        for work in contiguous_works((256, blocks, 128), (4096, 2048), DType.BFLOAT16, 132):
            if work.form.rows == 128 and work.form.share is Share.NOTHING:
                assert work.band == high
    for work in masked_works((6, 4096, 1024), (4096, 7168), DType.BFLOAT16, 132):
        assert work.band <= 3
