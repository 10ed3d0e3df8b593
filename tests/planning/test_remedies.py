"""Remedies for split blocks: which are offered, which is chosen, and why others are refused."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockscale.backends.registry import BACKENDS
from blockscale.errors import FormatError
from blockscale.formats import FP8_128X128_FP32, BlockShape, DType
from blockscale.planning.device import Device
from blockscale.planning.pieces import Holding, Span, piece_of, request_of
from blockscale.planning.planner import plan_model
from blockscale.planning.policy import PlanPolicy
from blockscale.planning.remedies import Refusal, Remedies, Remedy, remedies_of
from blockscale.planning.request import LinearRequest, RemedyKind, ShardStyle
from blockscale.planning.sharded import Target, plan_shards, shards_of
from blockscale.planning.sharding import Parallelism, WholeLayer, cut

if TYPE_CHECKING:
    from collections.abc import Sequence

    from blockscale.planning.plan import LinearPlan

BF16 = DType.BFLOAT16
BLOCK = BlockShape(128, 128)


def request(name: str, n: int, k: int, **more: object) -> LinearRequest:
    return LinearRequest(name, n, k, FP8_128X128_FP32, BF16, BF16, **more)


def mlp(width: int, hidden: int = 512, **more: object) -> list[WholeLayer]:
    gate_up = request("mlp.gate_up_proj", 2 * width, hidden, parts=(width, width), **more)
    names = ("gate_proj", "up_proj")
    return [
        WholeLayer(gate_up, ShardStyle.COLUMN, names, (None, None)),
        WholeLayer(request("mlp.down_proj", hidden, width, **more), ShardStyle.ROW),
    ]


def attention(heads: int, head: int, hidden: int = 512) -> list[WholeLayer]:
    size = heads * head
    qkv = request("attn.qkv_proj", 3 * size, hidden, parts=(size, size, size))
    return [
        WholeLayer(qkv, ShardStyle.COLUMN, ("q_proj", "k_proj", "v_proj"), (heads,) * 3),
        WholeLayer(request("attn.o_proj", hidden, size), ShardStyle.ROW),
    ]


def looked(
    layers: list[WholeLayer],
    parallelism: Parallelism,
    device: str = "sm_90",
    backends: tuple[str, ...] | None = None,
) -> Remedies:
    policy = PlanPolicy(backends=backends)

    def plan(requests: Sequence[LinearRequest]) -> Sequence[LinearPlan]:
        return plan_model(requests, Device.named(device), policy, BACKENDS).layers

    return remedies_of(layers, parallelism, plan)


def answer(remedies: Remedies, kind: RemedyKind) -> Remedy | Refusal:
    return next(one for one in remedies.answers if one.kind is kind)


def test_refining_is_chosen_where_a_kernel_takes_smaller_blocks() -> None:
    found = looked(mlp(384), Parallelism(2))
    chosen = found.chosen
    assert chosen is not None
    assert chosen.kind is RemedyKind.REFINE
    assert [str(one.format.block) for one in chosen.requests] == ["64x128", "32x32"]
    assert chosen.backends == ("triton",)
    assert all(one.shard.split_blocks == () for one in chosen.requests)


def test_the_cpu_takes_the_fewest_scales() -> None:
    chosen = looked(mlp(384), Parallelism(2), "cpu").chosen
    assert chosen is not None
    assert [str(one.format.block) for one in chosen.requests] == ["64x128", "128x64"]
    assert chosen.backends == ("cpu",)


def test_whole_blocks_are_chosen_where_no_kernel_refines() -> None:
    found = looked(mlp(384), Parallelism(2), backends=("gluon",))
    refused = answer(found, RemedyKind.REFINE)
    assert isinstance(refused, Refusal)
    assert "no backend serves mlp.gate_up_proj in blocks of 64x128" in refused.reason
    chosen = found.chosen
    assert chosen is not None
    assert chosen.kind is RemedyKind.UNEVEN
    assert [(one.n, one.k) for one in chosen.requests] == [(512, 512), (512, 256)]


def test_the_reference_does_not_make_a_remedy_the_chosen_one() -> None:
    """It takes any blocks; a kernel for whole blocks is still better."""
    chosen = looked(mlp(384), Parallelism(2), backends=("gluon", "reference")).chosen
    assert chosen is not None
    assert chosen.kind is RemedyKind.UNEVEN
    assert chosen.backends == ("gluon",)


def test_heads_are_padded_and_never_dealt_unevenly() -> None:
    """Heads of 64: six of them over two ranks are 192 rows each."""
    found = looked(attention(6, 64), Parallelism(2), backends=("gluon",))
    refused = answer(found, RemedyKind.UNEVEN)
    assert isinstance(refused, Refusal)
    assert "cut by attention heads" in refused.reason
    assert found.chosen is not None
    assert found.chosen.kind is RemedyKind.PAD
    assert [one.parts for one in found.chosen.requests] == [(256, 256, 256), (512,)]


def test_a_lone_row_cut_layer_is_not_dealt_unevenly() -> None:
    found = looked(mlp(384)[1:], Parallelism(2))
    refused = answer(found, RemedyKind.UNEVEN)
    assert isinstance(refused, Refusal)
    assert "what feeds mlp.down_proj is not cut beside it" in refused.reason


def test_dense_layers_have_no_expert_parallelism() -> None:
    refused = answer(looked(mlp(384), Parallelism(2)), RemedyKind.EXPERT)
    assert isinstance(refused, Refusal)


def test_more_expert_parallelism_is_offered_and_never_taken_unasked() -> None:
    found = looked(mlp(384, experts=8), Parallelism(2))
    whole = answer(found, RemedyKind.EXPERT)
    assert isinstance(whole, Remedy)
    assert whole.parallelism == Parallelism(2, 2)
    assert [(one.experts, one.n, one.k) for one in whole.requests] == [
        (4, 768, 512),
        (4, 512, 384),
    ]
    assert found.chosen is not None
    assert found.chosen.kind is RemedyKind.REFINE


def test_odd_sizes_that_no_block_of_32_divides_are_rounded() -> None:
    """48 elements a rank: blocks of 16, finer than any kernel takes."""
    found = looked(mlp(240), Parallelism(5), backends=("triton",))
    assert isinstance(answer(found, RemedyKind.REFINE), Refusal)
    assert found.chosen is not None
    assert found.chosen.kind is RemedyKind.PAD


def test_a_rank_without_blocks_is_a_reason_not_a_crash() -> None:
    refused = answer(looked(mlp(384), Parallelism(4)), RemedyKind.UNEVEN)
    assert isinstance(refused, Refusal)
    assert refused.reason == (
        "384 elements are 3 blocks of 128, which leaves 1 of 4 ranks with nothing"
    )


def test_a_split_that_nothing_helps_stays_unservable_and_says_so() -> None:
    target = Target(Device.named("sm_90"), PlanPolicy(backends=("gluon",)), BACKENDS)
    layers = attention(3, 48)
    shards = shards_of(layers, Parallelism(3), target)
    plan = plan_shards(shards, target)
    assert [one.chosen.kind for one in shards.split if one.chosen] == [RemedyKind.PAD]
    none = Target(Device.named("sm_80"), PlanPolicy(backends=("gluon",)), BACKENDS)
    plan = plan_shards(shards_of(layers, Parallelism(3), none), none)
    assert len(plan.unservable) == 2
    assert {"unservable", "shard_splits_block"} <= {one.code for one in plan.findings}


def test_identical_sets_are_one_finding() -> None:
    layers = [
        WholeLayer(
            request(
                f"model.layers.{i}.{one.request.name}",
                one.request.n,
                one.request.k,
                parts=one.request.parts,
            ),
            one.style,
            one.part_names,
            one.part_units,
        )
        for i in range(5)
        for one in mlp(384)
    ]
    target = Target(Device.named("sm_90"), PlanPolicy(), BACKENDS)
    shards = shards_of(layers, Parallelism(2), target)
    assert len(shards.holdings) == 10
    (finding,) = shards.findings
    assert "and 4 layers like it" in finding.message
    assert "expert parallelism" not in finding.message


sizes = st.integers(1, 12).map(lambda blocks: blocks * 32)


@given(sizes, st.integers(1, 6), st.sampled_from([None, *RemedyKind][:-1]))
def test_shares_cover_an_axis_once_and_zeros_fill_whole_blocks(
    share: int, degree: int, kind: RemedyKind | None
) -> None:
    width = share * degree
    layer = mlp(width)[1]
    holding = Holding(kind, BLOCK) if kind else None
    if kind is RemedyKind.UNEVEN and degree > 1 and -(-width // 128) < degree:
        with pytest.raises(FormatError, match="with nothing"):
            piece_of(layer, Parallelism(degree), 0, holding)
        return
    spans = [piece_of(layer, Parallelism(degree), rank, holding).columns for rank in range(degree)]
    assert [i for span in spans for i in range(span.first, span.end)] == list(range(width))
    if kind is RemedyKind.PAD and degree > 1:
        assert len({span.size for span in spans}) == 1
        for span in spans:
            assert (span.first - span.before) % 128 == 0
            assert span.size % 128 == 0
            indices = span.scale_indices(128, 128)
            assert {i // 128 for i in range(span.first, span.end)} == set(indices)
    if kind is RemedyKind.UNEVEN:
        assert all(span.first % 128 == 0 for span in spans)
        assert max(span.size for span in spans) == spans[0].size


@given(sizes, st.integers(1, 6))
def test_a_plain_piece_and_a_plain_cut_agree(share: int, degree: int) -> None:
    for layer in mlp(share * degree):
        parallelism = Parallelism(degree)
        plain = cut(layer, parallelism)
        assert isinstance(plain, LinearRequest)
        for rank in range(degree):
            made = request_of(layer, parallelism, piece_of(layer, parallelism, rank))
            assert (made.n, made.k, made.parts) == (plain.n, plain.k, plain.parts)


def test_a_scale_that_two_stored_blocks_would_share_is_refused() -> None:
    with pytest.raises(FormatError, match="does not fit"):
        Span(64, 128).scale_indices(128, 128)


@pytest.mark.parametrize("wanted", [RemedyKind.REFINE, RemedyKind.UNEVEN, RemedyKind.PAD])
def test_a_wanted_remedy_is_taken(wanted: RemedyKind) -> None:
    target = Target(Device.named("sm_90"), PlanPolicy(), BACKENDS, wanted)
    shards = shards_of(mlp(384), Parallelism(2), target)
    assert {one.shard.remedy for one in shards.requests} == {wanted}


def test_a_wanted_remedy_that_is_not_offered_is_not_missed() -> None:
    target = Target(Device.named("sm_90"), PlanPolicy(), BACKENDS, RemedyKind.UNEVEN)
    shards = shards_of(attention(6, 64), Parallelism(2), target)
    assert {one.shard.remedy for one in shards.requests} == {RemedyKind.REFINE}
