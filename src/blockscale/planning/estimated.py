"""Times for the choice among backends that read the same prepared weight: measured, or estimated.

Some backends can say what they would take (``EstimatingBackend``). Where nothing near was measured,
their estimates choose among them, if the most preferred backend is one of them: nothing is known of
one that cannot estimate. Where something was measured, a backend that is missing in the table, or
whose table is of another (N, K), takes the time of an estimating one that was measured, times the
ratio of their estimates for these very layers. The weights of a set of experts are such layers: one
backend runs them all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from blockscale.planning.decision import EstimatingBackend
from blockscale.planning.timed import TOKENS, Timed, starts_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from blockscale.planning.decision import PlannableBackend
    from blockscale.planning.device import Device
    from blockscale.planning.request import LinearRequest


# The ratio of two estimates of a dense layer is off by 10 % (root of the mean square). With 5 %
# between them plans lose 0.5 % to whoever is fastest, with 1 % 0.7 % (``family_fit.py --doubt``,
# H100 and H200, 2026-11-27). Those of experts, from measured ratios, lose 0.2 % (ADR 0011).
DENSE_DOUBT = 0.05


@dataclass(frozen=True, slots=True)
class _Estimates:
    """What the backends that can estimate say about layers that are decided together."""

    requests: Sequence[LinearRequest]
    device: Device
    backends: Sequence[EstimatingBackend]

    @property
    def doubt(self) -> float:
        """As ``Timed`` has it."""
        return DENSE_DOUBT if all(one.experts is None for one in self.requests) else 0.0

    def at(self, m: int) -> dict[str, float]:
        """Microseconds of all layers by backend; empty unless there is an answer to each."""
        found: dict[str, float] = {}
        for backend in self.backends:
            found[backend.name] = 0.0
            for request in self.requests:
                time_us = backend.estimate_us(request, self.device, m)
                if time_us is None:
                    return {}
                found[backend.name] += time_us
        return found


def timed_for(
    requests: Sequence[LinearRequest],
    device: Device,
    preferred: Sequence[str],
    backends: Iterable[PlannableBackend],
    measured: tuple[Timed, ...],
) -> tuple[Timed, ...]:
    """Times of the backends named ``preferred``, in rising order of M; empty if there are none.

    ``requests``: a dense layer, or the weights of a set of experts, whose times count together.
    ``preferred``: those that would serve them on one prepared weight, most preferred first.
    ``measured``: as a table has it for these layers or some near them.
    """
    able = [
        backend
        for backend in backends
        if backend.name in preferred
        and isinstance(backend, EstimatingBackend)
        and _knows(backend, requests, device)
    ]
    if len(able) > 1:
        estimates = _Estimates(requests, device, able)
        if measured:
            measured = tuple(_completed(one, estimates) for one in measured)
        elif preferred[0] in {backend.name for backend in able}:
            measured = _estimated(estimates)
    return tuple(one for one in measured if any(name in one.time_us for name in preferred))


def _knows(backend: EstimatingBackend, requests: Sequence[LinearRequest], device: Device) -> bool:
    """Whether it estimates such layers at all: many tokens, if any."""
    return all(backend.estimate_us(one, device, TOKENS[-1]) is not None for one in requests)


def _estimated(estimates: _Estimates) -> tuple[Timed, ...]:
    known = [(m, times) for m in TOKENS if (times := estimates.at(m))]
    if not known:
        return ()
    starts = starts_of([m for m, _ in known])
    return tuple(
        Timed(start, m, times, frozenset(times), doubt=estimates.doubt)
        for start, (m, times) in zip(starts, known, strict=True)
    )


def _completed(point: Timed, estimates: _Estimates) -> Timed:
    """With the times that were not measured, or not at this very shape."""
    names = [backend.name for backend in estimates.backends]
    base = next((name for name in names if name in point.time_us), None)
    missing = [name for name in names if name not in point.time_us or point.is_near]
    if base is None or missing in ([], [base]):
        return point
    times = estimates.at(point.m)
    if not times:
        return point
    filled = {
        name: point.time_us[base] * times[name] / times[base] for name in missing if name != base
    }
    times = {**point.time_us, **filled}
    return Timed(point.min_m, point.m, times, frozenset(filled), doubt=estimates.doubt)
