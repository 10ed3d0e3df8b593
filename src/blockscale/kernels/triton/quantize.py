"""Quantizers bound to a format, a layout, an activation dtype, a width and a device.

A quantizer is made once; calling it allocates codes and scales and enqueues one kernel. Scales come
out in the layout that was asked for, padding zeroed: no other kernel touches them before the GEMM.
"""

from __future__ import annotations

from functools import cache
from math import gcd
from typing import TYPE_CHECKING, NamedTuple

import torch

from blockscale.errors import BackendError
from blockscale.formats import ceil_div
from blockscale.kernels.triton.build import TYPES, Variant, launcher
from blockscale.kernels.triton.destination import (
    TILE_COLUMNS,
    VECTOR_BYTES,
    Destination,
    QuantizerSpec,
)
from blockscale.kernels.triton.fused_kernel import (
    normalize_quantize_kernel,
    silu_multiply_quantize_kernel,
)
from blockscale.kernels.triton.quantize_kernel import quantize_kernel
from blockscale.tensor import BlockScaledTensor

if TYPE_CHECKING:
    from collections.abc import Callable

    from blockscale.formats import BlockFormat, ScaleLayout

# 8 x 512 values by 128 threads: 32 a thread, in 16-byte loads that are all in flight at once, and
# whole 32-byte sectors of scales along M.
TILE_ROWS, NUM_WARPS = 8, 4

# Programmatic dependent launch (CUDA programming guide).
OVERLAPPING = (9, 0)

# RMSNorm holds a whole row in the registers of one program, 16 values a thread if it can.
VALUES_PER_THREAD = 16
MAX_WARPS, WARP_SIZE = 32, 32
# Rows that a normalizing program has under way at most, the present one counted.
ROWS_AHEAD = 3
# For sums over warps and what the driver keeps of each program's shared memory.
RESERVED_BYTES = 2048
# Warps that all normalizing programs of a multiprocessor have together.
RESIDENT_WARPS = 32
# 32-bit registers of a multiprocessor (CUDA programming guide, sm_90).
REGISTERS = 65_536
MAX_NORMALIZED = 2 * VALUES_PER_THREAD * MAX_WARPS * WARP_SIZE


class _Quantizer:
    """What all quantizers share: where results go, and variants for aligned and other inputs."""

    __slots__ = ("_aligned", "_destination", "_device", "_variant", "spec")

    def __init__(self, spec: QuantizerSpec, variant: Callable[[int], Variant]) -> None:
        self.spec = spec
        self._variant = variant
        self._destination = Destination(spec)
        self._device = torch.device("cuda", spec.device)
        self._aligned = launcher(variant(VECTOR_BYTES), spec.device)

    def tensor(self, codes: torch.Tensor, scales: torch.Tensor) -> BlockScaledTensor:
        """Both halves as one value, unchecked: they were made here, and forwards pass by here."""
        result = object.__new__(BlockScaledTensor)
        set_field = object.__setattr__
        set_field(result, "data", codes)
        set_field(result, "scales", scales)
        set_field(result, "format", self.spec.format)
        set_field(result, "layout", self.spec.layout)
        return result

    def _launcher(self, bits: int) -> Callable[..., None]:
        """The variant for addresses and strides whose bits, in bytes, are ``bits`` together."""
        if bits % VECTOR_BYTES == 0:
            return self._aligned
        return launcher(self._variant(1), self.spec.device)


