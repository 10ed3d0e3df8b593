"""Lossless ways to hold shards whose cut goes through scale blocks: found, priced, chosen.

Layers that share an activation (gate_up and down, w13 and w2) are one *set*: they are cut the same
way or the second reads what the first did not write. For each set every remedy is tried against
every backend; an answer is a ``Remedy`` with its price or a ``Refusal`` with its reason.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

from blockscale.errors import FormatError
from blockscale.formats import BlockShape, ScaleFormat
from blockscale.planning.decision import LAST_RESORT
from blockscale.planning.expert_sets import expert_sets
from blockscale.planning.pieces import Holding, piece_of, request_of
from blockscale.planning.request import LinearRequest, RemedyKind, ShardStyle
from blockscale.planning.sharding import Parallelism, cut

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from blockscale.planning.plan import LinearPlan
    from blockscale.planning.sharding import WholeLayer

# Finer blocks than these are read by no kernel that sums in blocks along K.
REFINED_SIZES = (128, 64, 32)
STORED_BYTES = {ScaleFormat.FP32: 4, ScaleFormat.BF16: 2, ScaleFormat.UE8M0: 1}


@dataclass(frozen=True, slots=True)
class Price:
    """What the rank with the most work holds, beside an exactly even share of the layers.

    Bytes of FP8 codes and of scales as a checkpoint stores them. One code is one multiplication for
    each token, so ``work`` is the ratio of codes: 1.0 is no padded work.
    """

    weight_bytes: int
    scale_bytes: int
    even_weight_bytes: int
    even_scale_bytes: int

    @property
    def extra_weight_bytes(self) -> int:
        """Bytes of codes beyond an even share."""
        return self.weight_bytes - self.even_weight_bytes

    @property
    def extra_scale_bytes(self) -> int:
        """Bytes of scales beyond an even share."""
        return self.scale_bytes - self.even_scale_bytes

    @property
    def work(self) -> float:
        """Multiplications of the busiest rank over an even share of them."""
        return self.weight_bytes / self.even_weight_bytes if self.even_weight_bytes else 1.0

    def times(self, count: int) -> Price:
        """The price of ``count`` such sets."""
        return Price(
            self.weight_bytes * count,
            self.scale_bytes * count,
            self.even_weight_bytes * count,
            self.even_scale_bytes * count,
        )

    def __add__(self, other: Price) -> Price:
        """The price of both."""
        return Price(
            self.weight_bytes + other.weight_bytes,
            self.scale_bytes + other.scale_bytes,
            self.even_weight_bytes + other.even_weight_bytes,
            self.even_scale_bytes + other.even_scale_bytes,
        )


@dataclass(frozen=True, slots=True)
class Remedy:
    """One way to hold a set of layers on whole blocks.

    ``requests``: those of the rank with the most work, in the order of the set. ``holdings``: what
    ``piece_of`` needs to say what each rank reads, None for a layer that is cut evenly.
    ``backends``: who then runs the set.
    """

    kind: RemedyKind
    parallelism: Parallelism
    holdings: tuple[Holding | None, ...]
    requests: tuple[LinearRequest, ...]
    price: Price
    backends: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a remedy does not help a set."""

    kind: RemedyKind
    reason: str


@dataclass(frozen=True, slots=True)
class Remedies:
    """Every remedy's answer for one set, in the order of ``RemedyKind``."""

    answers: tuple[Remedy | Refusal, ...]

    @property
    def offered(self) -> tuple[Remedy, ...]:
        """Those that work."""
        return tuple(answer for answer in self.answers if isinstance(answer, Remedy))

    @property
    def chosen(self) -> Remedy | None:
        """The one that keeps the asked degrees with the least work, then the fewest bytes."""
        kept = [remedy for remedy in self.offered if remedy.kind is not RemedyKind.EXPERT]
        return min(kept, key=_preference, default=None)

    def choice(self, wanted: RemedyKind | None) -> Remedy | None:
        """The wanted remedy if it is offered at the asked degrees, else the chosen one."""
        for remedy in self.offered:
            if remedy.kind is wanted and wanted is not RemedyKind.EXPERT:
                return remedy
        return self.chosen


def _preference(remedy: Remedy) -> tuple[bool, float, int]:
    price = remedy.price
    # A remedy for it alone helps only where nothing else does.
    is_slow = LAST_RESORT in remedy.backends
    return is_slow, price.work, price.weight_bytes + price.scale_bytes


def remedies_of(
    layers: Sequence[WholeLayer],
    parallelism: Parallelism,
    plan: Callable[[Sequence[LinearRequest]], Sequence[LinearPlan]],
) -> Remedies:
    """What can be done about a set of which some cut goes through a scale block.

    Every layer of the set is divisible. ``plan`` decides the requests of one rank, experts together
    as ``plan_model`` does, and does not raise if no backend serves one.
    """
    looked = _Set(tuple(layers), parallelism, plan)
    return Remedies((looked.refine(), looked.uneven(), looked.pad(), looked.expert_parallel()))


