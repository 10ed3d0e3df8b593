"""What measurements say beyond the model: its error by tile, and the fastest work of known shapes.

``tables/gluon.json``, written by ``benchmarks/gluon_fit.py`` from the sweep that it names, has

- for each form (tile, and whether it splits), the logarithm of measured / modelled time as a linear
  function of ``quantities``;
- for each (N, K) of the sweep, by bucket of M, the form and pieces that were fastest.

Needs neither torch nor Triton. The file is read once, at the first choice.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from math import ceil, exp, log2
from operator import mul
from typing import TYPE_CHECKING

from blockscale.kernels.gluon.costs import (
    SMALL_PROGRAMS_PER_PROCESSOR,
    estimate,
    outside_share,
)
from blockscale.kernels.gluon.work import SmallWork

if TYPE_CHECKING:
    from collections.abc import Iterable

    from blockscale.kernels.gluon.work import Work

# A correction is never more than this, as a logarithm.
MOST = 0.5
OUT_BYTES = 2
# One work serves all M of a bucket: a tile of tokens up to 64, then 16 rows, which is how the sweep
# steps. Between more distant M the fastest work is not the same (docs/perf-log.md G17).
FEW_TOKENS = (8, 16, 32, 64)
BUCKET_ROWS = 16


@dataclass(frozen=True, slots=True)
class Table:
    """``ranges``: least and greatest of each quantity in the sweep; beyond, it is taken for them.

    ``winners``: "form/pieces" by (n, k) and bucket of M, on a GPU of ``processors``.
    """

    processors: int
    ranges: tuple[tuple[float, float], ...]
    factors: dict[str, tuple[float, ...]]
    winners: dict[tuple[int, int], dict[int, str]]


@lru_cache(maxsize=1)
def shipped() -> Table:
    """The table that ships."""
    place = resources.files("blockscale.kernels.gluon") / "tables" / "gluon.json"
    document = json.loads(place.read_text(encoding="utf-8"))
    return Table(
        document["processors"],
        tuple((low, high) for low, high in document["ranges"]),
        {form: tuple(factors) for form, factors in document["factors"].items()},
        {
            (n, k): {int(bucket): name for bucket, name in map(_parts, words.split())}
            for n, k, words in document["winners"]
        },
    )


def clocks(work: Work, m: int, n: int, out_bytes: int, processors: int) -> float:
    """The corrected time of one launch."""
    found = estimate(work, m, n, out_bytes, processors)
    table = shipped()
    factors = table.factors.get(form(work))
    if factors is None:
        return found.clocks
    share = found.memory / found.clocks
    own = bounded(quantities(work, m, share, processors), table.ranges)
    error = sum(map(mul, factors, terms(own)))
    return found.clocks * exp(max(-MOST, min(MOST, error)))


def quantities(work: Work, m: int, memory_share: float, processors: int) -> tuple[float, ...]:
    """What the model's error may depend on; most are logarithms, so that halves and doubles count.

    In order: programs that run together, K blocks of an item, the share of memory in the time, the
    share of rows beyond M, M, pieces, tiles of rows, rounds, the last round's empty places.
    """
    places = SMALL_PROGRAMS_PER_PROCESSOR * processors
    if isinstance(work, SmallWork):
        items, at_once, row_tiles = work.parts * work.pieces, places, work.token_tiles
    else:
        items, at_once, row_tiles = max(1, work.items), work.programs, work.row_tiles
    return (
        log2(min(items, places) / processors),
        log2(work.piece_blocks),
        memory_share,
        outside_share(work, m, processors),
        log2(m),
        log2(work.pieces),
        log2(row_tiles),
        log2(ceil(items / places)),
        min(1.0, ceil(items / at_once) * at_once / items - 1),
    )


def bounded(values: tuple[float, ...], ranges: Iterable[tuple[float, float]]) -> tuple[float, ...]:
    """``values``, those beyond what was measured moved to its ends."""
    pairs = zip(values, ranges, strict=True)
    return tuple(max(low, min(high, value)) for value, (low, high) in pairs)


def terms(own: tuple[float, ...]) -> tuple[float, ...]:
    """What factors belong to: one, the quantities, and the products of some."""
    together, blocks, memory, outside, _m, pieces = own[:6]
    return (
        1.0,
        *own,
        blocks * blocks,
        memory * memory,
        together * blocks,
        together * memory,
        blocks * memory,
        outside * memory,
        pieces * together,
    )


def form(work: Work) -> str:
    """Tile, and whether sums are split: ``small64x8``, ``128x64+split``, whatever the dtype."""
    return tile(work).removesuffix("+narrow") + "+split" * (work.pieces > 1)


def tile(work: Work) -> str:
    """Tile, and whether a narrow column follows: how winners are named, before their pieces."""
    if isinstance(work, SmallWork):
        return f"small{work.variant.weights}x{work.variant.tokens}"
    return f"{work.variant.rows}x{work.variant.columns}" + "+narrow" * (work.narrow_tiles > 0)


def bucket(m: int) -> int:
    """The largest M that the same measured work serves."""
    few = next((tokens for tokens in FEW_TOKENS if m <= tokens), None)
    return few or ceil(m / BUCKET_ROWS) * BUCKET_ROWS


def winner(
    works: Iterable[Work], m: int, shape: tuple[int, int], out_bytes: int, processors: int
) -> Work | None:
    """Which of ``works`` was measured to be the fastest; None where nothing was measured."""
    table = shipped()
    if out_bytes != OUT_BYTES or processors != table.processors:
        return None
    name = table.winners.get(shape, {}).get(bucket(m))
    return next((work for work in works if winner_name(work) == name), None)


def winner_name(work: Work) -> str:
    """``64x32/4``: how a winner is written."""
    return f"{tile(work)}/{work.pieces}"


def _parts(word: str) -> tuple[str, str]:
    first, _, name = word.partition(":")
    return first, name
