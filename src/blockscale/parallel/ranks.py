"""The processes that share layers, and the three things that they tell one another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import distributed

from blockscale.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process's place among ``size``. ``group`` None: the default group, or no other process.

    Every rank must make the same calls in the same order, as torch.distributed wants it.
    """

    rank: int = 0
    size: int = 1
    group: distributed.ProcessGroup | None = None

    @classmethod
    def joined(cls, group: distributed.ProcessGroup | None = None) -> Ranks:
        """The ranks of a group that this process has joined, the default one if None.

        Raises ModelError before ``torch.distributed.init_process_group``.
        """
        if not distributed.is_initialized():
            msg = "no process group: call torch.distributed.init_process_group first (torchrun)"
            raise ModelError(msg)
        return cls(distributed.get_rank(group), distributed.get_world_size(group), group)

    def sum(self, partial: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks, written into ``partial`` and given back, in its own dtype."""
        if self.size > 1:
            distributed.all_reduce(partial, group=self.group)
        return partial

    def side_by_side(self, part: torch.Tensor) -> torch.Tensor:
        """Every rank's (..., n) in rank order as (..., size x n), on every rank."""
        if self.size == 1:
            return part
        found = [torch.empty_like(part) for _ in range(self.size)]
        distributed.all_gather(found, part.contiguous(), group=self.group)
        return torch.cat(found, -1)

    def exchange(
        self, rows: torch.Tensor, sent: Sequence[int], received: Sequence[int]
    ) -> torch.Tensor:
        """Send the first ``sent[0]`` rows to rank 0, the next to rank 1 ...; what came, by sender.

        ``received[r]``: how many rows rank r sends here.
        """
        if self.size == 1:
            return rows
        found = rows.new_empty((sum(received), *rows.shape[1:]))
        distributed.all_to_all_single(
            found, rows.contiguous(), list(received), list(sent), group=self.group
        )
        return found
