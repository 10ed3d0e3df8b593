"""Where points, bars and ticks of a plot lie; the template draws them as SVG."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, floor, isfinite, log2, log10
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

WIDTH, HEIGHT = 960.0, 300.0
LEFT, RIGHT, TOP, BOTTOM = 64.0, 12.0, 14.0, 34.0
# Above this a point has no tooltip and all points of a series are one path.
MAX_CIRCLES = 1500
_TICKS = 5
_SLACK = 1e-9


@dataclass(frozen=True, slots=True)
class Sample:
    """One layer: its series, its label, and its values (one, or the ends of a span)."""

    series: str
    label: str
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Mark:
    """A sample in the plot's coordinates; ``y`` and ``y_low`` are equal for a point."""

    x: float
    y: float
    y_low: float
    label: str


@dataclass(frozen=True, slots=True)
class Series:
    """The marks of one series; ``path`` instead of marks where there are too many."""

    name: str
    colour: int
    marks: tuple[Mark, ...]
    path: str | None


@dataclass(frozen=True, slots=True)
class Plot:
    """Everything a template needs. ``ticks``: (position, label) on each axis."""

    width: float
    height: float
    left: float
    right: float
    top: float
    bottom: float
    series: tuple[Series, ...]
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    left_out: int


def linear_plot(samples: Sequence[Sample], colours: int) -> Plot | None:
    """Samples from left to right on an axis from zero; None if no value is finite.

    Where all values lie close together the axis begins near the least of them, so that they differ.
    """
    shown = [sample for sample in samples if isfinite(sample.high)]
    if not shown:
        return None
    least, most = min(sample.low for sample in shown), max(sample.high for sample in shown)
    is_close = least > most / 2
    step = _step((most - least if is_close else most) or most or 1.0)
    # A value that is a tick but for rounding needs no further tick.
    first = floor(least / step + _SLACK) if is_close else 0
    last = max(first + 1, ceil(most / step - _SLACK))
    ticks = [(float(i - first), f"{i * step:.6g}") for i in range(first, last + 1)]
    spans = [
        tuple((value / step - first) / (last - first) for value in (s.low, s.high)) for s in samples
    ]
    return _plot(samples, [(low, high) for low, high in spans], ticks, float(last - first), colours)


def octave_plot(samples: Sequence[Sample], colours: int) -> Plot | None:
    """As ``linear_plot`` with a logarithmic axis of powers of two; values must be above zero."""
    shown = [s for s in samples if s.low > 0 and isfinite(s.high)]
    if not shown:
        return None
    first = floor(log2(min(sample.low for sample in shown)))
    last = ceil(log2(max(sample.high for sample in shown)))
    last = max(last, first + 1)
    every = max(1, ceil((last - first) / _TICKS))
    ticks = [(float(e - first), f"2^{e}") for e in range(first, last + 1, every)]
    spans = [
        ((log2(s.low) - first) / (last - first), (log2(s.high) - first) / (last - first))
        if s.low > 0 and isfinite(s.high)
        else (float("nan"), float("nan"))
        for s in samples
    ]
    return _plot(samples, spans, ticks, float(last - first), colours)


def _plot(
    samples: Sequence[Sample],
    spans: Sequence[tuple[float, float]],
    ticks: Sequence[tuple[float, str]],
    top: float,
    colours: int,
) -> Plot:
    inner, plain = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    names = list(dict.fromkeys(sample.series for sample in samples))
    marks: dict[str, list[Mark]] = {name: [] for name in names}
    left_out = 0
    for index, (sample, (low, high)) in enumerate(zip(samples, spans, strict=True)):
        if not (isfinite(low) and isfinite(high)):
            left_out += 1
            continue
        x = LEFT + inner * (index + 0.5) / len(samples)
        y, y_low = (TOP + plain * (1 - value) for value in (high, low))
        marks[sample.series].append(Mark(round(x, 1), round(y, 1), round(y_low, 1), sample.label))
    many = len(samples) > MAX_CIRCLES
    series = tuple(
        Series(name, index % colours, () if many else tuple(marks[name]), _path(marks[name], many))
        for index, name in enumerate(names)
    )
    x_ticks = tuple(
        (LEFT + inner * (index + 0.5) / len(samples), str(index + 1))
        for index in sorted(
            {0, *range(_every(len(samples)) - 1, len(samples), _every(len(samples)))}
        )
    )
    y_ticks = tuple((TOP + plain * (1 - value / top), label) for value, label in ticks)
    return Plot(WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM, series, x_ticks, y_ticks, left_out)


def _path(marks: Sequence[Mark], many: bool) -> str | None:  # noqa: FBT001 - a fact, no mode
    if not many:
        return None
    return "".join(f"M{m.x:g} {m.y:g}V{m.y_low:g}h0" for m in marks)


def _step(top: float) -> float:
    """1, 2 or 5 times a power of ten, for about ``_TICKS`` ticks."""
    rough = top / _TICKS
    power = 10.0 ** floor(log10(rough))
    return next(
        power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * (1 - _SLACK)
    )


def _every(count: int) -> int:
    return max(1, round(_step(count)))
