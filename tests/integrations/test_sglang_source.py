"""The SGLang plugin against SGLang's own sources, on a CPU: `make test-sglang`.

SGLang does not import without CUDA packages, so its classes are taken out of its files and run
where they need no GPU: the real hook registry patches the real linear method, which creates,
loads, processes and applies a real linear layer. What cannot run is read: signatures and calls.
"""

from __future__ import annotations

import ast
import importlib
import sys
from pathlib import Path
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

pytestmark = pytest.mark.engine

CACHE = Path(__file__).resolve().parent.parent.parent / ".cache" / "sglang"
VERSIONS = ("0.5.12", "0.5.13")
PACKAGES = ("sglang", "sglang.srt", "sglang.srt.layers", "sglang.srt.layers.quantization")
N, K = 192, 256


@pytest.fixture(params=VERSIONS)
def source(request: pytest.FixtureRequest) -> Path:
    """The unpacked package of one version."""
    folder = CACHE / request.param / "sglang" / "srt"
    assert folder.is_dir(), f"{folder} is missing; fetch it with python tools/sglang_source.py"
    return folder


@pytest.fixture
def sglang(source: Path) -> Iterator[SimpleNamespace]:
    """SGLang's registry, linear layers and FP8 method, out of its own files."""
    before = set(sys.modules)
    for name in PACKAGES:
        package = ModuleType(name)
        package.__path__ = [str(source.parent.joinpath(*name.split(".")[1:]))]
        sys.modules[name] = package
    stub("sglang.srt.debug_utils.cuda_coredump")
    stub("sglang.srt.layers.moe.fused_moe_triton", FusedMoE=type("FusedMoE", (), {}))
    stub("sglang.srt.layers.radix_attention", RadixAttention=type("RadixAttention", (), {}))
    auto = SimpleNamespace(value="auto", is_auto=lambda: True)
    stub("sglang.srt.layers.quantization.fp8_utils", get_fp8_gemm_runner_backend=lambda: auto)
    linear = extracted(
        source / "layers" / "linear.py",
        "sglang.srt.layers.linear",
        ("LinearBase", "ReplicatedLinear"),
        wrap_method_with_debug_kernel_once=lambda *_, **__: None,
        set_weight_attrs=lambda *_: None,
        _is_npu=False,
    )
    fp8 = extracted(
        source / "layers" / "quantization" / "fp8.py",
        plugin.MODULE,
        ("Fp8Config", "Fp8LinearMethod"),
        QuantizationConfig=object,
        LinearMethodBase=object,
        ACTIVATION_SCHEMES=["static", "dynamic"],
        logger=None,
        log_info_on_rank0=lambda *_: None,
        envs=importlib.import_module("sglang.srt.environ").envs,
        is_layer_skipped=lambda *_, **__: False,
        cutlass_fp8_supported=lambda: False,
        dispatch_w8a8_block_fp8_linear=lambda: fallback,
        get_tensor_model_parallel_world_size=lambda: 1,
        ModelWeightParameter=parameter,
        BlockQuantScaleParameter=parameter,
        use_intel_amx_backend=lambda _: False,
        _is_cuda=False,
    )
    engine.situation.cache_clear()
    plugins = importlib.import_module("sglang.srt.plugins")
    yield SimpleNamespace(fp8=fp8, linear=linear, plugins=plugins)
    engine.situation.cache_clear()
    for name in set(sys.modules) - before:
        if name.partition(".")[0] == "sglang":
            del sys.modules[name]


def stub(name: str, **contents: object) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(contents)
    sys.modules[name] = module
    return module


def parameter(data: torch.Tensor, **attributes: object) -> nn.Parameter:
    """SGLang's parameter classes without the sharding that they add."""
    made = nn.Parameter(data, requires_grad=False)
    for name in ("input_dim", "output_dim", "weight_loader"):
        setattr(made, name, attributes[name])
    return made


def fallback(**_: object) -> torch.Tensor:
    return torch.full((1,), -1.0)


def extracted(path: Path, name: str, classes: tuple[str, ...], **needed: object) -> ModuleType:
    """A module of that name with only these classes of the file, and the names that they need."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    future = ast.parse("from __future__ import annotations").body
    bodies = [node for node in tree.body if getattr(node, "name", None) in classes]
    assert len(bodies) == len(classes)
    module = stub(name, torch=torch, Parameter=nn.Parameter, Module=nn.Module, **needed)
    code = compile(ast.Module([*future, *bodies], []), str(path), "exec")
    exec(code, vars(module))  # noqa: S102 - SGLang's own classes
    return module


def loaded_layer(sglang: SimpleNamespace, seed: int = 0) -> Any:
    """A layer as SGLang makes one, with weights loaded and not yet processed."""
    config = sglang.fp8.Fp8Config(is_checkpoint_fp8_serialized=True, weight_block_size=[128, 128])
    layer = sglang.linear.ReplicatedLinear(
        K,
        N,
        params_dtype=torch.bfloat16,
        quant_config=config,
        prefix="model.layers.0.mlp.up_proj",
    )
    values = torch.randn(N, K, generator=torch.Generator().manual_seed(seed))
    weight = quantize(values, FP8_128X128_FP32)
    layer.weight_loader(layer.weight, weight.data)
    layer.weight_loader(layer.weight_scale_inv, weight.scales)
    layer.weight_loader(layer.bias, torch.arange(N).to(torch.bfloat16))
    return layer


def entry(sglang: SimpleNamespace, found: list[object]) -> None:
    """SGLang's own discovery and its hooks, with these entry points installed."""
    vars(sglang.plugins)["entry_points"] = lambda group: (
        found if group == "sglang.srt.plugins" else []
    )
    sglang.plugins.load_plugins()


