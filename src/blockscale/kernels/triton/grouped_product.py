"""A stack of weights ready to multiply: the hot calls of the ``triton`` backend for experts."""

from __future__ import annotations

from dataclasses import replace
from math import gcd
from typing import TYPE_CHECKING, NamedTuple

import torch

from blockscale.errors import BackendError
from blockscale.formats import ceil_div
from blockscale.kernels.step import device_index
from blockscale.kernels.triton.build import TYPES, Variant, launcher
from blockscale.kernels.triton.grouped_kernel import grouped_kernel
from blockscale.kernels.triton.product import BAND, VECTOR
from blockscale.kernels.triton.tiles import Product, Tile, tile_for

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from blockscale.tensor import BlockScaledTensor

# Row blocks of the contiguous layout, and numbers of rows that a group may be expected to have.
ALIGNMENTS = (16, 64, 128)
ROW_BOUNDS = (16, 32, 64, 128, 512)
# Row blocks, and rows of a group, that kernels are compiled for beforehand: what the numbers of
# tokens that get such row blocks come to, eight experts for each, padding counted.
LIKELY = ((16, 16), (16, 32), (64, 64), (64, 128), (128, 128), (128, 512), (128, 1024))


class Rows(NamedTuple):
    """Rows of a slot, of a row block (contiguous), and programs that share a slot's (masked)."""

    slot_rows: int
    alignment: int
    row_programs: int


