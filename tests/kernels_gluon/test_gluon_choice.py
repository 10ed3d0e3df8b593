"""The choice of tile and split: every choice is complete, fits, and is known beforehand."""

from __future__ import annotations

import json
import subprocess
import sys
from math import ceil
from pathlib import Path

import pytest

from blockscale.kernels.corrected import bucket
from blockscale.kernels.gluon.choice import (
    DENSE_TILES,
    FEW_M,
    MAX_SMALL_M,
    MIN_PIECE_BLOCKS,
    candidates,
    choose,
    variants,
)
from blockscale.kernels.gluon.corrections import clocks, form, shipped, winner, winner_name
from blockscale.kernels.gluon.work import (
    HALF_SHARED_BYTES,
    K_BLOCK,
    SHARED_BYTES,
    DenseVariant,
    DenseWork,
    SmallWork,
    aligned_scale_stride,
    dense_variant,
    dense_work,
)

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "src" / "blockscale" / "kernels" / "gluon" / "tables" / "gluon.json"
PROCESSORS = 132
# benchmarks/results, and the edges of the contract.
SHAPES = (
    (4096, 7168),
    (2112, 7168),
    (576, 7168),
    (24576, 1536),
    (32768, 512),
    (7168, 16384),
    (8, 16),
    (200, 1088),
    (129, 128),
)
TOKENS = (1, 8, 9, 17, 64, 65, 127, 128, 129, 257, 512, 1000, 4096, 8192)


