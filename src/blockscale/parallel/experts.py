"""Experts spread over ranks, two ways: tokens travel to their experts, or results are summed.

``TravellingExperts`` is for tokens that lie on different ranks (each rank attends to its own
sequences); ``SummedExperts`` for tokens that all ranks have (attention cut by tensor parallelism).
Both run whatever computes a rank's own experts: a ``BlockScaledExperts``, or any callable.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import nn

from blockscale.errors import ModelError

if TYPE_CHECKING:
    from blockscale.parallel.ranks import Ranks

# (tokens (T, k), ids (T, choices) counted on this rank, weights (T, choices)) -> (T, k). An id
# outside the rank's stack adds nothing.
LocalExperts: TypeAlias = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class TravellingExperts(nn.Module):
    """Every rank has its own tokens; each (token, choice) is sent to the rank of its expert.

    ``experts``: this rank's, in the order of their numbers; ``count``: all ranks' together, the
    same number on each. Results come back unweighted and are summed in float32 in the order of the
    choices, so they do not depend on who computed what: bit for bit those of one process, if an
    expert's rows do not depend on the rows beside them.

    The numbers of rows to send are read on the host, once for each call: this path cannot be
    captured in a CUDA graph. Raises ModelError if the experts do not divide evenly.
    """

    def __init__(self, experts: LocalExperts, count: int, ranks: Ranks) -> None:
        super().__init__()
        _check_divides(count, ranks)
        self.experts = experts
        self.count = count
        self.ranks = ranks

    def forward(
        self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """(T, k), (T, choices) integers in [0, count), (T, choices) floats to (T, k)."""
        tokens, choices = ids.shape
        held = self.count // self.ranks.size
        wanted = ids.reshape(-1)
        # By expert, tokens in order: neighbours on the way out are neighbours in the product.
        order = torch.argsort(wanted, stable=True)
        owners = torch.div(wanted, held, rounding_mode="floor")
        sent_counts = torch.bincount(owners, minlength=self.ranks.size)
        even = [1] * self.ranks.size
        sent = sent_counts.tolist()
        received = self.ranks.exchange(sent_counts, even, even).tolist()
        rows = self.ranks.exchange(hidden[order // choices], sent, received)
        local = self.ranks.exchange(wanted[order] % held, sent, received)
        ones = torch.ones((len(local), 1), dtype=weights.dtype, device=weights.device)
        products = self.experts(rows, local[:, None], ones)
        back = self.ranks.exchange(products, received, sent)
        placed = torch.empty_like(back)
        placed[order] = back
        return _combined(placed.view(tokens, choices, hidden.shape[-1]), weights, hidden.dtype)


class SummedExperts(nn.Module):
    """Every rank has every token, computes what its own experts add, and the ranks sum up.

    ``first``: the number of this rank's first expert. Ids of other ranks' experts become one that
    no stack has. Nothing is read on the host. Partial results are summed in the tokens' dtype, in
    the order of torch.distributed: results differ from one process's by that rounding.
    """

    def __init__(self, experts: LocalExperts, first: int, held: int, ranks: Ranks) -> None:
        super().__init__()
        self.experts = experts
        self.first = first
        self.held = held
        self.ranks = ranks

    def forward(
        self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """(T, k), (T, choices) integers, (T, choices) floats to (T, k)."""
        local = ids - self.first
        elsewhere = (local < 0) | (local >= self.held)
        return self.ranks.sum(self.experts(hidden, local.masked_fill(elsewhere, -1), weights))


def _combined(rows: torch.Tensor, weights: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Weighted sum over the choices in float32, one after another, then one cast."""
    total = torch.zeros_like(rows[:, 0], dtype=torch.float32)
    for choice in range(rows.shape[1]):
        total += rows[:, choice].float() * weights[:, choice, None].float()
    return total.to(dtype)


def _check_divides(count: int, ranks: Ranks) -> None:
    if count % ranks.size:
        msg = f"{count} experts cannot be divided evenly over {ranks.size} ranks"
        raise ModelError(msg)
