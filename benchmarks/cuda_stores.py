"""Times ways to write results in gemm.cu: how much of a tile's end hides behind the next tile.

    python benchmarks/cuda_stores.py --out FILE [--seconds 90] [--shapes 24576x1536,...]
                                     [--tokens 4096,...] [--tiles 256x128,...] [--bands 4,8]
                                     [--out-dtype float32]

For each (N, K), M and tile every way of ``kernels.cuda.writing.forms_to_compare``, and what
``kernels.gluon.choice`` chooses, in turns as ``cuda_sweep.py`` does, whose lines it writes. At the
end, by tile: the time of each way relative to the usual one, geometric mean and worst. ``--bands``:
instead, the tiles written late in each of these orders (rows of units in a band).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import defaultdict
from pathlib import Path
from statistics import geometric_mean
from typing import TYPE_CHECKING, Any

import torch

from blockscale.formats import DType
from blockscale.kernels.cuda.build import compile_all
from blockscale.kernels.cuda.work import make_work
from blockscale.kernels.cuda.writing import forms_to_compare, late
from cuda_sweep import OUT_DTYPES, measure
from record import machine, versions

if TYPE_CHECKING:
    from blockscale.kernels.cuda.work import Form, Work

# K short and long, wide and narrow outputs; by what is to be learned first.
SHAPES = "24576x1536,32768x512,7168x2048,4096x7168,3072x6144,2112x7168,576x7168,7168x16384"
TOKENS = "4096,1024,8192,2048"
TILES = "256x128,128x192,128x128,128x144,128x160,256x112,256x96"


def main() -> int:
    """Compile everything on all cores, then measure until the time is up."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=90)
    parser.add_argument("--shapes", default=SHAPES)
    parser.add_argument("--tokens", default=TOKENS)
    parser.add_argument("--tiles", default=TILES)
    parser.add_argument("--bands")
    parser.add_argument("--out-dtype", choices=OUT_DTYPES, default="float16")
    options = parser.parse_args()
    started = time.monotonic()
    shapes = [tuple(map(int, shape.split("x"))) for shape in options.shapes.split(",")]
    tiles = [tuple(map(int, tile.split("x"))) for tile in options.tiles.split(",")]
    out = DType(options.out_dtype)
    by_tile = {(rows, columns): forms_to_compare(rows, columns, out) for rows, columns in tiles}
    every = [form for forms in by_tile.values() for form in forms]
    compile_all(every, os.cpu_count() or 1)
    print(f"compiled {len(every)} forms in {time.monotonic() - started:.0f} s", flush=True)
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    lines = []
    with options.out.open("w", encoding="utf-8") as file:
        file.write(json.dumps({"machine": machine(), "versions": versions()}) + "\n")
        for m, n, k in ((int(m), n, k) for m in options.tokens.split(",") for n, k in shapes):
            if time.monotonic() - started > options.seconds:
                print("out of time", flush=True)
                break
            works = works_of(every, (m, n, k), processors, options.bands)
            lines.append(measure((m, n, k), out, works))
            file.write(json.dumps(lines[-1]) + "\n")
            file.flush()
            print_line(lines[-1])
    for tile, forms in () if options.bands else by_tile.items():
        print_tile(tile, forms, lines)
    return 0


def works_of(
    every: list[Form], shape: tuple[int, int, int], processors: int, bands: str | None
) -> list[Work]:
    """Each form in the usual order, or each tile's late form in the orders asked for."""
    if bands is None:
        return [make_work(form, *shape, processors) for form in every]
    forms = dict.fromkeys(late(form) for form in every)
    found = [
        make_work(form, *shape, processors, band=int(band))
        for form in forms
        for band in bands.split(",")
    ]
    return list(dict.fromkeys(found))


def time_of(line: dict[str, Any], form: Form) -> float:
    """Microseconds; a work's name is its form's and its band."""
    found: float = next(
        us for name, us in line["times"].items() if name.startswith(f"{form.name} ")
    )
    return found


def print_line(line: dict[str, Any]) -> None:
    """The four fastest, and Gluon's choice."""
    ordered = sorted(line["times"].items(), key=lambda item: item[1])
    shown = ordered[:4] + [item for item in ordered[4:] if item[0].startswith("gluon")]
    words = ", ".join(f"{name} {us:.1f}" for name, us in shown)
    print(f"M={line['m']} N={line['n']} K={line['k']}: {words}", flush=True)


def print_tile(tile: tuple[int, int], forms: tuple[Form, ...], lines: list[dict[str, Any]]) -> None:
    """Each way's time relative to the usual one: K up to 2048, and longer."""
    relative: dict[tuple[str, bool], list[float]] = defaultdict(list)
    for line in lines:
        for form in forms[1:]:
            factor = time_of(line, form) / time_of(line, forms[0])
            relative[form.name, line["k"] <= 2048].append(factor)
    for (name, is_short), factors in sorted(relative.items(), key=lambda item: item[0][::-1]):
        print(
            f"{tile[0]}x{tile[1]} K {'<= 2048' if is_short else '> 2048'}: {name} takes "
            f"x{geometric_mean(factors):.3f} (worst x{max(factors):.3f}) of {forms[0].name}, "
            f"{len(factors)} cases"
        )


if __name__ == "__main__":
    sys.exit(main())
