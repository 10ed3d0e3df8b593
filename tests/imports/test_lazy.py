"""What importing costs: planning without torch, the library without Triton or transformers."""

from __future__ import annotations

import subprocess
import sys

import pytest

import blockscale

HEAVY = ("torch", "triton", "transformers", "safetensors", "rich", "deep_gemm", "flashinfer")


def loaded_after(program: str) -> set[str]:
    code = f"{program}\nimport sys\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_blockscale_loads_nothing_heavy() -> None:
    assert not loaded_after("import blockscale").intersection(HEAVY)


def test_planning_loads_no_torch() -> None:
    program = (
        "from blockscale import Device, DType, LinearRequest, PlanPolicy, plan_linear\n"
        "from blockscale.formats import FP8_128X128_FP32\n"
        "from blockscale.backends.registry import BACKENDS\n"
        "r = LinearRequest('x', 4096, 4096, FP8_128X128_FP32, DType.BFLOAT16, DType.BFLOAT16)\n"
        "assert plan_linear(r, Device.named('sm_90'), PlanPolicy(), BACKENDS).is_servable\n"
        "import blockscale.checkpoint.requests, blockscale.checkpoint.inspect\n"
        "import blockscale.planning.serialize, blockscale.planning.explain, blockscale.settings"
    )
    assert not loaded_after(program).intersection(HEAVY)


def test_running_on_a_cpu_loads_no_gpu_provider() -> None:
    program = "import blockscale.modules.linear, blockscale.probe, blockscale.reference"
    assert not loaded_after(program) & {"triton", "transformers", "deep_gemm", "flashinfer"}


@pytest.mark.parametrize("name", blockscale.__all__)
def test_every_public_name_exists(name: str) -> None:
    assert getattr(blockscale, name) is not None


def test_unknown_names_raise_attribute_error() -> None:
    with pytest.raises(AttributeError, match="fp8_utils"):
        _ = blockscale.fp8_utils


def test_dir_lists_the_public_names() -> None:
    assert dir(blockscale) == sorted(blockscale.__all__)
