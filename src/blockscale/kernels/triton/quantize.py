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
from blockscale.kernels.step import device_index
from blockscale.kernels.triton.build import TYPES, Variant, launcher
from blockscale.kernels.triton.destination import (
    TILE_COLUMNS,
    VECTOR_BYTES,
    Destination,
    QuantizerSpec,
)
from blockscale.kernels.triton.fused_kernel import silu_multiply_quantize_kernel
from blockscale.kernels.triton.quantize_kernel import quantize_kernel
from blockscale.tensor import BlockScaledTensor

if TYPE_CHECKING:
    from collections.abc import Callable

    from blockscale.formats import BlockFormat, ScaleLayout
    from blockscale.kernels.step import QuantizerStart, Scratch
    from blockscale.kernels.triton.build import Launcher

# 8 x 512 values by 128 threads: 32 a thread, in 16-byte loads that are all in flight at once, and
# whole 32-byte sectors of scales along M.
TILE_ROWS, NUM_WARPS = 8, 4

# Programmatic dependent launch (CUDA programming guide).
OVERLAPPING = (9, 0)


class Quantizer:
    """What all quantizers share: where results go, and variants for aligned and other inputs."""

    __slots__ = ("_aligned", "_variant", "destination", "device", "spec")

    def __init__(self, spec: QuantizerSpec, variant: Callable[[int], Variant]) -> None:
        self.spec = spec
        self._variant = variant
        self.destination = Destination(spec)
        self.device = torch.device("cuda", spec.device)
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

    def launcher(self, bits: int) -> Launcher:
        """The variant for addresses and strides whose bits, in bytes, are ``bits`` together."""
        if bits % VECTOR_BYTES == 0:
            return self._aligned
        return launcher(self._variant(1), self.spec.device)


class TiledQuantizer(Quantizer):
    """A kernel that quantizes tiles of 8 rows by 512 columns."""

    __slots__ = ("_tiles_across", "_width")

    def __init__(
        self,
        spec: QuantizerSpec,
        variant: Callable[[QuantizerSpec, int], Variant],
        width: int,
    ) -> None:
        """``width``: columns of the kernel's input."""
        super().__init__(spec, lambda alignment: variant(spec, alignment))
        self._width = width
        self._tiles_across = ceil_div(self.destination.columns, TILE_COLUMNS)

    def __call__(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes (m, k) and stored scales of ``values`` (m, width), stride 1 along a row."""
        m, width = values.shape
        if width != self._width:
            msg = f"this quantizer takes {self._width} columns, got {tuple(values.shape)}"
            raise BackendError(msg)
        stride, address = values.stride(0), values.data_ptr()
        codes, scales, extents = self.destination.new(m, values.device)
        tall = max(extents[0], extents[1])
        self.launcher(address | stride * values.itemsize)(
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

    def sizes(self, m: int) -> tuple[int, int]:
        """As ``step.StepQuantizer``."""
        places = self.destination.places(m)
        return places.code_rows * self.spec.k, places.stored.bytes

    def start_for(self, m: int, scratch: Scratch) -> QuantizerStart:
        """As ``step.StepQuantizer``."""
        extents = self.destination.places(m).extents
        programs = -(-max(extents[0], extents[1]) // TILE_ROWS) * self._tiles_across
        k, itemsize, scales = self.spec.k, self.spec.dtype.itemsize, scratch.scales
        launch, static = self._aligned.start, self._aligned.static
        ending = (*extents, *self._aligned.constants)

        def start(stream: int, values: int, row_stride: int, base: int) -> None:
            bits = values | row_stride * itemsize
            if bits % VECTOR_BYTES:
                places = (base, base + scales)
                self.launcher(bits)(programs, values, *places, m, k, row_stride, *extents)
                return
            places = (values, base, base + scales)
            launch(programs, 1, 1, stream, *static, *places, m, k, row_stride, *ending)

        return start


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


def activation_variant(spec: QuantizerSpec, alignment: int) -> Variant:
    """The quantizing kernel, for rows that start on multiples of ``alignment`` bytes."""
    return _tiled(spec, quantize_kernel, "values", alignment)


def silu_multiply_variant(spec: QuantizerSpec, alignment: int) -> Variant:
    """The kernel with SiLU before it, for rows that start on multiples of ``alignment`` bytes."""
    return _tiled(spec, silu_multiply_quantize_kernel, "gate_up", alignment)


@cache
def activation_quantizer(spec: QuantizerSpec) -> TiledQuantizer:
    """(m, k) floats to codes and scales: ``reference.quantize``, bit for bit."""
    return TiledQuantizer(spec, activation_variant, spec.k)


@cache
def silu_multiply_quantizer(spec: QuantizerSpec) -> TiledQuantizer:
    """(m, 2 k) gate and up projections to codes and scales of silu(gate) * up, (m, k).

    ``reference.fused.silu_and_multiply`` and then ``reference.quantize``, bit for bit.
    """
    return TiledQuantizer(spec, silu_multiply_variant, 2 * spec.k)


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
        quantizer = rows_quantizer(
            fmt, layout, values.dtype, values.shape[1], device_index(values), row_multiple
        )
        found = _QUANTIZERS[key] = _Found(quantizer, fmt, layout)
    return found.quantizer.tensor(*found.quantizer(values))


def rows_quantizer(
    fmt: BlockFormat,
    layout: ScaleLayout,
    dtype: torch.dtype,
    k: int,
    device: int,
    row_multiple: int = 1,
) -> TiledQuantizer:
    """The quantizer behind ``quantize_rows`` for (m, k) matrices of ``dtype`` on a GPU."""
    overlaps = torch.cuda.get_device_capability(device) >= OVERLAPPING
    return activation_quantizer(
        QuantizerSpec(fmt, layout, dtype, k, device, row_multiple, overlaps=overlaps)
    )


class _Found(NamedTuple):
    """A quantizer, with the objects whose ids lead to it, so that the ids stay theirs."""

    quantizer: TiledQuantizer
    format: BlockFormat
    layout: ScaleLayout


# By identity: hashing a format and a layout takes longer than a launch.
_QUANTIZERS: dict[tuple[object, ...], _Found] = {}
