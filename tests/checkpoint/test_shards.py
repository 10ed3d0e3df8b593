"""Shards read from files: the same dequantized numbers, bit for bit, and only the rank's bytes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from blockscale.backends.registry import BACKENDS
from blockscale.checkpoint.rank_plan import RankPlan, plan_rank
from blockscale.checkpoint.read import read_checkpoint
from blockscale.checkpoint.requests import MergedLayer, RequestOptions
from blockscale.checkpoint.schema import read_layers
from blockscale.checkpoint.shards import read_bias_piece, read_piece
from blockscale.errors import CheckpointError
from blockscale.formats import FP8_128X128_FP32, DType
from blockscale.planning.device import Device
from blockscale.planning.pieces import Holding, Piece, Span, piece_of
from blockscale.planning.policy import PlanPolicy
from blockscale.planning.remedies import Remedy, remedies_of
from blockscale.planning.request import RemedyKind
from blockscale.planning.sharded import Target
from blockscale.planning.sharding import Parallelism
from blockscale.reference import dequantize, quantize

CPU = Target(Device.named("cpu"), PlanPolicy(), BACKENDS)
EXPERTS = "model.layers.0.mlp.experts"
ATTENTION = "model.layers.0.self_attn"
# MiniMax at TP 8, seen from two ranks of two: three blocks, so each has one and a half.
HIDDEN, WIDTH, EXPERT_COUNT, RANKS = 256, 384, 3, 2


class Store:
    """A checkpoint of random weights and the float32 values that it stands for."""

    def __init__(self, folder: Path, config: dict[str, Any] | None = None) -> None:
        self.folder = folder
        self.config = config or {}
        self.tensors: dict[str, torch.Tensor] = {}
        self.values: dict[str, torch.Tensor] = {}
        self.generator = torch.Generator().manual_seed(3)

    def add(self, name: str, *shape: int) -> None:
        weight = quantize(torch.randn(shape, generator=self.generator), FP8_128X128_FP32)
        self.tensors[f"{name}.weight"] = weight.data
        self.tensors[f"{name}.weight_scale_inv"] = weight.scales
        self.values[name] = dequantize(weight)

    def plan(
        self, parallelism: Parallelism, rank: int, target: Target = CPU
    ) -> tuple[RankPlan, dict[str, MergedLayer]]:
        save_file(self.tensors, self.folder / "model.safetensors")
        declared = {"quant_method": "fp8", "weight_block_size": [128, 128]}
        config = {"quantization_config": declared, **self.config}
        (self.folder / "config.json").write_text(json.dumps(config))
        checkpoint = read_checkpoint(self.folder)
        options = RequestOptions(DType.BFLOAT16, parallelism)
        plan = plan_rank(checkpoint, read_layers(checkpoint), options, target, rank)
        return plan, {layer.whole.request.name: layer for layer in plan.merged.layers}


def experts(folder: Path) -> Store:
    store = Store(folder)
    for expert in range(EXPERT_COUNT):
        store.add(f"{EXPERTS}.{expert}.gate_proj", WIDTH, HIDDEN)
        store.add(f"{EXPERTS}.{expert}.up_proj", WIDTH, HIDDEN)
        store.add(f"{EXPERTS}.{expert}.down_proj", HIDDEN, WIDTH)
    return store


def rows(values: torch.Tensor, span: Span) -> torch.Tensor:
    kept = values[span.first : span.end]
    return torch.nn.functional.pad(kept, (0, 0, span.before, span.after))


def columns(values: torch.Tensor, span: Span) -> torch.Tensor:
    return torch.nn.functional.pad(values[:, span.first : span.end], (span.before, span.after))


def remedies(plan: RankPlan, layers: dict[str, MergedLayer]) -> dict[RemedyKind, Remedy]:
    from blockscale.planning.planner import plan_model

    found = remedies_of(
        [layer.whole for layer in layers.values()],
        plan.parallelism,
        lambda requests: plan_model(requests, CPU.device, CPU.policy, BACKENDS).layers,
    )
    return {remedy.kind: remedy for remedy in found.offered}


@pytest.mark.parametrize("rank", range(RANKS))
@pytest.mark.parametrize("kind", [RemedyKind.REFINE, RemedyKind.UNEVEN, RemedyKind.PAD])
def test_a_remedied_shard_has_the_whole_weights_values_and_zeros(
    tmp_path: Path, kind: RemedyKind, rank: int
) -> None:
    store = experts(tmp_path)
    plan, layers = store.plan(Parallelism(RANKS), rank)
    remedy = remedies(plan, layers)[kind]
    pieces = dict(
        zip(
            layers,
            (
                piece_of(layer.whole, plan.parallelism, rank, holding)
                for layer, holding in zip(layers.values(), remedy.holdings, strict=True)
            ),
            strict=True,
        )
    )
    w13 = dequantize(read_piece(layers[f"{EXPERTS}.w13"], pieces[f"{EXPERTS}.w13"]))
    w2 = dequantize(read_piece(layers[f"{EXPERTS}.w2"], pieces[f"{EXPERTS}.w2"]))
    gate, up = pieces[f"{EXPERTS}.w13"].rows
    across = pieces[f"{EXPERTS}.w2"].columns
    assert (across.first, across.count) == (gate.first, gate.count)
    for expert in range(EXPERT_COUNT):
        values = {
            leaf: store.values[f"{EXPERTS}.{expert}.{leaf}"]
            for leaf in ("gate_proj", "up_proj", "down_proj")
        }
        stacked = torch.cat([rows(values["gate_proj"], gate), rows(values["up_proj"], up)])
        assert torch.equal(w13[expert], stacked)
        assert torch.equal(w2[expert], columns(values["down_proj"], across))


@pytest.mark.parametrize("kind", [RemedyKind.REFINE, RemedyKind.UNEVEN, RemedyKind.PAD])
def test_ranks_together_hold_every_element_once(tmp_path: Path, kind: RemedyKind) -> None:
    plan, layers = experts(tmp_path).plan(Parallelism(RANKS), 0)
    remedy = remedies(plan, layers)[kind]
    for layer, holding in zip(layers.values(), remedy.holdings, strict=True):
        pieces = [piece_of(layer.whole, plan.parallelism, r, holding) for r in range(RANKS)]
        axis = [p.rows[0] if layer.whole.request.n > HIDDEN else p.columns for p in pieces]
        covered = [i for span in axis for i in range(span.first, span.end)]
        assert covered == list(range(WIDTH))


def test_expert_parallel_ranks_read_whole_experts(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for expert in range(4):
        store.add(f"{EXPERTS}.{expert}.down_proj", HIDDEN, WIDTH)
    plan, layers = store.plan(Parallelism(2, 2), 1)
    (layer,) = layers.values()
    values = dequantize(read_piece(layer, plan.piece(layer)))
    assert torch.equal(
        values, torch.stack([store.values[f"{EXPERTS}.{i}.down_proj"] for i in (2, 3)])
    )


@pytest.mark.parametrize("rank", range(2))
def test_experts_stacked_in_one_tensor_with_parts_fused(tmp_path: Path, rank: int) -> None:
    store = Store(tmp_path)
    store.add(f"{EXPERTS}.gate_up_proj", 4, 2 * WIDTH, HIDDEN)
    plan, layers = store.plan(Parallelism(4, 2), 1 + 2 * rank)
    (layer,) = layers.values()
    piece = plan.piece(layer)
    values = dequantize(read_piece(layer, piece))
    gate, up = store.values[f"{EXPERTS}.gate_up_proj"].split(WIDTH, dim=1)
    assert piece.experts == Span(2 * rank, 2)
    held = slice(2 * rank, 2 * rank + 2)
    half = slice(WIDTH // 2, WIDTH)
    assert torch.equal(values, torch.cat([gate[held, half], up[held, half]], dim=1))


def attention(folder: Path) -> Store:
    store = Store(folder, {"num_attention_heads": 8, "num_key_value_heads": 2})
    store.add(f"{ATTENTION}.q_proj", 512, HIDDEN)
    store.add(f"{ATTENTION}.k_proj", 128, HIDDEN)
    store.add(f"{ATTENTION}.v_proj", 128, HIDDEN)
    for leaf, size in (("q_proj", 512), ("k_proj", 128), ("v_proj", 128)):
        store.tensors[f"{ATTENTION}.{leaf}.bias"] = torch.randn(size, generator=store.generator)
    return store


@pytest.mark.parametrize("rank", range(4))
def test_key_heads_are_shared_by_neighbouring_ranks(tmp_path: Path, rank: int) -> None:
    """Two key heads of 64 rows for four ranks: half a block each, so scales are repeated."""
    store = attention(tmp_path)
    plan, layers = store.plan(Parallelism(4), rank)
    layer = layers[f"{ATTENTION}.qkv_proj"]
    piece = plan.piece(layer)
    (planned,) = plan.plan.layers
    assert planned.request.shard.remedy is RemedyKind.REFINE
    values = dequantize(read_piece(layer, piece))
    bias = read_bias_piece(read_checkpoint(tmp_path), layer, piece)
    q = slice(128 * rank, 128 * rank + 128)
    kv = slice(64 * (rank // 2), 64 * (rank // 2) + 64)
    whole = [store.values[f"{ATTENTION}.{leaf}_proj"] for leaf in "qkv"]
    biases = [store.tensors[f"{ATTENTION}.{leaf}_proj.bias"] for leaf in "qkv"]
    assert torch.equal(values, torch.cat([whole[0][q], whole[1][kv], whole[2][kv]]))
    assert bias is not None
    assert torch.equal(bias, torch.cat([biases[0][q], biases[1][kv], biases[2][kv]]))


def bytes_read() -> int:
    """What this process has asked the kernel to read, from any file."""
    line = Path("/proc/self/io").read_text(encoding="ascii").splitlines()[0]
    return int(line.removeprefix("rchar: "))


@pytest.mark.skipif(not os.access("/proc/self/io", os.R_OK), reason="Linux counts bytes read")
@pytest.mark.parametrize("leaf", ["w13", "w2"])
def test_a_rank_reads_its_codes_and_the_scales_it_touches_and_nothing_else(
    tmp_path: Path, leaf: str
) -> None:
    plan, layers = experts(tmp_path).plan(Parallelism(RANKS), 1)
    layer = layers[f"{EXPERTS}.{leaf}"]
    piece = plan.piece(layer)
    counting = bytes_read()
    counting = bytes_read() - counting
    before = bytes_read()
    read_piece(layer, piece)
    read = bytes_read() - before - counting
    codes = EXPERT_COUNT * WIDTH // RANKS * HIDDEN
    # 192 elements touch two blocks of 128; the other axis has two.
    scales = EXPERT_COUNT * 2 * 2 * 4
    parts = 2 if leaf == "w13" else 1
    assert read == parts * (codes + scales)


def test_a_file_that_shrank_is_named(tmp_path: Path) -> None:
    plan, layers = experts(tmp_path).plan(Parallelism(RANKS), 1)
    layer = layers[f"{EXPERTS}.w2"]
    last = max(
        (entry for members in layer.members for entry in (members[0].weight,)),
        key=lambda entry: entry.offset,
    )
    os.truncate(tmp_path / "model.safetensors", last.offset + 5)
    with pytest.raises(CheckpointError, match="became shorter"):
        read_piece(layer, plan.piece(layer))


def test_a_deleted_file_is_named(tmp_path: Path) -> None:
    plan, layers = experts(tmp_path).plan(Parallelism(RANKS), 1)
    layer = layers[f"{EXPERTS}.w2"]
    piece: Piece = plan.piece(layer)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*cannot be read"):
        read_piece(layer, piece)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float8_e8m0fnu])
def test_other_scale_dtypes_keep_their_values(tmp_path: Path, stored: torch.dtype) -> None:
    store = Store(tmp_path)
    data = torch.randint(0, 0x7E, (256, HIDDEN), dtype=torch.uint8).view(torch.float8_e4m3fn)
    scales = torch.tensor([[0.5, 0.25], [2.0, 1.0]])
    store.tensors = {
        "a.down_proj.weight": data,
        "a.down_proj.weight_scale_inv": scales.to(stored),
    }
    plan, layers = store.plan(Parallelism(2), 1)
    layer = layers["a.down_proj"]
    piece = piece_of(layer.whole, plan.parallelism, 1)
    shard = read_piece(layer, piece)
    assert shard.format == layer.whole.request.format
    values = dequantize(shard)
    whole = data.float() * scales.repeat_interleave(128, 0).repeat_interleave(128, 1)
    assert torch.equal(values, whole[:, 128:])


def test_holding_none_is_the_plain_cut(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.add("mlp.down_proj", 256, 512)
    plan, layers = store.plan(Parallelism(2), 1)
    layer = layers["mlp.down_proj"]
    assert plan.shards.holdings == {}
    assert piece_of(layer.whole, plan.parallelism, 1) == plan.piece(layer)
    pad = Holding(RemedyKind.PAD, layer.whole.request.format.block)
    assert not piece_of(layer.whole, plan.parallelism, 1, pad).is_padded
