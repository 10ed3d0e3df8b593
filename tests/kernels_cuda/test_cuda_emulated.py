"""``gemm.cu`` itself, compiled for the CPU and run on a pretend Hopper: no GPU needed.

Small whole numbers with powers of two as scales: every sum is exact, so the result must be the
float64 product, rounded once. ``pytest -m machine`` runs many more forms, orders and broken kernels
(minutes).
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from blockscale.formats import DType
from blockscale.kernels.cpu.build import find_compiler
from blockscale.kernels.cuda.work import (
    EARLY_BLOCKS,
    SHARED_BYTES,
    Form,
    Share,
    Stores,
    When,
    Work,
    aligned_scale_stride,
    make_form,
    make_work,
)
from blockscale.kernels.cuda.writing import at_once, by_lanes, in_flight, late
from blockscale.tensor import torch_dtype
from blockscale.testing import cuda_machine
from blockscale.testing.cuda_machine import FIRST, EmulationError, Trial

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.skipif(
    find_compiler() is None, reason="needs a C++ compiler (apt install g++)"
)

BF16, FP16, FP32 = DType.BFLOAT16, DType.FLOAT16, DType.FLOAT32
FEW_FORMS = [
    make_form(256, 128, BF16, share=Share.ACTIVATION),
    make_form(128, 192, FP32, share=Share.WEIGHT),
    make_form(64, 112, FP16, beside=2),
    make_form(256, 112, FP16, stores=Stores(128, 2, 8, When.LATE)),
    replace(make_form(64, 64, FP16), flight=2),
    in_flight(late(make_form(64, 48, BF16))),
    in_flight(by_lanes(make_form(128, 96, FP16), When.LATE)),
    by_lanes(make_form(64, 32, FP32), When.AT_ONCE),
]
MANY_FORMS = [
    make_form(rows, columns, out, share=share, beside=2 if rows == 64 else 1)
    for rows, columns, out, share in (
        (256, 128, FP16, Share.NOTHING),
        (256, 128, FP32, Share.WEIGHT),
        (256, 112, BF16, Share.NOTHING),
        (256, 96, BF16, Share.ACTIVATION),
        (128, 128, BF16, Share.NOTHING),
        (128, 128, FP16, Share.ACTIVATION),
        (128, 160, BF16, Share.WEIGHT),
        (128, 144, FP32, Share.NOTHING),
        (128, 112, BF16, Share.ACTIVATION),
        (128, 80, FP16, Share.NOTHING),
        (128, 48, BF16, Share.WEIGHT),
        (128, 16, FP32, Share.NOTHING),
        (64, 192, BF16, Share.ACTIVATION),
        (64, 128, BF16, Share.NOTHING),
        (64, 64, FP16, Share.WEIGHT),
        (64, 32, FP32, Share.NOTHING),
    )
] + [
    make_form(256, 128, BF16, stores=Stores(128, 1)),
    make_form(256, 128, BF16, stores=Stores(128, 4)),
    make_form(256, 128, BF16, stores=Stores(128, 4, 16, When.LATE)),
    make_form(256, 128, FP16, stores=Stores(128, 3, 8, When.LATE), share=Share.WEIGHT),
    make_form(256, 128, FP32, stores=Stores(128, 3, 8, When.LATE)),
    make_form(128, 192, FP16, stores=Stores(128, 3, 16, When.LATE), share=Share.ACTIVATION),
    make_form(128, 144, BF16, stores=Stores(128, 3, 16, When.LATE)),
    make_form(128, 144, FP32, stores=Stores(128, 2, 16, When.LATE)),
    make_form(128, 160, FP16, stores=Stores(128, 1, 16)),
    make_form(64, 96, BF16, stores=Stores(128, 2, 16, When.LATE), beside=2),
    make_form(64, 48, FP16, stores=Stores(64, 2, 8, When.LATE)),
    replace(make_form(128, 128, BF16), flight=2),
    replace(make_form(128, 48, FP32, share=Share.WEIGHT), flight=2),
    in_flight(late(make_form(128, 128, FP16, share=Share.ACTIVATION))),
    in_flight(late(make_form(128, 96, FP32))),
    replace(make_form(64, 32, BF16, beside=2), flight=2),
    by_lanes(make_form(256, 128, BF16, share=Share.ACTIVATION), When.LATE),
    by_lanes(make_form(256, 112, FP32), When.LATE),
    in_flight(by_lanes(make_form(128, 80, FP16), When.LATE)),
    by_lanes(make_form(128, 160, BF16, share=Share.WEIGHT), When.LATE),
    by_lanes(make_form(256, 112, FP16, share=Share.WEIGHT), When.LATE),
    by_lanes(make_form(128, 192, FP16, share=Share.WEIGHT), When.AT_ONCE),
    in_flight(by_lanes(make_form(128, 128, FP32), When.AT_ONCE)),
    in_flight(by_lanes(make_form(64, 48, BF16, beside=2), When.AT_ONCE)),
    by_lanes(make_form(64, 16, FP32), When.AT_ONCE),
]
machine = pytest.mark.machine
SOME_AND_MANY = [*FEW_FORMS, *(pytest.param(form, marks=machine) for form in MANY_FORMS)]


def name_of(value: object) -> str:
    return value.name + value.out.value if isinstance(value, Form) else str(value)


class Problem:
    """Operands with NaN behind them, and their float64 product."""

    def __init__(self, m: int, n: int, k: int, *, is_whole: bool = True) -> None:
        self.m, self.n, self.k = m, n, k
        self.chance = torch.Generator().manual_seed(m + 31 * n + 1009 * k)
        blocks = -(-k // 128)
        self.blocks = blocks
        make = self.whole if is_whole else self.normal
        self.a = torch.full((m + 8, k), float("nan")).to(torch.float8_e4m3fn)
        self.a[:m] = make(m, k).to(torch.float8_e4m3fn)
        self.b = make(n, k).to(torch.float8_e4m3fn)
        memory = torch.full((blocks, aligned_scale_stride(m)), float("nan"))
        self.a_scales = memory.T[:m]
        self.b_scales = torch.empty((-(-n // 128), blocks))
        for scales in (self.a_scales, self.b_scales):
            exponents = torch.randint(-3, 4, scales.shape, generator=self.chance)
            scales.copy_(2.0**exponents if is_whole else self.normal(*scales.shape).abs())

    def whole(self, *shape: int) -> torch.Tensor:
        return torch.randint(-4, 5, shape, generator=self.chance).float()

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.chance)

    @property
    def expected(self) -> torch.Tensor:
        """The product in float64."""
        a = self.a[: self.m].double() * self._spread(self.a_scales, 1)[: self.m]
        return a @ (self.b.double() * self._spread(self.b_scales, 128)[: self.n]).T

    def _spread(self, scales: torch.Tensor, rows: int) -> torch.Tensor:
        wide = scales.double().repeat_interleave(rows, 0)
        return wide.repeat_interleave(128, 1)[:, : self.k]

    def run(
        self, work: Work, bias: torch.Tensor | None = None, trial: Trial = FIRST
    ) -> torch.Tensor:
        """The kernel's result; fails if it wrote outside, shows NaN where it wrote nothing."""
        guard = 64
        dtype = torch_dtype(work.form.out)
        memory = torch.full((self.m * self.n + 2 * guard,), float("nan"), dtype=dtype)
        out = memory[guard : guard + self.m * self.n].view(self.m, self.n)
        a, b = (self.a[: self.m], self.a_scales), (self.b, self.b_scales)
        cuda_machine.multiply(work, a, b, out, bias, trial)
        assert memory[:guard].isnan().all()
        assert memory[guard + self.m * self.n :].isnan().all()
        return out


