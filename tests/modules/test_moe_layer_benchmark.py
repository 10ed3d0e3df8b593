"""The benchmark of a layer of experts runs from end to end, tiny, on any machine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.usefixtures("forked")

ROOT = Path(__file__).parent.parent.parent


def test_every_token_count_leaves_a_record(tmp_path: Path) -> None:
    out = tmp_path / "moe.jsonl"
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "moe_layer.py", "--smoke", "--out", out],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["m"] for line in lines] == [1, 3]
    for line in lines:
        assert line["backends"] == {"qkv": ["cpu"], "o": ["cpu"], "experts": ["cpu"]}
        assert min(line["plan_us"], line["triton_us"], line["bf16_us"]) > 0
