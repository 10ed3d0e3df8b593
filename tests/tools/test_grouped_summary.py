"""What the grouped benchmark says of its records, on records made up here."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import grouped_summary

LONG = "contiguous-contiguous-8x4096-6144x7168"
SHORT = "contiguous-contiguous-8x4096-7168x2048"
SLOTS = "masked-masked-6x1024-4096x7168"


def record(case: str, backend: str, us: float, **other: Any) -> dict[str, Any]:
    n, k = map(int, case.rsplit("-", 1)[1].split("x"))
    found = {"case": case, "backend": backend, "time_us": us, "out_dtype": "bfloat16"}
    found |= {"chosen": True, "m": 32768, "n": n, "k": k, "groups": 8, "benchmark": "grouped"}
    return found | other


RECORDS = [
    record(LONG, "deep_gemm", 100.0),
    record(LONG, "gluon", 110.0),
    record(LONG, "cuda", 999.0),
    record(LONG, "cuda", 105.0),
    record(LONG, "cuda", 50.0, chosen=False),
    record(SHORT, "deep_gemm", 100.0),
    record(SHORT, "gluon", 98.0),
    record(SHORT, "cuda", 96.0),
    record(SLOTS, "deep_gemm", 90.0),
    record(SLOTS, "gluon", 120.0),
    record(SLOTS, "cuda", 100.0),
]


def ratios(points: list[grouped_summary.Point]) -> dict[str, float]:
    return {point.case: point.ratio for point in points}


def test_the_best_of_ours_is_the_faster_and_the_last_record_counts() -> None:
    best = grouped_summary.best_of_ours(grouped_summary.points(RECORDS))
    assert ratios(best) == {LONG: 100 / 105, SHORT: 100 / 96, SLOTS: 0.9}


def test_one_of_ours_alone_is_not_the_faster() -> None:
    records = [one for one in RECORDS if one["backend"] != "cuda"]
    assert grouped_summary.best_of_ours(grouped_summary.points(records)) == []


def test_planned_is_what_a_plan_takes_of_contiguous_rows() -> None:
    """By K: ``gemm.cu`` at 7168 and Gluon at 2048, although it is the slower one here."""
    planned = [point for point in grouped_summary.points(RECORDS) if point.is_planned]
    assert {(point.case, point.backend) for point in planned} == {(LONG, "cuda"), (SHORT, "gluon")}


def test_low_row_blocks_are_compared_with_deep_gemms_slots() -> None:
    base = record("minimax-masked-t16-3072x1536", "deep_gemm", 60.0)
    low = record("minimax-blocks8-t16-3072x1536", "gluon", 40.0)
    points = grouped_summary.points([base, low])
    (found,) = [point for point in points if point.backend == "gluon"]
    assert (found.ratio, found.kind, found.is_aligned) == (1.5, "minimax blocks8", False)


def test_the_summary_names_what_is_below_the_goal() -> None:
    text = grouped_summary.summary(RECORDS)
    assert "masked masked          best of ours     bfloat16  0.900 (0.900) 1" in text
    assert f"best of ours below 0.93:\n  0.900 bfloat16  {SLOTS}" in text
    assert "below" not in grouped_summary.summary([r for r in RECORDS if r["case"] != SLOTS])


@pytest.mark.parametrize("case", [LONG, SLOTS])
def test_without_deep_gemm_there_is_nothing_to_say(case: str) -> None:
    assert grouped_summary.points([record(case, "gluon", 1.0)]) == []
