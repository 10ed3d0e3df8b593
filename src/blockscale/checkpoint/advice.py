"""Which degrees of tensor and expert parallelism a checkpoint's blocks allow, and at what price."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from blockscale.checkpoint.requests import RequestOptions, merged_layers
from blockscale.planning.planner import plan_model
from blockscale.planning.remedies import Price, Refusal, Remedy, price_of
from blockscale.planning.request import RemedyKind
from blockscale.planning.sharded import shards_of
from blockscale.planning.sharding import Parallelism

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from blockscale.checkpoint.read import Checkpoint
    from blockscale.checkpoint.schema import Layers
    from blockscale.formats import DType
    from blockscale.planning.plan import Finding, ModelPlan
    from blockscale.planning.sharded import Shards, SplitSet, Target
    from blockscale.planning.sharding import WholeLayer

TENSOR_DEGREES = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True, slots=True)
class RemedyAdvice:
    """One remedy for all layers of a model whose shards split blocks.

    ``price`` counts those layers alone, on the rank with the most work; None if the remedy does not
    help everywhere, and then ``reason`` says why. ``expert``: the degree that it needs.
    ``backends``: who would run those layers.
    """

    kind: RemedyKind
    price: Price | None
    backends: tuple[str, ...] = ()
    expert: int | None = None
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Advice:
    """One pair of degrees. Counts are of layers on one rank.

    ``price``: all layers of the rank with the most work, remedies applied. ``split``: layers whose
    even cut goes through a scale block; ``remedies``: what could be done, and ``chosen`` what the
    plan does. ``indivisible``: layers that cannot be cut evenly. ``reason``: the first thing that
    is wrong with an even cut, in words; None if nothing is. No remedies are looked for where a
    layer is indivisible.
    """

    parallelism: Parallelism
    layers: int
    price: Price
    unservable: int
    split: int
    indivisible: int
    reason: str | None
    remedies: tuple[RemedyAdvice, ...]
    chosen: tuple[RemedyKind, ...]

    @property
    def works(self) -> bool:
        """Whether every layer of every rank has a backend."""
        return self.unservable == 0 and self.indivisible == 0

    @property
    def weight_bytes(self) -> int:
        """FP8 codes of the rank with the most work."""
        return self.price.weight_bytes


def advise(
    checkpoint: Checkpoint,
    layers: Layers,
    dtype: DType,
    target: Target,
    tensor_degrees: Sequence[int] = TENSOR_DEGREES,
) -> tuple[Advice, ...]:
    """A plan for each tensor parallel degree and every expert parallel degree that divides it.

    Expert degrees are powers of two. Raises as ``requests_of`` and ``plan_model`` do.
    """
    merged = merged_layers(checkpoint, layers, RequestOptions(dtype))
    whole = [layer.whole for layer in merged.layers]
    return tuple(
        _advice(whole, parallelism, target) for parallelism in _degrees(whole, tensor_degrees)
    )


def _degrees(whole: Sequence[WholeLayer], tensor_degrees: Sequence[int]) -> Iterator[Parallelism]:
    has_experts = any(layer.request.experts is not None for layer in whole)
    for tensor in tensor_degrees:
        yield Parallelism(tensor)
        expert = 2
        while has_experts and expert <= tensor and tensor % expert == 0:
            yield Parallelism(tensor, expert)
            expert *= 2


def _advice(whole: Sequence[WholeLayer], parallelism: Parallelism, target: Target) -> Advice:
    shards = shards_of(whole, parallelism, target)
    plan = plan_model(shards.requests, target.device, target.policy, target.backends)
    by_name = {layer.request.name: layer for layer in whole}
    divisible = [by_name[request.name] for request in shards.requests]
    return Advice(
        parallelism,
        len(plan.layers),
        price_of(divisible, parallelism, shards.requests),
        len(plan.unservable),
        sum(one.split_layers * one.count for one in shards.split),
        len(whole) - len(divisible),
        _reason(shards, plan),
        tuple(_over_the_model(kind, shards.split) for kind in RemedyKind)
        if shards.split and len(divisible) == len(whole)
        else (),
        tuple(dict.fromkeys(one.chosen.kind for one in shards.split if one.chosen is not None)),
    )


def _reason(shards: Shards, plan: ModelPlan) -> str | None:
    for finding in shards.findings:
        if finding.code == "indivisible":
            return _placed(finding)
    if shards.split:
        return shards.split[0].reason
    if plan.unservable:
        return f"{plan.unservable[0].name}: no backend; see plan --explain"
    return None


def _placed(finding: Finding) -> str:
    return f"{finding.layer}: {finding.message}"


def _over_the_model(kind: RemedyKind, split: Sequence[SplitSet]) -> RemedyAdvice:
    """One remedy everywhere: the sum of its prices, or the first reason against it."""
    total: Price | None = None
    expert = None
    backends: dict[str, None] = {}
    for one in split:
        answer = next(answer for answer in one.remedies.answers if answer.kind is kind)
        if isinstance(answer, Refusal):
            return RemedyAdvice(kind, None, reason=answer.reason)
        assert isinstance(answer, Remedy)
        price = answer.price.times(one.count)
        total = price if total is None else total + price
        backends.update(dict.fromkeys(answer.backends))
        if kind is RemedyKind.EXPERT:
            # A degree that keeps the widest experts whole keeps the others whole too.
            expert = max(expert or 1, answer.parallelism.expert)
    return RemedyAdvice(kind, total, tuple(backends), expert)
