"""Which of several backends serves which token counts, by their times: few ranges, worth a switch.

Times are measured (``planning.measured``) or estimated by backends that can
(``EstimatingBackend``). A pure function of them: nothing here knows where they come from.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from math import exp, inf, isqrt, log
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

# Token counts that backends are asked about; below the least that all of them know, the order of
# preference stands.
TOKENS = (
    1,
    2,
    4,
    8,
    16,
    24,
    32,
    48,
    64,
    96,
    128,
    192,
    256,
    384,
    512,
    768,
    1024,
    1536,
    2048,
    3072,
    4096,
    8192,
)
# Whoever is not the most preferred must be faster by this, as a logarithm.
LEAST_GAIN = 0.01
# A switch costs this: a range between two of another backend saves twice as much or is none.
SWITCH_COST = 0.015
MOST_RANGES = 6
# What words do not tell apart.
NO_DIFFERENCE = 0.005


@dataclass(frozen=True, slots=True)
class Timed:
    """From ``min_m`` tokens on, until the next one: microseconds by backend, at ``m`` tokens.

    ``is_near``: measured at another (N, K), near this one. ``estimated``: the backends whose time
    was not measured; ``doubt``: how much faster than the most preferred, as a logarithm, somebody
    must be where one of both was not.
    """

    min_m: int
    m: int
    time_us: Mapping[str, float]
    estimated: frozenset[str] = frozenset()
    is_near: bool = False
    doubt: float = 0.0


@dataclass(frozen=True, slots=True)
class Served:
    """From ``min_m`` tokens on, until the next one: who serves.

    ``other``: the best of the others over these token counts, None where nobody else has times for
    all of them; ``gain``: how many times as long it takes, the geometric mean. ``is_estimated``:
    that some of these times were not measured.
    """

    min_m: int
    backend: str
    other: str | None
    gain: float
    is_estimated: bool

    @property
    def reason(self) -> str:
        """In words: ``estimated 1.06 times as fast as gluon``."""
        verb = "estimated" if self.is_estimated else "measured"
        if self.other is None:
            return f"{verb}, and no other backend was"
        if abs(self.gain - 1) < NO_DIFFERENCE:
            return f"{verb} as fast as {self.other}"
        if self.gain < 1:
            return f"{verb} {1 / self.gain:.2f} times as slow as {self.other}: no switch for that"
        return f"{verb} {self.gain:.2f} times as fast as {self.other}"


def starts_of(tokens: Sequence[int]) -> tuple[int, ...]:
    """The first token count that each speaks for: the geometric mean with the one before.

    The first speaks for no fewer than half of it.
    """
    before = (tokens[0] // 2, *tokens)
    return tuple(isqrt(low * high) + 1 for low, high in zip(before, tokens, strict=False))


def in_ranges(points: Sequence[Timed], preferred: Sequence[str]) -> tuple[Served, ...]:
    """Ranges that cost least: times as logarithms, with least gains and ``SWITCH_COST`` on top.

    ``points``: in rising order of M. ``preferred``: all backends that may serve, most preferred
    first; at each point at least one of them has a time. At most ``MOST_RANGES``.
    """
    if not points:
        return ()
    names = [name for name in preferred if any(name in point.time_us for point in points)]
    costs = [
        [
            log(one.time_us[name]) + _least_gain(one, name, names[0])
            if name in one.time_us
            else inf
            for name in names
        ]
        for one in points
    ]
    switch_cost = SWITCH_COST
    while True:
        chosen = _cheapest(costs, switch_cost)
        runs = [(name, [i for i, _ in run]) for name, run in groupby(enumerate(chosen), _second)]
        if len(runs) <= MOST_RANGES or switch_cost == inf:
            break
        switch_cost *= 2
    return tuple(_served(names[index], [points[i] for i in run], names) for index, run in runs)


def _least_gain(one: Timed, name: str, preferred: str) -> float:
    """What ``name`` must be faster by."""
    if name == preferred:
        return 0.0
    return max(LEAST_GAIN, one.doubt if one.estimated & {name, preferred} else 0.0)


def _second(pair: tuple[int, int]) -> int:
    return pair[1]


def _cheapest(costs: Sequence[Sequence[float]], switch_cost: float) -> list[int]:
    """The way through all points that costs least; who is named first wins a tie."""
    total = list(costs[0])
    came_from: list[list[int]] = []
    for row in costs[1:]:
        before = []
        for index in range(len(row)):
            ways = [cost + switch_cost * (index != other) for other, cost in enumerate(total)]
            before.append(ways.index(min(ways)))
        total = [
            row[index] + total[other] + switch_cost * (index != other)
            for index, other in enumerate(before)
        ]
        came_from.append(before)
    found = [total.index(min(total))]
    for before in reversed(came_from):
        found.append(before[found[-1]])
    return found[::-1]


def _served(backend: str, points: Sequence[Timed], names: Sequence[str]) -> Served:
    """What a range is told by."""
    ratios = {
        name: sum(log(one.time_us[name] / one.time_us[backend]) for one in points) / len(points)
        for name in names
        if name != backend and all(name in one.time_us for one in points)
    }
    other = min(ratios, key=ratios.__getitem__, default=None)
    is_estimated = any(name in one.estimated for one in points for name in (backend, other))
    gain = exp(ratios[other]) if other else 1.0
    return Served(points[0].min_m, backend, other, gain, is_estimated)
