"""A planned layer, named by its weight: called eagerly, traced, and not found."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

import pytest
import torch

from blockscale.backends.registry import BACKENDS
from blockscale.errors import BackendError
from blockscale.formats import FP8_128X128_FP32, DType
from blockscale.integrations.weight_operator import linear_of, name_by_weight
from blockscale.modules.linear import BlockScaledLinear
from blockscale.planning.planner import plan_linear
from blockscale.planning.policy import PlanPolicy
from blockscale.planning.request import LinearRequest
from blockscale.probe import detect_device
from blockscale.reference import quantize

if TYPE_CHECKING:
    from blockscale.tensor import BlockScaledTensor

N, K = 192, 256
DTYPE = torch.bfloat16


def planned(seed: int) -> tuple[BlockScaledTensor, BlockScaledLinear]:
    values = torch.randn(N, K, generator=torch.Generator().manual_seed(seed))
    weight = quantize(values, FP8_128X128_FP32)
    request = LinearRequest(f"layer {seed}", N, K, weight.format, DType.BFLOAT16, DType.BFLOAT16)
    plan = plan_linear(request, detect_device(), PlanPolicy(), BACKENDS)
    linear = BlockScaledLinear(plan, weight)
    name_by_weight(weight.data, linear)
    return weight, linear


@pytest.mark.parametrize("shape", [(3,), (2, 5), (0,)])
def test_the_weight_names_its_plan(shape: tuple[int, ...]) -> None:
    weight, linear = planned(0)
    x = torch.randn(*shape, K, dtype=DTYPE)
    assert torch.equal(linear_of(x, weight.data, None, DTYPE), linear(x))


def test_a_bias_is_added_before_rounding() -> None:
    weight, linear = planned(0)
    with_bias = BlockScaledLinear(linear.plan, weight, torch.arange(N) / 7)
    x = torch.randn(3, K, dtype=DTYPE)
    assert with_bias.bias is not None
    assert torch.equal(linear_of(x, weight.data, with_bias.bias, DTYPE), with_bias(x))


def test_two_layers_of_one_shape_are_one_traced_graph() -> None:
    graphs = []

    def keep(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    @torch.compile(backend=keep, fullgraph=True)
    def layer(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return linear_of(x, weight, None, DTYPE) + 1

    x = torch.randn(4, K, dtype=DTYPE)
    for seed in (0, 1):
        weight, linear = planned(seed)
        assert torch.equal(layer(x, weight.data), linear(x) + 1)
    (graph,) = graphs
    assert torch.ops.blockscale.linear_of in {node.target for node in graph.graph.nodes}


def test_a_weight_that_moved_is_an_error_and_not_another_layer() -> None:
    weight, _linear = planned(0)
    with pytest.raises(BackendError, match="no plan is known for this 192x256 weight"):
        linear_of(torch.randn(1, K, dtype=DTYPE), weight.data.clone(), None, DTYPE)


def test_a_layer_that_died_is_forgotten() -> None:
    weight, linear = planned(0)
    del linear
    gc.collect()
    with pytest.raises(BackendError, match="no plan is known"):
        linear_of(torch.randn(1, K, dtype=DTYPE), weight.data, None, DTYPE)
