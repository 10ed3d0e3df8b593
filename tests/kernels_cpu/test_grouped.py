"""Products of several experts: exact on integers, the same bits as one expert at a time."""

from __future__ import annotations

import pytest
import torch

from blockscale.formats import FP8_128X128_FP32, K_MAJOR
from blockscale.kernels.cpu.grouped import GroupedWeightOnlyProduct, Segment, segments
from blockscale.kernels.cpu.product import MAX_DIRECT_TOKENS, WeightOnlyProduct
from blockscale.reference import dequantize, quantize
from blockscale.tensor import BlockScaledTensor

EXPERTS, N, K = 5, 200, 300
MANY = MAX_DIRECT_TOKENS + 3
ROUTINGS = {
    "one row each": [1, 1, 1, 1, 1],
    "few and many": [0, 3, MANY, 0, 1],
    "one hot": [0, 0, 0, MANY, 0],
    "only the last": [0, 0, 0, 0, 2],
    "all empty": [0, 0, 0, 0, 0],
}


@pytest.fixture
def weight() -> BlockScaledTensor:
    generator = torch.Generator().manual_seed(1)
    data = torch.randint(-4, 5, (EXPERTS, N, K), generator=generator).to(torch.float8_e4m3fn)
    grid = FP8_128X128_FP32.block.grid(N, K)
    scales = 2.0 ** torch.randint(-2, 3, (EXPERTS, *grid), generator=generator)
    return BlockScaledTensor(data, scales, FP8_128X128_FP32, K_MAJOR)


def product(weight: BlockScaledTensor) -> GroupedWeightOnlyProduct:
    block = weight.format.block
    return GroupedWeightOnlyProduct(weight.data, weight.scales, (block.mn, block.k))


def groups_of(counts: list[int]) -> torch.Tensor:
    experts = torch.arange(EXPERTS, dtype=torch.int32)
    return experts.repeat_interleave(torch.tensor(counts))


@pytest.mark.parametrize("counts", ROUTINGS.values(), ids=ROUTINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("left_out", [0, 2])
def test_integers_are_exact(
    weight: BlockScaledTensor, counts: list[int], dtype: torch.dtype, left_out: int
) -> None:
    """Sums are exact in float32 and rounded once; rows of -1 are not written."""
    groups = groups_of(counts)
    generator = torch.Generator().manual_seed(2)
    activation = torch.zeros(len(groups) + left_out, K)
    one_of_sixteen = torch.randint(0, 16, activation.shape, generator=generator) == 0
    activation[one_of_sixteen] = 1.0
    activation[len(groups) :] = torch.nan
    which = torch.cat([groups, torch.full((left_out,), -1, dtype=torch.int32)])
    out = torch.full((len(which), N), -7.0, dtype=dtype)
    product(weight)(activation.to(dtype), which, out)
    exact = torch.einsum(
        "rk,rnk->rn", activation[: len(groups)].double(), dequantize(weight)[groups].double()
    )
    assert torch.equal(out[: len(groups)].double(), exact.to(dtype).double())
    assert (out[len(groups) :] == -7.0).all()


@pytest.mark.parametrize("alignment", [2, 8, 16])
def test_row_blocks_of_several_rows(weight: BlockScaledTensor, alignment: int) -> None:
    groups = torch.tensor([0, 2, 2, 4, -1], dtype=torch.int32)
    activation = torch.ones(5 * alignment, K)
    out = torch.full((5 * alignment, N), -7.0)
    product(weight)(activation, groups, out)
    expected = dequantize(weight).sum(2)
    for block, expert in enumerate(groups.tolist()):
        found = out[block * alignment : (block + 1) * alignment]
        assert (found == (-7.0 if expert < 0 else expected[expert])).all()


@pytest.mark.parametrize("m", [1, 4, MAX_DIRECT_TOKENS])
def test_the_same_bits_as_one_expert_at_a_time(m: int) -> None:
    weight = quantize(torch.randn(EXPERTS, N, K), FP8_128X128_FP32)
    activation = torch.randn(EXPERTS * m, K)
    out = torch.empty(EXPERTS * m, N)
    product(weight)(activation, groups_of([m] * EXPERTS), out)
    for expert in range(EXPERTS):
        here = slice(expert * m, (expert + 1) * m)
        alone = torch.empty(m, N)
        single = WeightOnlyProduct(weight.data[expert], weight.scales[expert], (128, 128))
        single(activation[here], alone, None)
        assert torch.equal(out[here], alone)


@pytest.mark.parametrize("rows_have_gaps", [False, True])
def test_weights_and_activations_may_be_views(
    weight: BlockScaledTensor, rows_have_gaps: bool
) -> None:
    data = torch.full((EXPERTS, N + 3, K + 20), 448.0).to(torch.float8_e4m3fn)
    view = data[:, :N, 20:] if rows_have_gaps else weight.data
    view.copy_(weight.data)
    wide = torch.full((3, K + 9), 1.0)
    groups = torch.tensor([0, 3, 3], dtype=torch.int32)
    out = torch.empty(3, N)
    GroupedWeightOnlyProduct(view, weight.scales, (128, 128))(wide[:, :K], groups, out)
    assert torch.equal(out, dequantize(weight)[groups].sum(2))


def test_bits_do_not_depend_on_the_number_of_threads() -> None:
    weight = quantize(torch.randn(EXPERTS, N, K), FP8_128X128_FP32)
    activation, groups = torch.randn(9, K), groups_of([1, 0, 4, 2, 2])
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            out = torch.empty(9, N)
            product(weight)(activation, groups, out)
            results.append(out)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


def test_segments_are_runs_of_one_expert() -> None:
    assert segments([0, 0, 3, -1, -1], 4) == [Segment(0, 0, 8), Segment(3, 8, 4)]
    assert segments([], 4) == []
