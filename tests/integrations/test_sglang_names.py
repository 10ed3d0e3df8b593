"""SGLang's functions, against a truth table of their documented conditions."""

from __future__ import annotations

import gc
from itertools import product

import pytest
import torch
from torch import nn

from blockscale.errors import FormatError, ModelError, PlanError
from blockscale.formats import FP8_128X128_FP32, FP8_128X128_UE8M0, BlockFormat, ScaleFormat
from blockscale.integrations import sglang
from blockscale.planning.device import Device
from blockscale.planning.plan import Conversion
from blockscale.reference import dequantize, quantize

DEVICES = ("cpu", "sm_89", "sm_90", "sm_100", "sm_103", "sm_120")
BLOCKS = (None, (128, 128), (64, 128), (1, 128))
DTYPES = (None, torch.bfloat16, torch.float16, torch.float32)
SHAPES = (None, (64, 128), (576, 7168), (4096, 7168), (96, 128), (128, 192))


@pytest.mark.parametrize(("device", "block"), list(product(DEVICES, BLOCKS)), ids=str)
def test_should_requant_truth_table(device: str, block: tuple[int, int] | None) -> None:
    """PR #22300: DeepGEMM wants UE8M0 here, and can run this very layer."""
    for dtype, shape in product(DTYPES, SHAPES):
        expected = (
            device in {"sm_100", "sm_103"}
            and block == (128, 128)
            and dtype in {None, torch.bfloat16}
            and (shape is None or (shape[0] % 64 == 0 and shape[1] % 128 == 0))
        )
        found = sglang.should_deepgemm_weight_requant_ue8m0(
            block, dtype, shape, Device.named(device)
        )
        assert found is expected, (dtype, shape)


def test_should_requant_needs_deep_gemm_installed() -> None:
    bare = Device.named("sm_100").with_packages(("torch", "2.11.0"))
    assert not sglang.should_deepgemm_weight_requant_ue8m0((128, 128), device=bare)


def test_should_requant_refuses_a_dtype_that_is_no_float() -> None:
    with pytest.raises(FormatError):
        sglang.should_deepgemm_weight_requant_ue8m0((128, 128), torch.int8)


class Layer(nn.Module):
    """The attributes of an SGLang linear layer after loading."""

    def __init__(self, n: int, k: int, dtype: torch.dtype, fmt: BlockFormat, seed: int = 0) -> None:
        super().__init__()
        values = torch.randn(n, k, generator=torch.Generator().manual_seed(seed))
        tensor = quantize(values, fmt)
        self.weight = nn.Parameter(tensor.data, requires_grad=False)
        self.weight_scale_inv = nn.Parameter(tensor.scales, requires_grad=False)
        self.weight_block_size = [128, 128]
        self.orig_dtype = dtype
        self.bias = None


@pytest.mark.parametrize("fmt", [FP8_128X128_FP32, FP8_128X128_UE8M0], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_processed_layer_runs(dtype: torch.dtype, fmt: BlockFormat) -> None:
    layer = Layer(192, 320, dtype, fmt)
    processed = sglang.process_weights_after_loading_block_quant(layer)
    x = torch.randn(3, 320).to(dtype)
    exact = x.double() @ dequantize(quantize(_floats(192, 320), fmt)).double().T
    out = layer.block_scaled_linear(x)
    assert processed.linear is layer.block_scaled_linear
    assert out.dtype is dtype
    assert (out.double() - exact).norm() / exact.norm() < 0.01


def _floats(n: int, k: int) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(0))


def test_a_second_load_serves_the_new_weights_from_the_same_storage() -> None:
    """The latch of SGLang #30749: the second load was silently served in the wrong format."""
    layer = Layer(192, 320, torch.float32, FP8_128X128_FP32)
    first = sglang.process_weights_after_loading_block_quant(layer).linear
    place = first.data.data_ptr()
    other = Layer(192, 320, torch.float32, FP8_128X128_FP32, seed=1)
    layer.weight.data.copy_(other.weight)
    layer.weight_scale_inv.data.copy_(other.weight_scale_inv)
    second = sglang.process_weights_after_loading_block_quant(layer).linear
    assert second is first
    assert second.data.data_ptr() == place
    fresh = sglang.process_weights_after_loading_block_quant(other).linear
    x = torch.randn(2, 320)
    assert torch.equal(second(x), fresh(x))


def test_post_load_weights_plans_every_block_layer_on_its_own_shape() -> None:
    model = nn.ModuleDict(
        {
            "a": Layer(192, 320, torch.float32, FP8_128X128_FP32),
            "b": Layer(256, 256, torch.bfloat16, FP8_128X128_UE8M0),
            "norm": nn.LayerNorm(4),
        }
    )
    plan = sglang.post_load_weights(model)
    assert [(layer.request.n, layer.request.k) for layer in plan.layers] == [(192, 320), (256, 256)]
    assert not hasattr(model["norm"], "block_scaled_linear")


