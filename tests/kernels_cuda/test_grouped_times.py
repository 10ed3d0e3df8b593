"""Who serves experts is estimated from what an H100 ran, and not where nothing was measured."""

from __future__ import annotations

import pytest

from blockscale.formats import DType
from blockscale.kernels.grouped_times import cuda_us, gluon_us

FP16 = DType.FLOAT16
# (tokens, experts, (N, K)) and Gluon's time / that of gemm.cu (grouped.py, H100, 2026-11-26).
MEASURED = (
    (4096, 8, (4096, 7168), 1700.5 / 1675.1),
    (4096, 8, (6144, 7168), 2630.9 / 2506.6),
    (4096, 8, (7168, 2048), 852.5 / 880.9),
    (4096, 8, (7168, 3072), 1288.5 / 1319.3),
    (4096, 256, (3072, 3072), 1101.1 / 1164.3),
    (4096, 256, (3072, 1536), 558.8 / 574.0),
)


def ratio(tokens: int, experts: int, shape: tuple[int, int]) -> float:
    gluon, cuda = gluon_us(tokens, experts, shape, FP16), cuda_us(tokens, experts, shape, FP16)
    assert gluon is not None
    assert cuda is not None
    return gluon / cuda


@pytest.mark.parametrize("case", MEASURED, ids=str)
def test_the_faster_was_faster_and_by_about_as_much(
    case: tuple[int, int, tuple[int, int], float],
) -> None:
    found, measured = ratio(*case[:3]), case[3]
    assert (found > 1) == (measured > 1)
    assert found == pytest.approx(measured, rel=0.03)


def test_the_ratio_stays_within_what_was_measured() -> None:
    for tokens in (1, 32, 100, 512, 8192, 1 << 20):
        for k in (128, 2048, 7168, 65536):
            assert 0.93 < ratio(tokens, 8, (4096, k)) < 1.06


def test_times_grow_with_tokens_and_weights() -> None:
    few, many = (cuda_us(tokens, 256, (3072, 3072), FP16) for tokens in (8, 4096))
    larger = cuda_us(8, 256, (6144, 3072), FP16)
    assert few is not None
    assert many is not None
    assert larger is not None
    assert few < larger < many


def test_float32_results_were_not_measured() -> None:
    assert cuda_us(64, 8, (4096, 4096), DType.FLOAT32) is None
    assert gluon_us(64, 8, (4096, 4096), DType.FLOAT32) is None
