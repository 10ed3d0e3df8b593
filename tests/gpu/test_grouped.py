"""Grouped products on a GPU: bit for bit where no tolerance is needed.

Small whole numbers with powers of two as scales: each kernel and tile must give the float64
product, rounded once, for any counts. What no row counts in is NaN, before and after.
"""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import TYPE_CHECKING

import pytest
import torch

pytest.importorskip("triton", reason="the Gluon kernels need Triton 3.6")

from blockscale.backends.registry import runnable_backend_named
from blockscale.formats import FP8_1X128_FP32, FP8_128X128_FP32, K_MAJOR, MN_MAJOR_TMA_ALIGNED
from blockscale.kernels.gluon.build import Form, compile_ahead
from blockscale.kernels.gluon.grouped_product import GroupedProduct
from blockscale.kernels.gluon.grouped_work import grouped_small_variant, grouped_variant
from blockscale.kernels.gluon.product import GluonProduct
from blockscale.kernels.triton.grouped_product import GroupedTritonProduct
from blockscale.planning.decision import Offer, OperandForm
from blockscale.reference import expert_of
from blockscale.tensor import BlockScaledTensor
from blockscale.testing.exact_groups import NAN, Contiguous, Masked, Weights, nan_scales

if TYPE_CHECKING:
    from blockscale.kernels.gluon.grouped_work import AnyGroupedVariant

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
        reason="the Gluon kernels run on SM90 (H100, H200)",
    ),
]

OFFER = Offer(
    "gluon",
    OperandForm(FP8_128X128_FP32, K_MAJOR),
    OperandForm(FP8_1X128_FP32, MN_MAJOR_TMA_ALIGNED),
)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# Each is compiled, some seconds each: every tile in bfloat16, some in the others.
MASKED = (
    (BF16, grouped_variant(256, 128, 2, 8)),
    (BF16, grouped_variant(128, 128, 2, 8)),
    (BF16, grouped_small_variant(64, 8, 2, 8)),
    (BF16, grouped_small_variant(64, 16, 2, 8)),
    (BF16, grouped_small_variant(64, 64, 2, 8)),
    (BF16, grouped_small_variant(128, 16, 2, 8)),
    (BF16, grouped_small_variant(128, 32, 2, 8)),
    (FP16, grouped_variant(256, 128, 2, 8)),
    (FP16, grouped_small_variant(64, 32, 2, 8)),
    (FP32, grouped_variant(256, 128, 4, 8)),
    (FP32, grouped_small_variant(64, 16, 4, 8)),
)
CONTIGUOUS = (
    (BF16, grouped_variant(256, 128, 2)),
    (BF16, grouped_variant(128, 128, 2)),
    (FP16, grouped_variant(256, 128, 2)),
    (FP32, grouped_variant(128, 128, 4)),
)
FEW = (
    (BF16, grouped_small_variant(64, 8, 2)),
    (FP16, grouped_small_variant(64, 16, 2)),
    (BF16, grouped_small_variant(128, 64, 2)),
)


