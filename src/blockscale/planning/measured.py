"""Measured times decide which backend serves which token counts, where there are any.

A table says how long each backend took for one (N, K), output dtype and M on one kind of device. A
layer whose shape was not measured takes the nearest measured one, if both N and K are within a
factor of two: tile effects beyond that are not predicted. Experts take times of as many experts
within a factor of two, and the products of a set count together. Without a table nothing here is
used and the order of preference stands.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from math import isqrt, log
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from blockscale.planning.device import Measurement
    from blockscale.planning.request import LinearRequest

NEAR = log(2.0)


@dataclass(frozen=True, slots=True)
class MeasuredRange:
    """From ``min_m`` tokens on, until the next range: times by backend, as measured at ``m``."""

    min_m: int
    m: int
    time_us: Mapping[str, float]


def measured_ranges(
    request: LinearRequest, measurements: Sequence[Measurement]
) -> tuple[MeasuredRange, ...]:
    """The measured token counts for this layer in rising order; empty if nothing near was measured.

    A measured M speaks for the token counts between the geometric means with its neighbours.
    """
    return ranges_of_set([request], measurements)


def ranges_of_set(
    requests: Sequence[LinearRequest], measurements: Sequence[Measurement]
) -> tuple[MeasuredRange, ...]:
    """``measured_ranges`` of layers that one backend serves together: the sums of their times.

    Of each token count, those backends that were measured for all of them.
    """
    if not measurements:
        return ()
    first, *others = (_times(request, measurements) for request in requests)
    times = {
        m: {
            backend: time_us + sum(other[m][backend] for other in others)
            for backend, time_us in of_backends.items()
            if all(backend in other.get(m, {}) for other in others)
        }
        for m, of_backends in first.items()
    }
    times = {m: of_backends for m, of_backends in times.items() if of_backends}
    ranges: list[MeasuredRange] = []
    previous = 0
    for m in sorted(times):
        start = isqrt(previous * m) + 1 if previous else 1
        ranges.append(MeasuredRange(start, m, times[m]))
        previous = m
    return tuple(ranges)


def _times(
    request: LinearRequest, measurements: Sequence[Measurement]
) -> dict[int, dict[str, float]]:
    """By tokens and backend, of the nearest shape."""
    wanted = [
        one
        for one in measurements
        if one.out_dtype is request.out_dtype and (one.experts is None) == (request.experts is None)
    ]
    shape = _nearest_shape(request, wanted)
    times: dict[int, dict[str, float]] = defaultdict(dict)
    for one in wanted:
        if (one.n, one.k, one.experts or 1) == shape:
            times[one.m][one.backend] = one.time_us
    return times


def _nearest_shape(
    request: LinearRequest, measurements: Sequence[Measurement]
) -> tuple[int, int, int] | None:
    """(n, k, experts), 1 for a dense layer."""
    own = (request.n, request.k, request.experts or 1)
    near: list[tuple[float, tuple[int, int, int]]] = []
    for shape in {(one.n, one.k, one.experts or 1) for one in measurements}:
        away = [abs(log(one / other)) for one, other in zip(shape, own, strict=True)]
        if max(away) <= NEAR:
            near.append((sum(away), shape))
    return min(near)[1] if near else None
