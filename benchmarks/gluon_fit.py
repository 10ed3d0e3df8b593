"""Fits the model of costs of ``kernels.gluon.choice`` to a sweep.

    python benchmarks/gluon_fit.py SWEEP... [--seconds 60]

Looks for constants whose choices lose least against the best candidate: the mean logarithm of
(chosen / best) over two thirds of the shapes, by random changes that are kept if they help. Prints
what today's constants and the fitted ones lose on the shapes that were held out, by range of M, and
the constants. Needs no GPU.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from collections import defaultdict
from dataclasses import fields
from pathlib import Path
from typing import Any

from blockscale.kernels.gluon import choice

PROCESSORS = 132
RANGES = (16, 64, 256, 512, 1024, 1 << 30)
SPREADS = (0.05, 0.15, 0.5)
# One change in three shapes of the sample is held out.
HELD_OUT = 3


def main() -> int:
    """Fit both kernels' constants at once."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sweeps", type=Path, nargs="+")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    shapes = [shape for sweep in options.sweeps for shape in read(sweep)]
    train = [shape for index, shape in enumerate(shapes) if index % HELD_OUT]
    test = shapes[::HELD_OUT]
    constants = today()
    print("today, held out:", by_range(test))
    best = mean(losses(train))
    draw = random.Random(options.seed)  # noqa: S311 - a search, not a secret
    end = time.monotonic() + options.seconds
    while time.monotonic() < end:
        # One to three constants, by a little or by a lot.
        moved = draw.sample(sorted(constants), draw.randint(1, 3))
        spread = draw.choice(SPREADS)
        changed = {
            name: value * math.exp(draw.gauss(0, spread)) if name in moved else value
            for name, value in constants.items()
        }
        apply(changed)
        loss = mean(losses(train))
        if loss < best:
            best, constants = loss, changed
    apply(constants)
    print("fitted, held out:", by_range(test))
    for name, value in constants.items():
        print(f"{name} = {value:.4g}")
    return 0


def read(sweep: Path) -> list[tuple[dict[str, Any], list[tuple[Any, float]]]]:
    """Shapes with every candidate and its time."""
    lines = [json.loads(line) for line in sweep.read_text(encoding="utf-8").splitlines()]
    found = []
    for line in lines:
        if "times" not in line:
            continue
        works = choice.candidates(line["m"], line["n"], line["k"], 2, PROCESSORS)
        timed = [(work, line["times"][work.name]) for work in works if work.name in line["times"]]
        found.append((line, timed))
    return found


def today() -> dict[str, float]:
    """The constants by name; those of ``Costs`` with a dot."""
    found = {
        f"{kernel}.{field.name}": float(getattr(getattr(choice, kernel), field.name))
        for kernel in ("SMALL", "DENSE")
        for field in fields(choice.Costs)
    }
    names = (
        "SMALL_BLOCK_CLOCKS",
        "SMALL_TURN_CLOCKS",
        "SMALL_WRITE_RATE",
        "WAVE_OVERHEAD_CLOCKS",
        "WRITE_CLOCKS",
    )
    return found | {name: float(getattr(choice, name)) for name in names}


def apply(constants: dict[str, float]) -> None:
    """Put constants into the module for this process."""
    for kernel in ("SMALL", "DENSE"):
        values = {f.name: constants[f"{kernel}.{f.name}"] for f in fields(choice.Costs)}
        setattr(choice, kernel, choice.Costs(**values))
    for name, value in constants.items():
        if "." not in name:
            setattr(choice, name, value)


def losses(shapes: list[tuple[dict[str, Any], list[tuple[Any, float]]]]) -> list[float]:
    """log(chosen / best) of each shape."""
    found = []
    for line, timed in shapes:
        chosen = min(
            timed, key=lambda pair: choice.clocks(pair[0], line["m"], line["n"], 2, PROCESSORS)
        )
        found.append(math.log(chosen[1] / min(time_us for _, time_us in timed)))
    return found


def mean(values: list[float]) -> float:
    """The arithmetic mean."""
    return sum(values) / len(values)


def by_range(shapes: list[tuple[dict[str, Any], list[tuple[Any, float]]]]) -> dict[str, str]:
    """Geometric mean and worst loss by range of M."""
    groups: dict[int, list[float]] = defaultdict(list)
    for (line, _), loss in zip(shapes, losses(shapes), strict=True):
        groups[next(bound for bound in RANGES if line["m"] <= bound)].append(loss)
    return {
        f"M <= {bound}": f"{math.exp(mean(values)):.3f}, worst {math.exp(max(values)):.2f}"
        for bound, values in sorted(groups.items())
    }


if __name__ == "__main__":
    sys.exit(main())
