"""Descriptors whose copies bring 256 bytes into L2 where they ask for 128.

A K block of FP8 is 128 bytes of a row. Triton 3.6 encodes its descriptors with an L2 promotion of
128 bytes, so each K block of a weight is a trip to memory of its own; DeepGEMM asks for 256, and
half of its K blocks are in L2 already (hit rate at M = 64, N = 3072, K = 6144: 44 % against 32 %,
ncu, H100, 2026-11-25). Triton has no option for it, so the descriptor that it made is encoded once
more by the same driver call with another promotion, and written over it.

This is done only if the descriptor's bytes are found where the release that was read keeps them
(``triton/backends/nvidia/driver.c``, 3.6: an object header, then the map at the next multiple of
128) and equal what the driver encodes with Triton's own arguments. Otherwise nothing is changed.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

MAP_BYTES = 128
MAP_ALIGNMENT = 64
# From the object's start to the map: the header, rounded up to the map's alignment (driver.c).
MAP_OFFSET = 128
# CUtensorMapL2promotion (cuda.h).
PROMOTE_128, PROMOTE_256 = 2, 3


def promote(
    descriptor: object,
    address: int,
    box: dict[str, Any],
    element_type: int,
    shape: Sequence[int],
    row_stride: int,
) -> bool:
    """Have ``descriptor``, a (rows, columns) matrix, promote to 256 bytes; whether it does now.

    ``box``: Triton's metadata of the parameter; ``element_type``: the driver's; ``row_stride``: in
    elements.
    """
    encode = _encoder()
    if encode is None:
        return False
    place = id(descriptor) + MAP_OFFSET
    arguments = (address, box, element_type, shape, row_stride)
    expected = _encoded(encode, *arguments, PROMOTE_128)
    if expected is None or ctypes.string_at(place, MAP_BYTES) != expected:
        return False
    wanted = _encoded(encode, *arguments, PROMOTE_256)
    if wanted is None:
        return False
    ctypes.memmove(place, wanted, MAP_BYTES)
    return True


def _encoded(
    encode: Any,
    address: int,
    box: dict[str, Any],
    element_type: int,
    shape: Sequence[int],
    row_stride: int,
    promotion: int,
) -> bytes | None:
    """The map's bytes; None if the driver refuses."""
    room = ctypes.create_string_buffer(MAP_BYTES + MAP_ALIGNMENT)
    start = -(-ctypes.addressof(room) // MAP_ALIGNMENT) * MAP_ALIGNMENT
    rows, columns = shape
    box_rows, box_columns = box["block_size"]
    longs, ints = ctypes.c_uint64 * 2, ctypes.c_uint32 * 2
    status = encode(
        ctypes.c_void_p(start),
        element_type,
        2,
        ctypes.c_void_p(address),
        longs(columns, rows),
        longs(row_stride * box["elem_size"], 0),
        ints(box_columns, box_rows),
        ints(1, 1),
        0,  # not interleaved
        box["swizzle"],
        promotion,
        0,  # zeros outside
    )
    return ctypes.string_at(start, MAP_BYTES) if status == 0 else None


@cache
def _encoder() -> Any:
    try:
        encode = ctypes.CDLL("libcuda.so.1").cuTensorMapEncodeTiled
    except (OSError, AttributeError):
        return None
    encode.restype = ctypes.c_int
    return encode
