"""benchmarks/gemm.py on a pretend GPU: what it writes, and that it goes on where it stopped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="pip install triton: its interpreter runs the kernels")

pytestmark = pytest.mark.usefixtures("forked")

ROOT = Path(__file__).parent.parent.parent
# Each run reads its state from files; one process saves two imports of torch and Triton.
PROGRAM = """
import json, runpy, sys

from blockscale.probe import machine

# With NVRTC, which a pretend GPU has, so small a weight is planned for `cuda`, not timed here.
known = machine._version
machine._version = lambda name: None if name == "cuda-bindings" else known(name)
common, *runs = json.loads(sys.argv[1])
sys.path.insert(0, "benchmarks")
for run in runs:
    sys.argv = ["benchmarks/gemm.py", *common, *run]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as ended:
        assert ended.code == 0, ended
    print("end of run", flush=True)
"""


def outputs(folder: Path, *runs: list[str]) -> list[str]:
    """What each of some runs prints, one after the other."""
    common = ["--smoke", "--state", str(folder / "state"), "--out", str(folder / "records")]
    common += ["--backends", "gluon,bf16_matmul", "--rounds", "2", "--tokens", "1,5"]
    program = folder / "program.py"
    program.write_text(PROGRAM)
    command = ["-m", "blockscale.testing.pretend_gpu", str(program), json.dumps([common, *runs])]
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "TRITON_INTERPRET": "1", "SOURCE_COMMIT": "abc1234"},
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    *printed, rest = done.stdout.split("end of run\n")
    assert not rest
    return printed


def test_a_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    """Whole (N, K) only, in order, each once; the planner's choice is marked."""
    both = "128x128,256x128"
    first, second, stopped = outputs(
        tmp_path,
        ["--pass", "main", "--shapes", "128x128"],
        ["--shapes", both],
        ["--shapes", f"{both},128x256", "--seconds", "0"],
    )
    assert "1 rows in" in first
    assert "left: nothing" in first
    assert "3 rows in" in second
    assert "left: nothing" in second
    lines = [json.loads(line) for line in (tmp_path / "records").read_text().splitlines()]
    assert [(r["pass"], r["n"], r["m"], r["backend"], r["out_dtype"]) for r in lines] == [
        (name, n, m, backend, dtype)
        for name, variants in (
            ("main", (("gluon", "float16"), ("gluon", "bfloat16"))),
            ("rest", (("gluon", "float32"), ("bf16_matmul", "bfloat16"))),
        )
        for n in (128, 256)
        for m in (1, 5)
        for backend, dtype in variants
    ]
    for r in lines:
        assert r["p10_us"] <= r["time_us"] <= r["p90_us"]
        assert r["planned"] == (r["backend"] == "gluon")
        assert r["commit"] == "abc1234"
        assert r["deep_gemm_us"] is None
    assert "0 rows in" in stopped
    assert "left: main 128x256, rest 128x256" in stopped
