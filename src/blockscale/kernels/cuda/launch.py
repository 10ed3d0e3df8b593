"""A compiled form on a device, and launches of it with all their arguments made in advance.

A launch is kept by the addresses it reads and writes: a caching allocator hands out the same ones
again, so that a call is a look-up and one call of the driver.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, TypeVar

from blockscale.kernels.cuda import driver
from blockscale.kernels.cuda.build import KERNEL, compile_form

if TYPE_CHECKING:
    from blockscale.kernels.cuda.driver import TensorMap
    from blockscale.kernels.cuda.work import Form, Work

Key = TypeVar("Key", bound="tuple[object, ...]")


class Problem(ctypes.Structure):
    """``Problem`` of gemm.cu."""

    _fields_ = (
        ("b_scales", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("m", ctypes.c_int),
        ("n", ctypes.c_int),
        ("k_blocks", ctypes.c_int),
        ("b_scale_stride", ctypes.c_int),
        ("unit_rows", ctypes.c_int),
        ("unit_columns", ctypes.c_int),
        ("band", ctypes.c_int),
        ("last_rows", ctypes.c_int),
        ("early_blocks", ctypes.c_int),
        ("block_rows", ctypes.c_int),
        ("groups", ctypes.c_int),
        ("routing", ctypes.c_void_p),
    )


@cache
def function_of(form: Form, device: int) -> ctypes.c_void_p:  # noqa: ARG001 - the key of the cache
    """The form's kernel in the current context, which is ``device``'s."""
    return driver.load_function(compile_form(form), KERNEL, form.shared_bytes)


@dataclass(frozen=True, slots=True)
class Arguments:
    """What a launch reads and writes: descriptors in the kernel's order, and its numbers."""

    maps: tuple[TensorMap, TensorMap, TensorMap, TensorMap, TensorMap, TensorMap]
    problem: Problem


def keep(kept: dict[Key, Launch], key: Key, launch: Launch, most: int) -> Launch:
    """``launch``, kept; where there are ``most`` already, all others are forgotten."""
    if len(kept) >= most:
        kept.clear()
    kept[key] = launch
    return launch


class Launch:
    """One launch, ready to be enqueued any number of times."""

    def __init__(
        self, work: Work, device: int, stream: int, arguments: Arguments, *, overlap: bool
    ) -> None:
        form = work.form
        self._function = function_of(form, device)
        self._enqueue = driver.driver().cuLaunchKernelEx
        # Kept: the driver reads them on every call.
        self._arguments = arguments
        values = (*arguments.maps, arguments.problem)
        self._places = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        self._attributes = (driver.LaunchAttribute * 2)()
        count = 0
        if form.cluster > 1:
            self._attributes[count].id = driver.CLUSTER_DIMENSION
            self._attributes[count].value[:3] = (form.cluster, 1, 1)
            count += 1
        if overlap:
            self._attributes[count].id = driver.PROGRAMMATIC_SERIALIZATION
            self._attributes[count].value[0] = 1
            count += 1
        self._config = driver.LaunchConfig(
            (work.blocks, 1, 1),
            (form.threads, 1, 1),
            form.shared_bytes,
            stream,
            self._attributes,
            count,
        )
        self._config_address = ctypes.addressof(self._config)

    def __call__(self) -> None:
        """Enqueue it. Raises BackendError if the driver refuses."""
        status = self._enqueue(self._config_address, self._function, self._places, None)
        if status:
            driver.check(status, "launching block_fp8_gemm")
