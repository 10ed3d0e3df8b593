"""Cutting a layer for tensor and expert parallelism, and what the cut does to scale blocks.

Kernel legality and shard legality are two tests. MiniMax-M2.5's w13 at tensor parallel 8 has
N = 384, which every kernel takes, but each half has 192 rows, one and a half scale blocks: the
checkpoint's scales cannot be sliced that way.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import gcd

from blockscale.errors import SettingsError
from blockscale.formats import BlockShape
from blockscale.planning.pieces import pieces_of_part
from blockscale.planning.plan import Finding, Severity
from blockscale.planning.request import LinearRequest, Shard, ShardStyle

# Plans look at every rank; no engine cuts a matrix over as many.
MOST_RANKS = 4096


@dataclass(frozen=True, slots=True)
class Parallelism:
    """Degrees of tensor and expert parallelism.

    Expert weights are cut ``tensor / expert`` ways, as SGLang and vLLM do: with TP 8 and EP 8 every
    rank holds whole experts.
    """

    tensor: int = 1
    expert: int = 1

    def __post_init__(self) -> None:
        """Refuse degrees without meaning."""
        if self.tensor < 1 or self.expert < 1:
            msg = f"parallel degrees are at least 1, not tp={self.tensor}, ep={self.expert}"
            raise SettingsError(msg)
        if self.tensor > MOST_RANKS:
            msg = f"tensor parallel degree {self.tensor} is above the limit of {MOST_RANKS}"
            raise SettingsError(msg)
        if self.tensor % self.expert:
            msg = (
                f"expert parallel degree {self.expert} does not divide the tensor parallel degree "
                f"{self.tensor}, whose ranks it shares; give a multiple of {self.expert} as --tp "
                f"or a divisor of {self.tensor} as --ep"
            )
            raise SettingsError(msg)

    @property
    def expert_tensor(self) -> int:
        """Ways in which one expert's matrices are cut."""
        return self.tensor // self.expert


@dataclass(frozen=True, slots=True)
class WholeLayer:
    """An unsharded layer and how it may be cut.

    ``part_names``: one word for each of ``request.parts``. ``part_units``: the attention heads of
    each part, or None where any row may start a shard; ranks get whole heads. ``part_shared``:
    whether neighbouring ranks hold the same heads of a part when there are more ranks, as engines
    do with those of keys and values and never with those of queries; empty: they do.
    ``fused_parts``: rows of each part of a weight that was merged before it was stored and has one
    scale grid; it is cut part by part, and left alone otherwise.
    """

    request: LinearRequest
    style: ShardStyle = ShardStyle.WHOLE
    part_names: tuple[str, ...] = ()
    part_units: tuple[int | None, ...] = ()
    part_shared: tuple[bool, ...] = ()
    fused_parts: tuple[int, ...] = ()

    def parts_when_cut(self, degree: int) -> tuple[int, ...]:
        """Rows of each part that is cut by itself when ``degree`` ranks share the layer."""
        return self.fused_parts if self.fused_parts and degree > 1 else self.request.parts


@dataclass(frozen=True, slots=True)
class _Part:
    """One merged weight on one rank. ``pieces``: the different shards it is cut into."""

    label: str
    rows: int
    pieces: int = 1


