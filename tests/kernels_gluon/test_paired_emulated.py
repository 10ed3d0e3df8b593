"""The kernel for pairs of programs on a pretend GPU: exact, and neither reaches for what is not."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch

from blockscale.kernels.gluon.pair_work import (
    PairVariant,
    PairWork,
    Shares,
    pair_variant,
    pair_work,
)
from blockscale.kernels.gluon.work import dense_variant, dense_work
from blockscale.testing import gluon_machine
from blockscale.testing.gluon_kernels import load_kernels
from blockscale.testing.gluon_machine import EmulationError
from blockscale.testing.gluon_problem import Problem

TILES = ((256, 128), (128, 128), (128, 192))
# Two pairs on five multiprocessors: each takes several items, and one multiprocessor is left over.
LARGER_PROCESSORS = 5


def paired(
    tile: tuple[int, int], m: int, n: int, k: int, shares: Shares | None = None, out_bytes: int = 4
) -> PairWork:
    """Work of a tile on two pairs; ``shares``: other than the tile's own choice."""
    variant = pair_variant(*tile, out_bytes)
    if shares is not None:
        variant = PairVariant(variant.tile, shares)
    return pair_work(variant, m, n, k, LARGER_PROCESSORS)


@pytest.mark.parametrize("shares", Shares, ids=lambda shares: shares.name)
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_pairs_are_exact_on_whole_numbers_with_ragged_edges(
    tile: tuple[int, int], shares: Shares
) -> None:
    """An odd number of tiles either way: the last pair's second tile has nothing in it."""
    problem = Problem(2 * tile[0] + 74, 2 * tile[1] + 40, 5 * 128 + 48)
    bias = torch.arange(problem.n).float() - problem.n // 2
    work = paired(tile, problem.m, problem.n, problem.k, shares)
    assert (work.row_tiles, work.column_tiles) in {(3, 2), (2, 3)}
    expected = problem.product + bias.double()
    assert torch.equal(problem.run(work, bias=bias).double(), expected)


@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 8, 16), (1, 392, 128), (600, 8, 300), (513, 648, 2064)]
)
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_pairs_serve_shapes_smaller_than_a_pair_and_larger(
    tile: tuple[int, int], m: int, n: int, k: int
) -> None:
    problem = Problem(m, n, k)
    assert torch.equal(problem.run(paired(tile, m, n, k)).double(), problem.product)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_pairs_round_once_to_the_output_dtype(tile: tuple[int, int], dtype: torch.dtype) -> None:
    problem = Problem(300, 520, 384)
    bias = torch.full((520,), 0.5, dtype=dtype)
    work = paired(tile, 300, 520, 384, out_bytes=2)
    assert torch.equal(problem.run(work, dtype, bias), (problem.product + 0.5).to(dtype))


def test_pairs_give_the_same_bits_as_single_programs() -> None:
    problem = Problem(330, 320, 900, whole_numbers=False)
    plain = dense_work(dense_variant(128, 128, 2), 330, 320, 900, 3)
    expected = problem.run(plain)
    for tile, shares in product(TILES, Shares):
        assert torch.equal(problem.run(paired(tile, 330, 320, 900, shares)), expected)


def test_each_row_and_column_has_its_own_scale() -> None:
    """Ones with a power of two of their own in each block: a wrong scale index would show."""
    problem = Problem(400, 520, 640)
    problem.a.fill_(1.0)
    problem.b.fill_(1.0)
    blocks = torch.arange(5)
    problem.a_scales[:, :400] = 2.0 ** ((torch.arange(400) % 7) + blocks[:, None])
    problem.b_scales.copy_(2.0 ** -(blocks + 5.0 * torch.arange(5)[:, None]))
    a = problem.a_scales[:, :400].T.double()
    expected = 128 * a @ problem.b_scales.double().repeat_interleave(128, 0)[:520].T
    for tile, shares in product(TILES, Shares):
        work = paired(tile, 400, 520, 640, shares)
        assert torch.equal(problem.run(work).double(), expected), work.name


def test_what_is_shared_is_copied_once_for_both(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes that L2 gives: half of the shared operand's, all of the other's."""
    moved: dict[tuple[int, ...], int] = {}
    original = gluon_machine.Box.clip

    def counted(self: Any, coordinates: Any, shape: Any = ()) -> Any:
        box = self.block_type.shape
        if self.matrix.dtype == torch.float8_e4m3fn:
            moved[box] = moved.get(box, 0) + self.block_type.nbytes
        return original(self, coordinates, shape)

    monkeypatch.setattr(gluon_machine.Box, "clip", counted)
    problem = Problem(512, 512, 1024)
    problem.run(paired((256, 128), 512, 512, 1024))
    tiles, blocks = 8, 8
    assert moved[256, 128] == tiles * blocks * 256 * 128 // 2
    assert moved[128, 128] == tiles * blocks * 128 * 128


BROKEN = {
    "the second program is not asked": (
        "mbarrier.wait(empty_in_both.index(slot), phase)",
        "pass",
    ),
    "the own slot is not asked": ("mbarrier.wait(empty.index(slot), phase)", "pass"),
    "nobody tells the other": (
        "        mbarrier.arrive(ring[8].index(slot), count=1, pred=is_used)",
        "        pass",
    ),
    "one program's arrivals are enough": (
        "mbarrier.init(empty_in_both.index(slot), count=CONSUMERS)",
        "mbarrier.init(empty_in_both.index(slot), count=1)",
    ),
    "both programs take one tile": ("column = 2 * column + number_in_pair()", "column *= 2"),
    "the other's row is stored to": ("row -= number_in_pair() * WAVE_ROWS", "pass"),
    "the first program ends early": ("_wait_for_both(ring, slot, phase, STAGES)\n", "pass\n"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_the_pretend_gpu_finds_a_broken_pair(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gluon_machine, "WAIT_SECONDS", 1.0)
    monkeypatch.setattr(gluon_machine, "LONGEST_DELAY_SECONDS", 5e-3)
    if fault == "the first program ends early":
        _second_is_late(monkeypatch)
    problem = Problem(520, 520, 128 * 7)
    work = paired((256, 128), 520, 520, 128 * 7, out_bytes=2)
    old, new = BROKEN[fault]
    try:
        result = problem.run(work, torch.bfloat16, kernels=load_kernels((old, new)))
    except EmulationError:
        return
    assert not torch.equal(result, problem.product.to(torch.bfloat16))


def _second_is_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the second program's consumers take their time before they give a slot back."""
    original = gluon_machine.Unfinished.finish

    def late(self: Any) -> Any:
        if gluon_machine.thread().program.rank:
            gluon_machine.time.sleep(0.05)
        return original(self)

    monkeypatch.setattr(gluon_machine.Unfinished, "finish", late)
