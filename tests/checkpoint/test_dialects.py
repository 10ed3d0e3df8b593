"""Every dialect of docs/checkpoints.md: names, shapes, formats, values and contradictions."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from blockscale.checkpoint.declared import SchemeKind
from blockscale.checkpoint.inspect import inspect_checkpoint
from blockscale.checkpoint.read import MODELOPT_NAME, Checkpoint, read_checkpoint
from blockscale.checkpoint.schema import Foreign, Layers, read_layers
from blockscale.checkpoint.tensors import read_block_scaled
from blockscale.checkpoint.verify import verify_checkpoint
from blockscale.errors import CheckpointError
from blockscale.formats import PowerOfTwo
from blockscale.reference import dequantize

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

GENERATOR = np.random.default_rng(0)


def codes(*shape: int) -> torch.Tensor:
    """E4M3 codes of every kind but NaN."""
    raw = GENERATOR.integers(0, 256, shape, np.uint8)
    raw[(raw & 0x7F) == 0x7F] = 0x7E
    return torch.from_numpy(raw).view(torch.float8_e4m3fn)


def exponents(*shape: int) -> torch.Tensor:
    return torch.from_numpy(GENERATOR.integers(100, 140, shape, np.uint8))


def e8m0(*shape: int) -> torch.Tensor:
    return exponents(*shape).view(torch.float8_e8m0fnu)


def floats(*shape: int) -> torch.Tensor:
    return torch.from_numpy(GENERATOR.uniform(0.001, 2.0, shape).astype(np.float32))


def packed(*shape: int) -> torch.Tensor:
    return torch.from_numpy(GENERATOR.integers(-128, 128, shape, np.int8))


def bf16(*shape: int) -> torch.Tensor:
    return floats(*shape).to(torch.bfloat16)


def group(strategy: str, **more: object) -> dict[str, Any]:
    weights = {"num_bits": 8, "type": "float", "strategy": strategy, **more}
    return {"targets": ["Linear"], "weights": weights}


def compressed(**groups: dict[str, Any]) -> dict[str, Any]:
    return {"quant_method": "compressed-tensors", "config_groups": groups}


V3 = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
}
V4 = {**V3, "scale_fmt": "ue8m0", "expert_dtype": "fp4"}
BLOCK = {"block_structure": [128, 128]}
FP32, UE8M0, BF16 = (f"e4m3fn/128x128/{scale}" for scale in ("fp32", "ue8m0", "bf16"))


@dataclass
class Dialect:
    """Tensors and declarations, and what must be read from them."""

    tensors: dict[str, torch.Tensor]
    quantized: dict[str, str]
    config: dict[str, Any] | None = None
    modelopt: dict[str, Any] | None = None
    foreign: dict[str, SchemeKind] = field(default_factory=dict)
    findings: set[str] = field(default_factory=set)


DIALECTS = {
    "DeepSeek-V3: ragged kv_a, router in bf16": Dialect(
        {
            "model.layers.0.self_attn.kv_a_proj_with_mqa.weight": codes(576, 256),
            "model.layers.0.self_attn.kv_a_proj_with_mqa.weight_scale_inv": floats(5, 2),
            "model.layers.0.mlp.gate.weight": bf16(8, 256),
        },
        {"model.layers.0.self_attn.kv_a_proj_with_mqa": FP32},
        V3,
    ),
    "DeepSeek-V3.1: declares ue8m0, stores float32": Dialect(
        {"o_proj.weight": codes(256, 128), "o_proj.weight_scale_inv": floats(2, 1)},
        {"o_proj": FP32},
        {**V3, "scale_fmt": "ue8m0"},
        findings={"ue8m0_stored_as_float"},
    ),
    "DeepSeek-V4-Flash: .scale in E8M0, experts in packed FP4": Dialect(
        {
            "layers.0.attn.wo_a.weight": codes(256, 128),
            "layers.0.attn.wo_a.scale": e8m0(2, 1),
            "layers.0.attn_norm.weight": bf16(128),
            "layers.0.ffn.experts.0.w1.weight": packed(64, 64),
            "layers.0.ffn.experts.0.w1.scale": e8m0(64, 4),
            "embed.weight": bf16(16, 128),
        },
        {"layers.0.attn.wo_a": UE8M0},
        V4,
        foreign={"layers.0.ffn.experts.0.w1": SchemeKind.FP4},
        findings={"other_quantization"},
    ),
    "DeepSeek-V4-Flash-Base: the same keys, float32 scales, FP8 experts": Dialect(
        {
            "layers.0.ffn.experts.0.w1.weight": codes(256, 128),
            "layers.0.ffn.experts.0.w1.scale": floats(2, 1),
        },
        {"layers.0.ffn.experts.0.w1": FP32},
        V4,
        findings={"expert_dtype_contradicted", "ue8m0_stored_as_float"},
    ),
    "DeepSeek-V4.1: 32x32 blocks": Dialect(
        {"wq_a.weight": codes(96, 80), "wq_a.scale": e8m0(3, 3)},
        {"wq_a": "e4m3fn/32x32/ue8m0"},
        {**V3, "weight_block_size": [32, 32], "scale_fmt": "ue8m0"},
    ),
    "MiniMax-M3: MXFP8 with U8 scales": Dialect(
        {"w1.weight": codes(48, 64), "w1.weight_scale": exponents(48, 2)},
        {"w1": "e4m3fn/1x32/ue8m0"},
        {"quant_method": "mxfp8", "weight_block_size": [1, 32], "ignored_layers": ["gate"]},
    ),
    "compressed-tensors block, float32": Dialect(
        {"a.weight": codes(200, 130), "a.weight_scale": floats(2, 2)},
        {"a": FP32},
        compressed(group_0=group("block", **BLOCK)),
    ),
    "compressed-tensors block, sizes in one word": Dialect(
        {"a.weight": codes(200, 130), "a.weight_scale": floats(4, 2)},
        {"a": "e4m3fn/64x128/fp32"},
        compressed(group_0=group("block", block_structure="64x128")),
    ),
    "compressed-tensors block, bf16 scales": Dialect(
        {"a.weight": codes(200, 130), "a.weight_scale": bf16(2, 2)},
        {"a": BF16},
        compressed(group_0=group("block", **BLOCK)),
    ),
    "float16 scales": Dialect(
        {"a.weight": codes(200, 130), "a.weight_scale_inv": floats(2, 2).half()},
        {"a": FP32},
        V3,
    ),
    "compressed-tensors MXFP8": Dialect(
        {"a.weight": codes(16, 64), "a.weight_scale": exponents(16, 2)},
        {"a": "e4m3fn/1x32/ue8m0"},
        compressed(group_0=group("group", group_size=32)),
    ),
    "compressed-tensors, two schemes": Dialect(
        {
            "a.q_proj.weight": codes(256, 128),
            "a.q_proj.weight_scale": floats(2, 1),
            "a.o_proj.weight": codes(256, 128),
            "a.o_proj.weight_scale": floats(256, 1),
        },
        {"a.q_proj": FP32},
        compressed(
            group_0={**group("channel")},
            group_1={**group("block", **BLOCK), "targets": ["re:.*q_proj$"]},
        ),
        foreign={"a.o_proj": SchemeKind.PER_CHANNEL_FP8},
        findings={"other_quantization"},
    ),
    "compressed-tensors, NVFP4 beside block FP8": Dialect(
        {
            "a.q_proj.weight": codes(256, 128),
            "a.q_proj.weight_scale": floats(2, 1),
            "a.up_proj.weight_packed": packed(32, 64).view(torch.uint8),
            "a.up_proj.weight_scale": codes(32, 8),
        },
        {"a.q_proj": FP32},
        compressed(
            group_0=group("block", **BLOCK),
            group_1={
                "targets": ["re:.*up_proj"],
                "weights": {"num_bits": 4, "type": "float", "strategy": "tensor_group"},
            },
        ),
        foreign={"a.up_proj": SchemeKind.FP4},
        findings={"other_quantization"},
    ),
    "ModelOpt FP8_PB_WO: 4-D scales, its own file": Dialect(
        {"a.weight": codes(200, 130), "a.weight_scale": floats(2, 1, 2, 1)},
        {"a": FP32},
        modelopt={
            "producer": {"name": "modelopt", "version": "0.47.0"},
            "quantization": {"quant_algo": "FP8_PB_WO", "exclude_modules": ["lm_head"]},
        },
    ),
    "ModelOpt fp8_pb_wo in config.json, 2-D scales": Dialect(
        {"a.weight": codes(200, 130), "a.weight_scale": floats(2, 2)},
        {"a": FP32},
        {"quant_method": "modelopt", "quant_algo": "fp8_pb_wo", "ignore": ["lm_head"]},
    ),
    "ModelOpt MXFP8": Dialect(
        {"a.weight": codes(16, 64), "a.weight_scale": exponents(16, 2)},
        {"a": "e4m3fn/1x32/ue8m0"},
        modelopt={"quantization": {"quant_algo": "MXFP8"}},
    ),
    "ModelOpt, mixed": Dialect(
        {
            "a.weight": codes(200, 130),
            "a.weight_scale": floats(2, 1, 2, 1),
            "b.weight": codes(8, 8),
            "b.weight_scale": floats(),
        },
        {"a": FP32},
        modelopt={
            "quantization": {
                "quant_algo": "MIXED_PRECISION",
                "quantized_layers": {"a": {"quant_algo": "FP8_PB_WO"}, "b": {"quant_algo": "FP8"}},
            }
        },
        foreign={"b": SchemeKind.PER_TENSOR_FP8},
        findings={"other_quantization"},
    ),
    "Step-3.5: fused experts, expert first": Dialect(
        {
            "model.layers.4.moe.down_proj.weight": codes(3, 200, 130),
            "model.layers.4.moe.down_proj.weight_scale_inv": floats(3, 2, 2),
        },
        {"model.layers.4.moe.down_proj": FP32},
        V3,
    ),
    "inkling: w13_weight with w13_weight_scale": Dialect(
        {"experts.w13_weight": codes(2, 256, 128), "experts.w13_weight_scale": floats(2, 2, 1)},
        {"experts.w13_weight": FP32},
        V3,
    ),
    "Mistral Large 4: qscale_weight": Dialect(
        {"a.weight": codes(128, 128), "a.qscale_weight": floats(1, 1)}, {"a": FP32}, V3
    ),
    "saved by transformers": Dialect(
        {
            "model.layers.0.mlp.experts.gate_up_proj": codes(2, 256, 128),
            "model.layers.0.mlp.experts.gate_up_proj_scale_inv": floats(2, 2, 1),
            "model.layers.0.self_attn.q_proj.weight": codes(128, 128),
            "model.layers.0.self_attn.q_proj.weight_scale_inv": floats(1, 1),
        },
        {
            "model.layers.0.mlp.experts.gate_up_proj": FP32,
            "model.layers.0.self_attn.q_proj": FP32,
        },
        {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "dequantize": False,
            "modules_to_not_convert": None,
            "scale_fmt": "float",
            "weight_block_size": [128, 128],
        },
    ),
    "a quantized embedding table": Dialect(
        {
            "model.embed_tokens.weight": codes(128, 128),
            "model.embed_tokens.weight_scale_inv": floats(1, 1),
            "a.weight": codes(128, 128),
            "a.weight_scale_inv": floats(1, 1),
        },
        {"a": FP32},
        {**V3, "modules_to_convert": ["model.embed_tokens"]},
        foreign={"model.embed_tokens": SchemeKind.TABLE},
        findings={"other_quantization"},
    ),
    "a quantized embedding table that nobody declares": Dialect(
        {
            "transformer.wte.weight": codes(128, 128),
            "transformer.wte.weight_scale_inv": floats(1, 1),
            "a.weight": codes(128, 128),
            "a.weight_scale_inv": floats(1, 1),
        },
        {"a": FP32},
        V3,
        foreign={"transformer.wte": SchemeKind.TABLE},
        findings={"other_quantization"},
    ),
    "a per-channel layer where blocks are declared": Dialect(
        {
            "a.weight": codes(256, 128),
            "a.weight_scale_inv": floats(2, 1),
            "b.weight": codes(256, 128),
            "b.weight_scale_inv": floats(256, 1),
        },
        {"a": FP32},
        V3,
        foreign={"b": SchemeKind.PER_CHANNEL_FP8},
        findings={"other_than_declared"},
    ),
    "scales for activations, though declared dynamic": Dialect(
        {
            "a.weight": codes(128, 128),
            "a.weight_scale_inv": floats(1, 1),
            "a.input_scale": floats(),
        },
        {"a": FP32},
        V3,
        findings={"activation_scales"},
    ),
    "E8M0 that nobody declares": Dialect(
        {"a.weight": codes(128, 128), "a.weight_scale_inv": e8m0(1, 1)},
        {"a": UE8M0},
        V3,
        findings={"undeclared_ue8m0"},
    ),
}


def write(folder: Path, dialect: Dialect) -> Checkpoint:
    folder.mkdir()
    save_file(dialect.tensors, folder / "model.safetensors")
    config = {} if dialect.config is None else {"quantization_config": dialect.config}
    (folder / "config.json").write_text(json.dumps(config))
    if dialect.modelopt is not None:
        (folder / MODELOPT_NAME).write_text(json.dumps(dialect.modelopt))
    return read_checkpoint(folder)


def multiplier(scale: torch.Tensor) -> NDArray[np.float64]:
    """What a stored scale multiplies by, restated without the library."""
    if scale.dtype in (torch.uint8, torch.float8_e8m0fnu):
        return 2.0 ** (scale.view(torch.uint8).numpy().astype(np.float64) - 127)
    return scale.double().numpy()


def expected(dialect: Dialect, layers: Layers) -> dict[str, NDArray[np.float64]]:
    """Code times scale of its block, element by element, in float64."""
    found = {}
    for layer in layers.quantized:
        weight = dialect.tensors[layer.weight.name].view(torch.uint8).numpy()
        values = weight.view(ml_dtypes.float8_e4m3fn).astype(np.float64)
        rows, columns = np.arange(layer.n), np.arange(layer.k)
        block = layer.format.block
        scale = multiplier(dialect.tensors[layer.scale.name])
        grid = scale.reshape(*values.shape[:-2], *block.grid(layer.n, layer.k))
        found[layer.name] = values * grid[..., rows[:, None] // block.mn, columns // block.k]
    return found


@pytest.mark.parametrize("name", DIALECTS)
def test_layers_and_findings(name: str, tmp_path: Path) -> None:
    dialect = DIALECTS[name]
    inspection = inspect_checkpoint(write(tmp_path / "x", dialect))
    layers = inspection.layers
    assert {layer.name: layer.format.name for layer in layers.quantized} == dialect.quantized
    assert {layer.name: layer.kind for layer in layers.foreign} == dialect.foreign
    assert {finding.code for finding in inspection.findings} == dialect.findings


@pytest.mark.parametrize("name", DIALECTS)
def test_values_are_code_times_scale(name: str, tmp_path: Path) -> None:
    dialect = DIALECTS[name]
    layers = read_layers(write(tmp_path / "x", dialect), Foreign.REPORT)
    for layer in layers.quantized:
        values = dequantize(read_block_scaled(layer)).numpy()
        wanted = expected(dialect, layers)[layer.name]
        np.testing.assert_array_equal(values, wanted.astype(np.float32))


@pytest.mark.parametrize("name", [name for name, dialect in DIALECTS.items() if dialect.foreign])
def test_who_would_run_it_is_told_what_it_cannot_run(name: str, tmp_path: Path) -> None:
    dialect = DIALECTS[name]
    with pytest.raises(CheckpointError, match="not block FP8") as caught:
        read_layers(write(tmp_path / "x", dialect))
    (first, *_) = dialect.foreign
    assert caught.value.tensor is not None
    assert caught.value.tensor.startswith(first)


def test_fp4_experts_are_counted_in_values(tmp_path: Path) -> None:
    dialect = DIALECTS["DeepSeek-V4-Flash: .scale in E8M0, experts in packed FP4"]
    (expert,) = inspect_checkpoint(write(tmp_path / "x", dialect)).foreign
    assert (expert.n, expert.k, expert.scale_dtype) == (64, 128, "F8_E8M0")


def test_stacked_scales_of_split_experts(tmp_path: Path) -> None:
    """Transformers 5.24 saves a matrix for each expert, and the scales of all in one tensor."""
    stacks = {
        "m.experts.gate_up_proj_scale_inv": floats(2, 4, 3),
        "m.experts.down_proj_scale_inv": floats(2, 3, 2),
    }
    shapes = {"gate_proj": (256, 384), "up_proj": (256, 384), "down_proj": (384, 256)}
    experts = {
        f"m.experts.{index}.{leaf}.weight": codes(*shape)
        for index in range(2)
        for leaf, shape in shapes.items()
    }
    checkpoint = write(tmp_path / "x", Dialect({**stacks, **experts}, {}, V3))
    layers = {layer.name: layer for layer in read_layers(checkpoint).quantized}
    assert len(layers) == 6
    gate_up, down = (stack.clone() for stack in stacks.values())
    for index in range(2):
        wanted = {
            "gate_proj": gate_up[index, :2],
            "up_proj": gate_up[index, 2:],
            "down_proj": down[index],
        }
        for leaf, scale in wanted.items():
            layer = layers[f"m.experts.{index}.{leaf}"]
            assert layer.is_scale_shared
            assert torch.equal(read_block_scaled(layer).scales, scale)
    third = {**stacks, **experts, "m.experts.2.up_proj.weight": codes(256, 384)}
    with pytest.raises(CheckpointError, match=r"experts\.2\.up_proj.*has no scale"):
        read_layers(write(tmp_path / "y", Dialect(third, {}, V3)))


def test_glm_4_5_is_named_per_channel_and_not_planned(tmp_path: Path) -> None:
    dialect = Dialect(
        {"a.weight": codes(256, 128), "a.weight_scale": bf16(256, 1)},
        {},
        compressed(group_0=group("channel")),
        foreign={"a": SchemeKind.PER_CHANNEL_FP8},
    )
    checkpoint = write(tmp_path / "x", dialect)
    inspection = inspect_checkpoint(checkpoint)
    assert [finding.code for finding in inspection.findings] == ["other_quantization"]
    for policy in Foreign:
        with pytest.raises(CheckpointError, match="per-channel FP8"):
            read_layers(checkpoint, policy)


def test_declared_ue8m0_that_is_not_is_found_by_reading(tmp_path: Path) -> None:
    """DeepSeek-V3.1's o_proj (DeepSeek-V3 issue 961): ue8m0 declared, mantissa 1.3229 stored."""
    scale = torch.full((2, 1), 1.3229) * 2.0**-12
    tensors = {"o_proj.weight": codes(256, 128), "o_proj.weight_scale_inv": scale}
    checkpoint = write(tmp_path / "x", Dialect(tensors, {}, {**V3, "scale_fmt": "ue8m0"}))
    result = verify_checkpoint(checkpoint)
    assert [finding.code for finding in result.findings] == ["declared_ue8m0"]
    assert result.layers[0].scales.power_of_two is PowerOfTwo.NO


