"""The two-GPU benchmark, small and over gloo: it runs, and its two models are the same."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="pip install 'blockscale[transformers]'")

pytestmark = pytest.mark.usefixtures("forked_transformers")

ROOT = Path(__file__).parent.parent.parent


def test_the_benchmark_compares_logits_and_writes_records(tmp_path: Path) -> None:
    out = tmp_path / "records.jsonl"
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    program = [ROOT / "benchmarks" / "tensor_parallel.py", "--smoke", "--out", out]
    done = subprocess.run(
        [sys.executable, *command, *program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert {(line["dtype"], line["phase"], line["m"]) for line in lines} == {
        (dtype, phase, tokens)
        for dtype in ("float16", "bfloat16")
        for phase, tokens in (("decode", 1), ("decode", 3), ("prefill", 32))
    }
    assert all(line["float32_error"] < 1e-5 and line["ranks"] == 2 for line in lines)
