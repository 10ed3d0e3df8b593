"""The choice of a form: pure, complete, and within what the hardware and the kernel allow."""

from __future__ import annotations

import pytest

from blockscale.formats import DType
from blockscale.kernels.cuda.choice import candidates, choose, clocks, forms, promising
from blockscale.kernels.cuda.work import (
    HALF_SHARED_BYTES,
    OUTPUTS,
    SHARED_BYTES,
    WIDTHS,
    Form,
    Share,
)

SHAPES = [(4096, 7168), (2112, 7168), (576, 7168), (24576, 1536), (32768, 512), (8, 16), (200, 400)]
TOKENS = [1, 17, 64, 65, 128, 300, 512, 513, 4096, 8192]
ALL_FORMS = [form for out in OUTPUTS for form in forms(out)]


@pytest.mark.parametrize("form", ALL_FORMS, ids=lambda form: form.name + form.out.value)
def test_every_form_keeps_to_the_kernels_limits(form: Form) -> None:
    room = SHARED_BYTES if form.beside == 1 else HALF_SHARED_BYTES
    assert form.shared_bytes <= room
    assert form.stages >= 3
    assert form.columns in WIDTHS
    assert form.columns * form.out.bytes >= form.stores.box_bytes
    # TMA copies up to 256 rows at a time, whole groups of 8 rows.
    assert all(box.rows <= 256 for box in form.boxes)
    assert form.boxes[0].rows % 8 == form.boxes[1].rows % 8 == 0
    assert (form.consumers + 1) * 128 * form.beside <= 512


@pytest.mark.parametrize("m", TOKENS)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_every_shape_is_covered_once(m: int, n: int, k: int) -> None:
    for out in OUTPUTS:
        work = choose(m, n, k, out, 132)
        form = work.form
        wide = form.columns * (2 if form.share is Share.ACTIVATION else 1)
        high = form.rows * (2 if form.share is Share.WEIGHT else 1)
        assert (work.unit_columns - 1) * wide < n <= work.unit_columns * wide
        assert (work.unit_rows - 1) * high < m <= work.unit_rows * high
        assert work.blocks % form.cluster == 0
        assert 0 < work.blocks <= 132 * form.beside
        assert (work.k_blocks - 1) * 128 < k <= work.k_blocks * 128


def test_the_choice_is_the_least_of_the_candidates_and_promising() -> None:
    for m in TOKENS:
        work = choose(m, 4096, 7168, DType.BFLOAT16, 132)
        costs = [clocks(one, m, 4096) for one in candidates(m, 4096, 7168, DType.BFLOAT16, 132)]
        assert clocks(work, m, 4096) == min(costs)
        assert promising(m, 4096, 7168, DType.BFLOAT16, 132)[0] == work


def test_many_tokens_take_large_tiles_in_clusters() -> None:
    work = choose(8192, 4096, 7168, DType.BFLOAT16, 132)
    assert work.form.rows * work.form.columns > 128 * 128
    assert work.form.cluster == 2


def test_an_odd_number_of_multiprocessors_leaves_one_idle() -> None:
    work = choose(8192, 4096, 7168, DType.BFLOAT16, 131)
    assert work.form.cluster == 2
    assert work.blocks == 130
