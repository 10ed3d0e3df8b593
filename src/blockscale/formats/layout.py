"""Where scales lie in memory, for a tensor whose logical shape is known.

A layout may change how many numbers are stored (padding, repetition, packing), never what they
mean, and every layout has an inverse (``blockscale.reference.layout``).

The logical scales of an (mn, k) matrix are a grid of ``ceil(mn / block.mn)`` rows by
``ceil(k / block.k)`` columns. A layout says which axis has stride 1 (``major``), in which order the
stored tensor names the axes (``axes``), whether a row is stored once per block or once per row of
data (``rows``), whether four exponents share an int32 (``packing``), to how many bytes the other
stride is rounded up (``leading_align_bytes``) and whether the stored tensor shows that padding.

=========================================  =======================================================
layout                                     who reads it (in letters, what tests call it)
=========================================  =======================================================
``K_MAJOR``                                checkpoints, Triton, DeepGEMM SM90 weights (WF32)
``MN_MAJOR``                               torch scaled_mm activations, FlashInfer TRTLLM (AF32C)
``MN_MAJOR_TMA_ALIGNED``                   DeepGEMM SM90 activations (AF32T)
``MN_MAJOR_TMA_ALIGNED_PACKED``            DeepGEMM SM100/SM120 activations (APK)
``MN_MAJOR_TMA_ALIGNED_PACKED_PER_ROW``    DeepGEMM SM100/SM120 weights (WPK)
``K_BY_MN``                                FlashInfer CUTLASS, both operands (WKM, AKM)
``K_MAJOR_TRANSPOSED``                     sgl-kernel CUTLASS weights, a view (WCT)
``MN_MAJOR_PADDED``                        sgl-kernel CUTLASS activations (AF32CP)
``K_MAJOR_PADDED_TRANSPOSED``              torch scaled_mm weights (L4)
``SWIZZLED_32_4_4``                        MXFP8 tensor cores: cuBLASLt, torch, FlashInfer
=========================================  =======================================================
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from blockscale.errors import FormatError
from blockscale.formats.block import ceil_div, round_up
from blockscale.formats.scale import ScaleFormat

if TYPE_CHECKING:
    from blockscale.formats.block_format import BlockFormat


class Major(Enum):
    """The axis along which neighbours are one element apart."""

    K = "k"
    MN = "mn"


class Axes(Enum):
    """The order in which the stored tensor names its axes."""

    MN_K = "mn,k"
    K_MN = "k,mn"


class Rows(Enum):
    """Whether a block's scale is stored once, or once for each of its rows."""

    PER_BLOCK = "per block"
    PER_ROW = "per row"


class Packing(Enum):
    """How a scale becomes bits in memory."""

    NONE = "none"
    FOUR_IN_INT32 = "four exponents in one int32, lowest byte first"
    SWIZZLED_32_4_4 = "tiles of 128 rows by 4 columns, stored as 32 x (4 x 4)"


class Padding(Enum):
    """Whether the stored tensor's shape shows the padding, or only its strides do."""

    HIDDEN = "hidden"
    VISIBLE = "visible"


class StorageType(Enum):
    """The dtype that holds stored scales; the value is torch's name."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    E8M0 = "float8_e8m0fnu"
    INT32 = "int32"

    @property
    def bytes(self) -> int:
        """Bytes of one stored element."""
        return {"float32": 4, "bfloat16": 2, "float8_e8m0fnu": 1, "int32": 4}[self.value]


@dataclass(frozen=True, slots=True)
class StoredScales:
    """The exact memory that a layout asks for: compare a tensor with it, or allocate from it."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    elements: int
    dtype: StorageType

    @property
    def bytes(self) -> int:
        """Bytes of the buffer, padding included."""
        return self.elements * self.dtype.bytes


