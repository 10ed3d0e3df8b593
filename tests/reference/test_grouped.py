"""Products with stacks of experts: exact on integers, and rows that do not count show as NaN."""

from __future__ import annotations

import pytest
import torch

from blockscale.backends.reference import Reference
from blockscale.errors import FormatError
from blockscale.formats import FP8_1X128_FP32, FP8_128X128_FP32, K_MAJOR, BlockFormat, DType
from blockscale.planning.decision import Offer
from blockscale.planning.device import Device
from blockscale.planning.request import LinearRequest
from blockscale.reference import contiguous_matmul, dequantize, expert_of, masked_matmul
from blockscale.tensor import BlockScaledTensor

EXPERTS, N, K = 5, 192, 256


def integers(shape: tuple[int, ...], fmt: BlockFormat, seed: int) -> BlockScaledTensor:
    generator = torch.Generator().manual_seed(seed)
    data = torch.randint(-4, 5, shape, generator=generator).to(torch.float8_e4m3fn)
    grid = (*shape[:-2], *fmt.block.grid(*shape[-2:]))
    scales = 2.0 ** torch.randint(-3, 4, grid, generator=generator)
    return BlockScaledTensor(data, scales, fmt, K_MAJOR)


@pytest.fixture
def weight() -> BlockScaledTensor:
    return integers((EXPERTS, N, K), FP8_128X128_FP32, 1)


@pytest.mark.parametrize("alignment", [1, 8, 128])
@pytest.mark.parametrize(
    "groups",
    [[0, 1, 2, 3, 4], [1, 1, 4, -1], [-1, -1], [2], [0, 0, 0, 0, 0, 0], []],
    ids=["one each", "some empty", "all empty", "only one", "one hot", "no rows"],
)
@pytest.mark.parametrize("accumulate", [torch.float32, torch.float64])
def test_contiguous_rows_are_exact(
    weight: BlockScaledTensor, alignment: int, groups: list[int], accumulate: torch.dtype
) -> None:
    rows = alignment * len(groups)
    activation = integers((rows, K), FP8_1X128_FP32, 2)
    which = torch.tensor(groups, dtype=torch.int32)
    out = contiguous_matmul(activation, weight, which, accumulate)
    assert out.shape == (rows, N)
    assert out.dtype is accumulate
    wide = dequantize(weight).double()
    for block, expert in enumerate(groups):
        here = slice(block * alignment, (block + 1) * alignment)
        if expert < 0:
            assert out[here].isnan().all()
        else:
            expected = dequantize(activation)[here].double() @ wide[expert].T
            assert torch.equal(out[here].double(), expected)


@pytest.mark.parametrize(
    "counts",
    [[1, 2, 3, 4, 5], [0, 0, 8, 0, 0], [0] * 5, [8] * 5],
    ids=["ragged", "one hot", "all empty", "full"],
)
def test_masked_rows_are_exact(weight: BlockScaledTensor, counts: list[int]) -> None:
    activation = integers((EXPERTS, 8, K), FP8_1X128_FP32, 3)
    out = masked_matmul(activation, weight, torch.tensor(counts, dtype=torch.int32))
    exact = dequantize(activation).double() @ dequantize(weight).double().transpose(1, 2)
    for expert, count in enumerate(counts):
        assert torch.equal(out[expert, :count].double(), exact[expert, :count])
        assert out[expert, count:].isnan().all()


def test_padding_rows_may_hold_nan(weight: BlockScaledTensor) -> None:
    activation = integers((4, K), FP8_1X128_FP32, 4)
    groups = torch.tensor([3, 4], dtype=torch.int32)
    before = contiguous_matmul(activation, weight, groups)
    activation.data.view(torch.uint8)[1] = 0x7F
    activation.scales[1] = torch.nan
    after = contiguous_matmul(activation, weight, groups)
    assert torch.equal(after[[0, 2, 3]], before[[0, 2, 3]])


def test_one_expert_of_a_stack_shares_its_memory(weight: BlockScaledTensor) -> None:
    one = expert_of(weight, 3)
    assert (one.mn, one.k, one.leading) == (N, K, ())
    assert one.data.data_ptr() == weight.data[3].data_ptr()
    assert torch.equal(dequantize(one), dequantize(weight)[3])


@pytest.mark.parametrize(
    ("rows", "groups", "words"),
    [(5, [0, 1], "5 rows cannot be 2"), (4, [0, 5], "expert 5"), (4, [], "4 rows")],
)
def test_rows_that_fit_no_expert_are_refused(
    weight: BlockScaledTensor, rows: int, groups: list[int], words: str
) -> None:
    activation = integers((rows, K), FP8_1X128_FP32, 5)
    with pytest.raises(FormatError, match=words):
        contiguous_matmul(activation, weight, torch.tensor(groups, dtype=torch.int32))


@pytest.mark.parametrize("counts", [[9, 0, 0, 0, 0], [-1, 0, 0, 0, 0]], ids=str)
def test_counts_outside_the_slot_are_refused(weight: BlockScaledTensor, counts: list[int]) -> None:
    activation = integers((EXPERTS, 8, K), FP8_1X128_FP32, 5)
    with pytest.raises(FormatError, match="slots of 8"):
        masked_matmul(activation, weight, torch.tensor(counts, dtype=torch.int32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_backend_writes_both_arrangements(
    weight: BlockScaledTensor, dtype: torch.dtype
) -> None:
    request = LinearRequest(
        "w13", N, K, FP8_128X128_FP32, DType.FLOAT32, DType.FLOAT32, experts=EXPERTS
    )
    backend = Reference()
    offer = backend.evaluate(request, Device.named("cpu"))
    assert isinstance(offer, Offer)
    counts = torch.full((EXPERTS,), 8, dtype=torch.int32)
    groups = torch.arange(EXPERTS, dtype=torch.int32)
    slots = integers((EXPERTS, 8, K), FP8_1X128_FP32, 6)
    flat = BlockScaledTensor(
        slots.data.flatten(0, 1), slots.scales.flatten(0, 1), slots.format, K_MAJOR
    )
    exact = dequantize(slots).double() @ dequantize(weight).double().transpose(1, 2)
    masked = torch.full((EXPERTS, 8, N), torch.nan, dtype=dtype)
    backend.bind_masked(weight, offer)(slots, counts, masked, 8)
    assert torch.equal(masked, exact.to(dtype))
    contiguous = torch.full((EXPERTS * 8, N), torch.nan, dtype=dtype)
    backend.bind_contiguous(weight, offer)(flat, groups, contiguous)
    assert torch.equal(contiguous, exact.flatten(0, 1).to(dtype))
