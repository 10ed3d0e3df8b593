"""How far a block-FP8 layer is from another version of it, a band of rows at a time."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, isnan, log10, prod, sqrt
from typing import TYPE_CHECKING

from blockscale.checkpoint.scales import read_scale_rows
from blockscale.checkpoint.schema import QuantizedLayer
from blockscale.errors import CheckpointError
from blockscale.formats import K_MAJOR, ScaleFormat

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from blockscale.checkpoint.header import TensorEntry
    from blockscale.tensor import BlockScaledTensor

_NAN_CODE = 0x7F
# What stands for itself: FP8 without its scales does not.
_FLOATS = frozenset({"BF16", "F16", "F32", "F64"})


@dataclass(frozen=True, slots=True)
class DataError:
    """How far a layer's values are from those that it should have.

    ``relative_error``: Frobenius norm of the difference over that of the right values.
    ``max_error``: largest absolute difference. ``snr_db``: signal to noise, infinite if exact.
    NaN where the values are.
    """

    relative_error: float
    max_error: float
    snr_db: float

    @property
    def badness(self) -> float:
        """Rises with the error; NaN is the worst."""
        return inf if isnan(self.relative_error) else self.relative_error


@dataclass(frozen=True, slots=True)
class Comparison:
    """The error of a layer, and how many of its codes are NaN."""

    error: DataError
    nan_codes: int


def compare(layer: QuantizedLayer, right: TensorEntry | QuantizedLayer) -> Comparison:
    """``layer`` against the float tensor it came from, or against another block-FP8 version.

    Memory is bounded by one band of rows, whatever the layer's size. Raises CheckpointError if a
    file cannot be read or the shapes differ.
    """
    import torch

    from blockscale.checkpoint.tensors import read_rows
    from blockscale.reference import dequantize

    other = right if isinstance(right, QuantizedLayer) else None
    entry = right.weight if isinstance(right, QuantizedLayer) else right
    if entry.shape != layer.weight.shape:
        raise CheckpointError(
            entry.path,
            f"has shape {entry.shape}, but {layer.weight.path} has {layer.weight.shape}",
            tensor=entry.name,
        )
    if other is None and entry.dtype not in _FLOATS:
        problem = (
            f"is {entry.dtype} and no block FP8 that can be read; compare with a float or a "
            "block-FP8 checkpoint"
        )
        raise CheckpointError(entry.path, problem, tensor=entry.name)
    difference_squared = signal_squared = largest = 0.0
    nan_codes = 0
    for first, band in bands(layer):
        count = band.data.shape[0]
        nan_codes += int(((band.data.view(torch.uint8) & _NAN_CODE) == _NAN_CODE).sum())
        if other is None:
            wanted = read_rows(entry, first, count).float()
        else:
            wanted = _values(other, first, count)
        change = dequantize(band) - wanted
        difference_squared += float(change.double().square().sum())
        signal_squared += float(wanted.double().square().sum())
        largest = max(largest, float(change.abs().max()) if change.numel() else 0.0)
    return Comparison(_error(difference_squared, signal_squared, largest), nan_codes)


def bands(layer: QuantizedLayer) -> Iterator[tuple[int, BlockScaledTensor]]:
    """(first row, values) of bands that cover a layer, scales restated as float32, exactly.

    Stacked experts follow one another; no band crosses from one to the next. Raises
    CheckpointError if a file cannot be read.
    """
    import torch

    from blockscale.checkpoint.tensors import read_rows, row_bands
    from blockscale.tensor import BlockScaledTensor

    fmt = layer.format.with_scale(ScaleFormat.FP32)
    block = fmt.block
    grid_rows = block.grid(layer.n, layer.k)[0]
    for index in range(prod(layer.weight.shape[:-2])):
        for first, count in row_bands(layer.n, layer.k, block.mn):
            data = read_rows(layer.weight, index * layer.n + first, count)
            block_row = index * grid_rows + first // block.mn
            scales = read_scale_rows(layer.scale, block_row, block.grid(count, 1)[0])
            tensor = BlockScaledTensor(data, torch.from_numpy(scales), fmt, K_MAJOR)
            yield index * layer.n + first, tensor


def _values(layer: QuantizedLayer, first: int, count: int) -> torch.Tensor:
    """Rows [first, first + count) in float32; all of one expert, wherever blocks begin."""
    import torch

    from blockscale.checkpoint.tensors import read_rows

    block = layer.format.block
    index, row = divmod(first, layer.n)
    begin, end = row // block.mn, block.grid(row + count, 1)[0]
    grid_rows = block.grid(layer.n, layer.k)[0]
    scales = torch.from_numpy(read_scale_rows(layer.scale, index * grid_rows + begin, end - begin))
    spread = scales.repeat_interleave(block.mn, 0)[row - begin * block.mn :][:count]
    spread = spread.repeat_interleave(block.k, 1)[:, : layer.k]
    return read_rows(layer.weight, first, count).float() * spread


def _error(difference_squared: float, signal_squared: float, largest: float) -> DataError:
    if difference_squared == 0.0:
        return DataError(0.0, 0.0, inf)
    if signal_squared == 0.0:
        return DataError(inf, largest, -inf)
    ratio = difference_squared / signal_squared
    return DataError(sqrt(ratio), largest, ratio if isnan(ratio) else -10.0 * log10(ratio))
