"""Reading stored scales, about 1/4096 of a checkpoint's bytes, with numpy alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from blockscale.checkpoint.header import DTYPE_BITS
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


# Scales are read this many bytes at a time: an expert stack in MXFP8 has hundreds of megabytes.
FACTS_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class ScaleFacts:
    """What the scales of one layer are. ``smallest`` and ``largest`` look at finite ones only.

    ``smallest`` and ``largest`` are None if no scale is finite. ``subnormal``: below 2**-126 in
    magnitude and not zero.
    """

    count: int
    power_of_two: PowerOfTwo
    not_power_of_two: int
    nonfinite: int
    zero: int
    negative: int
    smallest: float | None
    largest: float | None
    subnormal: int = 0


def read_scales(entry: TensorEntry) -> NDArray[np.float32]:
    """The stored scales as float32, in the entry's shape; all other dtypes are restated exactly.

    Raises CheckpointError if the file cannot be read.
    """
    return _restated(read_bytes(entry), entry.dtype).reshape(entry.shape)


def read_scale_rows(entry: TensorEntry, first: int, count: int) -> NDArray[np.float32]:
    """Rows [first, first + count) of the scales seen as a matrix: all axes but the last are rows.

    Raises CheckpointError if the file cannot be read.
    """
    columns = entry.shape[-1]
    row_bytes = columns * DTYPE_BITS[entry.dtype] // 8
    raw = read_bytes(entry, first * row_bytes, (first + count) * row_bytes)
    return _restated(raw, entry.dtype).reshape(count, columns)


def _restated(raw: bytes, dtype: str) -> NDArray[np.float32]:
    if dtype == "F32":
        return np.frombuffer(raw, "<f4").astype(np.float32)
    if dtype == "F16":
        return np.frombuffer(raw, "<f2").astype(np.float32)
    if dtype == "BF16":
        return (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
    codes = np.frombuffer(raw, np.uint8)
    is_nan = codes == UE8M0_NAN_BYTE
    exponents = np.where(is_nan, 0, codes.astype(np.int32) - 127)
    values = np.ldexp(np.float32(1), exponents).astype(np.float32)
    values[is_nan] = np.nan
    return values


def read_scale_facts(entry: TensorEntry) -> ScaleFacts:
    """``scale_facts`` of stored scales, reading a bounded number of them at a time.

    Raises CheckpointError if the file cannot be read.
    """
    facts = scale_facts(np.empty(0, np.float32))
    for begin in range(0, entry.length, FACTS_BYTES):
        raw = read_bytes(entry, begin, min(begin + FACTS_BYTES, entry.length))
        facts = _together(facts, scale_facts(_restated(raw, entry.dtype)))
    return facts


def _together(one: ScaleFacts, two: ScaleFacts) -> ScaleFacts:
    smallest = [facts.smallest for facts in (one, two) if facts.smallest is not None]
    largest = [facts.largest for facts in (one, two) if facts.largest is not None]
    inexact = one.not_power_of_two + two.not_power_of_two
    return ScaleFacts(
        count=one.count + two.count,
        power_of_two=PowerOfTwo.NO if inexact else PowerOfTwo.YES,
        not_power_of_two=inexact,
        nonfinite=one.nonfinite + two.nonfinite,
        zero=one.zero + two.zero,
        negative=one.negative + two.negative,
        smallest=min(smallest, default=None),
        largest=max(largest, default=None),
        subnormal=one.subnormal + two.subnormal,
    )


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
        subnormal=int(((exponent & UE8M0_NAN_BYTE == 0) & (values != 0)).sum()),
    )


def read_power_of_two(
    layers: Iterable[QuantizedLayer], progress: Callable[[int], None] | None = None
) -> dict[str, PowerOfTwo]:
    """Whether each layer's scales are powers of two, by reading them.

    ``progress`` is called with the number of layers done since the last call.
    """
    found = {}
    for layer in layers:
        found[layer.name] = read_scale_facts(layer.scale).power_of_two
        if progress is not None:
            progress(1)
    return found