def shape_for(form: Form) -> tuple[int, int, int]:
    """Ragged in M, N and K, an odd number of tiles each way, and the ring goes round."""
    rows = form.rows + 37 if form.rows > 128 else 2 * form.rows + 37
    columns = 2 * form.columns + whole_groups(24, form)
    return rows, columns, 128 * (form.stages // 2 + 1) + 16


def whole_groups(n: int, form: Form) -> int:
    """At least ``n`` columns, in whole groups of dealt rows."""
    return -(-n // form.dealt) * form.dealt


@pytest.mark.parametrize("form", SOME_AND_MANY, ids=name_of)
def test_whole_numbers_give_the_float64_product_bit_for_bit(form: Form) -> None:
    """Several tiles a block: the ring's phases go on from one to the next."""
    problem = Problem(*shape_for(form))
    dtype = torch_dtype(form.out)
    bias = problem.whole(problem.n).to(dtype)
    work = make_work(form, *shape_for(form), processors=2)
    assert work.units > work.blocks // form.cluster
    assert torch.equal(problem.run(work, bias), (problem.expected + bias.double()).to(dtype))


@pytest.mark.parametrize("form", SOME_AND_MANY, ids=name_of)
def test_scale_fingerprint(form: Form) -> None:
    """Ones with a power of two of their own in each block: a wrong scale index would show."""
    problem = Problem(70, whole_groups(3 * form.columns + 8 - form.columns % 8, form), 640)
    problem.a.fill_(1.0)
    problem.b.fill_(1.0)
    blocks, rows = torch.arange(5), torch.arange(problem.m) % 7
    problem.a_scales.copy_(2.0 ** (rows[:, None] + blocks))
    columns = torch.arange(len(problem.b_scales))
    problem.b_scales.copy_(2.0 ** -(blocks + 3.0 * columns[:, None]))
    out = problem.run(make_work(form, problem.m, problem.n, problem.k, processors=4))
    assert torch.equal(out, problem.expected.to(out.dtype))


@pytest.mark.parametrize("form", [pytest.param(form, marks=machine) for form in FEW_FORMS])
@pytest.mark.parametrize("shape", [(1, 8, 16), (3, 1000, 128), (600, 40, 272), (257, 129 * 8, 32)])
def test_shapes_from_one_row_on(form: Form, shape: tuple[int, int, int]) -> None:
    m, n, k = shape
    problem = Problem(m, whole_groups(n, form), k)
    out = problem.run(make_work(form, m, problem.n, k, processors=6, band=2))
    assert torch.equal(out, problem.expected.to(out.dtype))


def documented_chain(problem: Problem) -> torch.Tensor:
    """What docs/kernels.md says each element goes through, rounded to float32 step by step."""
    result = np.zeros((problem.m, problem.n), np.float32)
    for block in range(problem.blocks):
        k = slice(128 * block, 128 * (block + 1))
        wave = (problem.a[: problem.m, k].double() @ problem.b[:, k].double().T).float()
        b_scales = problem.b_scales[:, block].repeat_interleave(128)[: problem.n]
        scales = problem.a_scales[:, block, None] * b_scales
        # One FFMA: the product and the sum are exact in 64 bits of fraction, but for ties.
        product = wave.numpy().astype(np.longdouble) * scales.numpy().astype(np.longdouble)
        result = (product + result).astype(np.float32)
    return torch.from_numpy(result)


@pytest.mark.parametrize(("m", "rows", "columns"), [(1, 64, 48), (83, 64, 48), (193, 128, 64)])
def test_what_lies_behind_the_last_tiles_rows_does_not_matter(
    m: int, rows: int, columns: int
) -> None:
    work = make_work(in_flight(make_form(rows, columns, FP16)), m, 200, 784, processors=2)
    assert work.last_rows < rows
    problem = Problem(m, 200, 784)
    out = problem.run(work)
    assert torch.equal(out, problem.expected.to(out.dtype))


@pytest.mark.parametrize("blocks", [1, EARLY_BLOCKS, EARLY_BLOCKS + 1, 15])
def test_weights_that_come_before_the_kernel_ahead_has_ended_are_used_once(blocks: int) -> None:
    form = in_flight(make_form(64, 32, FP16))
    problem = Problem(21, 104, 128 * blocks - 16)
    work = make_work(form, 21, 104, problem.k, processors=2)
    assert work.early_blocks == EARLY_BLOCKS
    for seed in range(3):
        out = problem.run(work, trial=Trial(seed))
        assert torch.equal(out, problem.expected.to(out.dtype))


@pytest.mark.parametrize("when", [at_once, late])
@pytest.mark.parametrize("blocks", range(1, 6))
def test_two_waves_in_flight_end_with_any_number_of_blocks(
    blocks: int, when: Callable[[Form], Form]
) -> None:
    form = in_flight(when(make_form(64, 32, FP16)))
    problem = Problem(150, 104, 128 * blocks - 16)
    work = make_work(form, 150, 104, problem.k, processors=2)
    for seed in range(3):
        out = problem.run(work, trial=Trial(seed))
        assert torch.equal(out, problem.expected.to(out.dtype))


@pytest.mark.parametrize("form", [FEW_FORMS[0], FEW_FORMS[-1]], ids=name_of)
def test_all_lanes_may_give_slots_back(form: Form) -> None:
    """As it is compiled for racecheck: with and without a cluster, the same bits."""
    all_lanes = ("#define ARRIVING_LANES 1\n", "#define ARRIVING_LANES 32\n")
    problem = Problem(*shape_for(form))
    work = make_work(form, *shape_for(form), processors=2)
    out = problem.run(work, trial=Trial(change=all_lanes))
    assert torch.equal(out, problem.expected.to(out.dtype))


@machine
@pytest.mark.parametrize(
    "form", [form for form in (*FEW_FORMS, *MANY_FORMS) if form.out is FP32], ids=name_of
)
def test_any_values_give_the_documented_chains_bits_in_any_order(form: Form) -> None:
    m, n, k = shape_for(form)
    problem = Problem(m, n, k, is_whole=False)
    expected = documented_chain(problem)
    for seed in range(5):
        work = make_work(form, m, n, k, processors=2, band=seed + 1)
        assert torch.equal(problem.run(work, trial=Trial(seed)), expected)


# A piece of the kernel, what takes its place, and what the machine says of it.
BROKEN = {
    "a slot is given back while the tensor cores read it": (
        FEW_FORMS[0],
        "        end_wave(wave);\n        if (number == COUNT - 1) give_back(ring);\n",
        "        if (number == COUNT - 1) give_back(ring);\n        end_wave(wave);\n",
        "fills a slot that is being read",
    ),
    "stores are not fenced": (
        FEW_FORMS[2],
        "        fence_for_tma();\n",
        "",
        "not fenced for TMA",
    ),
    "a slot is read before it is full": (
        FEW_FORMS[2],
        "    if (!is_full) barrier_wait(ring.full(), ring.parity);\n",
        "",
        "what TMA is writing|fills a slot",
    ),
    "a slot is filled before it is empty": (
        FEW_FORMS[2],
        "            barrier_wait(ring.empty(), ring.parity ^ 1);\n            if (COPIES",
        "            if (COPIES",
        "fills a slot|more arrivals",
    ),
    "more bytes are expected than come": (
        FEW_FORMS[2],
        "bytes += rows * (K_BLOCK + SCALE_BYTES);",
        "bytes += rows * (K_BLOCK + SCALE_BYTES) + 16;",
        "nothing can go on",
    ),
    "a block does not wait for the other's end": (
        FEW_FORMS[0],
        "    if (CLUSTER > 1) wait_for_last_arrivals(ring);\n",
        "",
        "a block that has ended",
    ),
    "a slot is given back to one block of two": (
        FEW_FORMS[0],
        "if (lane_index() < CLUSTER) barrier_arrive_at(ring.empty(), lane_index());",
        "if (lane_index() < CLUSTER) barrier_arrive(ring.empty());",
        "fills a slot|more arrivals|nothing can go on|wrong",
    ),
    "a buffer is written again before it was stored": (
        FEW_FORMS[2],
        "        if (lane_index() == 0) tma_store_wait_read<BUFFERS - 1>();\n",
        "",
        "overwrites what TMA",
    ),
    "the activation is read too early": (
        FEW_FORMS[2],
        "            wait_for_kernel_ahead();\n            if (problem.early_blocks == 0) let_next",
        "            if (problem.early_blocks == 0) let_next",
        "before the kernel ahead has ended",
    ),
    "weights that came early are copied again": (
        FEW_FORMS[4],
        "for (int block = early; block < problem.k_blocks; block++)",
        "for (int block = 0; block < problem.k_blocks; block++)",
        "wrong|more arrivals|fills a slot|nothing can go on",
    ),
    "wgmma is not fenced": (
        FEW_FORMS[2],
        "    wgmma_fence();\n",
        "",
        "without a fence",
    ),
    "a block ends before its stores": (
        FEW_FORMS[2],
        "    if (lane_index() == 0) tma_store_wait_read<0>();\n",
        "",
        "ends before its stores are done",
    ),
    "barriers are not fenced": (
        FEW_FORMS[2],
        "    fence_barrier_init();\n",
        "",
        "before fence_barrier_init",
    ),
    "a late tile is forgotten": (
        FEW_FORMS[3],
        "        place = next;\n        is_written = false;\n",
        "        place = next;\n        is_written = true;\n",
        "wrong",
    ),
    "a tile is written where the next one belongs": (
        FEW_FORMS[3],
        "if (WHEN == When::LATE && !is_written) write(number);",
        "place = next; if (WHEN == When::LATE && !is_written) write(number);",
        "wrong",
    ),
    "a slot is given back before the other wave has read it": (
        FEW_FORMS[4],
        "        end_block<1>(results, odd, second, own_columns);\n    };\n",
        "give_back(first.ring); end_block<1>(results, odd, second, own_columns);\n    };\n",
        "what TMA is writing|fills a slot|more arrivals|nothing can go on",
    ),
    "the wrong wave is promoted": (
        FEW_FORMS[4],
        "        end_block<1>(results, even, first, own_columns);\n        first =",
        "        end_block<1>(results, odd, first, own_columns);\n        first =",
        "wrong|sums of a wgmma",
    ),
    "scales are put into a slot that is in use": (
        FEW_FORMS[2],
        "            barrier_wait(ring.empty(), ring.parity ^ 1);\n            // No lane looks",
        "            // No lane looks",
        "more arrivals|wrong",
    ),
    "lanes write their pairs in another order": (
        FEW_FORMS[6],
        "rounded(pairs[4 * word], pairs[4 * word + 1])",
        "rounded(pairs[4 * (WORDS - 1 - word)], pairs[4 * (WORDS - 1 - word) + 1])",
        "wrong",
    ),
    "the bias is that of columns in order": (
        FEW_FORMS[6],
        "return i * 2 / DEALT * DEALT + lane_index() % 4 * QUARTER + i * 2 % DEALT / 4;",
        "return i * 2 + lane_index() % 4 * 2;",
        "wrong",
    ),
    "another group of dealt rows is copied": (
        FEW_FORMS[6],
        "row / GROUP, barrier, policy",
        "row / GROUP + 1, barrier, policy",
        "wrong",
    ),
    "lanes write rows that are not there": (
        FEW_FORMS[7],
        "row < first.end ? problem.n - first.column : 0",
        "problem.n - first.column",
        "outside of the output",
    ),
    "lanes write columns that are not there": (
        FEW_FORMS[6],
        "row < first.end ? problem.n - first.column : 0",
        "row < first.end ? COLUMNS : 0",
        "outside of the output|wrong",
    ),
    "the second weight scale is never used": (
        FEW_FORMS[2],
        "segment * SEGMENT < own_columns",
        "segment >= 0",
        "wrong",
    ),
}
IN_THE_DEFAULT_RUN = ("stores are not fenced", "a slot is read before it is full")


@pytest.mark.parametrize("name", BROKEN)
def test_the_kernel_still_has_what_is_broken(name: str) -> None:
    _, piece, instead, _ = BROKEN[name]
    assert cuda_machine.sources((piece, instead)) != cuda_machine.sources()


@pytest.mark.parametrize(
    "name",
    [name if name in IN_THE_DEFAULT_RUN else pytest.param(name, marks=machine) for name in BROKEN],
)
def test_the_machine_notices_a_broken_kernel(name: str) -> None:
    form, piece, instead, words = BROKEN[name]
    shape = (37, *shape_for(form)[1:]) if "early" in name else shape_for(form)
    problem = Problem(*shape)
    work = make_work(form, *shape, processors=2)
    # Chance decides what happens first; a fault that never shows would be a fault of the test.
    bias = problem.whole(problem.n).to(torch_dtype(form.out)) if "bias" in name else None
    found = (try_broken(problem, work, Trial(seed, (piece, instead)), bias) for seed in range(10))
    assert re.search(words, next(filter(None, found), "right"))


def try_broken(problem: Problem, work: Work, trial: Trial, bias: torch.Tensor | None = None) -> str:
    """What is noticed; empty if the result is right."""
    try:
        out = problem.run(work, bias, trial)
    except EmulationError as error:
        return str(error)
    expected = problem.expected if bias is None else problem.expected + bias.double()
    return "" if torch.equal(out, expected.to(out.dtype)) else "wrong"


@pytest.mark.parametrize("form", FEW_FORMS, ids=name_of)
def test_python_and_the_kernel_agree_on_threads_and_shared_memory(form: Form) -> None:
    library = cuda_machine.library(form)
    assert library.threads() == form.threads
    assert library.shared_bytes() == form.shared_bytes <= SHARED_BYTES
