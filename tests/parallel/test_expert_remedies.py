"""Experts whose blocks the ranks' cut splits, by every remedy: together the whole experts."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import save_file

from blockscale.backends.registry import BACKENDS
from blockscale.checkpoint.rank_plan import RankPlan, plan_rank
from blockscale.checkpoint.read import read_checkpoint
from blockscale.checkpoint.requests import RequestOptions
from blockscale.checkpoint.schema import read_layers
from blockscale.checkpoint.shards import expert_reader
from blockscale.formats import FP8_128X128_FP32, DType
from blockscale.modules.experts import BlockScaledExperts
from blockscale.planning.device import Device
from blockscale.planning.expert_sets import experts_plan
from blockscale.planning.policy import PlanPolicy
from blockscale.planning.request import RemedyKind
from blockscale.planning.sharded import Target
from blockscale.planning.sharding import Parallelism
from blockscale.reference import quantize

if TYPE_CHECKING:
    from pathlib import Path

NAME = "model.layers.0.mlp.experts"
# Three blocks over two ranks.
HIDDEN, WIDTH, COUNT, RANKS = 256, 384, 4, 2


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("experts")
    generator = torch.Generator().manual_seed(8)
    tensors = {}
    for expert in range(COUNT):
        for leaf, n, k in (
            ("gate_proj", WIDTH, HIDDEN),
            ("up_proj", WIDTH, HIDDEN),
            ("down_proj", HIDDEN, WIDTH),
        ):
            weight = quantize(torch.randn(n, k, generator=generator) / k**0.5, FP8_128X128_FP32)
            tensors[f"{NAME}.{expert}.{leaf}.weight"] = weight.data
            tensors[f"{NAME}.{expert}.{leaf}.weight_scale_inv"] = weight.scales
    save_file(tensors, folder / "model.safetensors")
    declared = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps({"quantization_config": declared}))
    return folder


def experts(
    stored: Path, parallelism: Parallelism, rank: int, remedy: RemedyKind | None = None
) -> tuple[RankPlan, BlockScaledExperts]:
    checkpoint = read_checkpoint(stored)
    target = Target(Device.named("cpu"), PlanPolicy(), BACKENDS, remedy)
    options = RequestOptions(DType.FLOAT32, parallelism)
    plan = plan_rank(checkpoint, read_layers(checkpoint), options, target, rank)
    layers = {layer.whole.request.name: layer for layer in plan.merged.layers}
    w13, w2 = (layers[f"{NAME}.{leaf}"] for leaf in ("w13", "w2"))
    readers = [expert_reader(layer, plan.piece(layer)) for layer in (w13, w2)]
    return plan, BlockScaledExperts(experts_plan(plan.plan, NAME), *readers)


@pytest.mark.parametrize("remedy", [RemedyKind.REFINE, RemedyKind.UNEVEN, RemedyKind.PAD])
def test_ranks_add_up_to_the_whole_experts(stored: Path, remedy: RemedyKind) -> None:
    generator = torch.Generator().manual_seed(9)
    hidden = torch.randn(11, HIDDEN, generator=generator)
    weights, ids = torch.rand(11, COUNT, generator=generator).topk(2)
    _, whole = experts(stored, Parallelism(), 0)
    expected = whole(hidden, ids, weights)
    total = torch.zeros_like(expected)
    for rank in range(RANKS):
        plan, share = experts(stored, Parallelism(RANKS), rank, remedy)
        assert {layer.request.shard.remedy for layer in plan.plan.layers} == {remedy}
        total += share(hidden, ids, weights)
    assert (total - expected).norm() <= 2e-6 * expected.norm()


def test_shares_of_two_ranks_have_the_planned_sizes(stored: Path) -> None:
    widths = {
        remedy: [experts(stored, Parallelism(RANKS), rank, remedy)[1].w2.k for rank in range(RANKS)]
        for remedy in (RemedyKind.REFINE, RemedyKind.UNEVEN, RemedyKind.PAD)
    }
    assert widths == {
        RemedyKind.REFINE: [192, 192],
        RemedyKind.UNEVEN: [256, 128],
        RemedyKind.PAD: [256, 256],
    }
