"""How stored weights become layers where they do not simply merge: apart, fused, incomplete."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from blockscale.backends.registry import BACKENDS
from blockscale.checkpoint.read import read_checkpoint
from blockscale.checkpoint.requests import Merging, RequestOptions, Requests, requests_of
from blockscale.checkpoint.schema import read_layers
from blockscale.errors import CheckpointError
from blockscale.formats import BlockShape, DType
from blockscale.planning.device import Device
from blockscale.planning.plan import Severity
from blockscale.planning.planner import plan_model
from blockscale.planning.policy import PlanPolicy
from blockscale.planning.request import ShardStyle
from blockscale.planning.sharding import Parallelism
from blockscale.testing.model_shapes import ModelShape, TensorShape, write_model_headers

if TYPE_CHECKING:
    from pathlib import Path

BLOCK = BlockShape(128, 128)
ATTENTION = "model.layers.{}.self_attn.{}"
HEADS = {"num_attention_heads": 9, "num_key_value_heads": 3}


def fp8(name: str, *shape: int, scale: str = "F32") -> list[TensorShape]:
    grid = (*shape[:-2], *BLOCK.grid(*shape[-2:]))
    return [
        TensorShape(f"{name}.weight", "F8_E4M3", shape),
        TensorShape(f"{name}.weight_scale_inv", scale, grid),
    ]


def requests(
    folder: Path, tensors: list[TensorShape], tp: int = 1, ep: int = 1, **config: Any
) -> Requests:
    declared = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    merging = config.pop("merging", Merging.ENGINE)
    whole = ModelShape("m", {"quantization_config": declared, **config}, tuple(tensors))
    write_model_headers(folder, whole)
    checkpoint = read_checkpoint(folder)
    options = RequestOptions(DType.BFLOAT16, Parallelism(tp, ep), merging)
    return requests_of(checkpoint, read_layers(checkpoint), options)


def smollm2(layers: int = 30) -> list[TensorShape]:
    """SmolLM2-135M's attention: 9 heads of 64, 3 for keys and values; hidden size 576."""
    return [
        tensor
        for i in range(layers)
        for leaf, rows in (("q_proj", 576), ("k_proj", 192), ("v_proj", 192))
        for tensor in fp8(ATTENTION.format(i, leaf), rows, 576)
    ]


def test_smollm2_is_servable_with_one_note_for_all_layers(tmp_path: Path) -> None:
    found = requests(tmp_path, smollm2(), **HEADS)
    assert [request.name for request in found.requests[:3]] == [
        ATTENTION.format(0, leaf) for leaf in ("q_proj", "k_proj", "v_proj")
    ]
    assert len(found.requests) == 90
    (note,) = found.findings
    assert (note.severity, note.code, note.layer) == (Severity.NOTE, "not_merged", None)
    for words in ("qkv_proj", "30 layers", "576 rows of q_proj", "block of 128"):
        assert words in note.message
    plan = plan_model(found.requests, Device.named("sm_90"), PlanPolicy(), BACKENDS)
    assert plan.unservable == ()


def test_parts_kept_apart_are_still_cut(tmp_path: Path) -> None:
    found = requests(tmp_path, smollm2(1), tp=3, **HEADS)
    q, k, v = found.requests
    assert (q.n, k.n, v.n) == (192, 64, 64)
    assert {part.shard.style for part in (q, k, v)} == {ShardStyle.COLUMN}
    assert [len(part.shard.split_blocks) for part in (q, k, v)] == [1, 1, 1]


def test_one_note_for_each_merged_leaf_with_every_reason(tmp_path: Path) -> None:
    tensors = [
        *smollm2(2),
        *fp8(ATTENTION.format(2, "q_proj"), 320, 576),
        *fp8(ATTENTION.format(2, "k_proj"), 192, 576),
        *fp8("model.layers.0.mlp.gate_proj", 192, 576),
        *fp8("model.layers.0.mlp.up_proj", 192, 576),
    ]
    found = requests(tmp_path, tensors)
    assert [finding.code for finding in found.findings] == ["not_merged", "not_merged"]
    qkv, gate_up = found.findings
    assert "576 rows" in qkv.message
    assert "320 rows" in qkv.message
    assert "3 layers" in qkv.message
    assert "gate_up_proj" in gate_up.message


def test_a_ragged_last_part_does_not_keep_parts_apart(tmp_path: Path) -> None:
    """DeepSeek's q_a (1536) and kv_a (576) are merged by every engine."""
    tensors = [
        *fp8(ATTENTION.format(0, "q_a_proj"), 1536, 7168),
        *fp8(ATTENTION.format(0, "kv_a_proj_with_mqa"), 576, 7168),
    ]
    found = requests(tmp_path, tensors, tp=8)
    (fused,) = found.requests
    assert (fused.n, fused.parts, found.findings) == (2112, (1536, 576), ())


def test_different_scale_formats_are_kept_apart_with_a_note(tmp_path: Path) -> None:
    tensors = [
        *fp8("mlp.gate_proj", 256, 256),
        *fp8("mlp.up_proj", 256, 256, scale="F8_E8M0"),
    ]
    found = requests(tmp_path, tensors)
    assert [str(request.format) for request in found.requests] == [
        "e4m3fn/128x128/fp32",
        "e4m3fn/128x128/ue8m0",
    ]
    (note,) = found.findings
    assert "up_proj has K=256 and e4m3fn/128x128/ue8m0" in note.message


