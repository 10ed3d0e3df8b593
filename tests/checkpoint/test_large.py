"""Planning a directory of hundreds of gigabytes: headers alone, little memory, no torch."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from blockscale.testing.model_shapes import deepseek_v3, write_model_headers

if TYPE_CHECKING:
    from pathlib import Path

PROGRAM = (
    "import sys\n"
    "from pathlib import Path\n"
    "from blockscale.cli.main import run\n"
    "try:\n"
    "    run()\n"
    "finally:\n"
    "    assert 'torch' not in sys.modules\n"
    "    print(Path('/proc/self/status').read_text(), file=sys.stderr)\n"
)


@pytest.mark.parametrize("device", ["sm_90", "sm_100"])
def test_sparse_deepseek_plans_from_headers_alone(tmp_path: Path, device: str) -> None:
    """Eight of the layers, 72 GB of holes; benchmarks/plan_large.py takes 700 GB."""
    folder = tmp_path / "deepseek"
    write_model_headers(folder, deepseek_v3(8))
    files = list(folder.glob("*.safetensors"))
    assert sum(file.stat().st_size for file in files) > 60e9
    assert sum(file.stat().st_blocks for file in files) * 512 < 50e6
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, "plan", folder, "--device", device, "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    planned = json.loads(done.stdout)
    assert len(planned["layers"]) == 3 * 6 + 5 * 8
    assert all(layer["backends"] for layer in planned["layers"])
    (peak,) = (line for line in done.stderr.splitlines() if line.startswith("VmHWM:"))
    assert int(peak.split()[1]) * 1024 < 150e6
