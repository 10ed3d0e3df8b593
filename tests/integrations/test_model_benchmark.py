"""The benchmark of a whole model runs from end to end, tiny, on any machine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="pip install 'blockscale[transformers]'")

pytestmark = pytest.mark.usefixtures("forked_transformers")

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


def test_transformers_takes_its_kernel_from_a_folder(tmp_path: Path) -> None:
    """Its FP8 layer calls what lies there, without the package that asks the Hub."""
    (tmp_path / "finegrained_fp8").mkdir()
    (tmp_path / "finegrained_fp8" / "__init__.py").write_text(
        "from ._ops import add_op_namespace_prefix\n"
        "matmul_batched = matmul_grouped = None\n"
        "def matmul_2d(x, weight, scales, block, dtype, activation_scale=None):\n"
        "    assert add_op_namespace_prefix('one') == 'finegrained_fp8::one'\n"
        "    return x.new_full((*x.shape[:-1], weight.shape[0]), block[0])\n"
    )
    program = f"""
import sys, pathlib
sys.path.insert(0, {str(ROOT / "benchmarks")!r})
import torch, finegrained
from transformers.integrations.finegrained_fp8 import FP8Linear
finegrained.FOLDER = pathlib.Path({str(tmp_path)!r})
print(finegrained.give_to_transformers())
layer = FP8Linear(256, 128, block_size=(128, 128)).requires_grad_(False)
print(layer(torch.zeros(3, 256)).tolist() == [[128.0] * 128] * 3)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    source, answer = done.stdout.splitlines()
    assert source.startswith("kernels-community sources, sha256 ")
    assert answer == "True"
