"""The kernels around the grouped products give the bits of ``expert_ops.TorchRows``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from blockscale.errors import BackendError
from blockscale.expert_ops import TorchRows
from blockscale.formats import (
    FP8_1X128_FP32,
    FP8_1X128_UE8M0,
    K_BY_MN,
    K_MAJOR,
    MN_MAJOR_TMA_ALIGNED,
    MN_MAJOR_TMA_ALIGNED_PACKED,
    BlockFormat,
    ScaleLayout,
)
from blockscale.planning.decision import Arrangement, GroupedRows, MRange, OperandForm
from blockscale.tensor import BlockScaledTensor

if TYPE_CHECKING:
    from blockscale.kernels.triton.rows import TritonRows
    from blockscale.reference.experts import ArrangedRows

pytestmark = pytest.mark.usefixtures("interpreted")

EXPERTS, CHOICES, K, INNER = 6, 3, 640, 128
TOKENS = 3
FORMS = [
    (FP8_1X128_FP32, MN_MAJOR_TMA_ALIGNED),
    (FP8_1X128_FP32, K_MAJOR),
    (FP8_1X128_UE8M0, MN_MAJOR_TMA_ALIGNED_PACKED),
]
ARRANGEMENTS = [
    (Arrangement.CONTIGUOUS, 1),
    (Arrangement.CONTIGUOUS, 8),
    (Arrangement.CONTIGUOUS, 16),
    (Arrangement.CONTIGUOUS, 128),
    (Arrangement.MASKED, 8),
    (Arrangement.MASKED, 64),
]
ROUTINGS = ("any", "one hot", "others' experts", "nobody's")


def both(
    arrangement: Arrangement,
    alignment: int,
    form: tuple[BlockFormat, ScaleLayout] = FORMS[0],
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[TritonRows, TorchRows]:
    from blockscale.kernels.triton.rows import ContiguousRows, MaskedRows, RowsSpec

    spec = RowsSpec(*form, alignment, EXPERTS, dtype, K, INNER, 0)
    kind = MaskedRows if arrangement is Arrangement.MASKED else ContiguousRows
    rows = GroupedRows(MRange(), arrangement, alignment)
    return kind(spec), TorchRows(OperandForm(*form), rows, EXPERTS)


def ids_of(tokens: int, routing: str = "any") -> torch.Tensor:
    generator = torch.Generator().manual_seed(tokens)
    if routing == "one hot":
        return torch.full((tokens, 1), 4)
    ids = torch.rand(tokens, EXPERTS + 2, generator=generator).argsort(1)[:, :CHOICES]
    if routing == "any":
        return ids % EXPERTS if tokens == 1 else ids.clamp(max=EXPERTS)
    return ids - 3 if routing == "others' experts" else torch.full_like(ids, -1)


def same(found: ArrangedRows, wanted: ArrangedRows) -> bool:
    return found.slot == wanted.slot and all(
        torch.equal(getattr(found, name), getattr(wanted, name))
        and getattr(found, name).dtype is torch.int32
        for name in ("source", "place", "groups")
    )


@pytest.mark.parametrize(("arrangement", "alignment"), ARRANGEMENTS)
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("tokens", [1, 9])
def test_rows_are_arranged_as_the_reference_arranges_them(
    arrangement: Arrangement, alignment: int, routing: str, tokens: int
) -> None:
    triton, reference = both(arrangement, alignment)
    ids = ids_of(tokens, routing)
    assert same(triton.arrange(ids), reference.arrange(ids))


@pytest.mark.parametrize(("arrangement", "alignment"), ARRANGEMENTS[1::3])
def test_more_ids_than_one_look_takes(arrangement: Arrangement, alignment: int) -> None:
    """100 tokens with three choices: the smaller kernel looks through 256 ids at once."""
    triton, reference = both(arrangement, alignment)
    ids = ids_of(100)
    wanted = reference.arrange(ids)
    for given in (ids, ids.int(), ids.T.contiguous().T, ids.short()):
        assert same(triton.arrange(given), wanted)


def test_a_token_that_names_an_expert_twice_overflows_its_slot() -> None:
    triton, reference = both(Arrangement.MASKED, 8)
    ids = torch.zeros(8, 2, dtype=torch.int64)
    found = triton.arrange(ids)
    assert same(found, reference.arrange(ids))
    assert found.groups.tolist() == [8, 0, 0, 0, 0, 0]
    assert (found.place == -2).sum() == 8


def rows_that_count(operand: BlockScaledTensor, rows: ArrangedRows) -> tuple[torch.Tensor, ...]:
    from blockscale.reference import scale_values

    counts = rows.source >= 0
    data = operand.data.view(torch.uint8).reshape(rows.rows, -1)
    return data[counts], scale_values(operand).reshape(rows.rows, -1)[counts]


def assert_same_operand(found: object, wanted: object, rows: ArrangedRows) -> None:
    assert isinstance(found, BlockScaledTensor)
    assert isinstance(wanted, BlockScaledTensor)
    assert (found.format, found.layout, found.leading) == (
        wanted.format,
        wanted.layout,
        wanted.leading,
    )
    assert all(map(torch.equal, rows_that_count(found, rows), rows_that_count(wanted, rows)))


def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """New memory is full of 0x7B: what a kernel does not write shows."""
    empty = torch.empty

    def full(*args: object, **kwargs: object) -> torch.Tensor:
        tensor = empty(*args, **kwargs)  # type: ignore[call-overload]
        tensor.view(torch.uint8).fill_(0x7B)
        return tensor

    monkeypatch.setattr(torch, "empty", full)


@pytest.mark.parametrize(("arrangement", "alignment"), ARRANGEMENTS[1:5:3])
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_gathered_rows_are_quantized_as_the_reference_does(
    monkeypatch: pytest.MonkeyPatch,
    arrangement: Arrangement,
    alignment: int,
    form: tuple[BlockFormat, ScaleLayout],
    dtype: torch.dtype,
) -> None:
    triton, reference = both(arrangement, alignment, form, dtype)
    hidden = torch.randn(TOKENS, K + 9, generator=torch.Generator().manual_seed(1)).to(dtype)
    ids = ids_of(TOKENS)
    rows, wanted_rows = triton.arrange(ids), reference.arrange(ids)
    for view in (hidden[:, :K].contiguous(), hidden[:, 9:]):
        wanted = reference.gather(view, wanted_rows)
        with monkeypatch.context() as patch:
            poisoned(patch)
            found = triton.gather(view, rows)
        assert_same_operand(found, wanted, rows)


@pytest.mark.parametrize(("arrangement", "alignment"), ARRANGEMENTS[1:5:3])
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_activated_rows_are_quantized_as_the_reference_does(
    arrangement: Arrangement,
    alignment: int,
    form: tuple[BlockFormat, ScaleLayout],
    dtype: torch.dtype,
) -> None:
    triton, reference = both(arrangement, alignment, form, dtype)
    ids = ids_of(TOKENS)
    rows, wanted_rows = triton.arrange(ids), reference.arrange(ids)
    gate_up = torch.randn(rows.rows, 2 * INNER, generator=torch.Generator().manual_seed(2))
    gate_up = (4 * gate_up).to(dtype)
    gate_up[rows.source < 0] = torch.nan
    assert_same_operand(
        triton.activate(gate_up, rows), reference.activate(gate_up, wanted_rows), rows
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("routing", ROUTINGS)
def test_products_are_combined_as_the_reference_does(
    dtype: torch.dtype, weights: torch.dtype, routing: str
) -> None:
    triton, reference = both(Arrangement.CONTIGUOUS, 8, dtype=dtype)
    ids = ids_of(TOKENS, routing)
    rows, wanted_rows = triton.arrange(ids), reference.arrange(ids)
    generator = torch.Generator().manual_seed(3)
    products = torch.randn(rows.rows, 1100, generator=generator).to(dtype)
    products[rows.source < 0] = torch.nan
    weight = torch.rand(ids.shape, generator=generator).to(weights)
    found, wanted = (torch.full((TOKENS, 1100), torch.nan, dtype=dtype) for _ in range(2))
    triton.combine(products, rows, weight, found)
    reference.combine(products, wanted_rows, weight, wanted)
    assert torch.equal(found, wanted)


def test_an_overflow_makes_its_token_nan() -> None:
    triton, reference = both(Arrangement.MASKED, 8)
    ids = torch.zeros(8, 2, dtype=torch.int64)
    rows = triton.arrange(ids)
    products, weights = torch.ones(rows.rows, 64).to(torch.bfloat16), torch.ones(8, 2)
    found, wanted = (torch.zeros(8, 64, dtype=torch.bfloat16) for _ in range(2))
    triton.combine(products, rows, weights, found)
    reference.combine(products, reference.arrange(ids), weights, wanted)
    assert torch.equal(found.isnan(), wanted.isnan())
    assert found[4:].isnan().all()
    assert (found[:4] == 2).all()


def test_forms_and_slots_without_a_kernel_are_refused() -> None:
    with pytest.raises(BackendError, match="no scales in k_by_mn"):
        both(Arrangement.CONTIGUOUS, 8, (FP8_1X128_FP32, K_BY_MN))
    with pytest.raises(BackendError, match="multiples of 8 rows here, not of 4"):
        both(Arrangement.MASKED, 4)