def cut(layer: WholeLayer, parallelism: Parallelism) -> LinearRequest | Finding:
    """What one rank holds of ``layer``, or why it cannot be divided evenly.

    The request's ``shard.split_blocks`` says which scale blocks the cut goes through, on any rank.
    All ranks hold shards of the same shape, so one request stands for all of them.
    """
    request = layer.request
    degree = parallelism.tensor
    if request.experts is not None:
        if request.experts % parallelism.expert:
            what = f"{request.experts} experts"
            return _indivisible(request, what, "expert", parallelism.expert)
        request = replace(request, experts=request.experts // parallelism.expert)
        degree = parallelism.expert_tensor
    if layer.style is ShardStyle.COLUMN and degree > 1:
        return _cut_rows(layer, request, degree)
    if layer.style is ShardStyle.ROW and degree > 1:
        return _cut_columns(request, degree)
    labels = _labels(layer, len(request.parts))
    parts = [_Part(label, rows) for label, rows in zip(labels, request.parts, strict=True)]
    return replace(request, shard=_row_shard(request, ShardStyle.WHOLE, 1, parts))


def _cut_rows(layer: WholeLayer, request: LinearRequest, degree: int) -> LinearRequest | Finding:
    whole = layer.parts_when_cut(degree)
    units = layer.part_units or (None,) * len(whole)
    shared = layer.part_shared or (True,) * len(whole)
    parts: list[_Part] = []
    for label, rows, heads, may_share in zip(
        _labels(layer, len(whole)), whole, units, shared, strict=True
    ):
        pieces = pieces_of_part(heads, degree)
        has_ranks_left = pieces < degree and not (may_share and degree % pieces == 0)
        if rows % pieces or has_ranks_left or (heads is not None and heads % pieces):
            what = f"{label}: {rows} rows" if heads is None else f"{label}: {heads} heads"
            return _indivisible(request, what, "tensor", degree)
        parts.append(_Part(label, rows // pieces, pieces))
    sizes = tuple(part.rows for part in parts)
    shard = _row_shard(request, ShardStyle.COLUMN, degree, parts)
    return replace(request, n=sum(sizes), parts=sizes, shard=shard)


def _cut_columns(request: LinearRequest, degree: int) -> LinearRequest | Finding:
    if request.k % degree:
        return _indivisible(request, f"K={request.k}", "tensor", degree)
    share, block = request.k // degree, request.format.block
    shard = Shard(ShardStyle.ROW, degree)
    if share % block.k:
        words = f"{share} columns per rank are {_ratio(share, block.k)} blocks of {block.k}"
        unsplit = BlockShape(block.mn, gcd(share, block.k))
        shard = replace(shard, split_blocks=(words,), unsplit_block=unsplit)
    return replace(request, k=share, shard=shard)


def _row_shard(request: LinearRequest, style: ShardStyle, degree: int, parts: list[_Part]) -> Shard:
    """Every part is a matrix of its own on disk, with a scale grid of its own.

    Cuts of one part lie at multiples of its share, so the first one tells about all. A part that
    is not cut may end inside a block, unless another part follows it in the merged weight.
    """
    block = request.format.block
    words: list[str] = []
    unsplit = block.mn
    for index, part in enumerate(parts):
        is_last = index == len(parts) - 1
        if part.rows % block.mn == 0 or (part.pieces == 1 and is_last):
            continue
        size = f"are {_ratio(part.rows, block.mn)} blocks of {block.mn}"
        if part.pieces > 1:
            words.append(f"{part.label}: {part.rows} rows per rank {size}")
        else:
            words.append(f"{part.label}: {part.rows} rows {size} and another part follows")
        unsplit = gcd(unsplit, part.rows)
    if not words:
        return Shard(style, degree)
    return Shard(style, degree, tuple(words), BlockShape(unsplit, block.k))


def _labels(layer: WholeLayer, count: int) -> tuple[str, ...]:
    if count == 1:
        return ("the layer",)
    if len(layer.part_names) == count:
        return tuple(f"part {name}" for name in layer.part_names)
    return tuple(f"part {index}" for index in range(count))


def _ratio(size: int, block: int) -> str:
    """``1.5``, with as many digits as the fraction has."""
    return f"{size / block:.10g}"


def _indivisible(request: LinearRequest, what: str, kind: str, degree: int) -> Finding:
    return Finding(
        Severity.FAULT,
        "indivisible",
        f"{what} cannot be divided evenly over {kind} parallel degree {degree}; plan --advise "
        "lists the degrees that work",
        request.name,
    )
