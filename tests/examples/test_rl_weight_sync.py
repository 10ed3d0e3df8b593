"""The example of weight sync runs: two processes, one refusal, two buckets."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="pip install 'blockscale[transformers]'")

pytestmark = pytest.mark.usefixtures("forked_transformers")

EXAMPLE = Path(__file__).parent.parent.parent / "examples" / "rl_weight_sync.py"


def test_trainer_and_engine_agree_bit_for_bit() -> None:
    done = subprocess.run(
        [sys.executable, EXAMPLE], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("the engine wants 14 layers")
    assert "the update was refused and every old weight kept" in done.stdout
    assert lines.count("7 layers updated") == 2
    assert lines[-1] == "changed: True; as from a fresh checkpoint, bit for bit: True"
