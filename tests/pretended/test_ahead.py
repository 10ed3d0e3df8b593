"""What benchmarks/ahead.py compiles beforehand is what the layers then launch, kernel by kernel."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="pip install triton: kernels are Triton's")

pytestmark = pytest.mark.usefixtures("forked")

ROOT = Path(__file__).parent.parent.parent
# Layers on the pretend GPU, launches noted and not run, beside what ahead says.
PROGRAM = """
import json, sys, types
sys.path.insert(0, "benchmarks")
from blockscale.testing import pretend_gpu, pretend_launch
pretend_gpu.install()
import torch, ahead, moe_layer
from blockscale.formats import DType

launched = set()

class Noting(pretend_launch.PretendLauncher):
    def __init__(self, variant, device):
        super().__init__(variant, device)
        self.kernel = ahead.Kernel.of(variant)

    def __call__(self, programs, *arguments):  # start comes by here too
        launched.add(self.kernel)
        super().__call__(programs, *arguments)

def compiled(form, _):
    launched.add(form)
    return pretend_launch.Compiled(form)

from blockscale.kernels.gluon import launch
from blockscale.kernels.triton import build
build.Launcher, launch.compile_form, pretend_launch.done = Noting, compiled, lambda work: None

size, tokens = moe_layer.SMOKE, (1, 3, 20, 70, 200)
weights = moe_layer.made(size, "cuda")
with torch.inference_mode():
    for backends in (("gluon",), ("triton",)):
        layer = moe_layer.Planned(size, weights, DType.FLOAT16, backends)
        for m in tokens:
            layer(moe_layer.inputs_of(size, m, DType.FLOAT16, "cuda"))
layers = [
    ahead.Linear(size.qkv, size.hidden, tokens, "float16"),
    ahead.Linear(size.hidden, size.attention, tokens, "float16"),
    ahead.Experts(size.experts, size.hidden, size.inner, size.choices, tokens, "float16"),
]
listed = set(ahead.kernels_of(layers))

calls = []
deep_gemm = types.ModuleType("deep_gemm")
deep_gemm.fp8_gemm_nt = lambda a, b, out, compiled_dims: calls.append(
    [list(one.shape) for one in (*a, *b, out)]
)
sys.modules["deep_gemm"] = deep_gemm
ahead.DeepGemmCall(256, 384, 8).compile()
print(json.dumps([len(launched), sorted(str(one) for one in launched - listed), calls]))
"""


def test_every_launch_was_compiled_ahead() -> None:
    """By blockscale; and DeepGEMM, of which a stand-in notes the call, gets what it asks for."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    count, missing, calls = json.loads(done.stdout.splitlines()[-1])
    assert count > 20
    assert missing == []
    assert calls == [[[8, 384], [8, 3], [256, 384], [2, 3], [8, 256]]]


def test_every_part_lists_its_kernels() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "ahead.py", "--list"],
        capture_output=True,
        text=True,
        check=True,
    )
    first, *names = done.stdout.split("\n")
    assert int(first.split()[0]) == len([name for name in names if name])
    assert {"combine_kernel", "quantize_kernel", "gemm_kernel"} <= set(names)
