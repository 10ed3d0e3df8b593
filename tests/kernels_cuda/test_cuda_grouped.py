"""The grouped forms of ``gemm.cu`` on the pretend Hopper, and what NVRTC makes of them: no GPU.

Small whole numbers with powers of two as scales: the float64 product, rounded once, whatever the
groups are. No result is written for rows that belong to no group. ``pytest -m machine`` runs more.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import pytest
import torch

from blockscale.formats import DType
from blockscale.kernels.cpu.build import find_compiler
from blockscale.kernels.cuda.grouped_choice import (
    ALIGNMENTS,
    choose_contiguous,
    choose_masked,
    deeper,
    make_masked_work,
    masked_form,
)
from blockscale.kernels.cuda.work import (
    OUTPUTS,
    SHARED_BYTES,
    Form,
    Grouping,
    Share,
    When,
    Work,
    aligned_scale_stride,
    make_form,
    make_work,
    unit_height,
)
from blockscale.kernels.cuda.writing import by_lanes, in_flight, late
from blockscale.tensor import torch_dtype
from blockscale.testing import cuda_machine
from blockscale.testing.cuda_machine import FIRST, EmulationError, Trial

if TYPE_CHECKING:
    from collections.abc import Sequence

pytestmark = pytest.mark.skipif(
    find_compiler() is None, reason="needs a C++ compiler (apt install g++)"
)

BF16, FP16, FP32 = DType.BFLOAT16, DType.FLOAT16, DType.FLOAT32
NAN = float("nan")
N_GROUPS = 5


def contiguous(rows: int, columns: int, out: DType, *, share: Share = Share.NOTHING) -> Form:
    form = late(make_form(rows, columns, out, share=share))
    return replace(form, grouping=Grouping.CONTIGUOUS)


def lanes(form: Form) -> Form:
    return in_flight(by_lanes(form, When.LATE))


WIDE = contiguous(256, 128, BF16)
SHARED = contiguous(256, 112, FP32, share=Share.ACTIVATION)
LOW = contiguous(128, 96, FP16)
PAIR = contiguous(128, 96, BF16, share=Share.WEIGHT)
machine = pytest.mark.machine
FORMS = [
    WIDE,
    SHARED,
    LOW,
    PAIR,
    lanes(contiguous(128, 128, FP16)),
    *(
        pytest.param(form, marks=machine)
        for form in (
            contiguous(128, 192, FP16, share=Share.WEIGHT),
            contiguous(128, 144, FP32, share=Share.WEIGHT),
            contiguous(64, 64, FP16, share=Share.WEIGHT),
            contiguous(256, 128, FP16, share=Share.ACTIVATION),
            deeper(contiguous(256, 128, BF16, share=Share.ACTIVATION)),
            contiguous(128, 192, BF16, share=Share.ACTIVATION),
            contiguous(128, 160, FP32),
            contiguous(128, 128, FP16),
            contiguous(64, 128, BF16),
            replace(make_form(256, 128, FP16), grouping=Grouping.CONTIGUOUS),
            lanes(contiguous(256, 128, BF16)),
            lanes(contiguous(128, 192, FP32, share=Share.WEIGHT)),
        )
    ),
]


def name_of(value: object) -> str:
    return value.name + value.out.value if isinstance(value, Form) else str(value)


class Problem:
    """``routing``: the group of each row block of ``block_rows`` rows, -1 for none."""

    def __init__(self, routing: Sequence[int], block_rows: int, n: int, k: int) -> None:
        self.routing, self.block_rows, self.n, self.k = routing, block_rows, n, k
        self.chance = torch.Generator().manual_seed(sum(routing) + 31 * n + 1009 * k)
        self.m, self.blocks = len(routing) * block_rows, -(-k // 128)
        of_rows = torch.tensor(routing, dtype=torch.int32).repeat_interleave(block_rows)
        self.is_used = of_rows >= 0
        # NaN behind the last row; numbers where rows belong to nobody, whose result would show.
        self.a = torch.full((self.m + 8, k), NAN).to(torch.float8_e4m3fn)
        self.a[: self.m] = self.whole(self.m, k).to(torch.float8_e4m3fn)
        memory = torch.full((self.blocks, aligned_scale_stride(self.m)), NAN)
        self.a_scales = memory.T[: self.m]
        self.a_scales.copy_(self.powers(self.m, self.blocks))
        self.b = self.whole(N_GROUPS, n, k).to(torch.float8_e4m3fn)
        self.b_scales = self.powers(N_GROUPS, -(-n // 128), self.blocks)

    def whole(self, *shape: int) -> torch.Tensor:
        return torch.randint(-4, 5, shape, generator=self.chance).float()

    def powers(self, *shape: int) -> torch.Tensor:
        return 2.0 ** torch.randint(-3, 4, shape, generator=self.chance)

    @property
    def expected(self) -> torch.Tensor:
        """The product in float64; NaN for rows of nobody."""
        found = torch.full((self.m, self.n), NAN, dtype=torch.float64)
        for block, group in enumerate(self.routing):
            if group < 0:
                continue
            rows = slice(block * self.block_rows, (block + 1) * self.block_rows)
            a = self.a[rows].double() * self._wide(self.a_scales[rows])
            scales = self._wide(self.b_scales[group].repeat_interleave(128, 0)[: self.n])
            found[rows] = a @ (self.b[group].double() * scales).T
        return found

    def _wide(self, scales: torch.Tensor) -> torch.Tensor:
        return scales.double().repeat_interleave(128, 1)[:, : self.k]

    def run(self, work: Work, trial: Trial = FIRST) -> torch.Tensor:
        """The kernel's result; fails if it wrote outside, NaN where it wrote nothing."""
        guard = 64
        memory = torch.full((self.m * self.n + 2 * guard,), NAN).to(torch_dtype(work.form.out))
        out = memory[guard : guard + self.m * self.n].view(self.m, self.n)
        a, b = (self.a[: self.m], self.a_scales), (self.b, self.b_scales)
        routing = torch.tensor(self.routing, dtype=torch.int32)
        cuda_machine.multiply(work, a, b, out, routing, trial)
        assert memory[:guard].isnan().all()
        assert memory[guard + self.m * self.n :].isnan().all()
        return out

    def is_right(self, out: torch.Tensor) -> bool:
        expected = self.expected.to(out.dtype)
        written = ~out.isnan().all(1)
        return torch.equal(written, self.is_used) and torch.equal(
            out[written], expected[self.is_used]
        )