def price_of(
    layers: Sequence[WholeLayer], parallelism: Parallelism, requests: Sequence[LinearRequest]
) -> Price:
    """What ``requests`` cost beside an even share of ``layers``."""
    even_weight = even_scale = weight = scale = 0
    for layer, request in zip(layers, requests, strict=True):
        whole = layer.request
        is_cut = layer.style is not ShardStyle.WHOLE or whole.experts is not None
        ranks = parallelism.tensor if is_cut else 1
        even_weight += whole.weight_bytes // ranks
        even_scale += scale_bytes_of(whole) // ranks
        weight += request.weight_bytes
        scale += scale_bytes_of(request)
    return Price(weight, scale, even_weight, even_scale)


def scale_bytes_of(request: LinearRequest) -> int:
    """Bytes of the scales as a checkpoint stores them, every part with a grid of its own."""
    block = request.format.block
    rows = sum(block.grid(part, request.k)[0] for part in request.parts)
    columns = block.grid(request.n, request.k)[1]
    return rows * columns * STORED_BYTES[request.format.scale] * (request.experts or 1)


@dataclass(frozen=True, slots=True)
class _Set:
    layers: tuple[WholeLayer, ...]
    parallelism: Parallelism
    plan: Callable[[Sequence[LinearRequest]], Sequence[LinearPlan]]

    def refine(self) -> Remedy | Refusal:
        """Experts are served together, so their blocks are chosen together."""
        holdings: dict[str, Holding | None] = {}
        for together in expert_sets(self._plain(layer) for layer in self.layers):
            layers = [self._layer(request) for request in together]
            choice = self._refined(layers)
            if isinstance(choice, Refusal):
                return choice
            holdings.update(
                (layer.request.name, one) for layer, one in zip(layers, choice, strict=True)
            )
        return self._remedy(
            RemedyKind.REFINE, [holdings[layer.request.name] for layer in self.layers]
        )

    def _refined(self, layers: Sequence[WholeLayer]) -> tuple[Holding | None, ...] | Refusal:
        """Blocks with the fewest scales for these layers, by a kernel if one takes any."""
        tried = sorted(
            product(*(self._finer(layer) for layer in layers)),
            key=lambda holdings: self._scale_bytes(layers, holdings),
        )
        served = [one for one in tried if self._unserved(layers, one) is None]
        if not served:
            split = [layer for layer in layers if self._plain(layer).shard.split_blocks]
            names = dict.fromkeys(
                str(one.block) for layer in split for one in self._finer(layer) if one is not None
            )
            reason = f"no backend serves {split[0].request.name} in blocks of {', '.join(names)}"
            return Refusal(RemedyKind.REFINE, reason)
        return min(served, key=lambda one: LAST_RESORT in self._backends(layers, one))

    def _finer(self, layer: WholeLayer) -> list[Holding | None]:
        """Blocks that no cut goes through; None alone where the even cut splits none."""
        unsplit = self._plain(layer).shard.unsplit_block
        if unsplit is None:
            return [None]
        stored = layer.request.format.block
        rows = {size for size in (*REFINED_SIZES, unsplit.mn) if unsplit.mn % size == 0}
        columns = {size for size in (*REFINED_SIZES, unsplit.k) if unsplit.k % size == 0}
        blocks = [BlockShape(mn, k) for mn in rows for k in columns]
        return [Holding(RemedyKind.REFINE, block) for block in blocks if block != stored]

    def _scale_bytes(
        self, layers: Sequence[WholeLayer], holdings: Sequence[Holding | None]
    ) -> tuple[int, int]:
        requests = self._requests(layers, holdings, 0)
        # Of as many scales, wider blocks along K: fewer partial sums.
        return sum(map(scale_bytes_of, requests)), -min(one.format.block.k for one in requests)

    def uneven(self) -> Remedy | Refusal:
        reason = self._cannot_be_uneven()
        return (
            self._rounded(RemedyKind.UNEVEN)
            if reason is None
            else Refusal(RemedyKind.UNEVEN, reason)
        )

    def pad(self) -> Remedy | Refusal:
        return self._rounded(RemedyKind.PAD)

    def expert_parallel(self) -> Remedy | Refusal:
        kind = RemedyKind.EXPERT
        if all(layer.request.experts is None for layer in self.layers):
            return Refusal(kind, "it is no mixture of experts")
        tensor, expert = self.parallelism.tensor, self.parallelism.expert
        for degree in range(expert + 1, tensor + 1):
            if tensor % degree:
                continue
            other = Parallelism(tensor, degree)
            found = [cut(layer, other) for layer in self.layers]
            requests = [one for one in found if isinstance(one, LinearRequest)]
            if len(requests) == len(found) and self._unserved_of(requests) is None:
                return self._priced(kind, other, (None,) * len(requests), requests)
        return Refusal(kind, f"no expert parallel degree that divides {tensor} keeps blocks whole")

    def _rounded(self, kind: RemedyKind) -> Remedy | Refusal:
        """Whole stored blocks on every rank, by other shares or by zeros."""
        for layer in self.layers:
            if any(rows % layer.request.format.block.mn for rows in layer.fused_parts[:-1]):
                return Refusal(kind, f"parts of {layer.request.name} share a stored block")
        holdings = [
            Holding(kind, layer.request.format.block) if self._takes_part(layer, kind) else None
            for layer in self.layers
        ]
        try:
            unserved = self._unserved(self.layers, holdings)
        except FormatError as error:
            return Refusal(kind, str(error))
        if unserved is not None:
            what = f"N={unserved.n}, K={unserved.k}"
            return Refusal(kind, f"no backend serves {unserved.name} with {what}")
        return self._remedy(kind, holdings)

    def _takes_part(self, layer: WholeLayer, kind: RemedyKind) -> bool:
        if kind is RemedyKind.UNEVEN:
            return layer.style is not ShardStyle.WHOLE
        return bool(self._plain(layer).shard.split_blocks)

    def _cannot_be_uneven(self) -> str | None:
        """Ranks may differ only where both layers around an activation are cut here."""
        columns = [layer for layer in self.layers if layer.style is ShardStyle.COLUMN]
        rows = [layer for layer in self.layers if layer.style is ShardStyle.ROW]
        for layer in columns:
            if any(heads is not None for heads in layer.part_units):
                return f"{layer.request.name} is cut by attention heads"
        widths = {size for layer in columns for size in layer.parts_when_cut(2)}
        for layer in rows:
            if {layer.request.k} != widths:
                return f"what feeds {layer.request.name} is not cut beside it"
        return None if rows else f"what reads {columns[0].request.name} is not cut beside it"

    def _unserved(
        self, layers: Sequence[WholeLayer], holdings: Sequence[Holding | None]
    ) -> LinearRequest | None:
        """A request of some rank that no backend serves. Raises FormatError if a rank has none."""
        ranks = dict.fromkeys(self._requests(layers, holdings, rank) for rank in self._ranks())
        return next((one for one in map(self._unserved_of, ranks) if one is not None), None)

    def _unserved_of(self, requests: Sequence[LinearRequest]) -> LinearRequest | None:
        plans = self.plan(requests)
        return next(
            (
                request
                for request, plan in zip(requests, plans, strict=True)
                if request.shard.split_blocks or not plan.is_servable
            ),
            None,
        )

    def _requests(
        self, layers: Sequence[WholeLayer], holdings: Sequence[Holding | None], rank: int
    ) -> tuple[LinearRequest, ...]:
        return tuple(
            self._of_rank(layer, holding, rank)
            for layer, holding in zip(layers, holdings, strict=True)
        )

    def _layer(self, request: LinearRequest) -> WholeLayer:
        return next(layer for layer in self.layers if layer.request.name == request.name)

    def _ranks(self) -> range:
        return range(self.parallelism.tensor)

    def _of_rank(self, layer: WholeLayer, holding: Holding | None, rank: int) -> LinearRequest:
        if holding is None:
            return self._plain(layer)
        piece = piece_of(layer, self.parallelism, rank, holding)
        return request_of(layer, self.parallelism, piece, holding)

    def _remedy(self, kind: RemedyKind, holdings: Sequence[Holding | None]) -> Remedy:
        # Rank 0: padded ranks are all alike, and uneven shares are dealt from it on.
        requests = self._requests(self.layers, holdings, 0)
        return self._priced(kind, self.parallelism, tuple(holdings), requests)

    def _priced(
        self,
        kind: RemedyKind,
        parallelism: Parallelism,
        holdings: tuple[Holding | None, ...],
        requests: Sequence[LinearRequest],
    ) -> Remedy:
        price = price_of(self.layers, parallelism, requests)
        names = dict.fromkeys(name for one in self.plan(requests) for name in one.backends)
        return Remedy(kind, parallelism, holdings, tuple(requests), price, tuple(names))

    def _backends(
        self, layers: Sequence[WholeLayer], holdings: Sequence[Holding | None]
    ) -> set[str]:
        plans = self.plan(self._requests(layers, holdings, 0))
        return {name for plan in plans for name in plan.backends}

    def _plain(self, layer: WholeLayer) -> LinearRequest:
        result = cut(layer, self.parallelism)
        assert isinstance(result, LinearRequest)
        return result
