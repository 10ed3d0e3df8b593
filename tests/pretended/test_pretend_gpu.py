"""The tests and benchmarks that only a GPU would reach, on a pretend one.

So host code cannot break unseen between two sessions on a real GPU. A quick part runs always; the
rest with ``make test-kernels`` (Triton's interpreter takes minutes).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="pip install triton: its interpreter runs the kernels")

pytestmark = pytest.mark.usefixtures("forked")

ROOT = Path(__file__).parent.parent.parent
SLOW = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="takes minutes: make test-kernels"
)
GPU = ROOT / "tests" / "gpu"
# One of each kind: a graph over all seven launches, an update under it, memory, a whole model.
QUICK = (
    "test_experts.py::test_a_graph_serves_every_routing[1-gluon]",
    "test_experts.py::test_an_update_reaches_a_captured_graph[gluon-4]",
    "test_experts.py::test_an_update_reaches_a_captured_graph[triton-1]",
    "test_experts.py::test_a_forward_leaves_nothing_in_memory[gluon]",
    "test_layers.py::test_a_forward_leaves_nothing_in_memory[gluon]",
    "test_layers.py::test_a_forward_leaves_nothing_in_memory[triton]",
    "test_experts.py::test_preparing_holds_one_expert_beside_the_stacks",
    "test_transformers.py::test_save_gives_the_same_bytes",
    "test_transformers.py::test_a_captured_decoding_step_replays_new_tokens_and_new_weights",
)
# Left out: thousands of tiles, or Inductor, which needs a real device.
TOO_BIG = (
    "not size_of_models and not exact_experts and not same_bits and not compiles and not 130 "
    "and not 300"
)


def pretended(*arguments: str | Path, program: tuple[str, ...] = ()) -> str:
    """What a program prints on a pretend GPU, in a process of its own."""
    command = [*program, "-m", "blockscale.testing.pretend_gpu", *map(str, arguments)]
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=3000,
        env={**os.environ, "TRITON_INTERPRET": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return done.stdout


def ran(output: str) -> None:
    """Tests passed, and none was skipped but for a provider that is not installed."""
    last = output.strip().splitlines()[-1]
    assert " passed" in last, output
    skips = [line for line in output.splitlines() if line.startswith("SKIPPED")]
    assert all("sgl-deep-gemm" in line for line in skips), output


def test_a_quick_part_of_the_gpu_tests_passes() -> None:
    names = [str(GPU / name) for name in QUICK]
    ran(pretended("-m", "pytest", "-q", "-rs", "-m", "gpu", "-p", "no:cacheprovider", *names))


@SLOW
def test_every_case_of_the_sanitizer_is_right() -> None:
    output = pretended("tools/sanitize.py", "--cases")
    assert "WRONG" not in output
    assert "FAILED" not in output
    assert output.count("error") > 100, output


@SLOW
@pytest.mark.parametrize("name", ["experts", "transformers", "transformers_experts"])
def test_all_gpu_tests_of_models_pass(name: str) -> None:
    path = GPU / f"test_{name}.py"
    selected = ("-k", TOO_BIG, path)
    ran(pretended("-m", "pytest", "-q", "-rs", "-m", "gpu", "-p", "no:cacheprovider", *selected))


@SLOW
@pytest.mark.parametrize(
    ("name", "planned"), [("moe_layer", {"gluon", "cuda"}), ("transformers_model", {"cuda"})]
)
def test_a_benchmark_times_the_gpu_s_kernels(name: str, planned: set[str], tmp_path: Path) -> None:
    out = tmp_path / "records.jsonl"
    pretended(ROOT / "benchmarks" / f"{name}.py", "--smoke", "--out", out)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert lines
    for line in lines:
        assert line["machine"] == "pretend H100"
        assert line["timing"] == "cuda_graph"
        backends = line["backends"]
        names = [backends] if isinstance(backends, list) else list(backends.values())
        assert {one for few in names for one in few} == planned


@SLOW
@pytest.mark.parametrize("backend", ["gluon", "cuda"])
def test_rows_and_slots_are_timed_beside_one_another(backend: str, tmp_path: Path) -> None:
    out = tmp_path / "records.jsonl"
    program = ROOT / "benchmarks" / "expert_slots.py"
    pretended(program, "--smoke", "--backend", backend, "--out", out)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(line["m"], line["backend"]) for line in lines] == [(1, backend), (3, backend)]
    assert all(line["rows_us"] > 0 and line["slots_us"] > 0 for line in lines)


@SLOW
@pytest.mark.parametrize("name", ["gluon:Gluon", "cuda:Cuda"])
def test_the_probe_s_processes_have_the_same_gpu(name: str) -> None:
    """One shape of experts in both arrangements, by ``prove`` as ``doctor --probe`` calls it."""
    module, _, kind = name.partition(":")
    program = (
        "from blockscale.testing import pretend_gpu; pretend_gpu.install()\n"
        f"from blockscale.backends.{module} import {kind} as Backend\n"
        "from blockscale.formats import DType\n"
        "from blockscale.probe import items, proving\n"
        "items.SHAPES, items.EXPERT_SHAPES = (), ((192, 256),)\n"
        "for proof in proving.prove([Backend()], [DType.FLOAT16]):\n"
        "    print(proof.words + ':', proof.detail)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    first, *others = done.stdout.splitlines()
    assert first.startswith(f"{module} proven for float16, contiguous experts: 1 shapes")
    assert [line.partition(":")[0] for line in others] == [
        f"{module} proven for float16, masked experts"
    ]


@SLOW
def test_two_processes_cut_a_model_over_two_gpus(tmp_path: Path) -> None:
    out = tmp_path / "records.jsonl"
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    program = (ROOT / "benchmarks" / "tensor_parallel.py", "--smoke", "--out", out)
    pretended(*program, program=torchrun)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert {line["timing"] for line in lines} == {"cuda_graph"}
    assert {line["ranks"] for line in lines} == {2}


CODE = {
    "two devices": "torch.ones(3, device='cuda') + torch.ones(3)",
    "waits for the device": (
        "x = torch.ones(3).cuda()\ntorch.cuda.set_sync_debug_mode('error')\nx.sum().item()"
    ),
    "while a CUDA graph is captured": (
        "g = torch.cuda.CUDAGraph()\n"
        "x = torch.ones(3).cuda()\n"
        "with torch.cuda.graph(g):\n    x.nonzero()"
    ),
    "no tensor on the GPU is at": (
        "from blockscale.kernels.triton.rows import *\n"
        "from blockscale.formats import *\n"
        "form = FP8_1X128_FP32, MN_MAJOR_TMA_ALIGNED\n"
        "rows = ContiguousRows(RowsSpec(*form, 8, 4, torch.bfloat16, 128, 128, 0))\n"
        "rows.arrange(torch.zeros(2, 1, dtype=torch.int64))"
    ),
    "takes 3 arguments at run time, got 2": (
        "from blockscale.kernels.triton import rows\n"
        "from blockscale.kernels.triton.build import launcher\n"
        "from blockscale.formats import *\n"
        "form = FP8_1X128_FP32, MN_MAJOR_TMA_ALIGNED\n"
        "made = rows.ContiguousRows(rows.RowsSpec(*form, 8, 4, torch.bfloat16, 128, 128, 0))\n"
        "made._arranging(torch.int64, 256)[0](1, 0, 0)"
    ),
}


def test_what_a_gpu_forbids_is_found() -> None:
    """Operands on two devices, waiting where it is forbidden, a CPU address, a lost argument."""
    program = (
        "import json, sys, torch\n"
        "found = {}\n"
        f"for name, code in {CODE!r}.items():\n"
        "    try:\n"
        "        exec(code, {'torch': torch})\n"
        "        found[name] = 'nothing'\n"
        "    except AssertionError as error:\n"
        "        found[name] = str(error)\n"
        "    torch.cuda.set_sync_debug_mode('default')\n"
        "print(json.dumps(found))\n"
    )
    code = f"from blockscale.testing import pretend_gpu; pretend_gpu.install()\n{program}"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert all(name in words for name, words in found.items()), found


PROBE = """
from blockscale.backends.gluon import Gluon
from blockscale.formats import DType
from blockscale.planning.decision import Arrangement
from blockscale.probe.checks import check_item
from blockscale.probe.items import Item
from blockscale.probe.machine import read_machine
from blockscale.probe.outcome import WrongNumbersError


class Misled(Gluon):
    def bind_masked(self, weight, offer):
        honest = super().bind_masked(weight, offer)
        return lambda rows, counts, out, hint: honest(rows, counts.clamp(max=128), out, hint)


device = read_machine()
for how in Arrangement:
    print(how.value, check_item(Gluon(), device, Item(DType.FLOAT16, 192, 768, how)))
try:
    check_item(Misled(), device, Item(DType.FLOAT16, 192, 768, Arrangement.MASKED))
except WrongNumbersError as error:
    print("wrong", error)
"""


def test_the_probe_checks_products_over_experts(tmp_path: Path) -> None:
    """A slot's 129th row that is not computed stays NaN, and shows."""
    program = tmp_path / "probe.py"
    program.write_text(PROBE)
    contiguous, masked, wrong = pretended(program).splitlines()
    assert contiguous.startswith("contiguous 1 shapes, relative error up to")
    assert masked.startswith("masked 1 shapes, relative error up to")
    assert wrong.startswith("wrong fingerprint weight, rows (0, 1, 64, 65, 0, 128, 129, 0)")
    assert "expert 6: 192 of 24768 elements differ, the first at (128, 0): nan" in wrong
