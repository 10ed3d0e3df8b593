"""What of the CUDA driver a launch needs, by ctypes: descriptors, modules, launches.

By ctypes because all arguments of a launch can then be made once and used again (``launch``).
Numbers and structures: cuda.h of CUDA 13.0.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import TYPE_CHECKING

from blockscale.errors import BackendError
from blockscale.kernels.cuda.work import IN_ORDER

if TYPE_CHECKING:
    from blockscale.kernels.cuda.work import Box

# CUtensorMap, and where it must lie.
MAP_BYTES, MAP_ALIGNMENT = 128, 64
# CUtensorMapDataType.
UINT8, FLOAT16, FLOAT32, BFLOAT16 = 0, 6, 7, 9
# CUtensorMapSwizzle by bytes; CUtensorMapL2promotion.
SWIZZLES = {0: 0, 32: 1, 64: 2, 128: 3}
PROMOTE_NOTHING, PROMOTE_256 = 0, 3
# CUfunction_attribute and CUlaunchAttributeID.
MAX_DYNAMIC_SHARED_BYTES = 8
CLUSTER_DIMENSION, PROGRAMMATIC_SERIALIZATION = 4, 6
TMA_BYTES = 16
# Descriptors that one product keeps, about 400 bytes each, before it starts again.
MAX_MAPS = 4096


class TensorMap(ctypes.Structure):
    """A CUtensorMap, wherever ctypes puts it: it is copied there from an aligned place."""

    _fields_ = (("opaque", ctypes.c_ubyte * MAP_BYTES),)


class LaunchAttribute(ctypes.Structure):
    """A CUlaunchAttribute; the value is a union of 64 bytes, used here as integers."""

    _fields_ = (
        ("id", ctypes.c_int),
        ("padding", ctypes.c_int),
        ("value", ctypes.c_uint * 16),
    )


class LaunchConfig(ctypes.Structure):
    """A CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(LaunchAttribute)),
        ("attribute_count", ctypes.c_uint),
    )


class Maps:
    """Descriptors: ``encode`` of the same arguments, once."""

    def __init__(self) -> None:
        self._kept: dict[tuple[object, ...], TensorMap] = {}

    def __call__(self, *key) -> TensorMap:
        """Raises BackendError if TMA cannot reach it."""
        found = self._kept.get(key)
        if found is None:
            if len(self._kept) >= MAX_MAPS:
                self._kept.clear()
            found = self._kept[key] = encode(*key)
        return found


@cache
def driver() -> ctypes.CDLL:
    """The CUDA driver. Raises BackendError if this machine has none."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        msg = f"the cuda backend needs NVIDIA's driver (libcuda.so.1): {error}"
        raise BackendError(msg) from error
    pointer = ctypes.c_void_p
    library.cuLaunchKernelEx.argtypes = [pointer] * 4
    library.cuFuncSetAttribute.argtypes = [pointer, ctypes.c_int, ctypes.c_int]
    return library


def check(status: int, what: str) -> None:
    """Raises BackendError with the driver's words unless the status is success."""
    if status:
        words = ctypes.c_char_p()
        driver().cuGetErrorString(status, ctypes.byref(words))
        msg = f"{what}: {(words.value or b'unknown error').decode()} (CUDA error {status})"
        raise BackendError(msg)


def load_function(cubin: bytes, name: str, shared_bytes: int) -> ctypes.c_void_p:
    """The kernel ``name``, loaded into the current context for so much shared memory."""
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    check(driver().cuModuleLoadData(ctypes.byref(module), cubin), "loading a kernel")
    found = driver().cuModuleGetFunction(ctypes.byref(function), module, name.encode())
    check(found, f"looking for {name}")
    wanted = driver().cuFuncSetAttribute(function, MAX_DYNAMIC_SHARED_BYTES, shared_bytes)
    check(wanted, f"asking for {shared_bytes} bytes of shared memory")
    return function


def encode(
    address: int, shape: tuple[int, ...], pitch: int, box: Box, element_type: int, promotion: int
) -> TensorMap:
    """The descriptor of a (rows, columns) matrix with ``pitch`` bytes from one row to the next.

    ``shape`` may be (slots, rows, columns): matrices one behind the other.

    ``box.dealt``: of each group of so many rows, row 8 j + 2 q + e of shared memory is row
    (dealt / 4) q + 2 j + e of the group, for e of 0 and 1 and q from 0 to 3. Beyond 8, where they
    are the same, rows must be whole groups, and the descriptor has five axes: columns, e, q, j,
    groups.

    Raises BackendError if TMA cannot reach it.
    """
    *slots, rows, columns = shape
    if address % TMA_BYTES or (rows > 1 and pitch % TMA_BYTES):
        msg = (
            f"TMA reads rows that start on {TMA_BYTES} bytes; a {rows}x{columns} operand lies "
            f"at {address:#x} with rows {pitch} bytes apart"
        )
        raise BackendError(msg)
    # One row has no pitch; the driver wants a multiple of 16 all the same.
    pitch = -(-pitch // TMA_BYTES) * TMA_BYTES
    room = ctypes.create_string_buffer(MAP_BYTES + MAP_ALIGNMENT)
    start = -(-ctypes.addressof(room) // MAP_ALIGNMENT) * MAP_ALIGNMENT
    if box.dealt > IN_ORDER:
        quarter = box.dealt // 4
        axes = (columns, 2, 4, quarter // 2, rows // box.dealt)
        pitches = (pitch, quarter * pitch, 2 * pitch, box.dealt * pitch)
        copied = (box.columns, 2, 4, quarter // 2, box.rows // box.dealt)
    else:
        axes = (columns, rows, *slots)
        pitches = (pitch, pitch * rows)
        copied = (box.columns, box.rows, *(1 for _ in slots))
    rank = len(axes)
    longs, ints = ctypes.c_uint64 * rank, ctypes.c_uint32 * rank
    status = driver().cuTensorMapEncodeTiled(
        ctypes.c_void_p(start),
        element_type,
        rank,
        ctypes.c_void_p(address),
        longs(*axes),
        longs(*pitches),
        ints(*copied),
        ints(*(1 for _ in axes)),
        0,  # not interleaved
        SWIZZLES[box.swizzle],
        promotion,
        0,  # zeros outside
    )
    check(status, f"describing a {rows}x{columns} operand to TMA")
    return TensorMap.from_buffer_copy(ctypes.string_at(start, MAP_BYTES))
