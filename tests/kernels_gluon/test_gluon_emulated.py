"""The Gluon kernels' own source on a pretend GPU: exact results, and no hazard on the way.

``blockscale.testing.gluon_kernels`` raises where a slot or a buffer is used out of turn.
"""

from __future__ import annotations

from itertools import chain
from typing import Any

import pytest
import torch

from blockscale.kernels.gluon.work import (
    Work,
    dense_variant,
    dense_work,
    small_variant,
    small_work,
)
from blockscale.testing import gluon_machine
from blockscale.testing.gluon_kernels import load_kernels
from blockscale.testing.gluon_machine import EmulationError, Program
from blockscale.testing.gluon_problem import KERNELS, Problem
from blockscale.testing.gluon_races import Clock, History, merge

TILES = ((256, 128), (128, 128), (128, 64), (128, 32), (64, 128), (64, 32))
PART_TILES = ((128, 192), (128, 96), (64, 192), (64, 96))
PROCESSORS = 3
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def dense(tile: tuple[int, int], kind: str, m: int, n: int, k: int) -> Work:
    """Work of a tile on three multiprocessors; ``kind``: what the variant does beyond the plain."""
    variant = dense_variant(*tile, 2, split=kind == "split", narrow=kind == "narrow")
    return dense_work(variant, m, n, k, PROCESSORS, pieces=3 if kind == "split" else 1)


@pytest.mark.parametrize("kind", ["plain", "split", "narrow"])
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_dense_is_exact_on_whole_numbers_with_ragged_edges(
    tile: tuple[int, int], kind: str
) -> None:
    columns = tile[1]
    m, n, k = 330, 2 * columns + columns // 2 - 8, 7 * 128 + 48
    problem = Problem(m, n, k)
    bias = torch.arange(n).float() - n // 2
    expected = problem.product + bias.double()
    assert torch.equal(problem.run(dense(tile, kind, m, n, k), bias=bias).double(), expected)


@pytest.mark.parametrize("last", [-40, -136])
@pytest.mark.parametrize("tile", PART_TILES, ids=str)
def test_tiles_of_two_parts_are_exact_and_know_their_scale_blocks(
    tile: tuple[int, int], last: int
) -> None:
    """Parts start on either side of a scale block's edge: eight columns of tiles meet them all.

    ``last``: where the last tile ends; a part of it may lie beyond the last scale block.
    """
    problem = Problem(150, 8 * tile[1] + last, 5 * 128 + 16)
    bias = torch.arange(problem.n).float() - problem.n // 2
    work = dense(tile, "plain", problem.m, problem.n, problem.k)
    expected = problem.product + bias.double()
    assert torch.equal(problem.run(work, bias=bias).double(), expected)


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("tokens", [8, 16, 32, 64])
@pytest.mark.parametrize("weights", [64, 128])
def test_small_m_is_exact_on_whole_numbers_with_ragged_edges(
    weights: int, tokens: int, split: bool
) -> None:
    # Wide tiles may be followed by others: three tokens more, in a second tile.
    m, n, k = tokens + (3 if tokens >= 32 else -3), 200, 9 * 128 + 16
    problem = Problem(m, n, k)
    bias = torch.arange(n).float() - n // 2
    work = small_work(small_variant(weights, tokens, 4, split=split), m, n, k, 3 if split else 1)
    assert torch.equal(problem.run(work, bias=bias).double(), problem.product + bias.double())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [1, 65])
def test_results_are_rounded_once_to_the_output_dtype(m: int, dtype: torch.dtype) -> None:
    problem = Problem(m, 136, 256)
    bias = torch.full((136,), 0.5, dtype=dtype)
    work: Work = small_work(small_variant(64, 8, 2, split=False), min(m, 8), 136, 256, 1)
    if m > 64:
        work = dense((128, 64), "plain", m, 136, 256)
    expected = (problem.product + 0.5).to(dtype)
    assert torch.equal(problem.run(work, dtype, bias), expected)


@pytest.mark.parametrize(("m", "n", "k"), [(1, 8, 16), (128, 128, 128), (129, 136, 2064)])
def test_the_smallest_and_just_exceeded_shapes(m: int, n: int, k: int) -> None:
    problem = Problem(m, n, k)
    assert torch.equal(problem.run(dense((128, 128), "plain", m, n, k)).double(), problem.product)


def test_scale_fingerprint() -> None:
    """Ones with a power of two of their own in each block: a wrong scale index would show."""
    problem = Problem(200, 264, 640)
    problem.a.fill_(1.0)
    problem.b.fill_(1.0)
    blocks = torch.arange(5)
    problem.a_scales[:, :200] = 2.0 ** ((torch.arange(200) % 7) + blocks[:, None])
    problem.b_scales.copy_(2.0 ** -(blocks + 5.0 * torch.arange(3)[:, None]))
    a = problem.a_scales[:, :200].T.double()
    expected = 128 * a @ problem.b_scales.double().repeat_interleave(128, 0)[:264].T
    for kind in ("plain", "split", "narrow"):
        work = dense((128, 128), kind, 200, 264, 640)
        assert torch.equal(problem.run(work).double(), expected), kind
    few = Problem(5, 264, 640)
    few.a.fill_(1.0)
    few.b.fill_(1.0)
    few.a_scales[:, :5] = problem.a_scales[:, :5]
    few.b_scales.copy_(problem.b_scales)
    work = small_work(small_variant(64, 8, 2, split=True), 5, 264, 640, 2)
    assert torch.equal(few.run(work).double(), expected[:5])


