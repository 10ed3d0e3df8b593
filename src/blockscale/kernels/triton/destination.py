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
)
from blockscale.kernels.triton import scales
from blockscale.kernels.triton.build import TYPES
from blockscale.tensor import torch_dtype

if TYPE_CHECKING:
    from blockscale.formats import BlockFormat, ScaleLayout
    from blockscale.formats.layout import StoredScales

# Columns of a tile; scale blocks divide it, and four of the widest make one packed word.
TILE_COLUMNS = 512
# The narrowest block: less than a thread's share of a row would not fill a vector.
MIN_BLOCK = 16
VECTOR_BYTES = 16
# Numbers of rows that one destination remembers.
MAX_KNOWN = 8192

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


@dataclass(frozen=True, slots=True)
class Places:
    """Where the codes and scales of m rows lie: all that follows from m.

    ``extents``: what the kernel is told (``QuantizerSpec.extents``).
    """

    code_rows: int
    stored: StoredScales
    extents: tuple[int, ...]


class Destination:
    """Allocates codes and scales of (m, k) matrices and knows their places in memory."""

    __slots__ = ("_align", "_blocks", "_codes", "_known", "_spec", "_stored_type", "columns")

    def __init__(self, spec: QuantizerSpec) -> None:
        layout, fmt = spec.layout, spec.format
        stored = layout.storage_type(fmt.scale)
        self._spec = spec
        self._codes = torch_dtype(fmt.element)
        self._stored_type = torch_dtype(stored)
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
        self._known: dict[int, Places] = {}

    def new(
        self, m: int, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor, tuple[int, ...]]:
        """Codes (m, k), stored scales, and the kernel's ``extents``."""
        places = self._known.get(m)
        if places is None:
            places = self._keep(m)
        code_rows, stored = places.code_rows, places.stored
        codes = torch.empty((code_rows, self._spec.k), dtype=self._codes, device=device)
        if code_rows != m:
            codes = codes[:m]
        flat = torch.empty(stored.elements, dtype=self._stored_type, device=device)
        return codes, flat.as_strided(stored.shape, stored.strides), places.extents

    def places(self, m: int) -> Places:
        """Where the codes and scales of m rows lie."""
        spec, layout = self._spec, self._spec.layout
        stored = layout.stored(m, spec.k, spec.format)
        if layout.packing is Packing.SWIZZLED_32_4_4:
            across = round_up(self._blocks, SWIZZLE_TILE_COLUMNS)
            written = (round_up(m, SWIZZLE_TILE_ROWS), across, 0, across // SWIZZLE_TILE_COLUMNS)
        else:
            strides = stored.strides if layout.axes is Axes.MN_K else stored.strides[::-1]
            if layout.major is Major.MN:
                written = (round_up(m, self._align), self._blocks, *strides)
            else:
                written = (m, round_up(self._blocks, self._align), *strides)
        code_rows = round_up(m, spec.row_multiple)
        return Places(code_rows, stored, (code_rows, *written))

    def _keep(self, m: int) -> Places:
        if len(self._known) >= MAX_KNOWN:
            self._known.clear()
        places = self._known[m] = self.places(m)
        return places
