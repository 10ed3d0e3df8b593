"""Column- and row-parallel linear layers: one rank's shard and what the ranks tell one another."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.functional import pad

from blockscale.checkpoint.shards import read_bias_piece, read_piece
from blockscale.errors import ModelError
from blockscale.modules.linear import BlockScaledLinear
from blockscale.planning.request import ShardStyle

if TYPE_CHECKING:
    from blockscale.checkpoint.rank_plan import RankPlan
    from blockscale.checkpoint.read import Checkpoint
    from blockscale.checkpoint.requests import MergedLayer
    from blockscale.parallel.ranks import Ranks
    from blockscale.planning.pieces import Piece
    from blockscale.planning.plan import LinearPlan


class ColumnParallelLinear(nn.Module):
    """The rows of a weight that one rank holds: (..., k) in, this rank's outputs out.

    ``forward`` gives the outputs of each merged part's rows, parts side by side; ``split`` takes
    them apart. Rows that only pad the shard are left out. Nothing is sent: every rank has the whole
    activation, and bit for bit the outputs that one process would compute, if the backend's sums do
    not depend on N.
    """

    def __init__(self, linear: BlockScaledLinear, piece: Piece) -> None:
        super().__init__()
        self.linear = linear
        self.part_sizes = tuple(span.count for span in piece.rows)
        self._kept: list[tuple[int, int]] = []
        row = 0
        for span in piece.rows:
            self._kept.append((row + span.before, span.count))
            row += span.size
        self._is_padded = piece.is_padded

    def forward(self, activation: torch.Tensor) -> torch.Tensor:
        """(..., k) to (..., sum of ``part_sizes``)."""
        out: torch.Tensor = self.linear(activation)
        if not self._is_padded:
            return out
        return torch.cat([out.narrow(-1, first, count) for first, count in self._kept], -1)

    def split(self, out: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The parts of ``forward``'s result, q, k, v for example, as views."""
        return torch.split(out, list(self.part_sizes), -1)


class RowParallelLinear(nn.Module):
    """The columns of a weight that one rank holds: this rank's inputs in, the sum of all out.

    Every rank gets the whole (..., n) result. Partial products are rounded to the planned output
    dtype and summed in it, so the result differs from one process's by that rounding. A bias is in
    one rank's ``linear`` only.
    """

    def __init__(self, linear: BlockScaledLinear, piece: Piece, ranks: Ranks) -> None:
        super().__init__()
        self.linear = linear
        self.ranks = ranks
        self._padding = (piece.columns.before, piece.columns.after)
        self._is_padded = piece.is_padded

    def forward(self, activation: torch.Tensor) -> torch.Tensor:
        """(..., this rank's columns) to (..., n)."""
        if self._is_padded:
            activation = pad(activation, self._padding)
        return self.ranks.sum(self.linear(activation))


def parallel_linear(
    checkpoint: Checkpoint,
    plan: RankPlan,
    layer: MergedLayer,
    ranks: Ranks,
    place: torch.device | str = "cpu",
) -> ColumnParallelLinear | RowParallelLinear | BlockScaledLinear:
    """This rank's share of a dense layer, read, prepared on ``place`` and ready to run.

    A layer that every rank holds whole becomes a plain ``BlockScaledLinear``. Raises ModelError if
    ``ranks`` are not those that were planned, or the layer is a stack of experts.
    """
    check_ranks(plan, ranks)
    if layer.whole.request.experts is not None:
        msg = f"{layer.whole.request.name!r} is a stack of experts, not one linear layer"
        raise ModelError(msg)
    linear_plan = plan.layer(layer)
    piece = plan.piece(layer)
    style = linear_plan.request.shard.style
    bias = _bias(checkpoint, layer, piece, linear_plan, ranks)
    weight = read_piece(layer, piece).to(place)
    linear = BlockScaledLinear(
        linear_plan, weight, None if bias is None else bias.to(place), plan.plan.policy
    )
    if style is ShardStyle.COLUMN:
        return ColumnParallelLinear(linear, piece)
    if style is ShardStyle.ROW:
        return RowParallelLinear(linear, piece, ranks)
    return linear


def check_ranks(plan: RankPlan, ranks: Ranks) -> None:
    """Raises ModelError unless the plan is this very rank's."""
    planned = (plan.rank, plan.parallelism.tensor)
    if planned != (ranks.rank, ranks.size):
        msg = (
            f"planned for rank {planned[0]} of {planned[1]}, but this process is rank "
            f"{ranks.rank} of {ranks.size}; plan with tensor parallel degree {ranks.size}"
        )
        raise ModelError(msg)


def _bias(
    checkpoint: Checkpoint, layer: MergedLayer, piece: Piece, plan: LinearPlan, ranks: Ranks
) -> torch.Tensor | None:
    # Summed over the ranks with the products: one of them adds it.
    if plan.request.shard.style is ShardStyle.ROW and ranks.rank > 0:
        return None
    return read_bias_piece(checkpoint, layer, piece)
