"""Which products the sanitizer watches: one for each way through the kernels, not for each tile.

See ``cuda_kind`` and ``gluon_kind``. N, K and M are ragged. K has a block or two more than the ring
has slots, or a block several tiles, so every ring goes round. Launches are for ``TWELVE``
multiprocessors, so that a kernel's blocks take several tiles; for other numbers where a form is for
no such launch. Forms are those that the choices may give: results written at once and late, one
wave and two in flight.

``Scope.RACES`` are fewer: any two traits of a kind that some case has together, one of these has.
"""

from __future__ import annotations

import importlib.util
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from itertools import combinations, product
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Iterator

    from blockscale.kernels.cuda.work import Form as CudaForm
    from blockscale.kernels.cuda.work import Work as CudaWork
    from blockscale.kernels.gluon.build import Form as GluonForm
    from blockscale.kernels.gluon.grouped_work import AnyGroupedVariant
    from blockscale.kernels.gluon.work import Work as GluonWork

N = 416
TOKENS = (1, 40, 129, 300, 600)
# K blocks: the fewest with which a ring goes round, however many slots it has; where K is split,
# in each piece.
BLOCKS = (5, 6, 7, 9, 11, 14, 18)
# So few that gemm.cu writes some tiles in another way; then a block has several.
VERY_FEW = 4
FEW, TWELVE = 3, 12
# Tried in this order, until there is a case of each kind.
PROCESSORS = (TWELVE, FEW, 132, 1, 2)
# Of groups: rows of each, and of a slot. Row blocks have one of the heights below.
COUNTS, SLOT_ROWS = (0, 65, 190, 1), 200
ALIGNMENTS = (64, 128)
# Rows of a slot that are said to be likely: few and many to a tile.
LIKELY = (40, 150)
# With it all lanes give slots of gemm.cu back, where one does it for its warp: see racecheck.py.
ALL_LANES = "-DARRIVING_LANES=32"
# And the lines of what races.
OPTIONS_FOR_RACES = (ALL_LANES, "--generate-line-info")

Work = TypeVar("Work")
Case = TypeVar("Case")


class Scope(Enum):
    """What is run: each way through the kernels, or what is enough to find races."""

    EVERY_WAY = "every-way"
    RACES = "races"


@dataclass(frozen=True, slots=True)
class Grouped:
    """A product over groups: in slots if ``alignment`` is 0, else in row blocks of so many rows."""

    work: Any
    alignment: int
    k_blocks: int

    @property
    def name(self) -> str:
        """The form's."""
        return str(self.work.name)


def k_of(blocks: int) -> int:
    """Ragged: the last block has 16."""
    return 128 * (blocks - 1) + 16


def build_for(scope: Scope) -> None:
    """From now on, compile ``gemm.cu`` as the scope wants it."""
    from blockscale.kernels.cuda import build

    own = OPTIONS_FOR_RACES if scope is Scope.RACES else ()
    usual = (option for option in build.OPTIONS if option not in OPTIONS_FOR_RACES)
    build.OPTIONS = (*usual, *own)


def gluon_works(scope: Scope = Scope.EVERY_WAY) -> list[tuple[int, GluonWork]]:
    """(M, work) of each kind that the choice of the Gluon kernels may give."""
    from blockscale.kernels.gluon.choice import candidates

    found = [
        (m, work)
        for m in TOKENS
        for processors in PROCESSORS
        for blocks in BLOCKS
        for work in candidates(m, N, k_of(blocks), 2, processors)
        if work.piece_blocks > work.variant.stages
    ]
    works = one_of_each(found, gluon_kind, gluon_turns)
    return scoped(works, lambda case: gluon_kind(case[1]), scope)


def gluon_kind(work: GluonWork) -> tuple[Hashable, ...]:
    """What decides the way through the code."""
    from blockscale.kernels.gluon.work import DenseWork

    variant: Any = work.variant
    if isinstance(work, DenseWork):
        return "dense", variant.rows, variant.rest > 0, variant.split, variant.narrow
    # A box of scales is wider than a tile of few tokens.
    return "small", variant.weights, variant.tokens < 32, variant.split  # noqa: PLR2004 - a box's scales


def gluon_turns(work: GluonWork) -> float:
    """Items that a program takes."""
    from blockscale.kernels.gluon.work import DenseWork

    if isinstance(work, DenseWork):
        return (work.items + work.narrow_tiles) / work.programs
    return 1


def cuda_works(scope: Scope = Scope.EVERY_WAY) -> list[tuple[int, CudaWork]]:
    """(M, work) of each kind that the choice of ``gemm.cu`` may give, as it would write them."""
    from blockscale.formats import DType
    from blockscale.kernels.cuda.choice import candidates
    from blockscale.kernels.cuda.writing import written

    found = [
        (m, work)
        for m in TOKENS
        for processors in PROCESSORS
        for blocks in (*BLOCKS, VERY_FEW)
        for out in (DType.BFLOAT16, DType.FLOAT32)
        for work in map(written, candidates(m, N, k_of(blocks), out, processors))
        if blocks * (work.turns if blocks == VERY_FEW else 1) > work.form.stages
    ]
    works = one_of_each(found, cuda_kind, cuda_turns)
    return scoped(works, lambda case: cuda_kind(case[1]), scope)


