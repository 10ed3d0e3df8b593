"""From stored weights to planned layers: merging, cutting, famous models."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file

from blockscale.checkpoint.read import read_checkpoint
from blockscale.checkpoint.requests import (
    Merging,
    RequestOptions,
    Requests,
    dtype_of_config,
    requests_of,
)
from blockscale.checkpoint.schema import read_layers
from blockscale.errors import CheckpointError
from blockscale.formats import DType, PowerOfTwo
from blockscale.planning.sharding import Parallelism
from blockscale.testing.model_shapes import (
    ModelShape,
    deepseek_v3,
    minimax_m25,
    qwen3_8b,
    write_model_headers,
)

if TYPE_CHECKING:
    from pathlib import Path

    from blockscale.planning.request import LinearRequest


# The first three are dense, the others alike.
DEEPSEEK_LAYERS = 8


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for model in (minimax_m25(layers=1), deepseek_v3(layers=DEEPSEEK_LAYERS), qwen3_8b()):
        made[model.name] = tmp_path_factory.mktemp("shapes") / model.name
        write_model_headers(made[model.name], model)
    return made


def requests(folder: Path, tensor: int = 1, expert: int = 1, **more: object) -> Requests:
    checkpoint = read_checkpoint(folder)
    options = RequestOptions(DType.BFLOAT16, Parallelism(tensor, expert), **more)
    return requests_of(checkpoint, read_layers(checkpoint), options)


def by_leaf(found: Requests) -> dict[str, LinearRequest]:
    return {request.name.rpartition(".")[2]: request for request in found.requests}


def test_deepseek_v3_is_merged_as_engines_merge_it(folders: dict[str, Path]) -> None:
    found = requests(folders["DeepSeek-V3"])
    leaves = by_leaf(found)
    assert leaves["fused_qkv_a_proj"].parts == (1536, 576)
    assert leaves["w13"].experts == 256
    assert (leaves["w13"].n, leaves["w13"].k) == (4096, 7168)
    assert (leaves["w2"].n, leaves["w2"].k) == (7168, 2048)
    assert len(found.requests) == 8 * 4 + 3 * 2 + 5 * 4
    assert found.findings == ()


def test_minimax_at_tp8_has_the_shapes_of_the_fact_table(folders: dict[str, Path]) -> None:
    leaves = by_leaf(requests(folders["MiniMax-M2.5"], 8))
    assert (leaves["qkv_proj"].n, leaves["qkv_proj"].k) == (1024, 3072)
    assert (leaves["o_proj"].n, leaves["o_proj"].k) == (3072, 768)
    assert (leaves["w13"].n, leaves["w13"].k) == (384, 3072)
    assert (leaves["w2"].n, leaves["w2"].k) == (3072, 192)
    assert {leaf for leaf, r in leaves.items() if r.shard.split_blocks} == {"w13", "w2"}


def test_ranks_share_key_heads_but_no_query_head(folders: dict[str, Path]) -> None:
    """MiniMax has 48 query heads and 8 key heads: TP 16 shares the latter, TP 96 is refused."""
    assert by_leaf(requests(folders["MiniMax-M2.5"], 16))["qkv_proj"].parts == (384, 128, 128)
    for merging in Merging:
        found = requests(folders["MiniMax-M2.5"], 96, 32, merging=merging)
        refused = {finding.layer for finding in found.findings if finding.code == "indivisible"}
        query = "qkv_proj" if merging is Merging.ENGINE else "q_proj"
        assert f"model.layers.0.self_attn.{query}" in refused


def test_module_merging_keeps_every_stored_weight(folders: dict[str, Path]) -> None:
    found = requests(folders["Qwen3-8B-FP8"], merging=Merging.MODULE)
    assert len(found.requests) == 36 * 7
    assert all(len(request.parts) == 1 for request in found.requests)


def test_headers_leave_powers_of_two_unknown(folders: dict[str, Path]) -> None:
    found = requests(folders["Qwen3-8B-FP8"])
    assert {request.power_of_two for request in found.requests} == {PowerOfTwo.UNKNOWN}


def test_what_reading_scales_found_is_joined_over_parts(folders: dict[str, Path]) -> None:
    prefix = "model.layers.0.mlp"
    known = {f"{prefix}.gate_proj": PowerOfTwo.YES, f"{prefix}.up_proj": PowerOfTwo.NO}
    leaves = {r.name: r for r in requests(folders["Qwen3-8B-FP8"], power_of_two=known).requests}
    assert leaves[f"{prefix}.gate_up_proj"].power_of_two is PowerOfTwo.NO


def fp8_layer(name: str, n: int, k: int) -> dict[str, torch.Tensor]:
    return {
        f"{name}.weight": torch.zeros(n, k).to(torch.float8_e4m3fn),
        f"{name}.weight_scale_inv": torch.ones(-(-n // 128), -(-k // 128)),
    }


def write(folder: Path, *layers: tuple[str, int, int]) -> Path:
    folder.mkdir()
    tensors: dict[str, torch.Tensor] = {}
    for layer in layers:
        tensors |= fp8_layer(*layer)
    save_file(tensors, folder / "model.safetensors")
    quantization = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps({"quantization_config": quantization}))
    return folder


def test_parts_that_end_inside_a_block_are_planned_apart(tmp_path: Path) -> None:
    """SmolLM2: q has 576 rows, four and a half blocks, and k follows."""
    names = [f"layers.0.self_attn.{leaf}" for leaf in ("q_proj", "k_proj", "v_proj")]
    folder = write(tmp_path / "x", (names[0], 576, 576), (names[1], 192, 576), (names[2], 192, 576))
    found = requests(folder)
    assert sorted(request.name for request in found.requests) == sorted(names)
    (finding,) = found.findings
    assert finding.code == "not_merged"
    assert "576 rows of q_proj" in finding.message


def test_parts_of_different_k_are_planned_apart(tmp_path: Path) -> None:
    folder = write(tmp_path / "x", ("mlp.gate_proj", 256, 256), ("mlp.up_proj", 256, 512))
    found = requests(folder)
    assert {request.name for request in found.requests} == {"mlp.gate_proj", "mlp.up_proj"}
    assert [finding.code for finding in found.findings] == ["not_merged"]


def test_experts_of_different_shape_are_an_error_that_names_them(tmp_path: Path) -> None:
    folder = write(tmp_path / "x", ("mlp.experts.0.w2", 256, 256), ("mlp.experts.1.w2", 256, 128))
    with pytest.raises(CheckpointError, match=r"experts\.1\.w2"):
        requests(folder)


@pytest.mark.parametrize("listed", [["mlp.experts.1.w2"], None])
def test_an_expert_left_in_float_is_an_error_that_names_it(
    tmp_path: Path, listed: list[str] | None
) -> None:
    """Planned without it, the stack would be one short, and expert 2 be found as expert 1."""
    folder = write(tmp_path / "x", *((f"mlp.experts.{i}.w2", 256, 256) for i in range(3)))
    tensors = load_file(folder / "model.safetensors")
    tensors["mlp.experts.1.w2.weight"] = torch.ones(256, 256, dtype=torch.bfloat16)
    del tensors["mlp.experts.1.w2.weight_scale_inv"]
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["modules_to_not_convert"] = listed
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"experts\.1\.w2': is BF16: .*quantize them alike"):
        requests(folder)


def test_experts_may_keep_one_projection_in_float(tmp_path: Path) -> None:
    """All down projections are: they are a stack of their own, which is not planned."""
    names = [f"mlp.experts.{index}.{leaf}" for index in range(2) for leaf in ("w1", "w2", "w3")]
    folder = write(tmp_path / "x", *((name, 256, 256) for name in names))
    tensors = load_file(folder / "model.safetensors")
    for index in range(2):
        tensors[f"mlp.experts.{index}.w2.weight"] = torch.ones(256, 256, dtype=torch.bfloat16)
        del tensors[f"mlp.experts.{index}.w2.weight_scale_inv"]
    save_file(tensors, folder / "model.safetensors")
    (request,) = requests(folder).requests
    assert (request.name, request.experts, request.n) == ("mlp.experts.w13", 2, 512)


def test_experts_are_counted_by_the_numbers_that_engines_write(tmp_path: Path) -> None:
    """No engine asks for expert 02: it is neither a fifth expert nor another 2."""
    names = [f"mlp.experts.{index}.w2" for index in ("0", "1", "2", "02")]
    found = requests(write(tmp_path / "x", *((name, 256, 256) for name in names)))
    counts = {request.name: request.experts for request in found.requests}
    assert counts == {"mlp.experts.w2": 3, "mlp.experts.02.w2": None}


def test_unknown_projections_under_tp_are_a_note(tmp_path: Path) -> None:
    found = requests(write(tmp_path / "x", ("mixer.in_proj", 256, 256)), 2)
    assert [finding.code for finding in found.findings] == ["unknown_projection"]
    assert found.requests[0].n == 256


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        ({"dtype": "float16"}, DType.FLOAT16),
        ({"torch_dtype": "float32"}, DType.FLOAT32),
        ({"text_config": {"dtype": "float16"}}, DType.FLOAT16),
        ({}, DType.BFLOAT16),
    ],
)
def test_dtype_of_config(tmp_path: Path, config: dict[str, object], dtype: DType) -> None:
    write_model_headers(tmp_path, ModelShape("tiny", config, qwen3_8b().tensors[:1]))
    assert dtype_of_config(read_checkpoint(tmp_path)) is dtype


def test_a_dtype_that_no_layer_runs_in_is_refused(tmp_path: Path) -> None:
    write_model_headers(tmp_path, ModelShape("tiny", {"dtype": "int4"}, qwen3_8b().tensors[:1]))
    with pytest.raises(CheckpointError, match="int4"):
        dtype_of_config(read_checkpoint(tmp_path))