def pieces_of(work: DenseWork) -> dict[int, list[tuple[int, int]]]:
    """(first K block, K blocks) of every piece by tile, as ``dense`` reads its items."""
    found: dict[int, list[tuple[int, int]]] = {}
    for part in range(work.items - work.whole_tiles):
        first = part % work.pieces * work.piece_blocks
        tile = work.whole_tiles + part // work.pieces
        count = min(work.piece_blocks, work.k_blocks - first)
        found.setdefault(tile, []).append((first, count))
    return found


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("m", TOKENS)
def test_every_candidate_covers_each_k_block_of_each_tile_once(
    m: int, shape: tuple[int, int]
) -> None:
    n, k = shape
    for work in candidates(m, n, k, 2, PROCESSORS):
        if isinstance(work, SmallWork):
            assert work.token_tiles * work.variant.tokens >= m
            # Boxes of scales are 32 wide or more, so narrower tiles cannot follow one another.
            assert work.token_tiles == 1 or work.variant.tokens >= 32
            assert work.tiles * work.variant.weights >= n
            blocks = [work.piece_blocks] * (work.pieces - 1)
            assert 0 < work.k_blocks - sum(blocks) <= work.piece_blocks
            continue
        split = pieces_of(work)
        tiles = work.row_tiles * work.column_tiles
        assert list(split) == list(range(work.whole_tiles, tiles))
        for parts in split.values():
            ends = [first + count for first, count in parts]
            assert [first for first, _ in parts] == [0, *ends[:-1]]
            assert ends[-1] == ceil(k / K_BLOCK)
        columns = work.column_tiles * work.variant.columns
        assert n <= columns + (work.variant.columns // 2 if work.narrow_tiles else 0)
        assert work.row_tiles * work.variant.rows >= m
        assert 1 <= work.programs <= PROCESSORS * work.variant.beside


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("m", TOKENS)
@pytest.mark.parametrize("out_bytes", [2, 4])
def test_the_choice_is_what_was_fastest_or_the_models_best_and_a_known_variant(
    m: int, shape: tuple[int, int], out_bytes: int
) -> None:
    n, k = shape
    chosen = choose(m, n, k, out_bytes, PROCESSORS)
    works = candidates(m, n, k, out_bytes, PROCESSORS)
    judged = m if m <= 64 else bucket(m)
    times = [clocks(work, judged, n, out_bytes, PROCESSORS) for work in works]
    known = winner(works, m, (n, k), out_bytes, PROCESSORS)
    assert chosen == (known or works[times.index(min(times))])
    assert chosen.variant in variants(out_bytes)
    if m < FEW_M or m > MAX_SMALL_M:
        assert isinstance(chosen, SmallWork) == (m < FEW_M)


@pytest.mark.parametrize("m", [1, 16, 64])
def test_decode_of_a_large_weight_occupies_most_of_the_gpu(m: int) -> None:
    for n, k in ((4096, 7168), (2112, 7168), (7168, 2048), (24576, 1536), (7168, 16384)):
        work = choose(m, n, k, 2, PROCESSORS)
        tiles, pieces = work.grid
        assert tiles * pieces >= 0.7 * PROCESSORS


def test_pieces_are_no_shorter_than_the_least() -> None:
    for n, k in SHAPES:
        for m in TOKENS:
            work = choose(m, n, k, 2, PROCESSORS)
            if work.pieces > 1:
                assert work.piece_blocks >= MIN_PIECE_BLOCKS


def test_a_ragged_last_column_of_half_a_tile_may_be_narrow() -> None:
    """N = 2112 is 16.5 columns of 128: 17 would take a third round for a quarter of its work."""
    works = [w for w in candidates(4096, 2112, 7168, 2, PROCESSORS) if isinstance(w, DenseWork)]
    narrow = {w.variant.rows: (w.items, w.narrow_tiles) for w in works if w.narrow_tiles}
    assert narrow == {256: (16 * 16, 16), 128: (32 * 16, 32)}


def test_tiles_of_192_columns_are_offered_and_fill_a_round() -> None:
    """2112 = 11 x 192; 1024 x 3072 is 128 tiles of 128x192 for 132 multiprocessors."""
    works = [w for w in candidates(4096, 2112, 7168, 2, PROCESSORS) if isinstance(w, DenseWork)]
    assert 11 in {w.column_tiles for w in works if w.variant.columns == 192}
    chosen = choose(1024, 3072, 6144, 2, PROCESSORS)
    assert isinstance(chosen, DenseWork)
    assert (chosen.variant.columns, chosen.items) == (192, 128)


@pytest.mark.parametrize("out_bytes", [2, 4])
@pytest.mark.parametrize("tile", DENSE_TILES, ids=str)
def test_ring_and_staging_fit_shared_memory_with_three_slots_or_more(
    tile: tuple[int, int], out_bytes: int
) -> None:
    rows, columns = tile
    variant = dense_variant(rows, columns, out_bytes)
    ring = variant.stages * ((rows + columns) * K_BLOCK + rows * 4)
    staging = variant.consumers * variant.buffers * 64 * columns * out_bytes
    assert variant.stages >= (3 if out_bytes == 2 else 2)
    assert ring + staging < SHARED_BYTES / variant.beside


@pytest.mark.parametrize("out_bytes", [2, 4])
def test_two_small_programs_fit_one_multiprocessor(out_bytes: int) -> None:
    for variant in variants(out_bytes):
        if not isinstance(variant, DenseVariant):
            slot = (variant.weights + variant.tokens) * K_BLOCK + max(variant.tokens, 32) * 4
            assert variant.stages * slot < HALF_SHARED_BYTES
            assert variant.stages >= 3


def test_whole_tiles_fill_rounds_when_the_rest_is_split() -> None:
    variant = dense_variant(128, 128, 2, split=True)
    work = dense_work(variant, 1024, 2176, 7168, PROCESSORS, pieces=4)
    assert (work.whole_tiles, work.split_tiles, work.pieces) == (132, 4, 4)
    assert work.workspace_elements == 4 * 4 * 128 * 128
    assert work.tickets == 8


def test_names_of_all_variants_differ() -> None:
    names = [variant.name for variant in variants(2)]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(("m", "stride"), [(1, 4), (4, 4), (5, 8), (4096, 4096)])
def test_scale_columns_start_on_16_bytes(m: int, stride: int) -> None:
    assert aligned_scale_stride(m) == stride


def test_factors_lose_little_on_shapes_that_their_fit_has_not_seen() -> None:
    """1.0 % at M of 17 to 512 by five-fold cross-validation over (N, K) (``gluon_fit.py``)."""
    document = json.loads(TABLE.read_text(encoding="utf-8"))
    held_out = {(n, k) for n, k in document["held_out"]}
    losses: dict[bool, list[float]] = {True: [], False: []}
    texts = [(ROOT / source).read_text("utf-8") for source in document["sources"]]
    for line in (json.loads(line) for text in texts for line in text.splitlines()[1:]):
        m, n, k, times = line["m"], line["n"], line["k"], line["times"]
        if (n, k) in held_out:
            works = [w for w in candidates(m, n, k, 2, PROCESSORS) if w.name in times]
            chosen = min(works, key=lambda w: clocks(w, m, n, 2, PROCESSORS))
            best = min(times[w.name] for w in works)
            losses[m in range(17, 513)].append(times[chosen.name] / best - 1)
    assert len(losses[True]) > 50
    assert sum(losses[True]) / len(losses[True]) < 0.02
    assert sum(losses[False]) / len(losses[False]) < 0.02


def test_every_winner_of_the_table_is_chosen() -> None:
    table = shipped()
    for (n, k), winners in table.winners.items():
        for m, name in winners.items():
            assert bucket(m) == m
            assert winner_name(choose(m, n, k, 2, table.processors)) == name


def test_every_form_has_factors() -> None:
    for m in TOKENS:
        for work in candidates(m, 4096, 7168, 2, PROCESSORS):
            assert form(work) in shipped().factors


@pytest.mark.parametrize("processors", [1, 78, 114, 144])
def test_the_choice_is_total_on_other_machines_and_beyond_the_sweep(processors: int) -> None:
    for m in (1, 33, 500, 10**6):
        for n, k in ((8, 16), (10**6, 128), (64, 10**6)):
            works = candidates(m, n, k, 2, processors)
            assert choose(m, n, k, 2, processors) in works
            assert winner(works, m, (n, k), 2, processors) is None


def test_measured_winners_are_of_their_machine_and_of_16_bit_results() -> None:
    (n, k), winners = next(iter(shipped().winners.items()))
    m = next(iter(winners))
    for out_bytes, processors in ((4, 132), (2, 114)):
        works = candidates(m, n, k, out_bytes, processors)
        assert winner(works, m, (n, k), out_bytes, processors) is None


@pytest.mark.parametrize(("m", "expected"), [(1, 8), (9, 16), (33, 64), (65, 80), (513, 528)])
def test_buckets_are_tiles_of_tokens_then_steps_of_sixteen(m: int, expected: int) -> None:
    assert bucket(m) == expected


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_all_m_of_a_bucket_have_the_same_candidates(shape: tuple[int, int]) -> None:
    """So that one answer serves them."""
    for m in (1, 9, 17, 31, 33, 65, 79, 241, 250, 257, 497, 511, 513, 1023, 4081, 8177):
        assert candidates(m, *shape, 2, PROCESSORS) == candidates(bucket(m), *shape, 2, PROCESSORS)


def test_rows_beyond_m_cost_time() -> None:
    """On an H100 128x64 at M = 320 takes 1.1 to 1.6 times as long as at 384 (perf-log G17)."""
    for n, k in ((5120, 8704), (24576, 5120)):
        few, all_there = (
            next(w for w in candidates(m, n, k, 2, PROCESSORS) if form(w) == "128x64")
            for m in (320, 384)
        )
        assert clocks(few, 320, n, 2, PROCESSORS) > 1.1 * clocks(all_there, 384, n, 2, PROCESSORS)


def test_choosing_needs_neither_torch_nor_triton() -> None:
    program = (
        "import sys; from blockscale.kernels.gluon.choice import choose; "
        "choose(128, 4096, 7168, 2, 132); "
        "sys.exit(bool({'torch', 'triton'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
