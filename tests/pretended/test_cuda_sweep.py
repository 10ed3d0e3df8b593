"""benchmarks/cuda_sweep.py and cuda_stores.py on a pretend GPU: float32 results, by every way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from blockscale.formats import DType
from blockscale.kernels.cuda.writing import forms_to_compare

if TYPE_CHECKING:
    from collections.abc import Sequence

pytest.importorskip("triton", reason="pip install triton: the benchmarks import Gluon's kernels")

pytestmark = pytest.mark.usefixtures("forked")

ROOT = Path(__file__).parent.parent.parent
# One copy of the weight: nothing is timed here.
PROGRAM = """
import runpy, sys
sys.path.insert(0, "benchmarks")
from blockscale.testing import pretend_gpu
pretend_gpu.install()
import gluon_sweep
gluon_sweep.MAX_COPIES = 1
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
# More blocks than the pretend GPU computes by gemm.cu itself: torch is faster.
SHAPE = ("--shapes", "256x128", "--tokens", "1", "--out-dtype", "float32")


def lines_of(program: str, out: Path, options: Sequence[str]) -> list[dict[str, Any]]:
    """What a sweep writes of its one shape, after its head."""
    command = ["-c", PROGRAM, f"benchmarks/{program}.py"]
    done = subprocess.run(
        [sys.executable, *command, "--out", str(out), *SHAPE, *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-2000:]
    head, *lines = map(json.loads, out.read_text(encoding="utf-8").splitlines())
    assert head["machine"] == "pretend H100"
    return lines


def test_every_way_to_write_float32_is_timed(tmp_path: Path) -> None:
    (line,) = lines_of("cuda_stores", tmp_path / "stores.jsonl", ("--tiles", "64x16"))
    ways = {f"{form.name} /1" for form in forms_to_compare(64, 16, DType.FLOAT32)}
    gluon = {name for name in line["times"] if name.startswith("gluon")}
    assert set(line["times"]) == ways | gluon
    assert len(gluon) == 1
    assert line["out_dtype"] == "float32"


def test_float32_candidates_are_written_as_they_are_chosen(tmp_path: Path) -> None:
    options = ("--written", "--most", "2", "--far", "9")
    (line,) = lines_of("cuda_sweep", tmp_path / "sweep.jsonl", options)
    assert line["out_dtype"] == "float32"
    assert len(line["clocks"]) == 2
    assert set(line["clocks"]) < set(line["times"])
