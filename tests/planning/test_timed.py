"""Ranges of token counts by times: the cheapest few, no switch for next to nothing."""

from __future__ import annotations

import random
from itertools import pairwise, product
from math import log

import pytest

from blockscale.planning.timed import (
    LEAST_GAIN,
    MOST_RANGES,
    SWITCH_COST,
    TOKENS,
    Timed,
    in_ranges,
    starts_of,
)

NAMES = ("first", "second")


def points(*ratios: float) -> list[Timed]:
    """``second`` takes 100 us everywhere, ``first`` so many times as long."""
    return [
        Timed(start, m, {"first": 100.0 * ratio, "second": 100.0})
        for start, m, ratio in zip(starts_of(TOKENS), TOKENS, ratios, strict=False)
    ]


def served(*ratios: float) -> list[tuple[int, str]]:
    return [(one.min_m, one.backend) for one in in_ranges(points(*ratios), NAMES)]


def test_each_token_count_speaks_up_to_the_geometric_mean() -> None:
    assert starts_of(TOKENS)[:6] == (1, 2, 3, 6, 12, 20)
    assert starts_of(TOKENS)[-1] == 5793


def test_a_range_goes_to_the_faster_one() -> None:
    assert served(0.9, 0.9, 1.1, 1.1) == [(1, "first"), (3, "second")]


def test_the_preferred_one_serves_unless_another_is_one_percent_faster() -> None:
    assert served(1.009, 1.009, 1.009) == [(1, "first")]
    assert served(1.03, 1.03, 1.03) == [(1, "second")]


def test_an_estimate_must_be_better_by_its_doubt() -> None:
    """Where neither time was estimated, the doubt of others' estimates does not count."""

    def backend(ratio: float, *estimated: str) -> str:
        times = {"first": ratio, "second": 1.0}
        (found,) = in_ranges([Timed(1, 1, times, frozenset(estimated), doubt=0.05)], NAMES)
        return found.backend

    for estimated in ("first", "second"):
        assert backend(1.04, estimated) == "first"
        assert backend(1.06, estimated) == "second"
    assert backend(1.04) == backend(1.04, "third") == "second"


def test_a_little_faster_at_one_token_count_is_worth_no_switch() -> None:
    assert served(0.9, 0.9, 1.02, 0.9, 0.9) == [(1, "first")]
    assert len(served(0.9, 0.9, 1.1, 0.9, 0.9)) == 3


def test_alternating_times_give_few_ranges() -> None:
    found = served(*[1.3, 0.7] * 9)
    assert 1 <= len(found) <= MOST_RANGES


def test_reasons_say_how_much_faster_than_whom() -> None:
    slow, fast = in_ranges(points(0.8, 0.8, 1.1, 1.1), NAMES)
    assert slow.reason == "measured 1.25 times as fast as second"
    assert fast.reason == "measured 1.10 times as fast as first"
    (alone,) = in_ranges([Timed(1, 1, {"first": 1.0})], NAMES)
    assert alone.reason == "measured, and no other backend was"
    (equal,) = in_ranges(points(1.001, 1.001), NAMES)
    assert equal.reason == "measured as fast as second"
    guess = [Timed(1, 1, {"first": 1.0, "second": 1.5}, frozenset({"second"}))]
    assert in_ranges(guess, NAMES)[0].reason == "estimated 1.50 times as fast as second"


def test_who_has_no_time_somewhere_serves_elsewhere() -> None:
    found = in_ranges([Timed(1, 1, {"first": 2.0}), Timed(9, 64, {"second": 1.0})], NAMES)
    assert [(one.min_m, one.backend) for one in found] == [(1, "first"), (9, "second")]


def test_nothing_gives_nothing() -> None:
    assert in_ranges([], NAMES) == ()


@pytest.mark.parametrize("seed", range(20))
def test_ranges_cost_least_of_all_ways(seed: int) -> None:
    draw = random.Random(seed)
    ratios = [draw.choice((0.9, 0.98, 1.0, 1.02, 1.04, 1.1)) for _ in range(6)]
    made = points(*ratios)

    def cost(way: tuple[str, ...]) -> float:
        times = sum(
            log(one.time_us[name]) + LEAST_GAIN * (name == "second")
            for one, name in zip(made, way, strict=True)
        )
        return times + SWITCH_COST * sum(a != b for a, b in pairwise(way))

    ranges = in_ranges(made, NAMES)
    way = tuple(
        next(one.backend for one in reversed(ranges) if one.min_m <= point.min_m) for point in made
    )
    least = min(cost(other) for other in product(NAMES, repeat=6))
    assert cost(way) == pytest.approx(least, abs=1e-12)
