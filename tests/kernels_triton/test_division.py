"""The shortcut of ``kernels.triton.arithmetic.divide_exactly``, tried in C on the CPU."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).with_name("division.c")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("apt install gcc")
    target = tmp_path_factory.mktemp("division") / "division"
    flags = ("-O3", "-march=native", "-ffp-contract=off")
    subprocess.run([compiler, *flags, str(SOURCE), "-o", str(target), "-lm"], check=True)
    return target


# float16 with every divisor ("10", "1") takes half a minute: 0 as well (2026-11-23).
@pytest.mark.parametrize(("bits", "step"), [(7, 1), (10, 7)], ids=["bfloat16", "float16"])
def test_one_correction_is_enough_for_half_precision(program: Path, bits: int, step: int) -> None:
    result = subprocess.run(
        [str(program), str(bits), str(step)], check=True, capture_output=True, text=True
    )
    assert result.stdout == "0\n"
