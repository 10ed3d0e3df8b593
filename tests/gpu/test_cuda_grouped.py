"""gemm.cu's grouped forms on a GPU: bit for bit, whatever the routing.

Few forms, for a first run on a GPU takes little: every form passes on the pretend Hopper
(``tests/kernels_cuda/test_cuda_grouped.py``).
"""

from __future__ import annotations

from dataclasses import replace
from itertools import starmap
from typing import TYPE_CHECKING

import pytest
import torch

from blockscale.formats import DType
from blockscale.kernels.cuda.grouped_choice import contiguous_works, masked_works
from blockscale.kernels.cuda.grouped_product import CudaGroupedProduct
from blockscale.kernels.cuda.work import Share
from blockscale.testing.exact_groups import NAN, Contiguous, Masked, Weights

if TYPE_CHECKING:
    from blockscale.kernels.cuda.work import Work

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
        reason="gemm.cu runs on SM90 (H100, H200)",
    ),
]

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = {BF16: DType.BFLOAT16, FP16: DType.FLOAT16, FP32: DType.FLOAT32}
# Rows and columns of a tile, what a cluster shares, the output.
FORMS = (
    (256, 128, Share.NOTHING, BF16),
    (256, 112, Share.ACTIVATION, FP32),
    (128, 192, Share.ACTIVATION, FP16),
    (128, 96, Share.NOTHING, BF16),
    (128, 192, Share.WEIGHT, FP16),
)
# Ends of waves and just beyond, empty ones anywhere, one hot expert, nothing at all.
COUNTS = (
    (0, 1, 64, 65, 0, 128, 129, 0),
    (1000, 0, 129, 2000, 1, 0, 0, 513),
    (0, 0, 0, 0, 0, 300, 0, 0),
    (0,) * 8,
)


def work_of(case: Contiguous, form: tuple[int, int, Share, torch.dtype], processors: int) -> Work:
    """This form, for a case."""
    rows, columns, share, dtype = form
    blocks = case.groups.numel()
    given = (case.weights.groups, blocks, case.activation.mn // blocks)
    shape = (case.weights.n, case.weights.k)
    return next(
        work
        for work in contiguous_works(given, shape, DTYPES[dtype], processors)
        if (work.form.rows, work.form.columns, work.form.share) == (rows, columns, share)
    )


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_contiguous_is_exact_whatever_the_groups(
    form: tuple[int, int, Share, torch.dtype],
) -> None:
    for n, k in ((456, 1152), (392, 80)):
        weights = Weights(8, n, k, CudaGroupedProduct)
        for counts in COUNTS:
            case = Contiguous(weights, counts, 128)
            # As many as there are, and so few that each computes several tiles.
            for processors in (132, 6):
                wrong = case.wrong(case.run(work_of(case, form, processors), form[3]))
                assert not wrong, (n, k, counts, processors, wrong)


# Each wave's end and just beyond it, empty ones anywhere, one hot expert, nothing at all.
SLOT_COUNTS = (
    (0, 1, 64, 65, 0, 128, 129, 0),
    (192, 193, 256, 257, 300, 0, 7, 16),
    (0, 0, 0, 0, 0, 300, 0, 0),
    (0,) * 8,
)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_masked_is_exact_whatever_the_counts(form: tuple[int, int, Share, torch.dtype]) -> None:
    rows, columns, share, dtype = form
    for n, k in ((456, 1152), (392, 80)):
        weights = Weights(8, n, k, CudaGroupedProduct)
        for counts in SLOT_COUNTS:
            for slot_rows, processors in ((300, 132), (331, 6)):
                case = Masked(weights, counts, slot_rows)
                works = masked_works((8, slot_rows, 99), (n, k), DTYPES[dtype], processors)
                work = next(
                    one
                    for one in works
                    if (one.form.rows, one.form.columns, one.form.share) == (rows, columns, share)
                )
                wrong = case.wrong(case.run(work, dtype))
                assert not wrong, (n, k, counts, slot_rows, wrong)


def test_the_choice_for_slots_is_exact() -> None:
    weights = Weights(8, 456, 1152, CudaGroupedProduct)
    for counts in SLOT_COUNTS:
        for dtype in DTYPES:
            case = Masked(weights, counts, 300)
            assert not case.wrong(case.run(None, dtype))


@pytest.mark.parametrize("alignment", [64, 128])
def test_the_choice_is_exact(alignment: int) -> None:
    weights = Weights(8, 456, 1152, CudaGroupedProduct)
    for counts in COUNTS:
        case = Contiguous(weights, counts, alignment)
        for dtype in DTYPES:
            wrong = case.wrong(case.run(None, dtype))
            assert not wrong, (counts, dtype, wrong)


def test_every_tile_gives_the_same_bits() -> None:
    weights = Weights(8, 456, 1152, CudaGroupedProduct)
    values = torch.randn(weights.tensor.data.shape, device="cuda")
    weights.tensor.data.copy_(values.to(torch.float8_e4m3fn))
    case = Contiguous(weights, (200, 0, 0, 64, 0, 0, 0, 3), 128)
    codes = torch.randn(case.activation.data.shape, device="cuda")
    case.activation.data.copy_(codes.to(torch.float8_e4m3fn))
    case.activation.scales.uniform_(0.5, 2.0)
    works = starmap(work_of, ((case, (*form[:3], FP32), 132) for form in FORMS))
    first, *others = [case.run(work, FP32)[: case.used] for work in works]
    assert all(torch.equal(first, other) for other in others)


def test_a_captured_graph_serves_every_routing_of_as_many_rows() -> None:
    weights = Weights(8, 456, 1152, CudaGroupedProduct)
    case = Contiguous(weights, (300, 0, 0, 0, 0, 0, 0, 900), 128)
    masked = Masked(weights, (300,) * 8, 300)
    out, slots = case.run(None, BF16), masked.run(None, BF16)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        weights.product.contiguous(case.activation, case.groups, out)
        weights.product.masked(masked.activation, masked.device_counts, slots, 300)
    for counts in ((0, 300, 1, 0, 0, 17, 0, 129), (0,) * 8):
        masked.counts = counts
        masked.device_counts.copy_(torch.tensor(counts))
        slots.fill_(NAN)
        graph.replay()
        assert not masked.wrong(slots)
    out.fill_(NAN)
    graph.replay()
    assert not case.wrong(out)
    # The last rows of the first and of the hot expert, 812 of them, go to five others.
    case.groups[3:10] = torch.tensor([2, 2, 3, 5, 5, 5, 6], device="cuda")
    graph.replay()
    expected = torch.full_like(out, NAN)
    weights.product.contiguous(case.activation, case.groups, expected)
    parts = [(0, 0, 300), (2, 384, 640), (3, 640, 768), (5, 768, 1152), (6, 1152, 1280)]
    for group, start, end in parts:
        rows = slice(start, end)
        codes, scales = case.activation.data[rows], case.activation.scales[rows]
        wanted = weights.expected(group, codes, scales).to(BF16)
        assert torch.equal(out[rows], wanted)
        assert torch.equal(expected[rows], wanted)


def test_more_than_two_to_the_31_codes() -> None:
    """256 experts of MiniMax's size (2.4e9 codes), by the choice and by the widest tile."""
    weights = Weights(256, 3072, 3072, CudaGroupedProduct)
    counts = [0] * 256
    counts[0], counts[131], counts[255] = 9, 300, 20
    case = Contiguous(weights, counts, 128)
    for work in (None, replace(work_of(case, FORMS[0], 132), band=3)):
        assert not case.wrong(case.run(work, BF16))