def test_powers_of_two_are_read_not_guessed() -> None:
    layer = Layer(128, 128, torch.bfloat16, FP8_128X128_UE8M0)
    layer.weight_scale_inv = nn.Parameter(layer.weight_scale_inv.float(), requires_grad=False)
    plan = sglang.process_weights_after_loading_block_quant(layer).plan
    assert plan.request.format.scale is ScaleFormat.FP32
    assert plan.request.power_of_two.value == "yes"
    assert plan.conversion is Conversion.NONE


def test_with_fallback_decides_once_for_each_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    decisions = []
    decide = sglang._decide

    def counted(*arguments: object) -> object:
        decisions.append(1)
        return decide(*arguments)

    monkeypatch.setattr(sglang, "_decide", counted)
    layer = Layer(192, 320, torch.float32, FP8_128X128_FP32)
    bias = torch.ones(192)
    call = sglang.flashinfer_gemm_w8a8_block_fp8_linear_with_fallback
    for m in (1, 5, 1):
        x = torch.randn(2, m, 320)
        out = call(x, layer.weight, [128, 128], layer.weight_scale_inv, None, bias)
        assert out.shape == (2, m, 192)
    assert len(decisions) == 1
    call(torch.randn(1, 320).half(), layer.weight, [128, 128], layer.weight_scale_inv)
    assert len(decisions) == 2


def test_with_fallback_knows_scales_by_where_they_lie() -> None:
    """An object per call (``.data``) is the same plan; other scales are another one, always."""
    layer = Layer(128, 128, torch.float32, FP8_128X128_FP32)
    call = sglang.flashinfer_gemm_w8a8_block_fp8_linear_with_fallback
    x = torch.randn(1, 128)
    once = call(x, layer.weight, [128, 128], layer.weight_scale_inv.data)
    call(x, layer.weight, [128, 128], layer.weight_scale_inv.data)
    assert len(sglang._DECIDED[layer.weight]) == 1
    for factor in (2, 4, 8):  # Each is freed before the next is made, often at the same address.
        scales = layer.weight_scale_inv.data * factor
        assert torch.equal(call(x, layer.weight, [128, 128], scales), once * factor)
        del scales


def test_with_fallback_answers_in_the_dtype_of_its_input() -> None:
    layer = Layer(128, 128, torch.bfloat16, FP8_128X128_FP32)
    call = sglang.flashinfer_gemm_w8a8_block_fp8_linear_with_fallback
    x, bias = torch.zeros(1, 128, dtype=torch.bfloat16), torch.ones(128)
    out = call(x, layer.weight, [128, 128], layer.weight_scale_inv, None, bias)
    assert torch.equal(out, torch.ones(1, 128, dtype=torch.bfloat16))


def test_with_fallback_forgets_freed_weights() -> None:
    gc.collect()
    before = len(sglang._DECIDED)
    layer = Layer(128, 128, torch.float32, FP8_128X128_FP32)
    call = sglang.flashinfer_gemm_w8a8_block_fp8_linear_with_fallback
    call(torch.randn(1, 128), layer.weight, [128, 128], layer.weight_scale_inv)
    assert len(sglang._DECIDED) == before + 1
    del layer
    gc.collect()
    assert len(sglang._DECIDED) == before


def test_float32_scales_cannot_pass_as_ue8m0_nor_the_reverse() -> None:
    """Bytes of one format handed over as the other are a FormatError, not a wrong answer."""
    layer = Layer(128, 256, torch.float32, FP8_128X128_FP32)
    call = sglang.flashinfer_gemm_w8a8_block_fp8_linear_with_fallback
    packed = torch.full((128, 1), 0x7F7F7F7F, dtype=torch.int32)
    with pytest.raises(FormatError, match="float32"):
        call(torch.randn(1, 256), layer.weight, [128, 128], packed)
    with pytest.raises(FormatError, match="shape"):
        call(torch.randn(1, 256), layer.weight, [64, 128], layer.weight_scale_inv)


def test_input_scales_are_refused() -> None:
    layer = Layer(128, 128, torch.float32, FP8_128X128_FP32)
    call = sglang.flashinfer_gemm_w8a8_block_fp8_linear_with_fallback
    x = torch.randn(1, 128)
    with pytest.raises(ModelError, match="input_scale"):
        call(x, layer.weight, [128, 128], layer.weight_scale_inv, torch.ones(1))


def test_layers_that_are_no_block_layers_are_named() -> None:
    with pytest.raises(ModelError, match="Linear is no block-FP8 layer"):
        sglang.process_weights_after_loading_block_quant(nn.Linear(4, 4))
    layer = Layer(128, 128, torch.float32, FP8_128X128_FP32)
    del layer.orig_dtype
    with pytest.raises(ModelError, match="orig_dtype"):
        sglang.process_weights_after_loading_block_quant(layer)


def test_a_layer_that_nothing_may_serve_says_why() -> None:
    from blockscale.planning.policy import PlanPolicy

    layer = Layer(128, 128, torch.float32, FP8_128X128_FP32)
    with pytest.raises(PlanError, match="deep_gemm"):
        sglang.process_weights_after_loading_block_quant(
            layer, policy=PlanPolicy(backends=("deep_gemm",))
        )
