"""``BlockScaledLinear`` and its operator: what a model sees."""

from __future__ import annotations

import copy
import gc
import io
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from blockscale import ops
from blockscale.backends.registry import BACKENDS
from blockscale.errors import BackendError, ModelError, PlanError
from blockscale.formats import (
    FP8_128X128_FP32,
    FP8_128X128_UE8M0,
    BlockFormat,
    DType,
    PowerOfTwo,
    ScaleFormat,
)
from blockscale.modules.linear import BlockScaledLinear
from blockscale.planning.device import Device
from blockscale.planning.planner import plan_linear
from blockscale.planning.policy import Exactness, PlanPolicy
from blockscale.planning.request import LinearRequest
from blockscale.reference import dequantize, quantize
from blockscale.tensor import BlockScaledTensor, torch_dtype

if TYPE_CHECKING:
    from collections.abc import Callable

    from blockscale.planning.plan import LinearPlan

N, K = 192, 320
BACKEND_NAMES = ("cpu", "reference")


def plan_for(
    backend: str = "cpu",
    dtype: DType = DType.FLOAT32,
    fmt: BlockFormat = FP8_128X128_FP32,
    policy: PlanPolicy | None = None,
) -> LinearPlan:
    known = PowerOfTwo.YES if fmt.scale is ScaleFormat.UE8M0 else PowerOfTwo.NO
    request = LinearRequest("layer", N, K, fmt, dtype, dtype, known)
    policy = replace(policy or PlanPolicy(), backends=(backend,))
    return plan_linear(request, Device.named("cpu"), policy, BACKENDS)


def weight_of(fmt: BlockFormat = FP8_128X128_FP32, seed: int = 0) -> BlockScaledTensor:
    return quantize(torch.randn(N, K, generator=torch.Generator().manual_seed(seed)), fmt)


def activation(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, K, generator=torch.Generator().manual_seed(9)).to(dtype)


def close(result: torch.Tensor, x: torch.Tensor, weight: BlockScaledTensor) -> bool:
    """Within float32 sums for `cpu`; `reference` quantizes activations too, about 3 %."""
    exact = x.double() @ dequantize(weight).double().T
    return bool((result.double() - exact).norm() / exact.norm() < 0.04)


@pytest.mark.parametrize("backend", BACKEND_NAMES)
@pytest.mark.parametrize("fmt", [FP8_128X128_FP32, FP8_128X128_UE8M0], ids=str)
@pytest.mark.parametrize("dtype", list(DType))
@pytest.mark.parametrize("shape", [(1,), (33,), (2, 5), (2, 1, 3), ()], ids=str)
def test_forward(backend: str, fmt: BlockFormat, dtype: DType, shape: tuple[int, ...]) -> None:
    layer = BlockScaledLinear(plan_for(backend, dtype, fmt), weight_of(fmt))
    x = activation(*shape, dtype=torch_dtype(dtype))
    result = layer(x)
    assert result.shape == (*shape, N)
    assert result.dtype is torch_dtype(dtype)
    assert close(result, x, weight_of(fmt))


@pytest.mark.parametrize("backend", BACKEND_NAMES)
@pytest.mark.parametrize("shape", [(0,), (2, 0)], ids=str)
def test_no_tokens_give_an_empty_result(backend: str, shape: tuple[int, ...]) -> None:
    layer = BlockScaledLinear(plan_for(backend), weight_of())
    assert layer(activation(*shape)).shape == (*shape, N)


@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_bias_is_added_once(backend: str) -> None:
    bias = torch.arange(float(N))
    plan = plan_for(backend)
    plain, biased = BlockScaledLinear(plan, weight_of()), BlockScaledLinear(plan, weight_of(), bias)
    x = activation(3)
    assert torch.allclose(biased(x) - plain(x), bias.expand(3, N), atol=1e-3)


def test_bias_of_another_shape_is_refused() -> None:
    with pytest.raises(ModelError, match=rf"\({N},\)"):
        BlockScaledLinear(plan_for(), weight_of(), torch.zeros(N + 1))


def test_a_bias_on_another_device_is_refused() -> None:
    with pytest.raises(ModelError, match="bias is on meta, its weight on cpu"):
        BlockScaledLinear(plan_for(), weight_of(), torch.zeros(N, device="meta"))


def test_a_weight_without_values_is_refused() -> None:
    empty = weight_of().to("meta")
    with pytest.raises(PlanError, match="on the meta device"):
        BlockScaledLinear(plan_for(), empty)


