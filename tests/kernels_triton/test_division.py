"""The exactness claims of ``kernels.triton.arithmetic`` and ``words``, tried in C on the CPU."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).with_name("division.c")
MANTISSA_BITS = {"bfloat16": "7", "float16": "10"}


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("apt install gcc")
    target = tmp_path_factory.mktemp("division") / "division"
    flags = ("-O3", "-march=native", "-ffp-contract=off")
    subprocess.run([compiler, *flags, str(SOURCE), "-o", str(target), "-lm"], check=True)
    return target


def differences(program: Path, *arguments: str) -> int:
    found = subprocess.run([str(program), *arguments], check=True, capture_output=True, text=True)
    return int(found.stdout)


@pytest.mark.parametrize("dtype", MANTISSA_BITS)
def test_a_reciprocal_in_two_parts_gives_every_code_of_half_precision(
    program: Path, dtype: str
) -> None:
    assert differences(program, "half", MANTISSA_BITS[dtype], "1") == 0
    # One part would not do.
    assert differences(program, "half", MANTISSA_BITS[dtype], "0") > 0


def test_one_correction_gives_every_code_of_float32_whatever_the_scale(program: Path) -> None:
    assert differences(program, "float", "1") == 0


def test_scales_are_rounded_quotients_for_every_largest_magnitude(program: Path) -> None:
    assert differences(program, "scale", "1") == 0


@pytest.mark.parametrize("dtype", MANTISSA_BITS)
def test_a_sum_of_halves_rounds_by_way_of_float32_as_at_once(program: Path, dtype: str) -> None:
    assert differences(program, "sum", MANTISSA_BITS[dtype]) == 0