BLOCKSCALE = SimpleNamespace(
    name="blockscale",
    value="blockscale.integrations.sglang_plugin:register",
    dist=SimpleNamespace(name="blockscale"),
    load=lambda: plugin.register,
)


def test_sglangs_own_layer_loads_and_runs_by_plan(sglang: SimpleNamespace) -> None:
    entry(sglang, [BLOCKSCALE])
    layer = loaded_layer(sglang)
    layer.quant_method.process_weights_after_loading(layer)
    x = torch.randn(5, K, dtype=torch.bfloat16)
    out, output_bias = layer(x)
    (plan,) = plugin.plan_of(layer).layers
    assert plan.name == "model.layers.0.mlp.up_proj"
    assert plan.request.has_bias
    weight = engine.block_scaled(layer.weight, layer.weight_scale_inv, (128, 128))
    assert output_bias is None
    assert torch.equal(out, BlockScaledLinear(plan, weight, layer.bias)(x))


def test_a_second_load_is_served_from_the_same_storage(sglang: SimpleNamespace) -> None:
    entry(sglang, [BLOCKSCALE])
    layer, other = loaded_layer(sglang), loaded_layer(sglang, seed=1)
    for each in (layer, other):
        each.quant_method.process_weights_after_loading(each)
    place = layer.block_scaled_linear.data.data_ptr()
    layer.weight_loader(layer.weight, other.weight.data)
    layer.weight_loader(layer.weight_scale_inv, other.weight_scale_inv.data)
    layer.quant_method.process_weights_after_loading(layer)
    x = torch.randn(2, K, dtype=torch.bfloat16)
    assert layer.block_scaled_linear.data.data_ptr() == place
    assert torch.equal(layer(x)[0], other(x)[0])


def test_uninstalled_the_methods_are_sglangs_own(sglang: SimpleNamespace) -> None:
    method = sglang.fp8.Fp8LinearMethod
    own = (method.process_weights_after_loading, method.apply)
    entry(sglang, [])
    assert (method.process_weights_after_loading, method.apply) == own
    layer = loaded_layer(sglang)
    assert not hasattr(layer, "block_scaled_linear")
    assert torch.equal(layer(torch.zeros(1, K))[0], fallback())


def test_the_signatures_are_those_that_are_hooked(source: Path) -> None:
    fp8 = ast.parse((source / "layers" / "quantization" / "fp8.py").read_text(encoding="utf-8"))
    assert parameters(fp8, "Fp8Config", "get_quant_method") == ["self", "layer", "prefix"]
    method = "Fp8LinearMethod"
    assert parameters(fp8, method, "process_weights_after_loading") == ["self", "layer"]
    assert parameters(fp8, method, "apply") == ["self", "layer", "x", "bias"]
    assigned = {
        node.attr
        for node in ast.walk(function(fp8, method, "__init__"))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
    }
    assert {
        "quant_config",
        "block_quant",
        "use_mxfp8",
        "use_marlin",
        "is_checkpoint_fp8_serialized",
    } <= assigned


def test_plugins_load_before_the_scheduler_builds_a_model(source: Path) -> None:
    path = source / "managers" / "scheduler.py"
    run = function(ast.parse(path.read_text(encoding="utf-8")), None, "run_scheduler_process")
    lines = {
        ast.unparse(node.func): node.lineno for node in ast.walk(run) if isinstance(node, ast.Call)
    }
    assert lines["load_plugins"] < lines["Scheduler"]


def test_weights_sent_as_tensors_are_not_processed_again(source: Path) -> None:
    """Why docs/clients/sglang.md limits that way of updating."""
    path = source / "model_executor" / "model_runner.py"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    body = ast.unparse(function(tree, "ModelRunner", "update_weights_from_tensor"))
    assert "self.model.load_weights(named_tensors)" in body
    assert "process_weights_after_loading" not in body


def function(tree: ast.Module, owner: str | None, name: str) -> ast.FunctionDef:
    scopes = [node for node in tree.body if getattr(node, "name", None) == owner] if owner else []
    body = scopes[0].body if scopes else tree.body
    (found,) = [n for n in body if isinstance(n, ast.FunctionDef) and n.name == name]
    return found


def parameters(tree: ast.Module, owner: str, name: str) -> list[str]:
    return [argument.arg for argument in function(tree, owner, name).args.args]
