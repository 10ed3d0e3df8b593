"""Stored bytes as torch tensors, a band of rows at a time, so that memory stays bounded."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from blockscale.checkpoint.read import read_bytes
from blockscale.errors import CheckpointError
from blockscale.formats import K_MAJOR, ScaleFormat
from blockscale.tensor import BlockScaledTensor

if TYPE_CHECKING:
    from collections.abc import Iterator

    from blockscale.checkpoint.header import TensorEntry
    from blockscale.checkpoint.schema import QuantizedLayer

TORCH_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "C64": torch.complex64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}

# Elements of one band: quantizing takes about 20 bytes each in float32 temporaries, 80 MB in all.
BAND_ELEMENTS = 4 << 20


def torch_dtype(entry: TensorEntry) -> torch.dtype:
    """What torch calls the stored dtype. Raises CheckpointError where it has none (F4, F6)."""
    dtype = TORCH_DTYPES.get(entry.dtype)
    if dtype is None:
        raise CheckpointError(
            entry.path,
            f"is {entry.dtype}, for which torch has no dtype; save it as BF16, F16 or F32",
            tensor=entry.name,
        )
    return dtype


def read_tensor(entry: TensorEntry) -> torch.Tensor:
    """The whole tensor. Raises CheckpointError if it cannot be read, or torch has no such dtype."""
    dtype = torch_dtype(entry)
    if entry.length == 0:
        return torch.empty(entry.shape, dtype=dtype)
    return torch.frombuffer(bytearray(read_bytes(entry)), dtype=dtype).reshape(entry.shape)


def read_rows(entry: TensorEntry, first: int, count: int) -> torch.Tensor:
    """Rows [first, first + count) of a tensor seen as a matrix: all axes but the last are rows."""
    columns = entry.shape[-1]
    rows = entry.length // (columns * torch_dtype(entry).itemsize) if columns else 0
    row_bytes = entry.length // rows if rows else 0
    raw = read_bytes(entry, first * row_bytes, (first + count) * row_bytes)
    return torch.frombuffer(bytearray(raw), dtype=torch_dtype(entry)).reshape(count, columns)


def row_bands(rows: int, columns: int, block_rows: int) -> Iterator[tuple[int, int]]:
    """(first, count) of bands that cover ``rows``, each whole blocks except the last."""
    per_band = max(1, BAND_ELEMENTS // max(1, columns * block_rows)) * block_rows
    for first in range(0, rows, per_band):
        yield first, min(per_band, rows - first)


def read_block_scaled(layer: QuantizedLayer) -> BlockScaledTensor:
    """One layer's weight exactly as stored, scales in ``K_MAJOR``; F16 ones become FP32, exactly.

    Raises CheckpointError if the files cannot be read.
    """
    scales = read_tensor(layer.scale)
    if layer.format.scale is ScaleFormat.UE8M0:
        scales = scales.view(torch.float8_e8m0fnu)  # MXFP8 files call the exponent bytes U8.
    elif scales.dtype is torch.float16:
        scales = scales.float()
    return BlockScaledTensor(read_tensor(layer.weight), scales, layer.format, K_MAJOR)
