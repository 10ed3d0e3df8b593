"""``BlockScaledLinear`` on a GPU: two kernels a forward, graphs, compilation, streams, reload."""

from __future__ import annotations

import gc
import warnings
from functools import cache
from typing import TYPE_CHECKING

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

pytest.importorskip("triton", reason="pip install triton: activations are quantized by it")

from blockscale.backends.registry import BACKENDS
from blockscale.formats import FP8_128X128_FP32, DType
from blockscale.modules.linear import BlockScaledLinear
from blockscale.planning.decision import Obstacle
from blockscale.planning.planner import plan_linear
from blockscale.planning.policy import PlanPolicy
from blockscale.planning.request import LinearRequest
from blockscale.probe.machine import read_machine
from blockscale.reference import dequantize, quantize

if TYPE_CHECKING:
    from collections.abc import Callable

    from blockscale.tensor import BlockScaledTensor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
        reason="needs SM90 (H100, H200)",
    ),
]

NAMES = ("triton", "torch_scaled_mm", "deep_gemm", "gluon", "cuda")
N, K = 576, 512


def weight_of(seed: int = 0) -> BlockScaledTensor:
    generator = torch.Generator().manual_seed(seed)
    return quantize(torch.randn(N, K, generator=generator), FP8_128X128_FP32).to("cuda")


def layer_of(name: str, bias: torch.Tensor | None = None) -> BlockScaledLinear:
    bf16 = DType.BFLOAT16
    request = LinearRequest("layer", N, K, FP8_128X128_FP32, bf16, bf16, has_bias=bias is not None)
    plan = plan_linear(request, read_machine(), PlanPolicy(backends=(name,)), BACKENDS)
    missing = [r.reason for r in plan.rejected if r.obstacle is Obstacle.NOT_INSTALLED]
    if missing:
        pytest.skip("; ".join(missing))
    return BlockScaledLinear(plan, weight_of(), bias)


def activation(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(*shape, K, generator=generator).to(torch.bfloat16).cuda()


def assert_close(found: torch.Tensor, x: torch.Tensor, weight: BlockScaledTensor) -> None:
    """Both operands are E4M3: about 3.7 % of relative error, and no more."""
    wanted = x.double() @ dequantize(weight).double().T
    assert float((found.double() - wanted).norm() / wanted.norm()) < 0.04


@cache
def start_profiler() -> None:
    """A process's first session warns, which is an error in tests; later ones are quiet."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]):
            torch.ones(1, device="cuda").add_(1)
            torch.cuda.synchronize()


def kernels(run: Callable[[], object]) -> list[str]:
    """Names of everything that ran on the GPU, in order of start."""
    start_profiler()
    run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        run()
        torch.cuda.synchronize()
    on_gpu = [e for e in recorded.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return [e.name for e in sorted(on_gpu, key=lambda e: e.time_range.start)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("m", [4, 128])
def test_a_forward_is_one_quantize_and_one_gemm_kernel(name: str, m: int) -> None:
    layer, x = layer_of(name), activation(m)
    names = kernels(lambda: layer(x))
    assert len(names) == 2, names
    assert "quantize_kernel" in names[0]
    assert "quantize" not in names[1]


@pytest.mark.parametrize("name", NAMES)
def test_a_replayed_graph_is_the_same_two_kernels(name: str) -> None:
    layer, x = layer_of(name), activation(128)
    graph, _ = captured(layer, x)
    names = kernels(graph.replay)
    assert len(names) == 2, names
    assert "quantize_kernel" in names[0]


@pytest.mark.parametrize("name", ["triton", "gluon"])
@pytest.mark.parametrize("m", [1, 7])
def test_any_token_count_is_two_kernels_with_our_own(name: str, m: int) -> None:
    layer, x = layer_of(name, torch.ones(N).cuda()), activation(m)
    assert len(kernels(lambda: layer(x))) == 2


def captured(
    layer: BlockScaledLinear, x: torch.Tensor
) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        layer(x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer(x)
    return graph, out


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("m", [1, 33, 128])
def test_a_captured_graph_serves_new_activations_and_new_weights(name: str, m: int) -> None:
    layer, x = layer_of(name), activation(m)
    graph, out = captured(layer, x)
    graph.replay()
    assert torch.equal(out, layer(x))
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(out, layer(x))
    layer.update(weight_of(seed=5))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, layer(x))
    assert_close(out, x, weight_of(seed=5))


@pytest.mark.parametrize("name", NAMES)
def test_compiles_without_graph_breaks(name: str) -> None:
    layer = layer_of(name, torch.ones(N).cuda())
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for m in (2, 33, 128):
        x = activation(m)
        assert torch.equal(compiled(x), layer(x))


@pytest.mark.parametrize("name", NAMES)
def test_a_forward_leaves_nothing_in_memory(name: str) -> None:
    """Not at a token count's first call either: that may be a graph's, with a pool of its own."""
    layer_of(name)(activation(4))  # A provider may keep a workspace, one for all its layers.
    layer = layer_of(name, torch.ones(N).cuda())
    inputs = [activation(m) for m in (1, 4, 33, 128)]
    gc.collect()  # What earlier tests left in cycles is not to be freed in between.
    before = torch.cuda.memory_allocated()
    for x in inputs:
        layer(x)
        assert torch.cuda.memory_allocated() == before


@pytest.mark.filterwarnings("ignore")  # Inductor advises on speed.
@pytest.mark.parametrize("name", NAMES)
def test_compiles_with_inductor_s_own_graphs(name: str) -> None:
    """It runs, captures and replays. What stays in a graph's pool and is no result is an error."""
    layer = layer_of(name, torch.ones(N).cuda())
    compiled = torch.compile(layer, fullgraph=True, mode="reduce-overhead")
    for _ in range(4):
        x = torch.randn(33, K, device="cuda").to(torch.bfloat16)
        with torch.inference_mode():
            assert torch.equal(compiled(x), layer(x))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(), (1,), (2, 7), (3, 1, 43), (0,), (2, 0)], ids=str)
def test_any_leading_axes(name: str, shape: tuple[int, ...]) -> None:
    layer, x = layer_of(name), activation(*shape)
    found = layer(x)
    assert found.shape == (*shape, N)
    if x.numel():
        assert_close(found, x, weight_of())


@pytest.mark.parametrize("name", NAMES)
def test_another_stream_waits_for_nobody_else(name: str) -> None:
    """Everything is enqueued on the stream that is current: it sees what that stream wrote."""
    layer, x = layer_of(name), activation(64)
    expected = layer(x)
    torch.cuda.synchronize()
    slow = torch.randn(8192, 8192, device="cuda")
    stream = torch.cuda.Stream()
    for _ in range(3):
        late = torch.zeros_like(x)
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            for _ in range(4):
                slow @ slow
            late.copy_(x)
            found = layer(late)
        stream.synchronize()
        assert torch.equal(found, expected)


@pytest.mark.parametrize("name", NAMES)
def test_rows_that_lie_apart(name: str) -> None:
    layer, wide = layer_of(name), torch.randn(9, 3 * K, device="cuda").to(torch.bfloat16)
    for view in (wide[:, :K], wide[:, 5 : 5 + K], wide[::2, K : 2 * K]):
        assert torch.equal(layer(view), layer(view.contiguous()))
