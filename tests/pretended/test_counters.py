"""benchmarks/counters.py: what it launches, on a pretend GPU, and how it reads what ncu prints."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from types import ModuleType

pytest.importorskip("triton", reason="pip install triton: the benchmark imports kernels")

pytestmark = pytest.mark.usefixtures("forked")

ROOT = Path(__file__).parent.parent.parent
PRINTED = ROOT / "benchmarks" / "results" / "nvidia-h100-80gb-hbm3" / "experiments" / "ncu-g15.csv"
PROGRAM = """
import sys
sys.path.insert(0, "benchmarks")
from blockscale.testing import pretend_gpu
pretend_gpu.install()
import torch, counters
torch.cuda.profiler.start = lambda: print("on")
torch.cuda.profiler.stop = lambda: print("off")
counters.launch("3:128x256,1:256x128", "gluon", "float16")
"""


@pytest.fixture
def counters(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """benchmarks/counters.py as a module."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    spec = importlib.util.spec_from_file_location("counters", ROOT / "benchmarks" / "counters.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_each_job_is_one_call_between_on_and_off() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert [line for line in lines if line in ("on", "off")] == ["on", "off"] * 2
    jobs = [json.loads(line[8:]) for line in lines if line.startswith("product ")]
    shapes = [(job["m"], job["n"], job["k"], job["backend"], job["out_dtype"]) for job in jobs]
    assert shapes == [(3, 128, 256, "gluon", "float16"), (1, 256, 128, "gluon", "float16")]


def test_what_ncu_printed_is_read(counters: ModuleType) -> None:
    """An earlier run on an H100, in the same format, its own lines among ncu's."""
    kernels = counters.counters_of(PRINTED.read_text(encoding="utf-8").splitlines())
    assert len(kernels) == 14
    assert kernels[0] == {
        "kernel": "dense_kernel",
        "memory_bytes": 27_170_048.0,
        "l2_bytes": 124_240_608.0,
        "active_clocks": 44_263.46,
        "clocks": 67_097.0,
        "tensor_percent": 53.70,
    }
    assert "gemm" in kernels[-1]["kernel"]


def test_a_product_without_its_kernel_is_a_fault(counters: ModuleType) -> None:
    text = PRINTED.read_text(encoding="utf-8")
    job = {"m": 1, "n": 2, "k": 3, "backend": "gluon", "out_dtype": "float16", "detail": ""}
    with pytest.raises(ValueError, match="1 products, but counters of 14 kernels"):
        counters.records_of(f"product {json.dumps(job)}\n{text}")
    lines = counters.records_of(f"product {json.dumps(job)}\n" * 14 + text)
    assert [line["kernel"] for line in lines[:1]] == ["dense_kernel"]
    assert counters.words_of(lines[0]).startswith(
        "1 x 2 x 3 gluon float16 : clocks 67,097, active_clocks"
    )
