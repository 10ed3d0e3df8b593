"""What a person should know about a whole plan, once for each cause and not once for each layer."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import TYPE_CHECKING

from blockscale.planning.decision import LAST_RESORT, Obstacle, Readiness
from blockscale.planning.explain import layer_count
from blockscale.planning.plan import Finding, LinearPlan, Severity

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence

    from blockscale.planning.request import LinearRequest


def findings_of(
    layers: Sequence[LinearPlan], if_powers_of_two: Mapping[LinearRequest, LinearPlan]
) -> list[Finding]:
    """Everything worth saying about these plans.

    ``if_powers_of_two``: for each request that unread scales kept from a backend, with an empty
    name, the plan it would get if its scales were powers of two.
    """
    return [
        *_unservable(layers),
        *_last_resorts(layers),
        *_split_blocks(layers),
        *_unread_scales(layers, if_powers_of_two),
        *_second_copies(layers),
        *_plan_only(layers),
    ]


def _unservable(layers: Iterable[LinearPlan]) -> list[Finding]:
    lost = [plan for plan in layers if not plan.is_servable]
    return [
        Finding(
            Severity.FAULT,
            "unservable",
            f"no backend may serve {_described(same)}; plan --explain gives every reason",
            _single(same),
        )
        for same in _grouped(lost, lambda plan: replace(plan.request, name=""))
    ]


def _last_resorts(layers: Iterable[LinearPlan]) -> list[Finding]:
    """Layers that run, but as nobody would want to serve them."""
    slow = [
        plan
        for plan in layers
        if LAST_RESORT in plan.backends
        and any(one.obstacle is not Obstacle.EXCLUDED_BY_POLICY for one in plan.rejected)
    ]
    return [
        Finding(
            Severity.WARNING,
            "last_resort",
            f"only {LAST_RESORT} serves {_described(same)}, and it dequantizes the weight on every "
            "call; plan --explain says what the others lack",
            _single(same),
        )
        for same in _grouped(slow, lambda plan: replace(plan.request, name=""))
    ]


def _split_blocks(layers: Iterable[LinearPlan]) -> list[Finding]:
    split = [plan for plan in layers if plan.request.shard.split_blocks]
    findings = []
    for same in _grouped(split, lambda plan: replace(plan.request, name="")):
        request = same[0].request
        cure = "a smaller tensor parallel degree keeps blocks whole"
        if request.experts is not None:
            cure = "expert parallelism (--ep) keeps experts whole"
        findings.append(
            Finding(
                Severity.WARNING,
                "shard_splits_block",
                f"the cut goes through scale blocks of {_described(same)}: "
                f"{'; '.join(request.shard.split_blocks)}; {cure}",
                _single(same),
            )
        )
    return findings


def _unread_scales(
    layers: Iterable[LinearPlan], if_powers_of_two: Mapping[LinearRequest, LinearPlan]
) -> list[Finding]:
    """What reading the scales would change, for each pair of backends now and then."""
    counts: dict[tuple[tuple[str, ...], tuple[str, ...]], int] = defaultdict(int)
    for plan in layers:
        then = if_powers_of_two.get(replace(plan.request, name=""))
        if then is not None and then.backends != plan.backends:
            counts[_unique(plan.backends), _unique(then.backends)] += 1
    return [
        Finding(
            Severity.NOTE,
            "unread_scales",
            f"{' and '.join(then)} would serve {layer_count(count)} instead of "
            f"{' and '.join(now) or 'no backend'} if their scales are powers of two: read them "
            "with plan --read-scales or verify (then lossless), or permit requantizing in any "
            "case with --allow-lossy",
        )
        for (now, then), count in counts.items()
    ]


def _second_copies(layers: Iterable[LinearPlan]) -> list[Finding]:
    """What keeping two prepared forms would take: a plan keeps one."""
    counts: dict[str, int] = defaultdict(int)
    sizes: dict[str, int] = defaultdict(int)
    for plan in layers:
        for rejection in plan.rejected:
            if rejection.copy_bytes is not None:
                counts[rejection.backend] += 1
                sizes[rejection.backend] += rejection.copy_bytes
    return [
        Finding(
            Severity.NOTE,
            "second_copy",
            f"{backend} would serve some numbers of tokens in {layer_count(count)}, but reads the "
            f"weights in another form; second prepared copies would cost {sizes[backend]} bytes "
            "on this rank, and a plan keeps one",
        )
        for backend, count in counts.items()
    ]


_NOT_RUNNABLE = {
    Readiness.PLAN_ONLY: "but blockscale cannot run it yet: on such a machine the next one in the "
    "order of preference is planned",
    Readiness.ONCE_PROVEN: "and runs only where doctor --probe has proven it",
}


def _plan_only(layers: Iterable[LinearPlan]) -> list[Finding]:
    counts: dict[tuple[str, Readiness], int] = defaultdict(int)
    for plan in layers:
        for backend, readiness in dict.fromkeys(
            (choice.offer.backend, choice.offer.readiness)
            for choice in plan.choices
            if choice.offer.readiness in _NOT_RUNNABLE
        ):
            counts[backend, readiness] += 1
    return [
        Finding(
            Severity.NOTE,
            readiness.value,
            f"{backend} is planned for {layer_count(count)}, {_NOT_RUNNABLE[readiness]}",
        )
        for (backend, readiness), count in counts.items()
    ]


def _grouped(
    plans: Iterable[LinearPlan], key: Callable[[LinearPlan], Hashable]
) -> list[list[LinearPlan]]:
    groups: dict[Hashable, list[LinearPlan]] = defaultdict(list)
    for plan in plans:
        groups[key(plan)].append(plan)
    return list(groups.values())


def _described(same: Sequence[LinearPlan]) -> str:
    request = same[0].request
    shape = f"(N={request.n}, K={request.k}, {request.format})"
    if len(same) == 1:
        return f"this layer {shape}"
    return f"{len(same)} layers like {request.name} {shape}"


def _single(same: Sequence[LinearPlan]) -> str | None:
    return same[0].name if len(same) == 1 else None


def _unique(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))