# What the tests below let the rules choose, beside these.
CHOSEN = (
    Form(grouped_small_variant(64, 16, 2, 256), BF16, overlap=True),
    Form(grouped_variant(256, 128, 2, 256), BF16, overlap=True),
    Form(grouped_variant(128, 128, 2, 256), FP16, overlap=True),
    Form(grouped_variant(128, 128, 2), FP16, overlap=True),
)


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    """Everything at once, by several processes: Triton keeps it on disk. Saves two minutes."""
    forms = [Form(variant, dtype, overlap=True) for dtype, variant in (*MASKED, *CONTIGUOUS, *FEW)]
    workers = min(12, os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        list(pool.map(compile_ahead, [*forms, *CHOSEN]))


# Each wave's end and just beyond it, empty ones anywhere, one hot expert, nothing at all.
COUNTS = (
    (0, 1, 64, 65, 0, 128, 129, 0),
    (192, 193, 256, 257, 300, 0, 7, 16),
    (0, 0, 0, 0, 0, 300, 0, 0),
    (0,) * 8,
)


@pytest.mark.parametrize(("dtype", "variant"), MASKED, ids=lambda x: getattr(x, "name", str(x)))
def test_masked_is_exact_whatever_the_counts(
    dtype: torch.dtype, variant: AnyGroupedVariant
) -> None:
    for n, k in ((456, 1152), (128, 80)):
        weights = Weights(8, n, k, GroupedProduct)
        for counts in COUNTS:
            for slot_rows in (300, 331):
                case = Masked(weights, counts, slot_rows)
                wrong = case.wrong(case.run(variant, dtype))
                assert not wrong, (n, k, counts, slot_rows, wrong)


@pytest.mark.parametrize(("dtype", "variant"), CONTIGUOUS, ids=lambda x: getattr(x, "name", str(x)))
def test_contiguous_is_exact_whatever_the_groups(
    dtype: torch.dtype, variant: AnyGroupedVariant
) -> None:
    for n, k in ((456, 1152), (128, 80)):
        weights = Weights(8, n, k, GroupedProduct)
        for counts in (*COUNTS, (1000, 0, 129, 2000, 1, 0, 0, 513)):
            case = Contiguous(weights, counts, 128)
            wrong = case.wrong(case.run(variant, dtype))
            assert not wrong, (n, k, counts, wrong)


@pytest.mark.parametrize(("dtype", "variant"), FEW, ids=lambda x: getattr(x, "name", str(x)))
def test_contiguous_rows_in_small_blocks_are_exact(
    dtype: torch.dtype, variant: AnyGroupedVariant
) -> None:
    weights = Weights(8, 456, 1152, GroupedProduct)
    alignment = getattr(variant, "tokens")  # noqa: B009 - only the kernel for few rows is here
    for counts in (*COUNTS, (1, 2, 3, 0, 0, 9, 17, 1200)):
        case = Contiguous(weights, counts, alignment)
        wrong = case.wrong(case.run(variant, dtype))
        assert not wrong, (counts, wrong)


def test_all_tiles_give_the_bits_of_the_dense_kernel() -> None:
    weights = Weights(8, 456, 1152, GroupedProduct)
    values = torch.randn(weights.tensor.data.shape, device="cuda")
    weights.tensor.data.copy_(values.to(torch.float8_e4m3fn))
    counts = (200, 0, 0, 64, 0, 0, 0, 3)
    masked, rows = Masked(weights, counts, 256), Contiguous(weights, counts, 128)
    for case in (masked, rows):
        codes = torch.randn(case.activation.data.shape, device="cuda")
        case.activation.data.copy_(codes.to(torch.float8_e4m3fn))
        case.activation.scales.uniform_(0.5, 2.0)
    for group, part in rows.parts:
        masked.activation.data[group, : counts[group]] = rows.activation.data[part]
        masked.activation.scales[group, : counts[group]] = rows.activation.scales[part]
    found = rows.run(grouped_variant(256, 128, 2), BF16)
    assert torch.equal(
        found[: rows.used], rows.run(grouped_variant(128, 128, 2), BF16)[: rows.used]
    )
    slots = [
        masked.run(variant, BF16)
        for dtype, variant in MASKED
        if dtype is BF16 and "few" not in variant.name
    ]
    slots.append(masked.run(grouped_small_variant(64, 64, 2, 8), BF16))
    for group, part in rows.parts:
        for slot in slots:
            assert torch.equal(found[part], slot[group, : counts[group]])
    alone = torch.empty((200, 456), dtype=BF16, device="cuda")
    codes, scales = rows.activation.data[:200], nan_scales(200, weights.k)
    scales.copy_(rows.activation.scales[:200])
    first = BlockScaledTensor(codes, scales, FP8_1X128_FP32, MN_MAJOR_TMA_ALIGNED)
    dense = GluonProduct(expert_of(weights.tensor, 0))
    dense.use(_unsplit(200, 456, weights.k), 200, BF16)
    dense(first, alone, None)
    assert torch.equal(found[:200], alone)


def test_a_captured_graph_serves_every_routing_of_as_many_rows() -> None:
    """The graph reads counts and groups when it runs: nothing of them was kept."""
    weights = Weights(8, 456, 1152, GroupedProduct)
    masked = Masked(weights, (300,) * 8, 300)
    rows = Contiguous(weights, (300, 0, 0, 0, 0, 0, 0, 900), 128)
    outs = [masked.run(None, BF16), rows.run(None, BF16)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        weights.product.masked(masked.activation, masked.device_counts, outs[0], 300)
        weights.product.contiguous(rows.activation, rows.groups, outs[1])
    for counts in ((0, 300, 1, 0, 0, 17, 0, 129), (0,) * 8, (300,) * 8):
        masked.counts = counts
        masked.device_counts.copy_(torch.tensor(counts))
        for out in outs:
            out.fill_(NAN)
        graph.replay()
        assert not masked.wrong(outs[0])
        assert not rows.wrong(outs[1])
    rows.groups[3:10] = torch.tensor([2, 2, 3, 5, 5, 5, 6], device="cuda")
    graph.replay()
    expected = Contiguous(weights, (300, 0, 200, 100, 0, 384, 128, 128), 128)
    expected.activation.data[: rows.used] = rows.activation.data[: rows.used]
    expected.activation.scales[: rows.used] = rows.activation.scales[: rows.used]
    again = expected.run(None, BF16)
    real = slice(0, 300), slice(384, 384 + 900)
    assert all(torch.equal(outs[1][part], again[part]) for part in real)


def test_more_than_two_to_the_31_codes_and_results() -> None:
    """256 experts of MiniMax's size (2.4e9 codes), slots with 3.2e9 results."""
    weights = Weights(256, 3072, 3072, GroupedProduct)
    counts = [0] * 256
    counts[0], counts[131], counts[255] = 9, 300, 20
    case = Masked(weights, counts, 4096)
    for variant in (grouped_small_variant(64, 16, 2, 256), grouped_variant(256, 128, 2, 256)):
        out = torch.full((256, 4096, 3072), NAN, dtype=BF16, device="cuda")
        weights.product.use(variant)
        weights.product.masked(case.activation, case.device_counts, out, 16)
        for group in (0, 131, 255):
            operands = (
                x[group, : counts[group]] for x in (case.activation.data, case.activation.scales)
            )
            expected = weights.expected(group, *operands).to(BF16)
            assert torch.equal(out[group, : counts[group]], expected), (variant.name, group)
        assert out[130].isnan().all()
        assert out[254].isnan().all()
        del out


def test_what_the_rules_choose_is_exact_on_skewed_routing() -> None:
    """128 tokens to 8 of 256 experts, a few of them favourites, in both layouts."""
    weights = Weights(256, 384, 512, GroupedProduct)
    chances = torch.ones(256, device="cuda")
    chances[:4] = 200.0
    picks = torch.multinomial(chances.expand(128, -1), 8, generator=weights.generator)
    counts = torch.bincount(picks.flatten(), minlength=256).tolist()
    masked = Masked(weights, counts, 128)
    assert not masked.wrong(masked.run(None, FP16))
    for alignment in (16, 128):
        rows = Contiguous(weights, counts, alignment)
        assert not rows.wrong(rows.run(None, FP16)), alignment


@pytest.mark.parametrize("name", ["gluon", "cuda", "triton", "deep_gemm"])
def test_each_backend_serves_both_arrangements(name: str) -> None:
    if name == "deep_gemm":
        pytest.importorskip("deep_gemm", reason="pip install sgl-deep-gemm==0.1.5")
    backend = runnable_backend_named(name)
    weights = Weights(8, 448, 1152, GroupedProduct)
    counts = (0, 1, 64, 65, 0, 128, 384, 0)
    rows, slots = Contiguous(weights, counts, 128), Masked(weights, counts, 384)
    contiguous = backend.bind_contiguous(weights.tensor, OFFER)
    masked = backend.bind_masked(weights.tensor, OFFER)
    out = torch.full((rows.activation.mn, weights.n), NAN, dtype=BF16, device="cuda")
    contiguous(rows.activation, rows.groups, out)
    # The rows of nobody may hold anything (backends/base.py); DeepGEMM writes zeros there.
    assert not [g for g in rows.wrong(out) if g >= 0 or name != "deep_gemm"]
    out = torch.full((8, 384, weights.n), NAN, dtype=BF16, device="cuda")
    for expected_rows in (8, 200):
        out.fill_(NAN)
        masked(slots.activation, slots.device_counts, out, expected_rows)
        assert not slots.wrong(out)


@pytest.mark.parametrize("alignment", [16, 64, 128])
def test_plain_triton_is_exact_in_every_row_block(alignment: int) -> None:
    weights = Weights(8, 200, 592, GroupedProduct)
    product = GroupedTritonProduct(weights.tensor)
    for counts in (*COUNTS, (1000, 0, 129, 2000, 1, 0, 0, 513)):
        case = Contiguous(weights, counts, alignment)
        out = torch.full((case.activation.mn, weights.n), NAN, dtype=FP16, device="cuda")
        product.contiguous(case.activation, case.groups, out)
        assert not case.wrong(out), counts


def _unsplit(m: int, n: int, k: int) -> object:
    from blockscale.kernels.gluon.work import dense_variant, dense_work

    return dense_work(dense_variant(128, 128, 2), m, n, k, 132)
