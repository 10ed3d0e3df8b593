"""Cutting a layer for tensor and expert parallelism, and what the cut does to scale blocks.

Kernel legality and shard legality are two tests. MiniMax-M2.5's w13 at tensor parallel 8 has
N = 384, which every kernel takes, but each half has 192 rows, one and a half scale blocks: the
checkpoint's scales cannot be sliced that way.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from blockscale.errors import SettingsError
from blockscale.planning.plan import Finding, Severity
from blockscale.planning.request import LinearRequest, Shard, ShardStyle


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
        if self.expert > 1 and self.tensor % self.expert:
            msg = (
                f"expert parallel degree {self.expert} does not divide the tensor parallel degree "
                f"{self.tensor}; give a divisor, for example --ep {self.tensor}"
            )
            raise SettingsError(msg)

    @property
    def expert_tensor(self) -> int:
        """Ways in which one expert's matrices are cut."""
        return max(1, self.tensor // self.expert)


@dataclass(frozen=True, slots=True)
class WholeLayer:
    """An unsharded layer and how it may be cut.

    ``part_names``: one word for each of ``request.parts``. ``part_units``: the attention heads of
    each part, or None where any row may start a shard; ranks get whole heads, and heads are
    replicated when there are more ranks.
    """

    request: LinearRequest
    style: ShardStyle = ShardStyle.WHOLE
    part_names: tuple[str, ...] = ()
    part_units: tuple[int | None, ...] = ()


def cut(layer: WholeLayer, parallelism: Parallelism) -> LinearRequest | Finding:
    """What one rank holds of ``layer``, or why it cannot be divided evenly.

    The request's ``shard.split_blocks`` says which scale blocks the cut goes through. All ranks
    hold shards of the same shape, so one request stands for all of them.
    """
    request = layer.request
    degree = parallelism.tensor
    if request.experts is not None:
        if request.experts % parallelism.expert:
            return _indivisible(
                request, f"{request.experts} experts", "expert", parallelism.expert
            )
        request = replace(request, experts=request.experts // parallelism.expert)
        degree = parallelism.expert_tensor
    if layer.style is ShardStyle.COLUMN and degree > 1:
        return _cut_rows(layer, request, degree)
    if layer.style is ShardStyle.ROW and degree > 1:
        return _cut_columns(request, degree)
    return replace(request, shard=Shard(split_blocks=_parts_off_grid(layer, request.parts)))


def _cut_rows(layer: WholeLayer, request: LinearRequest, degree: int) -> LinearRequest | Finding:
    units = layer.part_units or (None,) * len(request.parts)
    names = _part_names(layer)
    parts: list[int] = []
    split: list[str] = []
    block = request.format.block.mn
    for name, rows, heads in zip(names, request.parts, units, strict=True):
        pieces = degree if heads is None else min(degree, heads)
        if rows % pieces or (heads is not None and (degree % pieces or heads % pieces)):
            what = f"{rows} rows of {name}" if heads is None else f"{heads} heads of {name}"
            return _indivisible(request, what, "tensor", degree)
        share = rows // pieces
        parts.append(share)
        if pieces > 1 and share % block:
            split.append(
                f"{name}: {share} rows per rank are {share / block:g} blocks of {block} rows"
            )
    if not split:
        split += _parts_off_grid(layer, tuple(parts))
    shard = Shard(ShardStyle.COLUMN, degree, tuple(split))
    return replace(request, n=sum(parts), parts=tuple(parts), shard=shard)


def _cut_columns(request: LinearRequest, degree: int) -> LinearRequest | Finding:
    if request.k % degree:
        return _indivisible(request, f"K={request.k}", "tensor", degree)
    share, block = request.k // degree, request.format.block.k
    split = ()
    if share % block:
        split = (f"{share} columns per rank are {share / block:g} blocks of {block} columns",)
    return replace(request, k=share, shard=Shard(ShardStyle.ROW, degree, split))


def _parts_off_grid(layer: WholeLayer, parts: tuple[int, ...]) -> tuple[str, ...]:
    """Merged parts that end inside a block while another part follows."""
    block = layer.request.format.block.mn
    return tuple(
        f"{name}: {rows} rows end inside a block of {block} rows and another part follows"
        for name, rows in zip(_part_names(layer)[:-1], parts[:-1], strict=True)
        if rows % block
    )


def _part_names(layer: WholeLayer) -> tuple[str, ...]:
    if layer.part_names:
        return layer.part_names
    if len(layer.request.parts) == 1:
        return ("the layer",)
    return tuple(f"part {index}" for index in range(len(layer.request.parts)))


def _indivisible(request: LinearRequest, what: str, kind: str, degree: int) -> Finding:
    return Finding(
        Severity.FAULT,
        "indivisible",
        f"{what} cannot be divided evenly over {kind} parallel degree {degree}",
        request.name,
    )
