"""Without blockscale, transformers starts as before: nothing is left behind in what it saved."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

# Runs with an import path that has no blockscale in it: the package as if uninstalled.
UNPLUGGED = """
import importlib.util, sys
from pathlib import Path

sys.path[:] = [p for p in sys.path if not (Path(p) / "blockscale").is_dir()]
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in type(f).__module__.lower()]
assert importlib.util.find_spec("blockscale") is None, "blockscale can still be imported"
"""

LOAD = """
import json
import torch
from transformers import AutoModelForCausalLM
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, AutoHfQuantizer

for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.inference_mode():
        logits = model(torch.arange(3, 13)[None]).logits
    print(json.dumps({
        "quantizers": sorted(AUTO_QUANTIZER_MAPPING),
        "merge": AutoHfQuantizer.merge_quantization_configs.__module__,
        "linear": type(model.model.layers[0].self_attn.q_proj).__name__,
        "dtype": str(model.dtype),
        "logits": logits.float().sum().item(),
        "loaded": sorted(name for name in sys.modules if name.startswith("blockscale")),
    }))
"""


def run(program: str, *folders: Path) -> list[dict[str, object]]:
    """What a process of its own finds in each checkpoint."""
    done = subprocess.run(
        [sys.executable, "-c", "import sys\n" + program, *folders],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()[-len(folders) :]]


@pytest.mark.usefixtures("forked")
def test_transformers_starts_as_before(whole_blocks_fp8: Path, tmp_path: Path) -> None:
    """Uninstalled, or installed and unused, or with what we saved: the same program."""
    from transformers import AutoModelForCausalLM

    from blockscale.integrations.transformers import BlockScaleConfig

    saved = tmp_path / "saved"
    AutoModelForCausalLM.from_pretrained(
        whole_blocks_fp8, quantization_config=BlockScaleConfig()
    ).save_pretrained(saved)
    without, what_we_saved = run(UNPLUGGED + LOAD, whole_blocks_fp8, saved)
    assert without["loaded"] == []
    assert "blockscale" not in without["quantizers"]  # type: ignore[operator]  # a list of names
    assert what_we_saved == without
    assert run(LOAD, whole_blocks_fp8) == [without]