@pytest.mark.parametrize("backend", BACKEND_NAMES)
@pytest.mark.parametrize("tokens", [2, 40])
def test_leading_axes_that_do_not_follow_one_another_are_served(backend: str, tokens: int) -> None:
    layer = BlockScaledLinear(plan_for(backend), weight_of())
    x = activation(3, tokens)
    for cut in (x[:, 1:], x[:, -1:], x.transpose(0, 1), x.expand(2, 3, tokens, K)):
        assert not cut.is_contiguous()
        result = layer(cut)
        assert result.shape == (*cut.shape[:-1], N)
        assert torch.equal(result, layer(cut.contiguous()))


def test_an_activation_on_another_device_is_refused() -> None:
    layer = BlockScaledLinear(plan_for(), weight_of())
    layer(activation(3))  # The shape is known then, and the device asked for all the same.
    with pytest.raises(BackendError, match="'layer' is on cpu, its activation on meta"):
        layer(activation(3).to("meta"))


def test_strided_activations_are_served() -> None:
    layer = BlockScaledLinear(plan_for(), weight_of())
    x = activation(4)
    turned = torch.stack([x, x]).permute(1, 2, 0).contiguous()[..., 0]
    assert turned.stride(-1) == 2
    assert torch.equal(layer(turned), layer(x))


@pytest.mark.parametrize(
    "x",
    [torch.zeros(1, K - 1), torch.zeros(1, K, dtype=torch.float16), torch.tensor(1.0)],
    ids=["K", "dtype", "axes"],
)
def test_an_activation_that_was_not_planned_is_refused(x: torch.Tensor) -> None:
    layer = BlockScaledLinear(plan_for(), weight_of())
    with pytest.raises(BackendError, match=r"planned for \(\.\.\., 320\) torch.float32"):
        layer(x)


def test_update_serves_the_new_weight_from_the_same_storage() -> None:
    layer = BlockScaledLinear(plan_for(), weight_of(seed=0))
    places = layer.data.data_ptr(), layer.scales.data_ptr()
    layer.update(weight_of(seed=1))
    assert (layer.data.data_ptr(), layer.scales.data_ptr()) == places
    x = activation(2)
    assert torch.equal(layer(x), BlockScaledLinear(plan_for(), weight_of(seed=1))(x))


def test_update_refuses_a_weight_that_was_not_planned() -> None:
    layer = BlockScaledLinear(plan_for(), weight_of())
    with pytest.raises(PlanError, match="plan again"):
        layer.update(quantize(torch.randn(N, K), FP8_128X128_UE8M0))


def test_half_touches_the_bias_alone_and_keeps_its_planned_dtype() -> None:
    layer = BlockScaledLinear(plan_for(), weight_of(), torch.ones(N)).half()
    assert layer.data.dtype is torch.float8_e4m3fn
    assert layer.scales.dtype is torch.float32
    assert layer.bias is not None
    assert layer.bias.dtype is torch.float32
    assert layer(activation(1)).dtype is torch.float32


def test_a_plan_without_backend_cannot_become_a_module() -> None:
    request = LinearRequest("layer", N, K, FP8_128X128_FP32, DType.FLOAT32, DType.FLOAT32)
    plan = plan_linear(request, Device.named("cpu"), PlanPolicy(backends=("deep_gemm",)), BACKENDS)
    with pytest.raises(PlanError, match="no backend"):
        BlockScaledLinear(plan, weight_of())


def test_a_weight_of_another_format_cannot_be_handed_in() -> None:
    with pytest.raises(PlanError, match="plan again"):
        BlockScaledLinear(plan_for(), weight_of(FP8_128X128_UE8M0))


def test_plan_only_backends_refuse_to_be_run() -> None:
    request = LinearRequest("layer", 128, 128, FP8_128X128_FP32, DType.BFLOAT16, DType.BFLOAT16)
    plan = plan_linear(
        request, Device.named("sm_120"), PlanPolicy(backends=("sgl_cutlass",)), BACKENDS
    )
    with pytest.raises(BackendError, match="sgl_cutlass"):
        BlockScaledLinear(plan, quantize(torch.ones(128, 128), FP8_128X128_FP32))


def test_requantizing_is_held_to_the_permitted_error() -> None:
    """A weight that would change by more than the policy says is refused at prepare."""
    from blockscale.modules.prepare import prepare_weight

    lossy = PlanPolicy(exactness=Exactness.ALLOW_LOSSY, max_relative_error=0.001)
    request = LinearRequest("layer", 256, 256, FP8_128X128_FP32, DType.BFLOAT16, DType.BFLOAT16)
    plan = plan_linear(
        request, Device.named("sm_100"), replace(lossy, backends=("deep_gemm",)), BACKENDS
    )
    weight = quantize(torch.randn(256, 256), FP8_128X128_FP32)
    with pytest.raises(PlanError, match=r"above the limit of 0\.10%"):
        prepare_weight(plan, weight, (), lossy)


