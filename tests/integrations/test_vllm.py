"""The vLLM plugin's own logic, without vLLM: what it reads from vLLM's objects and what it says.

The engine itself is in test_vllm_engine.py.
"""

from __future__ import annotations

import logging
import sys
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from blockscale.errors import FormatError
from blockscale.formats import FP8_128X128_FP32, FP8_128X128_UE8M0, BlockFormat, DType
from blockscale.integrations import engine
from blockscale.integrations import vllm as plugin
from blockscale.planning.request import ShardStyle
from blockscale.reference import quantize

if TYPE_CHECKING:
    from collections.abc import Iterator

    from blockscale.tensor import BlockScaledTensor

N, K = 192, 320


@pytest.fixture(autouse=True)
def _fresh_process() -> Iterator[None]:
    """Each test reads the environment anew and explains everything again."""
    engine.situation.cache_clear()
    engine._EXPLAINED.clear()
    yield
    engine.situation.cache_clear()


def config(
    block: tuple[int, int] = (128, 128),
    scales: torch.dtype = torch.float32,
    *,
    static: bool = False,
) -> Any:
    """A layer config of vLLM, FP8ScaledMMLinearLayerConfig, as far as it is read."""
    weight = SimpleNamespace(scale=SimpleNamespace(group_shape=block, dtype=scales, static=True))
    activation = SimpleNamespace(scale=SimpleNamespace(static=static))
    return SimpleNamespace(
        weight_quant_key=weight,
        activation_quant_key=activation,
        weight_shape=torch.Size((N, K)),
        input_dtype=torch.bfloat16,
        out_dtype=torch.bfloat16,
    )


class Layer(nn.Module):
    """vLLM's LinearBase after loading, as far as it is read."""

    def __init__(self, fmt: BlockFormat = FP8_128X128_FP32, seed: int = 0) -> None:
        super().__init__()
        values = torch.randn(N, K, generator=torch.Generator().manual_seed(seed))
        self.tensor = quantize(values, fmt)
        self.weight = nn.Parameter(self.tensor.data, requires_grad=False)
        self.weight_scale_inv = nn.Parameter(self.tensor.scales, requires_grad=False)
        self.prefix = "model.layers.7.mlp.gate_up_proj"
        self.logical_widths = [128, 64]
        self.bias: nn.Parameter | None = None


def test_the_request_is_what_vllm_knows_when_it_chooses() -> None:
    with plugin._named("model.layers.3.self_attn.o_proj"):
        request = plugin.request_of_config(config((64, 128)))
    assert request.name == "model.layers.3.self_attn.o_proj"
    assert (request.n, request.k, str(request.format)) == (N, K, "e4m3fn/64x128/fp32")
    assert request.activation_dtype is request.out_dtype is DType.BFLOAT16
    assert request.power_of_two.value == "unknown"


def test_the_name_is_known_only_while_vllm_chooses() -> None:
    method = SimpleNamespace()
    seen = []

    def create_weights(_method: object, _layer: nn.Module) -> None:
        seen.append(plugin.request_of_config(config()).name)

    plugin._naming(create_weights)(method, Layer())
    create_weights(method, Layer())
    assert seen == ["model.layers.7.mlp.gate_up_proj", "a layer of 192x320"]


def test_static_activation_scales_and_unknown_scales_are_refused() -> None:
    with pytest.raises(FormatError, match="static"):
        plugin.request_of_config(config(static=True))
    with pytest.raises(FormatError, match=r"scales are torch\.uint8"):
        plugin.request_of_config(config(scales=torch.uint8))


@pytest.mark.parametrize(
    ("fmt", "powers"), [(FP8_128X128_FP32, "no"), (FP8_128X128_UE8M0, "yes")], ids=str
)
def test_the_loaded_layer_completes_the_request(fmt: BlockFormat, powers: str) -> None:
    layer = Layer(fmt)
    layer.bias = nn.Parameter(torch.zeros(N))
    asked = plugin.request_of_config(config())
    request = plugin.request_of_layer(layer, layer.tensor, asked)
    assert request.name == layer.prefix
    assert request.parts == (128, 64)
    assert request.format == fmt
    assert request.power_of_two.value == powers
    assert request.has_bias
    assert request.shard.style is ShardStyle.WHOLE


@pytest.mark.parametrize(
    ("attributes", "style"),
    [({}, ShardStyle.COLUMN), ({"input_is_parallel": True}, ShardStyle.ROW)],
)
def test_shards_are_told_apart(attributes: dict[str, bool], style: ShardStyle) -> None:
    layer = Layer()
    for name, value in {**attributes, "tp_size": 4}.items():
        setattr(layer, name, value)
    request = plugin.request_of_layer(layer, layer.tensor, plugin.request_of_config(config()))
    assert (request.shard.style, request.shard.degree) == (style, 4)


def test_a_layer_without_backend_stays_with_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    request = plugin.request_of_config(config())
    assert not isinstance(engine.take(request), str)
    monkeypatch.setenv("BLOCKSCALE_BACKENDS", "deep_gemm")
    engine.situation.cache_clear()
    reason = engine.take(request)
    assert isinstance(reason, str)
    assert reason.startswith("deep_gemm: runs on sm_90")


def test_register_leaves_an_unknown_vllm_alone(caplog: pytest.LogCaptureFixture) -> None:
    """In the default environment vLLM is not installed at all."""
    logger = logging.getLogger("blockscale")
    parent = logger.parent
    try:
        logging.getLogger("vllm").addHandler(caplog.handler)
        plugin.register()
    finally:
        logger.parent = parent
        logging.getLogger("vllm").removeHandler(caplog.handler)
    assert "left as it is: No module named 'vllm" in caplog.text