def cuda_kind(work: CudaWork) -> tuple[Hashable, ...]:
    """What decides the way through the code; a wide tile's width decides only how often."""
    form, stores = work.form, work.form.stores
    # Copied by a lane that walks alone (producer.cuh).
    is_narrow = form.columns <= 32  # noqa: PLR2004 - COPIES_ALONE
    return (
        *(form.rows, is_narrow, form.grouping, form.share, form.beside, form.flight),
        *(stores.when, stores.box_rows, work.early_blocks > 0),
        # What a lane writes at a time.
        (form.dealt, form.out.bytes) if stores.buffers == 0 else None,
    )


def cuda_turns(work: CudaWork) -> float:
    """Units that a block takes."""
    return work.turns


def grouped_gluon(scope: Scope = Scope.EVERY_WAY) -> list[Grouped]:
    """Each kind of the Gluon kernels for groups."""
    from blockscale.kernels.gluon.grouped_choice import contiguous_variants, masked_variants

    found = [
        (alignment, variant)
        for alignment in ALIGNMENTS
        for variant in contiguous_variants(alignment, 2)
    ]
    found += [(0, variant) for variant in masked_variants(len(COUNTS), 2)]

    def kind(variant: AnyGroupedVariant) -> tuple[Hashable, ...]:
        few: Any = variant
        height = few.weights if hasattr(few, "weights") else few.rows
        return type(variant), height, variant.groups

    works = one_of_each(found, kind, lambda _: 1)
    cases = [Grouped(work, alignment, blocks_for(work.stages)) for alignment, work in works]
    return scoped(cases, lambda case: kind(case.work), scope)


def grouped_cuda(scope: Scope = Scope.EVERY_WAY) -> list[Grouped]:
    """Each kind of ``gemm.cu`` for groups."""
    from blockscale.formats import DType
    from blockscale.kernels.cuda.grouped_choice import contiguous_works, masked_works

    dtype, found = DType.BFLOAT16, []
    for processors, k_blocks in product(PROCESSORS, BLOCKS):
        shape = N, k_of(k_blocks)
        for alignment in ALIGNMENTS:
            # Three more that belong to no group: as ``exact_groups`` has them.
            blocks = sum(-(-count // alignment) for count in COUNTS) + 3
            rows = (len(COUNTS), blocks, alignment)
            found += [
                (alignment, work) for work in contiguous_works(rows, shape, dtype, processors)
            ]
        for likely in LIKELY:
            rows = (len(COUNTS), SLOT_ROWS, likely)
            found += [(0, work) for work in masked_works(rows, shape, dtype, processors)]
    turning = [(alignment, work) for alignment, work in found if work.k_blocks > work.form.stages]
    works = one_of_each(turning, cuda_kind, cuda_turns)
    cases = [Grouped(work, alignment, work.k_blocks) for alignment, work in works]
    return scoped(cases, lambda case: cuda_kind(case.work), scope)


def blocks_for(stages: int) -> int:
    """K blocks with which a ring of so many slots goes round."""
    return next(blocks for blocks in BLOCKS if blocks > stages)


def one_of_each(
    found: Iterable[tuple[int, Work]],
    kind: Callable[[Work], Hashable],
    turns: Callable[[Work], float],
) -> list[tuple[int, Work]]:
    """The first of each kind, or the first with several turns."""
    kept: dict[Hashable, tuple[int, Work]] = {}
    for number, work in found:
        old = kept.get(kind(work))
        if old is None or (turns(work) > 1 >= turns(old[1])):
            kept[kind(work)] = number, work
    return list(kept.values())


def scoped(
    cases: list[Case], traits: Callable[[Case], tuple[Hashable, ...]], scope: Scope
) -> list[Case]:
    """All of them; for races those that have two traits together that none before has."""
    if scope is Scope.EVERY_WAY:
        return cases
    kept, seen = [], set()
    for case in cases:
        pairs = set(combinations(enumerate(traits(case)), 2))
        if pairs - seen:
            kept.append(case)
            seen |= pairs
    return kept


def forms_of(scope: Scope) -> Iterator[CudaForm | GluonForm]:
    """What the cases compile, as far as it can be compiled here."""
    if importlib.util.find_spec("triton"):
        yield from gluon_forms(scope)
    with suppress(ImportError):
        need_nvrtc()
        yield from (work.form for _, work in cuda_works(scope))
        yield from (case.work.form for case in grouped_cuda(scope))


def need_nvrtc() -> None:
    """Raises ImportError where ``gemm.cu`` cannot be compiled."""
    from blockscale.errors import BackendError
    from blockscale.kernels.cuda.build import nvrtc

    try:
        nvrtc()
    except BackendError as error:
        raise ImportError(str(error)) from error


def gluon_forms(scope: Scope) -> Iterator[GluonForm]:
    """What the Gluon cases compile."""
    import torch

    from blockscale.kernels.gluon.build import Form

    variants = [work.variant for _, work in gluon_works(scope)]
    variants += [case.work for case in grouped_gluon(scope)]
    return (Form(variant, torch.bfloat16, overlap=True) for variant in variants)