@dataclass(frozen=True, slots=True)
class Routing:
    name: str
    groups: tuple[int, ...]


ROUTINGS = (
    Routing("odd counts", (0, 0, 0, 1, 3, 3, 4)),
    Routing("holes and an end of nobody", (0, -1, 2, 2, -1, -1, 4, -1, -1)),
    Routing("one hot expert", (-1, 3, 3, 3, 3)),
)
EMPTY = Routing("all empty", (-1,) * 5)


def shape_for(form: Form) -> tuple[int, int]:
    """Ragged in N and K, an odd tile of columns beside those of a cluster; the ring goes round."""
    columns = form.cluster * form.columns + -(-24 // form.dealt) * form.dealt
    return columns, 128 * (form.stages // 2 + 1) + 16


@pytest.mark.parametrize("routing", [*ROUTINGS, EMPTY], ids=lambda routing: routing.name)
@pytest.mark.parametrize("form", FORMS, ids=name_of)
def test_any_groups_give_the_float64_product_bit_for_bit(form: Form, routing: Routing) -> None:
    block_rows = min(128, form.rows)
    n, k = shape_for(form)
    problem = Problem(routing.groups, block_rows, n, k)
    work = make_work(form, problem.m, n, k, processors=2)
    assert problem.is_right(problem.run(work))


@pytest.mark.parametrize("groups", [(2,), (0, 1), (4, 4), (1, 2, 2)])
def test_any_number_of_blocks_at_once_in_any_order(groups: tuple[int, ...]) -> None:
    """Odd and even numbers of slots for each: a barrier's phase that is off by one would show."""
    n, k = 136, 128 * 3
    problem = Problem(groups, 128, n, k)
    for seed, processors in enumerate((1, 2, 3, 5)):
        for form in (WIDE, LOW, PAIR):
            most = max(processors, form.cluster)
            work = make_work(form, problem.m, n, k, most, band=1 + seed % 2)
            assert problem.is_right(problem.run(work, Trial(seed)))


def masked(rows: int, columns: int, out: DType, *, share: Share = Share.NOTHING) -> Form:
    return masked_form(late(make_form(rows, columns, out, share=share)))


MASKED_FORMS = [
    masked(256, 128, BF16),
    masked(128, 96, FP32, share=Share.ACTIVATION),
    *(
        pytest.param(form, marks=machine)
        for form in (
            masked(256, 112, FP16, share=Share.ACTIVATION),
            masked(128, 192, BF16),
            masked(128, 96, BF16, share=Share.WEIGHT),
            masked(128, 192, FP16, share=Share.WEIGHT),
            masked(256, 128, BF16, share=Share.WEIGHT),
            deeper(masked(256, 128, FP16)),
            masked_form(late(make_form(64, 128, BF16, beside=2))),
            masked_form(lanes(make_form(128, 48, FP16))),
            masked_form(lanes(make_form(256, 96, FP32))),
            masked_form(make_form(256, 128, FP16)),
            masked(64, 64, FP32),
        )
    ),
]
# Each wave's end and just beyond it, none, all of a slot; beyond what a slot can have.
COUNTS = ((0, 1, 64, 65, 0), (128, 129, 300, 0, 0), (0, 0, 0, 0, 0), (-3, 0, 17, 1000, 257))


class Slots:
    """A slot of rows for each group; those that do not count are NaN."""

    def __init__(self, counts: Sequence[int], slot: int, n: int, k: int) -> None:
        self.slot, self.n, self.k = slot, n, k
        self.given = torch.tensor(counts, dtype=torch.int32)
        self.counts = [min(max(count, 0), slot) for count in counts]
        flat = Problem([*range(N_GROUPS)], slot, n, k)
        self.flat = flat
        self.codes = flat.a[: flat.m].view(N_GROUPS, slot, k)
        stride = aligned_scale_stride(slot)
        self.scales = torch.full((N_GROUPS, flat.blocks, stride), NAN)
        for group, count in enumerate(self.counts):
            self.codes[group, count:] = torch.tensor(NAN).to(torch.float8_e4m3fn)
            rows = slice(group * slot, group * slot + count)
            self.scales[group, :, :count] = flat.a_scales[rows].T

    def run(self, work: Work, trial: Trial = FIRST) -> torch.Tensor:
        """The kernel's result; fails if it wrote outside, NaN where it wrote nothing."""
        guard, size = 64, N_GROUPS * self.slot * self.n
        memory = torch.full((size + 2 * guard,), NAN).to(torch_dtype(work.form.out))
        out = memory[guard : guard + size].view(N_GROUPS, self.slot, self.n)
        a, b = (self.codes, self.scales), (self.flat.b, self.flat.b_scales)
        cuda_machine.multiply(work, a, b, out, self.given, trial)
        assert memory[:guard].isnan().all()
        assert memory[guard + size :].isnan().all()
        return out

    def is_right(self, out: torch.Tensor) -> bool:
        expected = self.flat.expected.to(out.dtype).view(out.shape)
        return all(
            torch.equal(out[group, :count], expected[group, :count])
            and bool(out[group, count:].isnan().all())
            for group, count in enumerate(self.counts)
        )


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("form", MASKED_FORMS, ids=name_of)
def test_any_counts_give_the_float64_product_bit_for_bit(
    form: Form, counts: tuple[int, ...]
) -> None:
    """Rows of a slot that do not count stay NaN; slots end within a store's 16 rows."""
    n, k = -(-136 // form.dealt) * form.dealt, 128 * (form.stages // 2) + 16
    for slot, processors in ((300, 2), (331, 3)):
        problem = Slots(counts, slot, n, k)
        work = make_masked_work(form, (N_GROUPS, slot), (n, k), processors)
        assert problem.is_right(problem.run(work, Trial(slot)))


# A piece of the kernel, what takes its place, and what is noticed.
MASKED_BROKEN = {
    "stores reach the next slot": (
        "tma_store_in_slot(out, source, place.column, place.row, place.slot);",
        "tma_store(out, source, place.column, place.slot * 331 + place.row);",
        "stores a box with nothing|wrong",
    ),
    "the table is read before it is written": (
        "    sync_block();\n    return uniform",
        "    return uniform",
        "wrong|what TMA|nothing can go on|outside|slot|negative|ends",
    ),
    "a consumer without rows keeps its slots": (
        "        give_back(ring);\n        ring.advance();\n",
        "        ring.advance();\n",
        "nothing can go on",
    ),
    "a consumer without rows does not wait": (
        "        barrier_wait(ring.full(), ring.parity);\n        give_back",
        "        give_back",
        "fills a slot|more arrivals|nothing can go on",
    ),
    "counts are not kept within the slot": (
        "return count < 0 ? 0 : smaller(count, problem.m);",
        "return count;",
        "wrong|nothing in it|negative",
    ),
}


@machine
@pytest.mark.parametrize("name", MASKED_BROKEN)
def test_the_machine_notices_a_broken_masked_kernel(name: str) -> None:
    piece, instead, words = MASKED_BROKEN[name]
    problem = Slots((331, 330, 17, 1000, -5), 331, 136, 896)
    work = make_masked_work(masked(128, 96, BF16), (N_GROUPS, 331), (136, 896), 2)
    found = []
    for seed in range(10):
        try:
            out = problem.run(work, Trial(seed, (piece, instead)))
        except EmulationError as error:
            found.append(str(error))
        else:
            found.append("" if problem.is_right(out) else "wrong")
        if found[-1]:
            break
    assert re.search(words, found[-1] or "right")


# A piece of the kernel, what takes its place, and what is noticed.
BROKEN = {
    "both consumers take their own rows where the group changes": (
        WIDE,
        "return {part * PART_ROWS + consumer * WAVE_ROWS, 1};",
        "return {consumer * OWN_ROWS, WAVES};",
        "wrong",
    ),
    "rows of the other consumer are written": (
        WIDE,
        "next.end = smaller(next.end, next.row + rows.waves * WAVE_ROWS);",
        ";",
        "wrong",
    ),
    "the second half of a tile is left out": (
        WIDE,
        "if (PARTS == 2 && part == 0 && !is_whole) {",
        "if (false) {",
        "wrong",
    ),
    "every group takes the first one's weight": (
        LOW,
        "b_row(place.group * problem.n + place.column),",
        "b_row(place.column),",
        "wrong",
    ),
    "every group takes the first one's scales": (
        LOW,
        "problem.b_scales + place.group * (last_row + 1) * problem.b_scale_stride;",
        "problem.b_scales;",
        "wrong",
    ),
    "two tiles of different groups share a weight": (
        PAIR,
        "is_common = own == other || own < 0 || other < 0;",
        "is_common = true;",
        "wrong|nothing can go on|while",
    ),
    "a block without rows does not copy for the other": (
        PAIR,
        "is_common = own == other || own < 0 || other < 0;",
        "is_common = own == other || own < 0;",
        "fills a slot|nothing can go on",
    ),
    "groups are read too early": (
        LOW,
        "    wait_for_kernel_ahead();\n    if (GROUPING == Grouping::CONTIGUOUS)",
        "    if (GROUPING == Grouping::CONTIGUOUS)",
        "before the kernel ahead has ended",
    ),
    "row blocks of nobody are computed": (
        LOW,
        "const int first = group_of(row);",
        "const int first = group_of(row) < 0 ? 0 : group_of(row);",
        "wrong",
    ),
}
IN_THE_DEFAULT_RUN = ("both consumers take",)


@pytest.mark.parametrize(
    "change",
    [(piece, instead) for *_, piece, instead, _ in [*BROKEN.values(), *MASKED_BROKEN.values()]],
    ids=[*BROKEN, *MASKED_BROKEN],
)
def test_the_kernel_still_has_what_is_broken(change: tuple[str, str]) -> None:
    assert cuda_machine.sources(change) != cuda_machine.sources()


@pytest.mark.parametrize(
    "name",
    [
        name if name.startswith(IN_THE_DEFAULT_RUN) else pytest.param(name, marks=machine)
        for name in BROKEN
    ],
)
def test_the_machine_notices_a_broken_kernel(name: str) -> None:
    form, piece, instead, words = BROKEN[name]
    n, k = shape_for(form)
    problem = Problem((0, 0, 0, 1, 3, -1, 4), 128, n, k)
    work = make_work(form, problem.m, n, k, processors=2)
    found = (try_broken(problem, work, Trial(seed, (piece, instead))) for seed in range(10))
    assert re.search(words, next(filter(None, found), "right"))


def try_broken(problem: Problem, work: Work, trial: Trial) -> str:
    """What is noticed; empty if the result is right."""
    try:
        out = problem.run(work, trial)
    except EmulationError as error:
        return str(error)
    return "" if problem.is_right(out) else "wrong"


SHAPES = [(4096, 7168), (3072, 1536), (136, 80), (8, 16)]


@pytest.mark.parametrize("alignment", ALIGNMENTS)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_the_choice_covers_every_row_block(alignment: int, n: int, k: int) -> None:
    for groups, blocks in ((1, 1), (4, 3), (8, 256), (256, 400)):
        rows = groups, blocks, alignment
        for out in OUTPUTS:
            work = choose_contiguous(rows, (n, k), out, 132)
            form = work.form
            assert form.grouping is Grouping.CONTIGUOUS
            assert form.share is not Share.WEIGHT or form.rows == alignment
            # No tile meets more than two row blocks, and those of 256 rows have blocks of 128.
            assert form.rows <= 2 * alignment
            assert form.rows == min(form.rows, 128) or alignment == 128
            assert (work.unit_rows - 1) * unit_height(form) < blocks * alignment
            assert work.unit_rows * unit_height(form) >= blocks * alignment
            assert form.shared_bytes <= SHARED_BYTES


def test_many_groups_of_few_rows_take_tiles_of_one_row_block() -> None:
    few = choose_contiguous((256, 320, 128), (3072, 3072), BF16, 132)
    many = choose_contiguous((4, 256, 128), (4096, 7168), BF16, 132)
    assert (few.form.rows, many.form.rows) == (128, 256)


def test_few_rows_of_a_slot_take_tiles_of_one_wave_and_many_tall_ones() -> None:
    few = choose_masked((32, 4096, 20), (4096, 7168), BF16, 132)
    some = choose_masked((32, 4096, 192), (4096, 7168), BF16, 132)
    assert (few.form.rows, some.form.rows) == (64, 256)
    for work in (few, some):
        assert work.form.grouping is Grouping.MASKED
        assert work.unit_rows * unit_height(work.form) >= 32 * 4096
        assert work.form.shared_bytes <= SHARED_BYTES
