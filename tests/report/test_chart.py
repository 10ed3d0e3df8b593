"""Where points and ticks lie."""

from __future__ import annotations

import pytest

from blockscale.report.chart import (
    BOTTOM,
    HEIGHT,
    LEFT,
    MAX_CIRCLES,
    RIGHT,
    TOP,
    WIDTH,
    Sample,
    linear_plot,
    octave_plot,
)

NAN, INF = float("nan"), float("inf")


def points(*values: float) -> list[Sample]:
    return [Sample("s", str(value), value, value) for value in values]


def test_an_axis_begins_at_zero_where_values_differ() -> None:
    plot = linear_plot(points(0.01, 0.042), 8)
    assert plot is not None
    assert [label for _, label in plot.y_ticks] == ["0", "0.01", "0.02", "0.03", "0.04", "0.05"]
    assert plot.y_ticks[0][0] == HEIGHT - BOTTOM
    assert plot.y_ticks[-1][0] == TOP
    low, high = plot.series[0].marks
    assert (low.x, high.x) == (285.0, 727.0)
    assert low.y == pytest.approx(HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) / 5, abs=0.1)


def test_an_axis_begins_near_values_that_lie_close_together() -> None:
    plot = linear_plot(points(0.0262, 0.0267), 8)
    assert plot is not None
    labels = [label for _, label in plot.y_ticks]
    assert labels == ["0.0262", "0.0263", "0.0264", "0.0265", "0.0266", "0.0267"]


@pytest.mark.parametrize("values", [(0.0,), (1.0,), (0.0, 0.0), (0.03, 0.03), (1e-30, 1e30)])
def test_every_mark_lies_inside(values: tuple[float, ...]) -> None:
    plot = linear_plot(points(*values), 8)
    assert plot is not None
    assert len(plot.series[0].marks) == len(values)
    for mark in plot.series[0].marks:
        assert LEFT <= mark.x <= WIDTH - RIGHT
        assert TOP <= mark.y <= HEIGHT - BOTTOM


def test_octaves_are_powers_of_two() -> None:
    plot = octave_plot([Sample("s", "", 0.25, 4.0), Sample("t", "", 1.0, 1.0)], 8)
    assert plot is not None
    assert [label for _, label in plot.y_ticks] == ["2^-2", "2^-1", "2^0", "2^1", "2^2"]
    (span,), (point,) = (series.marks for series in plot.series)
    assert (span.y, span.y_low) == (TOP, HEIGHT - BOTTOM)
    assert point.y == point.y_low == (TOP + HEIGHT - BOTTOM) / 2


def test_what_is_not_finite_is_left_out_and_counted() -> None:
    plot = linear_plot(points(NAN, 0.5, INF), 8)
    assert plot is not None
    assert plot.left_out == 2
    assert linear_plot(points(NAN, INF), 8) is None
    assert linear_plot([], 8) is None
    octaves = octave_plot([Sample("s", "", 0.0, 1.0), Sample("s", "", 1.0, 2.0)], 8)
    assert octaves is not None
    assert octaves.left_out == 1
    assert octave_plot([Sample("s", "", 0.0, 0.0)], 8) is None


def test_many_points_are_one_path() -> None:
    plot = linear_plot(points(*[0.5] * (MAX_CIRCLES + 1)), 8)
    assert plot is not None
    assert plot.series[0].marks == ()
    assert plot.series[0].path is not None
    assert plot.series[0].path.count("M") == MAX_CIRCLES + 1
