"""Which degrees of tensor and expert parallelism a checkpoint's blocks allow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from blockscale.checkpoint.requests import RequestOptions, requests_of
from blockscale.planning.planner import plan_model
from blockscale.planning.sharding import Parallelism

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from blockscale.checkpoint.read import Checkpoint
    from blockscale.checkpoint.schema import Layers
    from blockscale.formats import DType
    from blockscale.planning.decision import PlannableBackend
    from blockscale.planning.device import Device
    from blockscale.planning.policy import PlanPolicy

TENSOR_DEGREES = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True, slots=True)
class Advice:
    """One pair of degrees. Counts are of layers on one rank.

    ``weight_bytes``: FP8 data of one rank, scales not counted. ``split``: layers whose shard cuts a
    scale block. ``indivisible``: layers that cannot be cut evenly. ``reason``: the first thing that
    is wrong, in words; None if every layer has a backend.
    """

    parallelism: Parallelism
    layers: int
    weight_bytes: int
    unservable: int
    split: int
    indivisible: int
    reason: str | None

    @property
    def works(self) -> bool:
        """Whether every layer of a rank has a backend."""
        return self.unservable == 0 and self.indivisible == 0


@dataclass(frozen=True, slots=True)
class Target:
    """What to plan for."""

    dtype: DType
    device: Device
    policy: PlanPolicy
    backends: Sequence[PlannableBackend]


def advise(
    checkpoint: Checkpoint,
    layers: Layers,
    target: Target,
    tensor_degrees: Sequence[int] = TENSOR_DEGREES,
) -> tuple[Advice, ...]:
    """A plan for each tensor parallel degree, without expert parallelism and with all of it.

    Raises as ``requests_of`` and ``plan_model`` do.
    """
    return tuple(
        _advice(checkpoint, layers, target, parallelism)
        for parallelism in _degrees(checkpoint, layers, target, tensor_degrees)
    )


def _degrees(
    checkpoint: Checkpoint, layers: Layers, target: Target, tensor_degrees: Sequence[int]
) -> Iterator[Parallelism]:
    whole = requests_of(checkpoint, layers, RequestOptions(target.dtype)).requests
    has_experts = any(request.experts is not None for request in whole)
    for tensor in tensor_degrees:
        yield Parallelism(tensor)
        if has_experts and tensor > 1:
            yield Parallelism(tensor, tensor)


def _advice(
    checkpoint: Checkpoint, layers: Layers, target: Target, parallelism: Parallelism
) -> Advice:
    wanted = requests_of(checkpoint, layers, RequestOptions(target.dtype, parallelism))
    plan = plan_model(wanted.requests, target.device, target.policy, target.backends)
    indivisible = [finding for finding in wanted.findings if finding.code == "indivisible"]
    split = [layer for layer in plan.layers if layer.request.shard.split_blocks]
    reason = None
    if indivisible:
        reason = f"{indivisible[0].layer}: {indivisible[0].message}"
    elif split:
        reason = f"{split[0].name}: {split[0].request.shard.split_blocks[0]}"
    elif plan.unservable:
        first = plan.unservable[0]
        reason = f"{first.name}: no backend; see plan --explain"
    return Advice(
        parallelism,
        len(plan.layers),
        sum(layer.request.weight_bytes for layer in plan.layers),
        len(plan.unservable),
        len(split),
        len(indivisible),
        reason,
    )