def test_an_unquantized_sibling_keeps_parts_apart(tmp_path: Path) -> None:
    """Engines refuse a merged layer that is half FP8; merging q and k without v is no layer."""
    tensors = [
        *fp8("self_attn.q_proj", 256, 256),
        *fp8("self_attn.k_proj", 128, 256),
        TensorShape("self_attn.v_proj.weight", "BF16", (128, 256)),
    ]
    found = requests(tmp_path, tensors)
    assert [request.name for request in found.requests] == ["self_attn.q_proj", "self_attn.k_proj"]
    (note,) = found.findings
    assert "v_proj stayed unquantized" in note.message


def test_a_part_without_partners_keeps_its_own_name(tmp_path: Path) -> None:
    """DeepSeek-V2-Lite has q_proj beside kv_a_proj_with_mqa, and no q_a."""
    tensors = [
        *fp8("self_attn.q_proj", 3072, 2048),
        *fp8("self_attn.kv_a_proj_with_mqa", 576, 2048),
        *fp8("mlp.up_proj", 256, 2048),
    ]
    found = requests(tmp_path, tensors, tp=2, num_attention_heads=16)
    assert [(request.name, request.n) for request in found.requests] == [
        ("self_attn.q_proj", 1536),
        ("self_attn.kv_a_proj_with_mqa", 576),
        ("mlp.up_proj", 128),
    ]
    assert found.findings == ()


def test_weights_fused_on_disk_are_cut_part_by_part(tmp_path: Path) -> None:
    """3072 rows over 8 ranks look whole (384 = 3 blocks), but each half gives 192."""
    tensors = [
        *fp8("mlp.gate_up_proj", 3072, 512),
        *fp8("self_attn.qkv_proj", 8192, 512),
    ]
    heads = {"num_attention_heads": 48, "num_key_value_heads": 8}
    gate_up, qkv = requests(tmp_path / "8", tensors, tp=8, **heads).requests
    assert (gate_up.n, gate_up.parts) == (384, (192, 192))
    assert "part up_proj: 192 rows per rank are 1.5 blocks of 128" in gate_up.shard.split_blocks
    assert (qkv.n, qkv.parts) == (1024, (768, 128, 128))
    replicated = requests(tmp_path / "16", tensors, tp=16, **heads).requests[1]
    assert replicated.parts == (384, 128, 128), "key and value heads are held twice"


def test_weights_fused_on_disk_stay_one_part_on_one_rank(tmp_path: Path) -> None:
    """They have one scale grid, so a half that ends inside a block is no obstacle."""
    found = requests(tmp_path, fp8("mlp.gate_up_proj", 384, 256))
    assert found.requests[0].parts == (384,)
    plan = plan_model(found.requests, Device.named("sm_90"), PlanPolicy(), BACKENDS)
    assert plan.unservable == ()


def test_stacked_experts_fused_on_disk_are_cut_by_what_expert_parallelism_leaves(
    tmp_path: Path,
) -> None:
    tensors = [
        TensorShape("mlp.experts.gate_up_proj", "F8_E4M3", (8, 3072, 256)),
        TensorShape("mlp.experts.gate_up_proj_scale_inv", "F32", (8, 24, 2)),
    ]
    (whole,) = requests(tmp_path / "ep", tensors, tp=8, ep=8).requests
    assert (whole.name, whole.experts, whole.parts) == ("mlp.experts.w13", 1, (3072,))
    (cut,) = requests(tmp_path / "tp", tensors, tp=8, ep=1).requests
    assert (cut.experts, cut.parts) == (8, (192, 192))
    assert cut.shard.split_blocks


def test_a_fused_weight_whose_heads_are_unknown_is_cut_evenly(tmp_path: Path) -> None:
    (qkv,) = requests(tmp_path, fp8("self_attn.qkv_proj", 1024, 256), tp=2).requests
    assert (qkv.n, qkv.parts) == (512, (512,))


def test_an_expert_without_one_of_its_weights_is_an_error_that_names_it(tmp_path: Path) -> None:
    tensors = [
        tensor
        for expert in range(4)
        for leaf in ("w1", "w3")
        if (expert, leaf) != (2, "w3")
        for tensor in fp8(f"mlp.experts.{expert}.{leaf}", 256, 256)
    ]
    with pytest.raises(CheckpointError, match=r"experts\.2.*w3"):
        requests(tmp_path, tensors)


def test_ragged_experts_are_merged_all_the_same(tmp_path: Path) -> None:
    """No kernel runs the halves of a stack of experts one by one; the plan says what is wrong."""
    tensors = [
        tensor
        for expert in range(2)
        for leaf in ("gate_proj", "up_proj")
        for tensor in fp8(f"mlp.experts.{expert}.{leaf}", 192, 256)
    ]
    found = requests(tmp_path, tensors)
    (w13,) = found.requests
    assert (w13.name, w13.experts, w13.parts) == ("mlp.experts.w13", 2, (192, 192))
    assert w13.shard.split_blocks == (
        "part gate_proj: 192 rows are 1.5 blocks of 128 and another part follows",
    )


def test_modules_are_never_merged_and_need_no_note(tmp_path: Path) -> None:
    found = requests(tmp_path, smollm2(2), merging=Merging.MODULE)
    assert len(found.requests) == 6
    assert found.findings == ()
