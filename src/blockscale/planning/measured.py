"""Measured times decide which backend serves which token counts, where there are any.

A table says how long each backend took for one (N, K), output dtype and M on one kind of device. A
layer whose shape was not measured takes the nearest measured one, if both N and K are within a
factor of two: tile effects beyond that are not predicted. Without a table nothing here is used and
the order of preference stands.
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
    shape = _nearest_shape(request, measurements)
    if shape is None or request.experts is not None:
        return ()
    times: dict[int, dict[str, float]] = defaultdict(dict)
    for one in measurements:
        if (one.n, one.k) == shape and one.out_dtype is request.out_dtype:
            times[one.m][one.backend] = one.time_us
    ranges: list[MeasuredRange] = []
    previous = 0
    for m in sorted(times):
        start = isqrt(previous * m) + 1 if previous else 1
        ranges.append(MeasuredRange(start, m, times[m]))
        previous = m
    return tuple(ranges)


def _nearest_shape(
    request: LinearRequest, measurements: Sequence[Measurement]
) -> tuple[int, int] | None:
    shapes = {(one.n, one.k) for one in measurements if one.out_dtype is request.out_dtype}
    near = [
        (abs(log(n / request.n)) + abs(log(k / request.k)), n, k)
        for n, k in shapes
        if abs(log(n / request.n)) <= NEAR and abs(log(k / request.k)) <= NEAR
    ]
    return min(near)[1:] if near else None