class TiledQuantizer(_Quantizer):
    """A kernel that quantizes tiles of 8 rows by 512 columns."""

    __slots__ = ("_tiles_across", "_width")

    def __init__(self, spec: QuantizerSpec, kernel: object, name: str, width: int) -> None:
        """``width``: columns of the kernel's input, called ``name`` there."""
        super().__init__(spec, lambda alignment: _tiled(spec, kernel, name, alignment))
        self._width = width
        self._tiles_across = ceil_div(self._destination.columns, TILE_COLUMNS)

    def __call__(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes (m, k) and stored scales of ``values`` (m, width), stride 1 along a row."""
        m, width = values.shape
        if width != self._width:
            msg = f"this quantizer takes {self._width} columns, got {tuple(values.shape)}"
            raise BackendError(msg)
        stride, address = values.stride(0), values.data_ptr()
        codes, scales, extents = self._destination.new(m, self._device)
        tall = max(extents[0], extents[1])
        self._launcher(address | stride * values.itemsize)(
            -(-tall // TILE_ROWS) * self._tiles_across,
            address,
            codes.data_ptr(),
            scales.data_ptr(),
            m,
            self.spec.k,
            stride,
            *extents,
        )
        return codes, scales


class NormalizeQuantizer(_Quantizer):
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
        most_programs = RESIDENT_WARPS // _normalizing_warps(spec.k)
        shared_bytes = properties.shared_memory_per_multiprocessor // most_programs
        ahead = _rows_ahead(spec, 1 + has_residual, shared_bytes)
        super().__init__(
            spec, lambda alignment: _normalizing(spec, alignment, ahead, has_residual=has_residual)
        )
        self._weight = weight.contiguous()
        self._epsilon = epsilon
        self._most_programs = properties.multi_processor_count * most_programs
        self._has_residual = has_residual

    def __call__(
        self, values: torch.Tensor, residual: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Codes, stored scales and what was normalized: ``values``, or the new residual.

        ``values`` and ``residual`` are (m, k) with stride 1 along k. Raises BackendError if there
        is a residual and none was announced, or the reverse.
        """
        if (residual is not None) != self._has_residual:
            msg = "this quantizer was made " + ("with" if residual is None else "without")
            msg += " a residual"
            raise BackendError(msg)
        m, k = values.shape
        added = values if residual is None else residual
        summed = (
            values
            if residual is None
            else torch.empty((m, k), dtype=values.dtype, device=self._device)
        )
        codes, scales, extents = self._destination.new(m, self._device)
        addresses = values.data_ptr() | added.data_ptr() | self._weight.data_ptr()
        strides = (values.stride(0) | added.stride(0)) * values.itemsize
        self._launcher(addresses | strides)(
            min(max(extents[0], extents[1]), self._most_programs),
            values.data_ptr(),
            added.data_ptr(),
            summed.data_ptr(),
            self._weight.data_ptr(),
            codes.data_ptr(),
            scales.data_ptr(),
            m,
            k,
            values.stride(0),
            added.stride(0),
            *extents,
            self._epsilon,
        )
        return codes, scales, summed


def _tiled(spec: QuantizerSpec, kernel: object, name: str, alignment: int) -> Variant:
    """A tiled kernel for inputs whose rows start on multiples of ``alignment`` bytes."""
    arguments = (
        (name, "*" + TYPES[spec.dtype], alignment),
        *spec.outputs(),
        ("rows", "i32", 1),
        ("columns", "i32", gcd(spec.k, VECTOR_BYTES)),
        ("values_stride", "i32", max(1, alignment // spec.dtype.itemsize)),
        *spec.extents(),
    )
    constants = (
        ("TILE_ROWS", TILE_ROWS),
        ("TILE_COLUMNS", TILE_COLUMNS),
        *spec.constants(),
        ("OVERLAP", spec.overlaps),
    )
    return Variant(kernel, arguments, constants, NUM_WARPS, overlaps=spec.overlaps)


def _normalizing(spec: QuantizerSpec, alignment: int, ahead: int, *, has_residual: bool) -> Variant:
    columns = _normalized_columns(spec.k)
    steps = columns.bit_length() - 1
    pointer = "*" + TYPES[spec.dtype]
    stride = max(1, alignment // spec.dtype.itemsize)
    arguments = (
        ("values", pointer, alignment),
        ("residual", pointer, alignment),
        ("summed", pointer, VECTOR_BYTES),
        ("weight", pointer, alignment),
        *spec.outputs(),
        ("rows", "i32", 1),
        ("columns", "i32", gcd(spec.k, VECTOR_BYTES)),
        ("values_stride", "i32", stride),
        ("residual_stride", "i32", stride),
        *spec.extents(),
        ("epsilon", "fp32", 1),
    )
    constants = (
        ("TILE_COLUMNS", columns),
        ("STEPS", steps),
        ("AHEAD", ahead),
        ("HAS_RESIDUAL", has_residual),
        *spec.constants(),
        ("OVERLAP", spec.overlaps),
    )
    return Variant(
        normalize_quantize_kernel,
        arguments,
        constants,
        _normalizing_warps(spec.k),
        overlaps=spec.overlaps,
        # All that lets RESIDENT_WARPS be resident; nothing spills (ptxas 12.8).
        most_registers=REGISTERS // (RESIDENT_WARPS * WARP_SIZE),
    )


def _normalized_columns(k: int) -> int:
    return 1 << (max(k, TILE_COLUMNS) - 1).bit_length()


def _normalizing_warps(k: int) -> int:
    return min(MAX_WARPS, max(NUM_WARPS, _normalized_columns(k) // (VALUES_PER_THREAD * WARP_SIZE)))


def _rows_ahead(spec: QuantizerSpec, inputs: int, shared_bytes: int) -> int:
    """Rows under way at a time, for a program that may keep so many bytes of them."""
    row_bytes = _normalized_columns(spec.k) * spec.dtype.itemsize * inputs
    return max(1, min(ROWS_AHEAD, 1 + (shared_bytes - RESERVED_BYTES) // row_bytes))


@cache
def activation_quantizer(spec: QuantizerSpec) -> TiledQuantizer:
    """(m, k) floats to codes and scales: ``reference.quantize``, bit for bit."""
    return TiledQuantizer(spec, quantize_kernel, "values", spec.k)


@cache
def silu_multiply_quantizer(spec: QuantizerSpec) -> TiledQuantizer:
    """(m, 2 k) gate and up projections to codes and scales of silu(gate) * up, (m, k).

    ``reference.fused.silu_and_multiply`` and then ``reference.quantize``, bit for bit.
    """
    return TiledQuantizer(spec, silu_multiply_quantize_kernel, "gate_up", 2 * spec.k)


def quantize_rows(
    values: torch.Tensor, fmt: BlockFormat, layout: ScaleLayout, row_multiple: int = 1
) -> BlockScaledTensor:
    """``values`` (m, k), stride 1 along k, as ``reference.quantize`` would, scales in ``layout``.

    One kernel on the current stream of their device. The storage behind ``data`` goes on, in zeros,
    up to a multiple of ``row_multiple`` rows. Raises BackendError for a format, layout or dtype
    that has no kernel.
    """
    key = (id(fmt), id(layout), values.dtype, values.shape[1], values.device, row_multiple)
    found = _QUANTIZERS.get(key)
    if found is None:
        found = _QUANTIZERS[key] = _found(values, fmt, layout, row_multiple)
    return found.quantizer.tensor(*found.quantizer(values))


class _Found(NamedTuple):
    """A quantizer, with the objects whose ids lead to it, so that the ids stay theirs."""

    quantizer: TiledQuantizer
    format: BlockFormat
    layout: ScaleLayout


# By identity: hashing a format and a layout takes longer than a launch.
_QUANTIZERS: dict[tuple[object, ...], _Found] = {}


def _found(
    values: torch.Tensor, fmt: BlockFormat, layout: ScaleLayout, row_multiple: int
) -> _Found:
    index = values.device.index
    device = torch.cuda.current_device() if index is None else index
    spec = QuantizerSpec(
        fmt,
        layout,
        values.dtype,
        values.shape[1],
        device,
        row_multiple,
        overlaps=torch.cuda.get_device_capability(device) >= OVERLAPPING,
    )
    return _Found(activation_quantizer(spec), fmt, layout)
