"""The plan of one rank: every layer cut, and a remedy wherever a cut goes through scale blocks."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from blockscale.planning.expert_sets import expert_sets
from blockscale.planning.explain import layer_count
from blockscale.planning.pieces import Holding, piece_of, request_of
from blockscale.planning.plan import Finding, LinearPlan, ModelPlan, Severity, SkippedLayer
from blockscale.planning.planner import plan_experts, plan_model
from blockscale.planning.policy import Strictness
from blockscale.planning.remedies import Price, Remedies, Remedy, remedies_of
from blockscale.planning.request import LinearRequest, RemedyKind
from blockscale.planning.sharding import cut

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from blockscale.planning.decision import PlannableBackend
    from blockscale.planning.device import Device
    from blockscale.planning.policy import PlanPolicy
    from blockscale.planning.sharding import Parallelism, WholeLayer


@dataclass(frozen=True, slots=True)
class Target:
    """What to plan for. ``backends``: all that exist, in the registry's order.

    ``remedy``: the one to take wherever it is offered, None for the cheapest.
    """

    device: Device
    policy: PlanPolicy
    backends: Sequence[PlannableBackend]
    remedy: RemedyKind | None = None


@dataclass(frozen=True, slots=True)
class SplitSet:
    """Layers that share an activation, of which some cut goes through a scale block.

    ``names``: in checkpoint order. ``count``: how many such sets the model has; this is the first.
    ``split_layers``: how many layers of a set are split. ``reason``: the first split, in words.
    ``chosen``: the remedy that is planned, None if none helps.
    """

    names: tuple[str, ...]
    count: int
    split_layers: int
    reason: str
    remedies: Remedies
    chosen: Remedy | None


@dataclass(frozen=True, slots=True)
class Shards:
    """What one rank holds: a request for each layer that can be cut, and how.

    ``holdings`` names the layers that are not cut evenly, with what ``piece_of`` needs.
    """

    requests: tuple[LinearRequest, ...]
    holdings: Mapping[str, Holding]
    split: tuple[SplitSet, ...]
    findings: tuple[Finding, ...]


def plan_shards(
    shards: Shards,
    target: Target,
    *,
    skipped: Sequence[SkippedLayer] = (),
    findings: Sequence[Finding] = (),
) -> ModelPlan:
    """The plan of one rank, with a finding for every remedy. Raises as ``plan_model`` does."""
    return plan_model(
        shards.requests,
        target.device,
        target.policy,
        target.backends,
        skipped=skipped,
        findings=(*findings, *shards.findings),
    )


def shards_of(
    layers: Sequence[WholeLayer], parallelism: Parallelism, target: Target, rank: int = 0
) -> Shards:
    """What ``rank`` holds of every layer; no rank has more work than rank 0.

    Where a cut splits blocks, all layers around that activation get the remedy with the least work
    that keeps the degrees; where none helps, the request stays split and has no backend. Raises
    SettingsError if the policy names a backend that does not exist.
    """
    cuts = {layer.request.name: cut(layer, parallelism) for layer in layers}
    remedied, split = _remedies(layers, cuts, parallelism, target)
    holdings: dict[str, Holding] = {}
    requests = []
    for layer in layers:
        name = layer.request.name
        plain, holding = cuts[name], remedied.get(name)
        if isinstance(plain, Finding):
            continue
        if holding is not None:
            holdings[name] = holding
            piece = piece_of(layer, parallelism, rank, holding)
            plain = request_of(layer, parallelism, piece, holding)
        requests.append(plain)
    indivisible = tuple(one for one in cuts.values() if isinstance(one, Finding))
    found = tuple(_finding(one) for one in split if one.chosen)
    return Shards(tuple(requests), holdings, split, (*indivisible, *found))


def _remedies(
    layers: Sequence[WholeLayer],
    cuts: Mapping[str, LinearRequest | Finding],
    parallelism: Parallelism,
    target: Target,
) -> tuple[dict[str, Holding], tuple[SplitSet, ...]]:
    """Holdings by layer name, and the split sets; sets that differ only in names are asked once."""
    plan = _decider(target)
    answers: dict[tuple[WholeLayer, ...], Remedies] = {}
    same: dict[tuple[WholeLayer, ...], list[list[WholeLayer]]] = defaultdict(list)
    for members in _split_sets(layers, cuts):
        key = tuple(_nameless(layer) for layer in members)
        if key not in answers:
            answers[key] = remedies_of(members, parallelism, plan)
        same[key].append(members)
    holdings = {}
    for key, sets in same.items():
        chosen = answers[key].choice(target.remedy)
        if chosen is None:
            continue
        for members in sets:
            for layer, holding in zip(members, chosen.holdings, strict=True):
                if holding is not None:
                    holdings[layer.request.name] = holding
    split = tuple(
        SplitSet(
            tuple(layer.request.name for layer in sets[0]),
            len(sets),
            sum(bool(_split_words(layer, cuts)) for layer in sets[0]),
            _first_split(sets[0], cuts),
            answers[key],
            answers[key].choice(target.remedy),
        )
        for key, sets in same.items()
    )
    return holdings, split


def _decider(target: Target) -> Callable[[Sequence[LinearRequest]], Sequence[LinearPlan]]:
    """Plans of the requests of one rank, experts together, each set asked once."""
    policy = replace(target.policy, strictness=Strictness.REPORT)
    decided: dict[tuple[LinearRequest, ...], tuple[LinearPlan, ...]] = {}

    def decide(requests: Sequence[LinearRequest]) -> Sequence[LinearPlan]:
        plans: dict[LinearRequest, LinearPlan] = {}
        for together in expert_sets(requests):
            nameless = tuple(replace(one, name="") for one in together)
            if nameless not in decided:
                decided[nameless] = plan_experts(nameless, target.device, policy, target.backends)
            plans.update(zip(together, decided[nameless], strict=True))
        return [plans[one] for one in requests]

    return decide


def _split_sets(
    layers: Iterable[WholeLayer], cuts: Mapping[str, LinearRequest | Finding]
) -> list[list[WholeLayer]]:
    """Divisible layers below one module, where at least one of them is split."""
    sets: dict[str, list[WholeLayer]] = defaultdict(list)
    for layer in layers:
        if isinstance(cuts[layer.request.name], LinearRequest):
            sets[layer.request.name.rpartition(".")[0]].append(layer)
    return [members for members in sets.values() if any(_split_words(one, cuts) for one in members)]


def _split_words(layer: WholeLayer, cuts: Mapping[str, LinearRequest | Finding]) -> tuple[str, ...]:
    plain = cuts[layer.request.name]
    return plain.shard.split_blocks if isinstance(plain, LinearRequest) else ()


def _first_split(members: Iterable[WholeLayer], cuts: Mapping[str, LinearRequest | Finding]) -> str:
    return next(
        f"{layer.request.name}: {words[0]}"
        for layer in members
        if (words := _split_words(layer, cuts))
    )


def _nameless(layer: WholeLayer) -> WholeLayer:
    leaf = layer.request.name.rpartition(".")[2]
    return replace(layer, request=replace(layer.request, name=leaf))


def _finding(split: SplitSet) -> Finding:
    chosen = split.chosen
    assert chosen is not None
    others = [remedy for remedy in split.remedies.offered if remedy is not chosen]
    also = "; ".join(remedy_words(other, split.count) for other in others)
    sets = "" if split.count == 1 else f" and {layer_count(split.count - 1)} like it"
    return Finding(
        Severity.NOTE,
        "shard_remedy",
        f"the cut goes through scale blocks of {split.reason}{sets}; held without loss by "
        f"{remedy_words(chosen, split.count)}" + (f"; or {also}" if also else ""),
    )


def remedy_words(remedy: Remedy, count: int) -> str:
    """What a remedy does to ``count`` such sets on a rank, and what that costs."""
    runs = " and ".join(remedy.backends)
    return f"{_deed(remedy)} ({runs}; {price_words(remedy.price, count)})"


def price_words(price: Price, count: int) -> str:
    """Work and bytes of ``count`` such sets beyond an even share."""
    work = "no padded work" if price.work == 1 else f"{price.work:.2f}x the work"
    weights = _bytes_words(price.extra_weight_bytes * count, "weights")
    return f"{work}, {weights}, {_bytes_words(price.extra_scale_bytes * count, 'scales')}"


def _deed(remedy: Remedy) -> str:
    kind = remedy.kind
    if kind is RemedyKind.REFINE:
        blocks = dict.fromkeys(
            str(holding.block) for holding in remedy.holdings if holding is not None
        )
        return f"refine: scales repeated for {' and '.join(blocks)} blocks"
    if kind is RemedyKind.UNEVEN:
        return "uneven: whole blocks, some ranks one more than others"
    if kind is RemedyKind.PAD:
        return "pad: zeros to the next block"
    return f"expert parallelism: --ep {remedy.parallelism.expert}"


def _bytes_words(count: int, what: str) -> str:
    megabytes = count / 1e6
    if count == 0:
        return f"no more {what}"
    sign = "+" if count > 0 else "-"
    return f"{sign}{abs(megabytes):.1f} MB of {what}"
