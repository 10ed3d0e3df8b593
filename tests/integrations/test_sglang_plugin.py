"""The SGLang plugin's own logic, without SGLang: what it takes, what it leaves, what it says.

The real sources are in test_sglang_source.py.
"""

from __future__ import annotations

import logging
import sys
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from blockscale.formats import FP8_128X128_FP32
from blockscale.integrations import engine
from blockscale.integrations import sglang_plugin as plugin
from blockscale.modules.linear import BlockScaledLinear
from blockscale.reference import quantize

if TYPE_CHECKING:
    from collections.abc import Iterator

N, K = 192, 256


class Registry:
    """SGLang's HookRegistry, as far as it is called."""

    registered: list[tuple[str, Any, str]]

    def register(self, target: str, hook: Any, hook_type: str) -> None:
        self.registered.append((target, hook, hook_type))


@pytest.fixture(autouse=True)
def sglang(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """Modules with SGLang's names; the chosen GEMM backend is ``auto``."""
    registry = Registry()
    registry.registered = []
    state = SimpleNamespace(registry=registry, backend="auto")

    def backend() -> SimpleNamespace:
        return SimpleNamespace(value=state.backend, is_auto=lambda: state.backend == "auto")

    contents = {
        "sglang.srt.plugins.hook_registry": {
            "HookRegistry": registry,
            "HookType": SimpleNamespace(AFTER="after", AROUND="around"),
        },
        "sglang.srt.layers.quantization.fp8_utils": {"get_fp8_gemm_runner_backend": backend},
    }
    paths = {path[:end] for path in contents for end in range(len(path)) if path[end] == "."}
    for name in paths | set(contents):
        module = ModuleType(name)
        vars(module).update(contents.get(name, {}))
        monkeypatch.setitem(sys.modules, name, module)
    engine.situation.cache_clear()
    engine._EXPLAINED.clear()
    yield state
    engine.situation.cache_clear()


def method(**changes: Any) -> SimpleNamespace:
    """SGLang's Fp8LinearMethod, as far as it is read."""
    facts: dict[str, Any] = {
        "block_quant": True,
        "use_mxfp8": False,
        "use_marlin": False,
        "is_checkpoint_fp8_serialized": True,
        "quant_config": SimpleNamespace(weight_block_size=[128, 128]),
    }
    return SimpleNamespace(**{**facts, **changes})


class Layer(nn.Module):
    """SGLang's LinearBase after loading, as far as it is read."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        values = torch.randn(N, K, generator=torch.Generator().manual_seed(seed))
        self.tensor = quantize(values, FP8_128X128_FP32)
        self.weight = nn.Parameter(self.tensor.data, requires_grad=False)
        self.weight_scale_inv = nn.Parameter(self.tensor.scales, requires_grad=False)
        self.orig_dtype = torch.bfloat16
        self.logical_widths = [128, 64]
        self.bias = None


def never(*_: Any) -> Any:
    pytest.fail("SGLang's own code ran")


def test_three_methods_are_hooked(sglang: SimpleNamespace) -> None:
    plugin.register()
    assert [
        (target.rpartition("fp8.")[2], kind) for target, _, kind in sglang.registry.registered
    ] == [
        ("Fp8Config.get_quant_method", "after"),
        ("Fp8LinearMethod.process_weights_after_loading", "around"),
        ("Fp8LinearMethod.apply", "around"),
    ]


def test_a_layer_is_named_planned_logged_and_run(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "blockscale")
    layer = Layer()
    assert plugin.name_layer("kept", None, layer, prefix="model.layers.0.qkv_proj") is None
    plugin.process_weights(never, method(), layer)
    assert "model.layers.0.qkv_proj: N=192 (128+64) K=256" in caplog.text
    (plan,) = plugin.plan_of(nn.Sequential(layer, nn.Linear(2, 2))).layers
    x = torch.randn(3, K, dtype=torch.bfloat16)
    expected = BlockScaledLinear(plan, layer.tensor)(x)
    assert torch.equal(plugin.apply(never, method(), layer, x), expected)


def test_the_prepared_weight_is_no_buffer_of_the_model() -> None:
    """SGLang clones every buffer when it frees memory."""
    layer = Layer()
    plugin.process_weights(never, method(), layer)
    assert not list(layer.named_buffers())
    assert layer.block_scaled_linear.data.data_ptr() == layer.weight.data_ptr()


def test_a_second_load_goes_into_the_same_storage(caplog: pytest.LogCaptureFixture) -> None:
    layer, other = Layer(), Layer(seed=1)
    plugin.process_weights(never, method(), layer)
    caplog.set_level(logging.INFO, "blockscale")
    linear, place = layer.block_scaled_linear, layer.block_scaled_linear.data.data_ptr()
    layer.weight.data.copy_(other.weight)
    layer.weight_scale_inv.data.copy_(other.weight_scale_inv)
    plugin.process_weights(never, method(), layer)
    assert layer.block_scaled_linear is linear
    assert linear.data.data_ptr() == place
    x = torch.randn(2, K, dtype=torch.bfloat16)
    plugin.process_weights(never, method(), other)
    assert torch.equal(
        plugin.apply(never, method(), layer, x), plugin.apply(never, method(), other, x)
    )


@pytest.mark.parametrize(
    ("changes", "backend", "words"),
    [
        ({"block_quant": False}, "auto", ""),
        ({"use_mxfp8": True}, "auto", "MXFP8"),
        ({"is_checkpoint_fp8_serialized": False}, "auto", "not FP8 on disk"),
        ({"use_marlin": True}, "auto", "Marlin"),
        ({}, "deep_gemm", "SGLang was told to use deep_gemm"),
    ],
)
def test_what_stays_with_sglang(
    sglang: SimpleNamespace,
    caplog: pytest.LogCaptureFixture,
    changes: dict[str, bool],
    backend: str,
    words: str,
) -> None:
    caplog.set_level(logging.INFO, "blockscale")
    sglang.backend = backend
    assert _left_to_sglang(Layer(), **changes)
    assert words in caplog.text


def test_scales_that_other_code_reads_raw_stay_with_sglang() -> None:
    layer = Layer()
    layer.weight_scale_inv.format_ue8m0 = True
    assert _left_to_sglang(layer)


def test_scales_that_sglang_already_packed_stay_with_sglang(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "blockscale")
    layer = Layer()
    packed = torch.zeros(N, 1, dtype=torch.int32)
    layer.weight_scale_inv = nn.Parameter(packed, requires_grad=False)
    assert _left_to_sglang(layer)
    assert "scales are torch.int32" in caplog.text


def test_a_layer_without_backend_stays_with_sglang(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "blockscale")
    monkeypatch.setenv("BLOCKSCALE_BACKENDS", "deep_gemm")
    assert _left_to_sglang(Layer())
    assert "stays with the engine: deep_gemm: runs on sm_90" in caplog.text


def _left_to_sglang(layer: Layer, **changes: Any) -> bool:
    """Whether SGLang's own processing and apply run for the layer."""
    calls: list[str] = []
    facts = method(**changes)
    plugin.process_weights(lambda *_: calls.append("process"), facts, layer)
    plugin.apply(lambda *_: calls.append("apply"), facts, layer, torch.zeros(1, K))
    return calls == ["process", "apply"]
