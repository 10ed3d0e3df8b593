"""What a planned layer launches, seen by a CUDA driver that does nothing."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="pip install triton")

pytestmark = pytest.mark.usefixtures("forked")

SCRIPT = Path(__file__).with_name("idle_steps.py")


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu asks the real one")
@pytest.mark.skipif(shutil.which("gcc") is None, reason="builds the driver: apt install gcc")
def test_a_layer_launches_what_its_backends_two_calls_launch() -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT)], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "18\n"
