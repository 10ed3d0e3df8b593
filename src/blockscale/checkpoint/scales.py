"""Reading stored scales, about 1/16384 of a checkpoint's bytes, with numpy alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from blockscale.checkpoint.read import read_bytes
from blockscale.formats import PowerOfTwo
from blockscale.formats.scale import (
    FLOAT32_MANTISSA_BITS,
    FLOAT32_MANTISSA_MASK,
    UE8M0_MAX_BYTE,
    UE8M0_MIN_BYTE,
    UE8M0_NAN_BYTE,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from numpy.typing import NDArray

    from blockscale.checkpoint.header import TensorEntry
    from blockscale.checkpoint.schema import QuantizedLayer


@dataclass(frozen=True, slots=True)
class ScaleFacts:
    """What the scales of one layer are. ``smallest`` and ``largest`` look at finite ones only.

    ``smallest`` and ``largest`` are None if no scale is finite.
    """

    count: int
    power_of_two: PowerOfTwo
    not_power_of_two: int
    nonfinite: int
    zero: int
    negative: int
    smallest: float | None
    largest: float | None


def read_scales(entry: TensorEntry) -> NDArray[np.float32]:
    """The stored scales as float32, in the entry's shape; all other dtypes are restated exactly.

    Raises CheckpointError if the file cannot be read.
    """
    raw = read_bytes(entry)
    if entry.dtype == "F32":
        values = np.frombuffer(raw, "<f4").astype(np.float32)
    elif entry.dtype == "F16":
        values = np.frombuffer(raw, "<f2").astype(np.float32)
    elif entry.dtype == "BF16":
        values = (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
    else:
        codes = np.frombuffer(raw, np.uint8)
        values = np.ldexp(np.float32(1), codes.astype(np.int32) - 127).astype(np.float32)
        values[codes == UE8M0_NAN_BYTE] = np.nan
    return values.reshape(entry.shape)


def scale_facts(values: NDArray[np.float32]) -> ScaleFacts:
    """Power-of-two-ness, range and faults of scales."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    exponent = bits >> FLOAT32_MANTISSA_BITS
    exact = (
        (exponent >= UE8M0_MIN_BYTE)
        & (exponent <= UE8M0_MAX_BYTE)
        & (bits & FLOAT32_MANTISSA_MASK == 0)
    )
    finite = values[np.isfinite(values)]
    inexact = int(values.size - exact.sum())
    return ScaleFacts(
        count=int(values.size),
        power_of_two=PowerOfTwo.NO if inexact else PowerOfTwo.YES,
        not_power_of_two=inexact,
        nonfinite=int(values.size - finite.size),
        zero=int((values == 0).sum()),
        negative=int((values < 0).sum()),
        smallest=float(finite.min()) if finite.size else None,
        largest=float(finite.max()) if finite.size else None,
    )


def read_power_of_two(
    layers: Iterable[QuantizedLayer], progress: Callable[[int], None] | None = None
) -> dict[str, PowerOfTwo]:
    """Whether each layer's scales are powers of two, by reading them.

    ``progress`` is called with the number of layers done since the last call.
    """
    found = {}
    for layer in layers:
        found[layer.name] = scale_facts(read_scales(layer.scale)).power_of_two
        if progress is not None:
            progress(1)
    return found
