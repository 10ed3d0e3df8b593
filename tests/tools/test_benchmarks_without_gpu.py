"""A benchmark that needs a GPU says so in one line where there is none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.usefixtures("forked")

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"
# The first ones' modules import the kernels that they measure.
NEED_TRITON = ("gemm", "counters", "grouped", "quantize")
NEED_A_GPU = (*NEED_TRITON, "fp16_model", "moe_layer", "gate_facts")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: it would measure")
@pytest.mark.parametrize("name", NEED_A_GPU)
def test_it_ends_with_one_line(name: str) -> None:
    if name in NEED_TRITON:
        pytest.importorskip("triton", reason="pip install triton: its kernels are measured")
    done = subprocess.run(
        [sys.executable, BENCHMARKS / f"{name}.py"],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(f"{name}.py needs an NVIDIA GPU")
    assert done.stderr.count("\n") == 1
