"""The benchmark of a whole model runs from end to end, tiny, on any machine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="pip install 'blockscale[transformers]'")

ROOT = Path(__file__).parent.parent.parent


def test_every_phase_and_dtype_leaves_a_record(tmp_path: Path) -> None:
    out = tmp_path / "model.jsonl"
    program = ROOT / "benchmarks" / "transformers_model.py"
    done = subprocess.run(
        [sys.executable, program, "--smoke", "--out", out],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    found = {(r["dtype"], r["phase"], r["batch"], r["variant"]) for r in lines}
    for dtype in ("bfloat16", "float16"):
        for variant in ("float", "blockscale"):
            assert {(dtype, "decode", 1, variant), (dtype, "decode", 2, variant)} <= found
            assert (dtype, "prefill", 1, variant) in found
    assert all(r["tokens_per_second"] > 0 and r["time_ms"] > 0 for r in lines)
    assert all(0 < r["relative_error"]["blockscale"] < 0.1 for r in lines)