class GroupedTritonProduct:
    """out[rows of g] = activation[rows of g] x weight[g]^T for one prepared stack of weights.

    ``weight``: (groups, n, k) E4M3FN with float32 scales in ``K_MAJOR``, contiguous. Its storages
    are read on every call, so that new values in them are served. ``tile``: for every call, None
    for ``tile_for``'s choice. Nothing is read back to the host. Deterministic.
    """

    def __init__(self, weight: BlockScaledTensor, tile: Tile | None = None) -> None:
        self._weight = weight
        self._groups, self._n, self._k = weight.data.shape
        self._tile = tile
        self._device = device_index(weight.data)
        self._addresses = weight.data.data_ptr(), weight.scales.data_ptr()
        self._launches: dict[tuple[Tile, torch.dtype, bool, bool], Callable[..., None]] = {}
        self._tiles: dict[int, Tile] = {}

    def contiguous(
        self, activation: BlockScaledTensor, groups: torch.Tensor, out: torch.Tensor
    ) -> None:
        """Enqueue ``backends.base``'s contiguous product; rows in blocks of 16, 64 or 128.

        Row blocks of -1 are neither read nor written. Raises BackendError for other row blocks.
        """
        rows, blocks = out.shape[0], groups.shape[0]
        if rows == 0:
            return
        alignment = rows // blocks if blocks else 0
        if alignment not in ALIGNMENTS or alignment * blocks != rows:
            msg = f"{rows} rows in {blocks} blocks; a row block has one of {ALIGNMENTS} rows"
            raise BackendError(msg)
        tile = self._tile_for(max(alignment, rows // self._groups))
        if tile.rows > alignment:
            tile = replace(tile, rows=alignment)
        programs = ceil_div(rows, tile.rows) * ceil_div(self._n, tile.columns)
        self._start(tile, (activation, groups, out), Rows(rows, alignment, 0), programs)

    def masked(
        self,
        activation: BlockScaledTensor,
        counts: torch.Tensor,
        out: torch.Tensor,
        expected_rows: int,
    ) -> None:
        """Enqueue ``backends.base``'s masked product, for slots of any number of rows.

        Rows that do not count are not written. Counts below 0 or beyond the slot are taken for 0
        and the slot.
        """
        slot_rows = out.shape[1]
        if slot_rows == 0:
            return
        likely = max(1, min(expected_rows, slot_rows))
        tile = self._tile_for(likely)
        row_programs = ceil_div(likely, tile.rows)
        programs = self._groups * row_programs * ceil_div(self._n, tile.columns)
        self._start(tile, (activation, counts, out), Rows(slot_rows, 0, row_programs), programs)

    def compile(self, out_dtypes: Sequence[torch.dtype]) -> None:
        """Build what contiguous rows are likely to need, for these output dtypes."""
        for out_dtype in out_dtypes:
            for alignment, rows in LIKELY:
                tile = self._tile_for(rows)
                low = replace(tile, rows=min(tile.rows, alignment))
                self._launcher(low, out_dtype, is_aligned=True, is_masked=False)

    def _start(
        self,
        tile: Tile,
        operands: tuple[BlockScaledTensor, torch.Tensor, torch.Tensor],
        rows: Rows,
        programs: int,
    ) -> None:
        activation, routing, out = operands
        address, out_address = activation.data.data_ptr(), out.data_ptr()
        is_aligned = (address | out_address) % VECTOR == 0
        is_masked = rows.row_programs > 0
        launch = self._launcher(tile, out.dtype, is_aligned=is_aligned, is_masked=is_masked)
        launch(
            programs,
            address,
            activation.scales.data_ptr(),
            *self._addresses,
            routing.data_ptr(),
            out_address,
            rows.slot_rows,
            self._n,
            self._k,
            activation.scales.stride(-1),
            rows.alignment,
            rows.row_programs,
        )

    def _launcher(
        self, tile: Tile, out_dtype: torch.dtype, *, is_aligned: bool, is_masked: bool
    ) -> Callable[..., None]:
        key = (tile, out_dtype, is_aligned, is_masked)
        found = self._launches.get(key)
        if found is None:
            variant = grouped_variant(
                self._weight, tile, out_dtype, is_aligned=is_aligned, is_masked=is_masked
            )
            found = self._launches[key] = launcher(variant, self._device)
        return found

    def _tile_for(self, rows: int) -> Tile:
        if self._tile is not None:
            return self._tile
        bound = next((bound for bound in ROW_BOUNDS if rows <= bound), 2 * ROW_BOUNDS[-1])
        found = self._tiles.get(bound)
        if found is None:
            properties = torch.cuda.get_device_properties(self._device)
            block = self._weight.format.block
            # Groups side by side fill the GPU as that many columns would.
            product = Product(
                bound,
                self._n * self._groups,
                self._k,
                block.mn,
                block.k,
                (properties.major, properties.minor),
                properties.multi_processor_count,
            )
            found = self._tiles[bound] = tile_for(product)
        return found


def grouped_variant(
    weight: BlockScaledTensor,
    tile: Tile,
    out_dtype: torch.dtype,
    *,
    is_aligned: bool,
    is_masked: bool,
) -> Variant:
    """The kernel for one tile. Of n and k only their divisors are compiled in."""
    n, k = weight.data.shape[-2:]
    block = weight.format.block
    arguments = (
        ("activation", "*fp8e4nv", VECTOR if is_aligned else 1),
        ("activation_scales", "*fp32", 4),
        ("weight", "*fp8e4nv", VECTOR),
        ("weight_scales", "*fp32", 4),
        ("routing", "*i32", 4),
        ("out", "*" + TYPES[out_dtype], VECTOR if is_aligned else out_dtype.itemsize),
        ("slot_rows", "i32", 1),
        ("n", "i32", VECTOR if n % VECTOR == 0 else 1),
        ("k", "i32", gcd(k, VECTOR)),
        ("activation_scales_stride", "i32", 4),
        ("alignment", "i32", 1),
        ("row_programs", "i32", 1),
    )
    constants = (
        ("TILE_M", tile.rows),
        ("TILE_N", tile.columns),
        ("BLOCK_N", block.mn),
        ("BLOCK_K", block.k),
        ("WHOLE_BLOCKS", k % block.k == 0),
        ("SWAPS", tile.swaps),
        ("STAGES", tile.num_stages),
        ("BAND", BAND),
        ("MASKED", is_masked),
    )
    return Variant(
        grouped_kernel, arguments, constants, tile.num_warps, tile.num_stages, contracts=True
    )