def test_two_declarations_that_differ(tmp_path: Path) -> None:
    tensors = {"a.weight": codes(256, 128), "a.weight_scale_inv": floats(2, 1)}
    modelopt = {"quantization": {"quant_algo": "MXFP8", "exclude_modules": ["lm_head"]}}
    layers = read_layers(write(tmp_path / "x", Dialect(tensors, {}, V3, modelopt)))
    (finding,) = layers.findings
    assert finding.code == "two_declarations"
    for word in ("config.json", MODELOPT_NAME, "128x128", "1x32", "lm_head"):
        assert word in finding.message


def test_every_problem_is_counted_and_the_rest_is_shown(tmp_path: Path) -> None:
    tensors = {
        "a.weight": codes(256, 128),
        "a.weight_scale_inv": floats(2, 1),
        "b.weight": codes(256, 128),
        "b.weight_scale_inv": floats(3, 1),
        "c.weight": codes(256, 128),
    }
    checkpoint = write(tmp_path / "x", Dialect(tensors, {}, V3))
    with pytest.raises(CheckpointError, match=r"b\.weight_scale_inv.*the first of 2"):
        read_layers(checkpoint)
    inspection = inspect_checkpoint(checkpoint)
    assert [group.example for group in inspection.groups] == ["a"]
    assert [f.code for f in inspection.findings] == ["unreadable_layer"] * 2
    result = verify_checkpoint(checkpoint)
    assert result.has_fault
    assert [layer.name for layer in result.layers] == ["a"]