@pytest.fixture
def kernel_class(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The kernel on a base class with vLLM's constructor, in modules with vLLM's names."""

    class Base:
        def __init__(self, config: Any) -> None:
            self.config = config
            self.weight_group_shape = config.weight_quant_key.scale.group_shape

        def _get_layer_params(self, layer: Layer) -> Any:
            return SimpleNamespace(
                weight=layer.weight, weight_scale_inv=layer.weight_scale_inv, weight_scale=None
            )

    vllm_config = SimpleNamespace(additional_config={})
    path = "vllm.model_executor.kernels.linear.scaled_mm.BlockScaledMMLinearKernel"
    modules = {
        "vllm": {"envs": SimpleNamespace(VLLM_BATCH_INVARIANT=False)},
        "vllm.config": {"get_current_vllm_config_or_none": lambda: vllm_config},
        "vllm.platforms": {
            "current_platform": SimpleNamespace(is_cuda=lambda: False, is_cpu=lambda: True)
        },
        path: {"Fp8BlockScaledMMLinearKernel": Base},
    }
    names = {path[:end] for end in range(len(path)) if path[end] == "."} | set(modules)
    for name in names:
        module = ModuleType(name)
        vars(module).update(modules.get(name, {}))
        monkeypatch.setitem(sys.modules, name, module)
    own = "blockscale.integrations.vllm_kernel"
    monkeypatch.delitem(sys.modules, own, raising=False)
    from blockscale.integrations.vllm_kernel import BlockscaleBlockFp8Kernel

    yield SimpleNamespace(cls=BlockscaleBlockFp8Kernel, vllm_config=vllm_config)
    sys.modules.pop(own, None)


def test_a_layer_is_planned_on_its_scales_and_runs(
    kernel_class: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "blockscale")
    kernel = kernel_class.cls(config())
    assert kernel_class.cls.is_supported() == (True, None)
    assert kernel_class.cls.can_implement(config()) == (True, None)
    assert kernel.plan is None
    layer = Layer()
    kernel.process_weights_after_loading(layer)
    assert kernel.plan.request.power_of_two.value == "no"
    x = torch.randn(3, K, dtype=torch.bfloat16)
    expected = _direct(kernel, layer.tensor)(x)
    assert torch.equal(kernel.apply_weights(layer, x), expected)
    layer.quant_method = SimpleNamespace(fp8_linear=kernel)
    assert plugin.plan_of(nn.Sequential(layer)).layers == (kernel.plan,)
    assert "model.layers.7.mlp.gate_up_proj: N=192 (128+64) K=320" in caplog.text
    assert "-> M >= 0: cpu; weight: none, used as stored" in caplog.text


def _direct(kernel: Any, weight: BlockScaledTensor) -> Any:
    from blockscale.modules.linear import BlockScaledLinear

    return BlockScaledLinear(kernel.plan, weight)


def test_reasons_are_logged_once_for_layers_that_are_alike(
    kernel_class: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "blockscale")
    for index in range(2):
        kernel = kernel_class.cls(config())
        layer = Layer()
        layer.prefix = f"model.layers.{index}.mlp.gate_up_proj"
        kernel.process_weights_after_loading(layer)
    assert caplog.text.count("not deep_gemm: runs on sm_90") == 1
    assert caplog.text.count("-> M >= 0: cpu") == 2


def test_a_second_load_goes_into_the_same_storage(kernel_class: Any) -> None:
    kernel = kernel_class.cls(config())
    layer, other = Layer(), Layer(seed=1)
    kernel.process_weights_after_loading(layer)
    x = torch.randn(2, K, dtype=torch.bfloat16)
    expected = _direct(kernel, other.tensor)(x)
    kernel.process_weights_after_loading(other)
    assert torch.equal(kernel.apply_weights(layer, x), expected)


def test_batch_invariance_is_not_promised(
    kernel_class: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["vllm"].envs, "VLLM_BATCH_INVARIANT", True)
    taken, reason = kernel_class.cls.can_implement(config())
    assert not taken
    assert "VLLM_BATCH_INVARIANT" in reason


@pytest.mark.parametrize(
    ("gigabytes", "group", "stays"), [(0, 0, False), (2, 0, True), (0, 8, True)]
)
def test_offloaded_weights_stay_with_vllm(
    kernel_class: Any, gigabytes: int, group: int, *, stays: bool
) -> None:
    kernel_class.vllm_config.offload_config = SimpleNamespace(
        uva=SimpleNamespace(cpu_offload_gb=gigabytes),
        prefetch=SimpleNamespace(offload_group_size=group),
    )
    taken, reason = kernel_class.cls.can_implement(config())
    assert taken is not stays
    assert stays == ("offloads weights" in (reason or ""))


def test_vllms_compile_cache_learns_which_layers_run_here(kernel_class: Any) -> None:
    """A graph compiled for another kernel must not be replayed: its key has to differ."""
    keys = []
    for names in (("a",), ("a", "b"), ("b", "a")):
        kernel_class.vllm_config.additional_config.clear()
        for name in names:
            with plugin._named(name):
                kernel_class.cls(config())
        keys.append(kernel_class.vllm_config.additional_config["blockscale"])
    assert len(set(keys)) == 3