@dataclass(frozen=True, slots=True)
class ScaleLayout:
    """A way to store scales; see the module docstring for the vocabulary."""

    name: str
    major: Major
    axes: Axes = Axes.MN_K
    rows: Rows = Rows.PER_BLOCK
    packing: Packing = Packing.NONE
    leading_align_bytes: int = 1
    padding: Padding = Padding.HIDDEN

    def __str__(self) -> str:
        """The name."""
        return self.name

    def grid(self, mn: int, k: int, fmt: BlockFormat) -> tuple[int, int]:
        """Rows and columns that are stored for an (mn, k) matrix before padding and packing."""
        rows, columns = fmt.block.grid(mn, k)
        return (mn if self.rows is Rows.PER_ROW else rows), columns

    def storage_type(self, scale: ScaleFormat) -> StorageType:
        """The dtype that stores ``scale``. Raises FormatError if this layout cannot hold it."""
        if self.packing is not Packing.NONE and scale is not ScaleFormat.UE8M0:
            msg = f"layout {self.name} holds exponents; {scale.value} scales cannot be stored in it"
            raise FormatError(msg)
        if self.packing is Packing.FOUR_IN_INT32:
            return StorageType.INT32
        return _UNPACKED[scale]

    def stored(self, mn: int, k: int, fmt: BlockFormat) -> StoredScales:
        """Shape, strides and size of the stored scales of one (mn, k) matrix.

        Raises FormatError if this layout cannot hold ``fmt.scale``.
        """
        dtype = self.storage_type(fmt.scale)
        rows, columns = self.grid(mn, k, fmt)
        if self.packing is Packing.SWIZZLED_32_4_4:
            elements = round_up(rows, SWIZZLE_TILE_ROWS) * round_up(columns, SWIZZLE_TILE_COLUMNS)
            return StoredScales((elements,), (1,), elements, dtype)
        if self.packing is Packing.FOUR_IN_INT32:
            columns = ceil_div(columns, EXPONENTS_PER_WORD)
        align = max(1, self.leading_align_bytes // dtype.bytes)
        if self.major is Major.MN:
            leading = round_up(rows, align)
            strides, elements = (1, leading), leading * columns
            shown = (leading, columns) if self.padding is Padding.VISIBLE else (rows, columns)
        else:
            leading = round_up(columns, align)
            strides, elements = (leading, 1), leading * rows
            shown = (rows, leading) if self.padding is Padding.VISIBLE else (rows, columns)
        if self.axes is Axes.K_MN:
            shown, strides = (shown[1], shown[0]), (strides[1], strides[0])
        return StoredScales(shown, strides, elements, dtype)


_UNPACKED = {
    ScaleFormat.FP32: StorageType.FLOAT32,
    ScaleFormat.BF16: StorageType.BFLOAT16,
    ScaleFormat.UE8M0: StorageType.E8M0,
}

EXPONENTS_PER_WORD = 4
SWIZZLE_TILE_ROWS = 128
SWIZZLE_TILE_COLUMNS = 4

# TMA wants every stride but the innermost to be a multiple of 16 bytes (CUDA driver API,
# cuTensorMapEncodeTiled, globalStrides).
TMA_STRIDE_BYTES = 16

K_MAJOR = ScaleLayout("k_major", Major.K)
MN_MAJOR = ScaleLayout("mn_major", Major.MN)
MN_MAJOR_TMA_ALIGNED = ScaleLayout(
    "mn_major_tma_aligned", Major.MN, leading_align_bytes=TMA_STRIDE_BYTES
)
MN_MAJOR_TMA_ALIGNED_PACKED = ScaleLayout(
    "mn_major_tma_aligned_packed",
    Major.MN,
    packing=Packing.FOUR_IN_INT32,
    leading_align_bytes=TMA_STRIDE_BYTES,
)
MN_MAJOR_TMA_ALIGNED_PACKED_PER_ROW = ScaleLayout(
    "mn_major_tma_aligned_packed_per_row",
    Major.MN,
    rows=Rows.PER_ROW,
    packing=Packing.FOUR_IN_INT32,
    leading_align_bytes=TMA_STRIDE_BYTES,
)
K_BY_MN = ScaleLayout("k_by_mn", Major.MN, axes=Axes.K_MN)
K_MAJOR_TRANSPOSED = ScaleLayout("k_major_transposed", Major.K, axes=Axes.K_MN)
MN_MAJOR_PADDED = ScaleLayout(
    "mn_major_padded",
    Major.MN,
    leading_align_bytes=TMA_STRIDE_BYTES,
    padding=Padding.VISIBLE,
)
K_MAJOR_PADDED_TRANSPOSED = ScaleLayout(
    "k_major_padded_transposed",
    Major.K,
    axes=Axes.K_MN,
    leading_align_bytes=TMA_STRIDE_BYTES,
    padding=Padding.VISIBLE,
)
SWIZZLED_32_4_4 = ScaleLayout(
    "swizzled_32_4_4", Major.K, rows=Rows.PER_ROW, packing=Packing.SWIZZLED_32_4_4
)

SCALE_LAYOUTS: tuple[ScaleLayout, ...] = (
    K_MAJOR,
    MN_MAJOR,
    MN_MAJOR_TMA_ALIGNED,
    MN_MAJOR_TMA_ALIGNED_PACKED,
    MN_MAJOR_TMA_ALIGNED_PACKED_PER_ROW,
    K_BY_MN,
    K_MAJOR_TRANSPOSED,
    MN_MAJOR_PADDED,
    K_MAJOR_PADDED_TRANSPOSED,
    SWIZZLED_32_4_4,
)


def scale_layout_named(name: str) -> ScaleLayout:
    """The layout of that name. Raises FormatError, listing the known ones, if there is none."""
    for layout in SCALE_LAYOUTS:
        if layout.name == name:
            return layout
    known = ", ".join(layout.name for layout in SCALE_LAYOUTS)
    msg = f"no scale layout is called {name!r}; known: {known}"
    raise FormatError(msg)