def test_every_unsplit_schedule_gives_the_same_bits() -> None:
    problem = Problem(330, 320, 900, whole_numbers=False)
    results = [
        problem.run(dense(tile, kind, 330, 320, 900))
        for tile in TILES
        for kind in ("plain", "narrow")
    ]
    results += [problem.run(dense(tile, "plain", 330, 320, 900)) for tile in PART_TILES]
    assert all(torch.equal(result, results[0]) for result in results)


def test_a_split_sum_has_the_same_bits_whatever_piece_comes_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    problem = Problem(130, 136, 1920, whole_numbers=False)
    work = dense((128, 64), "split", 130, 136, 1920)
    first = problem.run(work)
    original = Program.__init__
    for shift in (1000, 2000, 3000):

        def reseeded(
            self: Program, *args: Any, seed: int, shift: int = shift, **named: Any
        ) -> None:
            original(self, *args, seed=seed + shift, **named)

        monkeypatch.setattr(Program, "__init__", reseeded)
        assert torch.equal(problem.run(work), first)


BROKEN = {
    "no fence": ("    fence_async_shared()\n", ""),
    "no wait for an empty slot": ("mbarrier.wait(empty.index(slot), phase)", "pass"),
    "no wait for a full slot": ("mbarrier.wait(full.index(slot), phase)", "pass"),
    "no wait for stores": ("tma.store_wait(BUFFERS - 1)", "pass"),
    "one consumer empties": ("empty.index(slot), count=CONSUMERS", "empty.index(slot), count=1"),
    "one buffer": ("return (buffer + 1) % BUFFERS", "return buffer"),
    "one piece too few": ("draw_ticket(ticket) == pieces - 1", "draw_ticket(ticket) == pieces - 2"),
}
KINDS = {"one piece too few": "split"}
# What no result would show: a scale that is read and not used.
WAITED_FOR = """\
    if not IS_LAST:
        mbarrier.wait(full.index(following), following_phase)
"""
READ_ANYWAY = """\
    following, _ = next_slot(slot, following_phase, STAGES)
    mbarrier.wait(full.index(following), following_phase, pred=not IS_LAST)
    if True:
"""


@pytest.mark.parametrize("fault", BROKEN)
def test_the_pretend_gpu_finds_a_broken_kernel(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gluon_machine, "WAIT_SECONDS", 1.0)
    monkeypatch.setattr(gluon_machine, "LONGEST_DELAY_SECONDS", 5e-3)
    blocks = 1 if "store" in fault or "buffer" in fault else 6
    problem = Problem(1200, 392, 128 * blocks)
    work = dense((256, 128), KINDS.get(fault, "plain"), 1200, 392, 128 * blocks)
    try:
        result = problem.run(work, torch.bfloat16, kernels=load_kernels(BROKEN[fault]))
    except EmulationError:
        return
    assert not torch.equal(result, problem.product.to(torch.bfloat16))


@pytest.mark.parametrize("tile", [(256, 128), (128, 192), (64, 64)], ids=str)
def test_the_pretend_gpu_finds_a_race_whatever_came_first(tile: tuple[int, int]) -> None:
    """As racecheck found it on an H200: scales of a slot that was perhaps being filled."""
    problem = Problem(330, 392, 768)
    work = dense(tile, "plain", 330, 392, 768)
    kernels = load_kernels((WAITED_FOR, READ_ANYWAY))
    with pytest.raises(EmulationError, match="a race"):
        problem.run(work, kernels=kernels)
    assert torch.equal(problem.run(work).double(), problem.product)


def test_one_access_has_seen_another_by_arrivals_and_waits_alone() -> None:
    memory = torch.zeros(4, 8)
    for waits in (True, False):
        history, first, second = History(), Clock(), Clock()
        known: dict[int, int] = {}
        assert not history.races(memory[1], first, writes=True)
        first.publish(known)
        if waits:
            merge(second.seen, known)
        assert not history.races(memory[0], second, writes=True), "other bytes"
        assert history.races(memory[1, 2:4], second, writes=False) is not waits
        # Two that only read never race; what the first does later is not known either.
        assert not history.races(memory[2], first, writes=False)
        assert not history.races(memory[2], second, writes=False)
        assert history.races(memory[2], second, writes=True)
        child = first.child()
        assert not history.races(memory[3], child, writes=True)
        assert history.races(memory[3], first, writes=False), "a copy that was not waited for"


@pytest.mark.parametrize("programs", [1, 2, 7, 132])
def test_narrow_tiles_are_taken_once_and_by_idle_programs_first(programs: int) -> None:
    schedule = KERNELS.schedule
    for full in (0, 1, programs - 1, programs, programs + 1, 3 * programs + 2):
        for narrow in (0, 1, 2, 5, 2 * programs, 5 * programs + 3):
            taken: list[list[int]] = []
            for number in range(programs):
                gluon_machine.enter(Program((number, 0), (programs, 1), seed=0))
                tile, head, idle = schedule.first_narrow(full, narrow)
                own = []
                while tile < narrow:
                    own.append(tile)
                    tile = schedule.next_narrow(tile, head, idle)
                taken.append(own)
            assert sorted(chain.from_iterable(taken)) == list(range(narrow))
            rounds = [len(range(number, full, programs)) for number in range(programs)]
            halves = [2 * whole + len(own) for whole, own in zip(rounds, taken, strict=True)]
            assert max(halves) - min(halves) <= 2


def test_tiles_are_walked_in_bands_and_each_once() -> None:
    position = KERNELS.schedule.tile_position
    for rows, columns in ((1, 1), (8, 3), (9, 2), (20, 5)):
        walked = [position(tile, rows, columns, 8) for tile in range(rows * columns)]
        assert sorted(walked) == [(row, column) for row in range(rows) for column in range(columns)]
        bands = [row // 8 for row, _ in walked]
        assert bands == sorted(bands)
