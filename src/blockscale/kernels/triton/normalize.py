"""The (add and) RMSNorm quantizer, bound to a weight, a format, a layout, a dtype and a device."""

from __future__ import annotations

from typing import NamedTuple

import torch

from blockscale.errors import BackendError
from blockscale.formats import ceil_div
from blockscale.kernels.triton.build import TYPES, WARP_SIZE, Variant
from blockscale.kernels.triton.destination import VECTOR_BYTES, Destination, QuantizerSpec
from blockscale.kernels.triton.normalize_kernel import normalize_quantize_kernel
from blockscale.kernels.triton.quantize import Quantizer

# A program holds a row in registers: a thread has two vectors of each tile, and four tiles at most.
VECTORS, FEW_TILES, MOST_TILES = 2, 2, 4
# Columns of which a thread has two vectors, or the columns of a block if those are more.
LEAST_SPAN = 128
# More warps than this share a row only if it would not fit otherwise: each costs instructions.
WARPS = 4
MAX_WARPS = 32
MAX_NORMALIZED = MOST_TILES * VECTORS * (VECTOR_BYTES // 4) * WARP_SIZE * MAX_WARPS
# Rows that a program has under way at most, the present one counted.
ROWS_AHEAD = 3
# For sums over warps and what the driver keeps of each program's shared memory.
RESERVED_BYTES = 2048
# 32-bit registers and programs of a multiprocessor (CUDA programming guide, sm_90).
REGISTERS, PROGRAMS = 65_536, 32
# Registers of a thread for FEW_TILES, and for more: nothing spills (ptxas 12.8).
FEW_REGISTERS, MOST_REGISTERS = 80, 128


class Shape(NamedTuple):
    """How a row is cut: ``tiles`` of ``tile`` columns, by ``warps`` of ``registers`` a thread."""

    warps: int
    tile: int
    tiles: int
    registers: int

    @property
    def programs(self) -> int:
        """What runs on one multiprocessor at a time."""
        return min(PROGRAMS, REGISTERS // (self.registers * WARP_SIZE) // self.warps)


def shape(columns: int, itemsize: int) -> Shape:
    """For rows of so many columns, padding included, of values of ``itemsize`` bytes.

    The least padding, then two tiles if possible: one leaves a row's own instructions to too few
    values, more than two take registers from other programs.
    """
    # Half as many values fill a vector of float32.
    warps = [itemsize // 2 << step for step in range(MAX_WARPS.bit_length())]
    shapes = [_shape(columns, itemsize, count) for count in warps if count <= MAX_WARPS]
    fitting = [found for found in shapes if found.tiles <= MOST_TILES]
    narrow = [found for found in fitting if found.warps <= WARPS * itemsize // 2]
    return min(
        narrow or fitting[:1],
        key=lambda found: (found.tile * found.tiles, abs(found.tiles - FEW_TILES)),
    )


def _shape(columns: int, itemsize: int, warps: int) -> Shape:
    tile = VECTORS * (VECTOR_BYTES // itemsize) * WARP_SIZE * warps
    tiles = ceil_div(columns, tile)
    return Shape(warps, tile, tiles, FEW_REGISTERS if tiles <= FEW_TILES else MOST_REGISTERS)


class NormalizeQuantizer(Quantizer):
    """(m, k) activations to codes and scales of their RMSNorm, after adding a residual if any.

    ``reference.fused.add_and_normalize`` and then ``reference.quantize``, bit for bit.
    """

    __slots__ = ("_epsilon", "_has_residual", "_most_programs", "_weight")

    def __init__(
        self, spec: QuantizerSpec, weight: torch.Tensor, epsilon: float, *, has_residual: bool
    ) -> None:
        if spec.k > MAX_NORMALIZED or weight.shape != (spec.k,) or weight.dtype is not spec.dtype:
            msg = (
                f"RMSNorm of {spec.k} {spec.dtype} columns (at most {MAX_NORMALIZED}) needs a "
                f"weight of the same, got {tuple(weight.shape)} {weight.dtype}"
            )
            raise BackendError(msg)
        properties = torch.cuda.get_device_properties(spec.device)
        shared = properties.shared_memory_per_multiprocessor
        super().__init__(
            spec, lambda alignment: variant(spec, alignment, shared, has_residual=has_residual)
        )
        columns = max(spec.k, self.destination.columns)
        programs = shape(columns, spec.dtype.itemsize).programs
        self._weight = weight.contiguous()
        self._epsilon = epsilon
        self._most_programs = properties.multi_processor_count * programs
        self._has_residual = has_residual

    def __call__(
        self, values: torch.Tensor, residual: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Codes, stored scales and what was normalized: ``values``, or the new residual.

        ``values`` and ``residual`` are (m, k) with stride 1 along k. Raises BackendError if there
        is a residual and none was announced, or the reverse, or they have another width.
        """
        if (residual is not None) != self._has_residual:
            msg = "this quantizer was made " + ("with" if residual is None else "without")
            msg += " a residual"
            raise BackendError(msg)
        m, k = values.shape
        if k != self.spec.k:
            msg = f"this quantizer takes {self.spec.k} columns, got {tuple(values.shape)}"
            raise BackendError(msg)
        added = values if residual is None else residual
        summed = (
            values
            if residual is None
            else torch.empty((m, k), dtype=values.dtype, device=self.device)
        )
        codes, scales, extents = self.destination.new(m, self.device)
        addresses = values.data_ptr() | added.data_ptr() | self._weight.data_ptr()
        strides = (values.stride(0) | added.stride(0)) * values.itemsize
        self.launcher(addresses | strides)(
            min(max(extents[0], extents[1]), self._most_programs),
            values.data_ptr(),
            added.data_ptr(),
            summed.data_ptr(),
            self._weight.data_ptr(),
            codes.data_ptr(),
            scales.data_ptr(),
            m,
            values.stride(0),
            added.stride(0),
            *extents,
            self._epsilon,
        )
        return codes, scales, summed


def variant(spec: QuantizerSpec, alignment: int, shared: int, *, has_residual: bool) -> Variant:
    """The kernel for rows that start on multiples of ``alignment`` bytes.

    ``shared``: bytes of a multiprocessor's shared memory.
    """
    cut = shape(max(spec.k, Destination(spec).columns), spec.dtype.itemsize)
    row_bytes = cut.tile * cut.tiles * spec.dtype.itemsize * (1 + has_residual)
    buffers = (shared // cut.programs - RESERVED_BYTES) // row_bytes
    is_paired = spec.is_half and alignment == VECTOR_BYTES and spec.k % 2 == 0
    pointer = "*" + TYPES[spec.dtype]
    stride = max(1, alignment // spec.dtype.itemsize)
    arguments = (
        ("values", pointer, alignment),
        ("residual", pointer, alignment),
        ("summed", pointer, VECTOR_BYTES),
        ("weight", pointer, alignment),
        *spec.outputs(),
        ("rows", "i32", 1),
        ("values_stride", "i32", stride),
        ("residual_stride", "i32", stride),
        *spec.extents(),
        ("epsilon", "fp32", 1),
    )
    constants = (
        ("COLUMNS", spec.k),
        ("TILE", cut.tile),
        ("TILES", cut.tiles),
        ("SPAN", max(LEAST_SPAN, spec.format.block.k)),
        ("VECTOR", VECTOR_BYTES // spec.dtype.itemsize),
        ("PER_LOAD", 2 if is_paired else 1),
        ("AHEAD", max(1, min(ROWS_AHEAD, 1 + buffers))),
        ("HAS_RESIDUAL", has_residual),
        *spec.constants(),
        ("OVERLAP", spec.overlaps),
    )
    return Variant(
        normalize_quantize_kernel,
        arguments,
        constants,
        cut.warps,
        overlaps=spec.overlaps,
        # Loads of single halves need more addresses.
        most_registers=cut.registers if alignment == VECTOR_BYTES else MOST_REGISTERS,
    )
