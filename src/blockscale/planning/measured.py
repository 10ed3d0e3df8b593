"""Measured times decide which backend serves which token counts, where there are any.

A table says how long each backend took for one (N, K), output dtype and M on one kind of device. A
layer whose shape was not measured takes the nearest measured one, if both N and K are within a
factor of two: tile effects beyond that are not predicted. Experts take times of as many experts
within a factor of two, and the products of a set count together. Without a table nothing here is
used and the order of preference stands.
"""

from __future__ import annotations

from collections import defaultdict
from math import isqrt, log
from typing import TYPE_CHECKING

from blockscale.planning.timed import Timed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from blockscale.planning.device import Measurement
    from blockscale.planning.request import LinearRequest

NEAR = log(2.0)


def measured_ranges(
    request: LinearRequest, measurements: Sequence[Measurement]
) -> tuple[Timed, ...]:
    """The measured token counts for this layer in rising order; empty if nothing near was measured.

    A measured M speaks for the token counts between the geometric means with its neighbours.
    """
    return ranges_of_set([request], measurements)


def ranges_of_set(
    requests: Sequence[LinearRequest], measurements: Sequence[Measurement]
) -> tuple[Timed, ...]:
    """``measured_ranges`` of layers that one backend serves together: the sums of their times.

    Of each token count, those backends that were measured for all of them.
    """
    if not measurements:
        return ()
    nearest = [_nearest(request, measurements) for request in requests]
    is_near = any(shape != _shape(one) for one, (shape, _) in zip(requests, nearest, strict=True))
    first, *others = (times for _, times in nearest)
    times = {
        m: {
            backend: time_us + sum(other[m][backend] for other in others)
            for backend, time_us in of_backends.items()
            if all(backend in other.get(m, {}) for other in others)
        }
        for m, of_backends in first.items()
    }
    times = {m: of_backends for m, of_backends in times.items() if of_backends}
    ranges: list[Timed] = []
    previous = 0
    for m in sorted(times):
        start = isqrt(previous * m) + 1 if previous else 1
        ranges.append(Timed(start, m, times[m], is_near=is_near))
        previous = m
    return tuple(ranges)


def _nearest(
    request: LinearRequest, measurements: Sequence[Measurement]
) -> tuple[tuple[int, int, int] | None, dict[int, dict[str, float]]]:
    """The nearest shape, and its times by tokens and backend."""
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
    return shape, times


def _shape(request: LinearRequest) -> tuple[int, int, int]:
    return request.n, request.k, request.experts or 1


def _nearest_shape(
    request: LinearRequest, measurements: Sequence[Measurement]
) -> tuple[int, int, int] | None:
    """(n, k, experts), 1 for a dense layer."""
    own = _shape(request)
    near: list[tuple[float, tuple[int, int, int]]] = []
    for shape in {(one.n, one.k, one.experts or 1) for one in measurements}:
        away = [abs(log(one / other)) for one, other in zip(shape, own, strict=True)]
        if max(away) <= NEAR:
            near.append((sum(away), shape))
    return min(near)[1] if near else None
