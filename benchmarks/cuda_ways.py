"""What lanes take beside boxes: a summary of ``cuda_sweep.py --ways``.

    python benchmarks/cuda_ways.py SWEEP...

By output, tile, turns of a block and length of K: the speed of each way by lanes relative to TMA's
boxes of the same tile, geometric mean and worst. ``kernels.cuda.writing`` takes its rule from
there. Needs no GPU.
"""

from __future__ import annotations

import json
import re
import sys
from bisect import bisect_left
from collections import defaultdict
from math import ceil
from pathlib import Path
from statistics import geometric_mean
from typing import TYPE_CHECKING, Any

from blockscale.kernels.cuda.work import K_BLOCK
from blockscale.kernels.cuda.writing import MOST_TURNS_IN_FLIGHT, SHORT_BLOCKS, TINY_BLOCKS
from choice_fit import PROCESSORS

if TYPE_CHECKING:
    from collections.abc import Iterable

# A work's name: its tile and what is shared, by whom it is written, and when.
NAME = re.compile(
    r"(?P<rows>\d+)x(?P<columns>\d+)s\d+(?P<share>\+.)?(?:(?P<lanes>lanes)|b\d+(?:r8)?x\d+?)"
    r"(?P<beside>x2)?(?P<way>(?:-late)?(?:w2)?) /\d+"
)
TILE = ("rows", "columns", "share", "beside")
# The longest K of a very short one, and of a short one.
LONGEST = (K_BLOCK * TINY_BLOCKS, K_BLOCK * SHORT_BLOCKS)


def main() -> int:
    """Read and print."""
    texts = [Path(name).read_text(encoding="utf-8") for name in sys.argv[1:]]
    if not texts:
        print(__doc__)
        return 2
    lines = [json.loads(line) for text in texts for line in text.splitlines()]
    print_ways(line for line in lines if "times" in line)
    return 0


def print_ways(lines: Iterable[dict[str, Any]]) -> None:
    """One line for each way of a tile."""
    found: dict[tuple[Any, ...], list[float]] = defaultdict(list)
    for line in lines:
        named = [(NAME.fullmatch(name), us) for name, us in line["times"].items()]
        own = [(match, us) for match, us in named if match is not None]
        boxes = {match.group(*TILE): us for match, us in own if not match["lanes"]}
        for match, us in own:
            if match["lanes"]:
                length = bisect_left(LONGEST, line["k"])
                key = (line["out_dtype"], *tile_and_turns(match, line), length, match["way"])
                found[key].append(boxes[match.group(*TILE)] / us)
    lengths = (*(f"K <= {most}" for most in LONGEST), f"K > {LONGEST[-1]}")
    for (out, rows, columns, beside, turns, length, way), factors in sorted(found.items()):
        print(
            f"{out} {rows}x{columns}{beside} {turns} {lengths[length]}: lanes{way} "
            f"x{geometric_mean(factors):.3f} (worst x{min(factors):.3f}), {len(factors)} cases"
        )


def tile_and_turns(match: re.Match[str], line: dict[str, Any]) -> tuple[int, int, str, str]:
    """Rows, columns, ``x2`` where two blocks share a multiprocessor, and turns of a block."""
    rows, columns, beside = int(match["rows"]), int(match["columns"]), match["beside"] or ""
    units = ceil(line["m"] / rows) * ceil(line["n"] / columns)
    turns = units / min(units, PROCESSORS * (2 if beside else 1))
    words = "one" if turns <= 1 else "few" if turns <= MOST_TURNS_IN_FLIGHT else "many"
    return rows, columns, beside, words


if __name__ == "__main__":
    sys.exit(main())
