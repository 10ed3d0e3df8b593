"""Cutting layers: shapes, split scale blocks, heads, experts."""

from __future__ import annotations

import pytest

from blockscale.errors import SettingsError
from blockscale.formats import FP8_128X128_FP32, BlockShape, DType
from blockscale.planning.plan import Finding
from blockscale.planning.request import LinearRequest, ShardStyle
from blockscale.planning.sharding import Parallelism, WholeLayer, cut

BF16 = DType.BFLOAT16


def layer(n: int, k: int, style: ShardStyle, **more: object) -> WholeLayer:
    parts = more.pop("parts", (n,))
    request = LinearRequest(
        "layer", n, k, FP8_128X128_FP32, BF16, BF16, parts=parts, experts=more.pop("experts", None)
    )
    return WholeLayer(request, style, **more)


def merged_qkv(rows: tuple[int, ...], heads: tuple[int, ...], **more: object) -> WholeLayer:
    names = ("q", "k", "v")
    return layer(
        sum(rows), 3072, ShardStyle.COLUMN, parts=rows, part_names=names, part_units=heads, **more
    )


def shard(whole: WholeLayer, tensor: int, expert: int = 1) -> LinearRequest:
    result = cut(whole, Parallelism(tensor, expert))
    assert isinstance(result, LinearRequest), result
    return result


def test_columns_are_cut_part_by_part() -> None:
    gate_up = layer(3072, 4096, ShardStyle.COLUMN, parts=(1536, 1536), part_names=("gate", "up"))
    on_rank = shard(gate_up, 4)
    assert (on_rank.n, on_rank.parts, on_rank.k) == (768, (384, 384), 4096)
    assert on_rank.shard.split_blocks == ()


def test_minimax_w13_at_tp8_splits_blocks_though_n_looks_fine() -> None:
    w13 = layer(3072, 3072, ShardStyle.COLUMN, parts=(1536, 1536), part_names=("w1", "w3"))
    on_rank = shard(w13, 8)
    assert on_rank.n == 384
    assert on_rank.n % 128 == 0
    assert len(on_rank.shard.split_blocks) == 2
    assert "w1: 192 rows per rank are 1.5 blocks of 128" in on_rank.shard.split_blocks[0]
    assert on_rank.shard.unsplit_block == BlockShape(64, 128)


def test_minimax_w2_at_tp8_splits_blocks_along_k() -> None:
    on_rank = shard(layer(3072, 1536, ShardStyle.ROW), 8)
    assert on_rank.k == 192
    assert on_rank.shard.split_blocks == ("192 columns per rank are 1.5 blocks of 128",)
    assert on_rank.shard.unsplit_block == BlockShape(128, 64)


def test_deepseek_dense_down_at_tp8_keeps_blocks_whole() -> None:
    on_rank = shard(layer(7168, 18432, ShardStyle.ROW), 8)
    assert (on_rank.k, on_rank.shard.split_blocks) == (2304, ())


def test_key_value_heads_are_replicated_when_there_are_more_ranks() -> None:
    """MiniMax qkv at TP 16: 48 query heads give 3 each, 8 key heads are held twice."""
    assert shard(merged_qkv((6144, 1024, 1024), (48, 8, 8)), 16).parts == (384, 128, 128)


def test_query_heads_are_never_held_by_two_ranks() -> None:
    """o_proj takes each of them once: engines refuse more ranks than query heads."""
    qkv = merged_qkv((512, 256, 256), (4, 2, 2), part_shared=(False, True, True))
    assert shard(qkv, 4).parts == (128, 128, 128)
    result = cut(qkv, Parallelism(8))
    assert isinstance(result, Finding)
    assert "part q: 4 heads cannot be divided evenly" in result.message


def test_heads_that_do_not_divide_are_a_finding_not_a_crash() -> None:
    qkv = layer(576, 576, ShardStyle.COLUMN, part_units=(9,))
    result = cut(qkv, Parallelism(2))
    assert isinstance(result, Finding)
    assert "9 heads" in result.message


def test_replicated_layers_stay_whole() -> None:
    fused = layer(2112, 7168, ShardStyle.WHOLE, parts=(1536, 576), part_names=("q_a", "kv_a"))
    on_rank = shard(fused, 8)
    assert (on_rank.n, on_rank.shard.split_blocks) == (2112, ())


def test_expert_parallelism_keeps_experts_whole() -> None:
    w2 = layer(3072, 1536, ShardStyle.ROW, experts=256)
    on_rank = shard(w2, 8, 8)
    assert (on_rank.experts, on_rank.k, on_rank.shard.split_blocks) == (32, 1536, ())


def test_experts_that_do_not_divide_are_a_finding() -> None:
    assert isinstance(cut(layer(64, 64, ShardStyle.ROW, experts=6), Parallelism(4, 4)), Finding)


@pytest.mark.parametrize(("tensor", "expert"), [(0, 1), (1, 0), (10**20, 1), (8, 3), (2, 4)])
def test_degrees_without_meaning_are_refused(tensor: int, expert: int) -> None:
    with pytest.raises(SettingsError):
        Parallelism(tensor, expert)
