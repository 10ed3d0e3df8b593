"""What a quantizer is made for, and where its codes and scales go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from blockscale.errors import BackendError
from blockscale.formats import ScaleFormat, ceil_div, round_up
from blockscale.formats.layout import (
    EXPONENTS_PER_WORD,
    SWIZZLE_TILE_COLUMNS,
    SWIZZLE_TILE_ROWS,
    Axes,
    Major,
    Packing,
    Padding,
)
from blockscale.kernels.triton import scales
from blockscale.kernels.triton.build import TYPES
from blockscale.tensor import as_stored, torch_dtype

if TYPE_CHECKING:
    from blockscale.formats import BlockFormat, ScaleLayout

# Columns of a tile; scale blocks divide it, and four of the widest make one packed word.
TILE_COLUMNS = 512
# The narrowest block: less than a thread's share of a row would not fill a vector.
MIN_BLOCK = 16
VECTOR_BYTES = 16

_KINDS = {
    Packing.NONE: scales.STRIDED.value,
    Packing.FOUR_IN_INT32: scales.PACKED.value,
    Packing.SWIZZLED_32_4_4: scales.SWIZZLED.value,
}


@dataclass(frozen=True, slots=True)
class QuantizerSpec:
    """What a quantizer is made for. ``k``: columns of the quantized matrix, not of the input.

    ``row_multiple``: codes are allocated, and zeroed, up to a multiple of this many rows; the
    result shows the real ones. ``overlaps``: the kernel may be launched before the one ahead has
    ended, and the one behind before this one has (SM90 and later).
    """

    format: BlockFormat
    layout: ScaleLayout
    dtype: torch.dtype
    k: int
    device: int
    row_multiple: int = 1
    overlaps: bool = False

    def __post_init__(self) -> None:
        """Refuse what the kernels do not compute."""
        block = self.format.block
        fits = block.mn == 1 and TILE_COLUMNS % block.k == 0 and block.k >= MIN_BLOCK
        if not fits or self.format.scale is ScaleFormat.BF16 or self.dtype not in TYPES:
            msg = f"the Triton quantizer has no kernel for {self.format} from {self.dtype}"
            raise BackendError(msg)
        self.layout.storage_type(self.format.scale)

    @property
    def is_half(self) -> bool:
        """Whether values come in two bytes each."""
        return self.dtype.itemsize == 2  # noqa: PLR2004 - two bytes

    def constants(self) -> tuple[tuple[str, object], ...]:
        """What is compiled into every quantizing kernel."""
        return (
            ("BLOCK", self.format.block.k),
            ("IS_UE8M0", self.format.scale is ScaleFormat.UE8M0),
            ("SCALE_KIND", _KINDS[self.layout.packing]),
            ("IS_HALF", self.is_half),
        )

    def outputs(self) -> tuple[tuple[str, str, int], ...]:
        """Run-time arguments for codes and scales."""
        stored = self.layout.storage_type(self.format.scale)
        # As many codes per store as values per load, so that both keep one register layout.
        vector = VECTOR_BYTES // self.dtype.itemsize
        return (
            ("codes", "*fp8e4nv", vector),
            ("scales", "*" + TYPES[torch_dtype(stored)], VECTOR_BYTES),
        )

    def extents(self) -> tuple[tuple[str, str, int], ...]:
        """Run-time arguments for what is written beside the data."""
        names = ("code_rows", "stored_rows", "stored_blocks", "scale_row_stride")
        return tuple((name, "i32", 1) for name in (*names, "scale_block_stride"))


class Destination:
    """Allocates codes and scales of (m, k) matrices and knows their places in memory."""

    __slots__ = (
        "_align",
        "_blocks",
        "_codes",
        "_is_plain",
        "_multiple",
        "_spec",
        "_stored_type",
        "columns",
    )

    def __init__(self, spec: QuantizerSpec) -> None:
        layout, fmt = spec.layout, spec.format
        stored = layout.storage_type(fmt.scale)
        self._spec = spec
        self._codes = torch_dtype(fmt.element)
        self._stored_type = torch_dtype(stored)
        self._multiple = spec.row_multiple
        columns = fmt.block.grid(1, spec.k)[1]
        packed = layout.packing is Packing.FOUR_IN_INT32
        self._blocks = ceil_div(columns, EXPONENTS_PER_WORD) if packed else columns
        self._align = max(1, layout.leading_align_bytes // stored.bytes)
        # What a program must go over, padding included.
        padded = columns
        if layout.packing is Packing.SWIZZLED_32_4_4:
            padded = round_up(columns, SWIZZLE_TILE_COLUMNS)
        elif layout.major is Major.K:
            padded = round_up(columns, self._align)
        self.columns = padded * fmt.block.k
        self._is_plain = (
            layout.major is Major.MN
            and layout.axes is Axes.MN_K
            and layout.padding is Padding.HIDDEN
            and layout.packing is not Packing.SWIZZLED_32_4_4
        )

    def new(
        self, m: int, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor, tuple[int, ...]]:
        """Codes (m, k), stored scales, and the kernel's ``extents``."""
        code_rows = round_up(m, self._multiple)
        codes = torch.empty((code_rows, self._spec.k), dtype=self._codes, device=device)
        if code_rows != m:
            codes = codes[:m]
        if not self._is_plain:
            stored, places = self._other(m, device)
            return codes, stored, (code_rows, *places)
        # Without the general rule's dataclass: this runs in every forward.
        leading = round_up(m, self._align)
        stored = torch.empty_strided(
            (leading, self._blocks), (1, leading), dtype=self._stored_type, device=device
        )
        if leading != m:
            stored = stored[:m]
        return codes, stored, (code_rows, leading, self._blocks, 1, leading)

    def _other(self, m: int, device: torch.device) -> tuple[torch.Tensor, tuple[int, ...]]:
        """Any layout, by its own description."""
        layout = self._spec.layout
        stored = layout.stored(m, self._spec.k, self._spec.format)
        flat = torch.empty(stored.elements, dtype=self._stored_type, device=device)
        if layout.packing is Packing.SWIZZLED_32_4_4:
            across = round_up(self._blocks, SWIZZLE_TILE_COLUMNS)
            places = (round_up(m, SWIZZLE_TILE_ROWS), across, 0, across // SWIZZLE_TILE_COLUMNS)
        else:
            strides = stored.strides if layout.axes is Axes.MN_K else stored.strides[::-1]
            if layout.major is Major.MN:
                places = (round_up(m, self._align), self._blocks, *strides)
            else:
                places = (m, round_up(self._blocks, self._align), *strides)
        return as_stored(flat, stored), places
