"""The plan of one rank of a checkpoint, and which stored numbers its shards are made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from blockscale.checkpoint.requests import (
    MergedLayers,
    RequestOptions,
    merged_layers,
    unknown_projections,
)
from blockscale.planning.pieces import piece_of
from blockscale.planning.sharded import Shards, Target, plan_shards, shards_of

if TYPE_CHECKING:
    from blockscale.checkpoint.read import Checkpoint
    from blockscale.checkpoint.requests import MergedLayer
    from blockscale.checkpoint.schema import Layers
    from blockscale.planning.pieces import Piece
    from blockscale.planning.plan import LinearPlan, ModelPlan
    from blockscale.planning.sharding import Parallelism


@dataclass(frozen=True, slots=True)
class RankPlan:
    """One rank's plan, the uncut layers behind it, and how each is held."""

    plan: ModelPlan
    parallelism: Parallelism
    rank: int
    merged: MergedLayers
    shards: Shards

    def layer(self, layer: MergedLayer) -> LinearPlan:
        """This rank's plan of ``layer``. Raises KeyError if it cannot be divided."""
        return self.plan.layer(layer.whole.request.name)

    def piece(self, layer: MergedLayer) -> Piece:
        """What this rank reads of ``layer``, which must be in the plan."""
        holding = self.shards.holdings.get(layer.whole.request.name)
        return piece_of(layer.whole, self.parallelism, self.rank, holding)


def plan_rank(
    checkpoint: Checkpoint, layers: Layers, options: RequestOptions, target: Target, rank: int = 0
) -> RankPlan:
    """The plan of ``rank``; no rank has more work than rank 0.

    Raises as ``requests_of`` and ``plan_model`` do.
    """
    merged = merged_layers(checkpoint, layers, options)
    shards = shards_of([layer.whole for layer in merged.layers], options.parallelism, target, rank)
    plan = plan_shards(
        shards,
        target,
        skipped=layers.skipped,
        findings=(
            *layers.findings,
            *merged.findings,
            *unknown_projections(merged, options.parallelism),
        ),
    )
    return RankPlan(plan, options.parallelism, rank, merged, shards)
