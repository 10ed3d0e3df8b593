"""UE8M0 rounding and values, exhaustively near powers of two."""

from __future__ import annotations

import struct
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest

from blockscale.formats import is_ue8m0_exact, ue8m0_byte_rounded_up, ue8m0_value

EXPONENTS = range(-126, 128)


def float32(bits: int) -> float:
    return struct.unpack("<f", struct.pack("<I", bits))[0]


def bits_of_power(exponent: int) -> int:
    return (exponent + 127) << 23


@pytest.mark.parametrize("exponent", EXPONENTS)
def test_power_of_two_is_itself(exponent: int) -> None:
    value = float32(bits_of_power(exponent))
    assert ue8m0_byte_rounded_up(value) == exponent + 127
    assert is_ue8m0_exact(value)


@pytest.mark.parametrize("exponent", EXPONENTS)
def test_one_ulp_below_rounds_up_to_the_power(exponent: int) -> None:
    value = float32(bits_of_power(exponent) - 1)
    assert ue8m0_byte_rounded_up(value) == exponent + 127
    assert not is_ue8m0_exact(value)


@pytest.mark.parametrize("exponent", range(-126, 127))
def test_one_ulp_above_rounds_up_to_the_next_power(exponent: int) -> None:
    value = float32(bits_of_power(exponent) + 1)
    assert ue8m0_byte_rounded_up(value) == exponent + 128
    assert not is_ue8m0_exact(value)


def test_the_common_formula_is_wrong_one_ulp_above_most_powers() -> None:
    """Why the bits are used: log2 in float32 loses the last ulp."""
    wrong = 0
    for exponent in range(-126, 127):
        value = np.float32(float32(bits_of_power(exponent) + 1))
        wrong += int(np.ceil(np.log2(value))) + 127 != ue8m0_byte_rounded_up(float(value))
    assert wrong > 200


@pytest.mark.parametrize("byte", range(1, 255))
def test_rounding_gives_the_smallest_power_not_below(byte: int) -> None:
    value = Fraction(ue8m0_value(byte)) * Fraction(3, 4)
    rounded = ue8m0_byte_rounded_up(float(value))
    assert rounded == byte
    assert value <= Fraction(ue8m0_value(rounded)) < 2 * value


def test_values_agree_with_ml_dtypes_for_every_byte() -> None:
    theirs = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e8m0fnu).astype(np.float64)
    for byte in range(255):
        assert ue8m0_value(byte) == theirs[byte]
    assert np.isnan(theirs[255])
    assert np.isnan(ue8m0_value(255))


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf"), -float("inf")])
def test_scales_without_a_meaning_are_refused(scale: float) -> None:
    with pytest.raises(ValueError, match="positive and finite"):
        ue8m0_byte_rounded_up(scale)


def test_scale_above_the_largest_power_is_refused() -> None:
    with pytest.raises(ValueError, match=r"2\*\*127"):
        ue8m0_byte_rounded_up(float32(bits_of_power(127) + 1))


def test_subnormals_round_up_to_the_smallest_byte_we_write() -> None:
    assert ue8m0_byte_rounded_up(float32(1)) == 1
    assert not is_ue8m0_exact(float32(1 << 22))