@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_compiles_without_graph_breaks(backend: str) -> None:
    layer = BlockScaledLinear(plan_for(backend), weight_of(), torch.ones(N))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for m in (1, 5, 33):
        assert torch.equal(compiled(activation(m)), layer(activation(m)))


def test_operator_has_a_fake_of_the_same_shape_and_dtype() -> None:
    layer = BlockScaledLinear(plan_for(dtype=DType.BFLOAT16), weight_of())
    x = activation(2, 3, dtype=torch.bfloat16)
    torch.library.opcheck(
        torch.ops.blockscale.linear.default,
        (x, None, layer._handle),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_a_dropped_layer_releases_its_weight() -> None:
    layer = BlockScaledLinear(plan_for(), weight_of())
    handle = layer._handle
    assert handle in ops._BOUND
    del layer
    gc.collect()
    assert handle not in ops._BOUND


def test_repr_names_shape_format_and_backend() -> None:
    text = repr(BlockScaledLinear(plan_for(), weight_of()))
    assert "320, 192, e4m3fn/128x128/fp32, cpu (M >= 0)" in text


@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_the_activation_gets_the_gradient_of_the_dequantized_product(backend: str) -> None:
    layer = BlockScaledLinear(plan_for(backend), weight_of(), torch.ones(N))
    x = activation(2, 3).requires_grad_()
    out = layer(x)
    assert torch.equal(out.detach(), layer(x.detach()))
    upstream = torch.randn(2, 3, N, generator=torch.Generator().manual_seed(5))
    out.backward(upstream)
    assert x.grad is not None
    assert torch.equal(x.grad, upstream @ dequantize(weight_of()))


def test_no_graph_is_recorded_where_nothing_needs_one() -> None:
    layer = BlockScaledLinear(plan_for(), weight_of())
    assert layer(activation(2)).grad_fn is None
    with torch.no_grad():
        assert layer(activation(2).requires_grad_()).grad_fn is None


def saved_and_loaded(layer: BlockScaledLinear) -> BlockScaledLinear:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    loaded: BlockScaledLinear = torch.load(file, weights_only=False)
    return loaded


@pytest.mark.parametrize("copy_of", [copy.deepcopy, saved_and_loaded])
def test_a_copy_has_a_weight_of_its_own(
    copy_of: Callable[[BlockScaledLinear], BlockScaledLinear],
) -> None:
    layer = BlockScaledLinear(plan_for(), weight_of(), torch.ones(N))
    x = activation(2)
    expected = layer(x)
    copied = copy_of(layer)
    assert copied.data.data_ptr() == copied.weight.data.data_ptr() != layer.data.data_ptr()
    layer.update(weight_of(seed=1))
    assert torch.equal(copied(x), expected)
    del layer
    gc.collect()
    assert torch.equal(copied(x), expected)


def test_a_layer_stays_on_the_kind_of_device_it_was_planned_for() -> None:
    layer = BlockScaledLinear(plan_for(), weight_of())
    x = activation(2)
    expected = layer(x)
    with pytest.raises(ModelError, match="was planned for cpu, not for meta"):
        layer.to("meta")
    assert torch.equal(layer.to("cpu")(x), expected)


def test_only_the_prepared_form_is_taken_as_it_is() -> None:
    layer = BlockScaledLinear(plan_for(), weight_of())
    before = layer(activation(2))
    with pytest.raises(ModelError, match=r"is prepared as .*fp32.*, not as .*ue8m0"):
        layer.take(weight_of(FP8_128X128_UE8M0))
    with pytest.raises(ModelError, match="has no bias"):
        layer.take(weight_of(seed=1), torch.zeros(N))
    assert torch.equal(layer(activation(2)), before)
    layer.take(weight_of(seed=1))
    assert torch.equal(layer.data.view(torch.uint8), weight_of(seed=1).data.view(torch.uint8))


def test_what_a_shape_needs_is_looked_up_once() -> None:
    layer = BlockScaledLinear(plan_for(), weight_of())
    calls = ops.bound(layer.handle).calls
    x = activation(2, 3)
    first = layer(x)
    call = calls[x.shape]
    assert torch.equal(layer(x), first)
    assert calls[x.shape] is call
    assert call.template.untyped_storage().nbytes() == first.itemsize
    with pytest.raises(BackendError, match=r"planned for \(\.\.\., 320\) torch.float32"):
        layer(x.half())


def test_a_first_call_keeps_no_memory_of_its_own() -> None:
    """What it keeps lies in what was allocated when the layer was made."""
    layer = BlockScaledLinear(plan_for(), weight_of())
    bound = ops.bound(layer.handle)
    for shape in ((1,), (7,), (2, 3), (0,)):
        layer(activation(*shape))
    templates = [call.template for call in bound.calls.values()]
    assert len(templates) == 4
    assert {one.data_ptr() for one in templates if one.numel()} == {bound.one.data_ptr()}
    assert {one.untyped_storage().data_ptr() for one in templates} == {bound.one.data_ptr()}


def test_rows_that_lie_apart_are_served() -> None:
    layer = BlockScaledLinear(plan_for("reference"), weight_of())
    x = activation(4)
    apart = torch.cat([x, x], dim=1)[:, :K]
    assert apart.stride() == (2 * K, 1)
    assert torch.equal(layer(apart), layer(x))


def test_a_tracer_of_operators_sees_the_operator() -> None:
    layer = BlockScaledLinear(plan_for(), weight_of(), torch.ones(N))
    x = activation(3)
    traced = make_fx(layer)(x)
    assert "blockscale.linear" in traced.code
    assert torch.equal(traced(x), layer(x))


def test_a_fake_activation_gives_a_fake_result() -> None:
    layer = BlockScaledLinear(plan_for(), weight_of())
    with FakeTensorMode() as mode:
        result = layer(mode.from_tensor(activation(3)))
    assert isinstance(result, FakeTensor)
    assert result.shape == (3, N)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_goes_through_the_operator() -> None:
    layer = BlockScaledLinear(plan_for(), weight_of())
    x = activation(2, 3)
    assert torch.equal(torch.vmap(layer)(x), layer(x))


def test_a_bias_that_is_exchanged_for_a_call_is_the_one_that_counts() -> None:
    layer = BlockScaledLinear(plan_for(), weight_of(), torch.zeros(N))
    x = activation(2)
    exchanged = torch.func.functional_call(layer, {"bias": torch.ones(N)}, (x,))
    assert torch.allclose(exchanged, layer(x) + 1, atol=1e-5)


@pytest.mark.parametrize("bias", [torch.ones(N).half(), torch.ones(1)], ids=["dtype", "shape"])
def test_an_exchanged_bias_that_kernels_would_misread_is_refused(bias: torch.Tensor) -> None:
    layer = BlockScaledLinear(plan_for(), weight_of(), torch.zeros(N))
    with pytest.raises(BackendError, match=r"planned for a bias of \(\d+,\) torch\.float32"):
        torch.func.functional_call(layer, {"bias": bias}, (activation(2),))


def test_compiled_code_serves_a_bias_that_changes() -> None:
    layer = BlockScaledLinear(plan_for(), weight_of(), torch.zeros(N))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = activation(2)
    before = compiled(x)
    layer.take(layer.weight, torch.full((N,), 2.0))
    assert not torch.equal(compiled(x), before)
    assert torch.equal(compiled(x), layer(x))


@pytest.mark.parametrize("assign", [False, True])
def test_a_loaded_state_dict_is_what_runs(assign: bool) -> None:
    source = BlockScaledLinear(plan_for(), weight_of(seed=1), torch.ones(N))
    layer = BlockScaledLinear(plan_for(), weight_of(seed=0), torch.zeros(N))
    state = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    layer.load_state_dict(state, assign=assign)
    x = activation(2)
    assert torch.equal(layer(x), source(x))
    assert layer.data.data_ptr() == layer.weight.data.data_ptr()


@pytest.mark.parametrize("name", ["data", "scales"])
def test_what_kernels_read_cannot_be_replaced(name: str) -> None:
    layer = BlockScaledLinear(plan_for(), weight_of(), torch.zeros(N))
    before = getattr(layer, name)
    with pytest.raises(ModelError, match=rf"{name} is the memory .* update\(\) or load_state_dict"):
        setattr(layer, name, before.clone())
    assert getattr(layer, name) is before
    setattr(layer, name, before)
    without = layer(activation(2))
    layer.bias = torch.full((N,), 512.0)
    assert not torch.equal(layer(activation(2)), without)


def test_no_scale_is_rounded_by_loading_a_state_dict() -> None:
    layer = BlockScaledLinear(plan_for(), weight_of())
    before = layer.weight.scales.clone()
    state = layer.state_dict() | {"scales": torch.ones_like(before).to(torch.float8_e8m0fnu)}
    with pytest.raises(RuntimeError, match=r"dtype mismatch for scales: torch\.float8_e8m0fnu"):
        layer.load_state_dict(state)
    assert torch.equal(layer.weight.scales, before)


def test_a_graph_that_outlived_its_layer_says_so() -> None:
    layer = BlockScaledLinear(plan_for(), weight_of())
    handle = layer.handle
    del layer
    gc.collect()
    with pytest.raises(BackendError, match=f"no layer has the handle {handle} in this process"):
        torch.ops.blockscale.linear(activation(1), None, handle)
