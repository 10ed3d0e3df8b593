"""The twins of the fused kernels against float64 and against torch's own layers."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch

from blockscale.errors import FormatError
from blockscale.reference.fused import (
    SMALLEST_GATE,
    _exp2,
    _fma,
    _pairwise_sum,
    add_and_normalize,
    silu_and_multiply,
)

HALF = [torch.bfloat16, torch.float16]


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def test_silu_is_within_4e_6_of_the_exact_one() -> None:
    gate = torch.cat([normal(100_000, scale=10), torch.linspace(-60, 60, 100_001)])
    found = silu_and_multiply(torch.stack([gate, torch.ones_like(gate)]).T.contiguous())[:, 0]
    exact = gate.double() * torch.sigmoid(gate.double())
    large = exact.abs() > 1e-30
    error = ((found.double() - exact) / exact)[large].abs()
    assert error.max() < 4e-6


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_silu_and_multiply_is_torchs_but_for_last_bits(dtype: torch.dtype) -> None:
    gate_up = normal(64, 4096, scale=4).to(dtype)
    gate, up = gate_up.chunk(2, -1)
    expected, found = torch.nn.functional.silu(gate) * up, silu_and_multiply(gate_up)
    assert (found != expected).float().mean() < 1e-3
    assert torch.allclose(found.float(), expected.float(), rtol=2 * torch.finfo(dtype).eps)


def test_silu_of_what_is_no_ordinary_number() -> None:
    gate = torch.tensor([0.0, -0.0, 3e38, -3e38, float("inf"), float("-inf"), float("nan")])
    found = silu_and_multiply(torch.stack([gate, torch.ones_like(gate)]).T.contiguous())[:, 0]
    floor = float(silu_and_multiply(torch.tensor([[SMALLEST_GATE, 1.0]])))
    assert -1.5e-36 < floor < 0
    wanted = torch.tensor([0.0, -0.0, 3e38, floor, float("inf"), floor, float("nan")])
    assert torch.equal(found.view(torch.int32)[:-1], wanted.view(torch.int32)[:-1])
    assert found[-1].isnan()


def test_odd_widths_and_integers_are_refused() -> None:
    for bad in (torch.zeros(2, 5), torch.zeros(2, 4, dtype=torch.int32)):
        with pytest.raises(FormatError, match="even last axis"):
            silu_and_multiply(bad)


def test_exp2_is_within_3e_7_of_the_exact_one() -> None:
    values = torch.linspace(-124, 126, 200_001)
    exact = torch.exp2(values.double())
    assert ((_exp2(values).double() - exact) / exact).abs().max() < 3e-7


def test_fma_rounds_once() -> None:
    one, other = normal(3000, seed=1), normal(3000, seed=2)
    addend = -(one * other) * (1 + normal(3000, seed=3, scale=1e-6))
    found = _fma(one, other, addend)
    for a, b, c, value in zip(*(t.tolist() for t in (one, other, addend, found)), strict=True):
        exact = Fraction(a) * Fraction(b) + Fraction(c)
        error = abs(Fraction(value) - exact)
        for neighbour in (np.float32(np.inf), np.float32(-np.inf)):
            other_value = float(np.nextafter(np.float32(value), neighbour))
            assert error <= abs(Fraction(other_value) - exact)


def test_pairwise_sum_adds_neighbours_first() -> None:
    big, small = 2.0**24, 1.0
    values = torch.tensor([big, small, small, -big, small])
    # ((big + 1) + (1 - big)) + ((1 + 0) + 0): big + 1 rounds to big.
    assert _pairwise_sum(values).tolist() == [2.0]


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("k", [1, 100, 7168])
def test_normalization_is_llamas_but_for_last_bits(dtype: torch.dtype, k: int) -> None:
    values, residual, weight = (normal(16, k, seed=s).to(dtype) for s in (1, 2, 3))
    weight = weight[0]
    found = add_and_normalize(values, residual, weight, 1e-6)
    summed = values + residual
    wide = summed.float()
    inverse = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    expected = weight * (wide * inverse).to(dtype)
    assert torch.equal(found.summed, summed)
    assert (found.normalized != expected).float().mean() < 0.01
    eps = torch.finfo(dtype).eps
    assert torch.allclose(found.normalized.float(), expected.float(), rtol=2 * eps)


def test_without_residual_the_values_themselves_are_normalized() -> None:
    values = normal(4, 64)
    plain = add_and_normalize(values, None, torch.ones(64), 0.0)
    assert plain.summed is values
    assert torch.allclose(plain.normalized.pow(2).mean(-1), torch.ones(4))


def test_weights_of_another_length_or_dtype_are_refused() -> None:
    values = torch.zeros(2, 8)
    for weight in (torch.ones(7), torch.ones(8, dtype=torch.float16)):
        with pytest.raises(FormatError, match="one dtype and a weight as long"):
            add_and_normalize(values, None, weight, 1e-6)
