"""Experts of a checkpoint, read one at a time: stored one by one, or stacked in one tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from blockscale.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from blockscale.checkpoint.header import TensorEntry
    from blockscale.checkpoint.requests import MergedLayer
    from blockscale.checkpoint.schema import QuantizedLayer
    from blockscale.tensor import BlockScaledTensor


@dataclass(frozen=True, slots=True)
class StoredExperts:
    """One weight of a set of experts: its parts for each expert, or stacks of all of them.

    ``members``: gate and up (or down) of expert 0, of expert 1, and so on; one if ``stacked``.
    """

    members: tuple[tuple[QuantizedLayer, ...], ...]

    @property
    def stacked(self) -> bool:
        """Whether one tensor holds all experts."""
        return self.members[0][0].stacked is not None

    def read(self, expert: int) -> Iterator[BlockScaledTensor]:
        """One expert's parts as stored, each read when it is asked for.

        Raises CheckpointError if the files cannot be read.
        """
        from blockscale.checkpoint.tensors import read_block_scaled

        if self.stacked:
            yield from (_read_from_stack(layer, expert) for layer in self.members[0])
        else:
            yield from (read_block_scaled(layer) for layer in self.members[expert])


def stored_experts(layer: MergedLayer) -> StoredExperts:
    """Where a planned stack of experts lies.

    Raises CheckpointError if the experts that are stored one by one are not numbered from 0 on.
    """
    stored = StoredExperts(layer.members)
    if not stored.stacked:
        for number, parts in enumerate(stored.members):
            name = parts[0].name
            if f".experts.{number}." not in name:
                raise CheckpointError(
                    parts[0].weight.path,
                    f"is the expert after number {number - 1}, so number {number} is missing",
                    tensor=name,
                )
    return stored


def _read_from_stack(layer: QuantizedLayer, expert: int) -> BlockScaledTensor:
    import torch

    from blockscale.formats import K_MAJOR, ScaleFormat
    from blockscale.tensor import BlockScaledTensor

    scales = _read_matrix(layer.scale, expert)
    if layer.format.scale is ScaleFormat.UE8M0:
        scales = scales.view(torch.float8_e8m0fnu)
    elif scales.dtype is torch.float16:
        scales = scales.float()
    return BlockScaledTensor(_read_matrix(layer.weight, expert), scales, layer.format, K_MAJOR)


def _read_matrix(entry: TensorEntry, index: int) -> torch.Tensor:
    from blockscale.checkpoint.tensors import read_rows

    rows = entry.shape[-2]
    return read_rows(entry, index * rows, rows)
