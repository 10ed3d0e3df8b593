"""A compiled kernel loaded on a device, and the least Python between a call and its launch.

Triton's launcher makes every TMA descriptor anew on every call, in Python; for a GEMM of three
operands that takes longer than a small product does. Here descriptors are kept by address and
shape (a caching allocator hands out the same addresses again), and with Triton 3.6 its C function
is called directly. Other releases go through Triton's public launcher.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime import driver

from blockscale.errors import BackendError
from blockscale.kernels.gluon.build import SM90, WARP_SIZE, boxes, compile_form, integers
from blockscale.kernels.gluon.descriptor import promote

if TYPE_CHECKING:
    from collections.abc import Callable

    from blockscale.kernels.gluon.build import Form

TMA_BYTES = 16
# Descriptors that one launcher keeps, about 400 bytes each, before it starts again.
MAX_BOXES = 4096
# The release whose launcher's insides were read: triton/backends/nvidia/driver.py.
KNOWN_RELEASE = "3.6."
# Codes come from memory, 128 bytes of a row at a time; scales and results do not.
PROMOTED = (torch.float8_e4m3fn,)


@cache
def launcher(form: Form, device: int) -> Launcher:
    """The launcher of a form on a device, made once. Compiles if Triton's cache has it not."""
    compiled = compile_form(form, GPUTarget("cuda", SM90, WARP_SIZE))
    # ``run`` loads the module onto the current device and builds Triton's own launcher.
    run = compiled.run
    direct = _c_function(run) if triton.__version__.startswith(KNOWN_RELEASE) else None
    if direct is None:
        return Launcher(form, device, compiled)
    return DirectLauncher(form, device, compiled, direct)


class Launcher:
    """Launches by Triton's public interface. ``form`` is loaded on ``device``, the current one.

    Who runs often calls ``start(*grid, 1, stream, *static, *arguments, *constants)`` itself.
    """

    start: Callable[..., None]
    static: tuple[Any, ...]

    def __init__(self, form: Form, device: int, compiled: Any) -> None:
        self.form = form
        self.device = device
        self._compiled = compiled
        self._types = tuple(boxes(form).values())
        self._integers = integers(form)
        self.constants = tuple(form.constants.values())
        self.start, self.static = self._start_publicly, ()
        self._boxes: dict[tuple[int, ...], tuple[Any, ...]] = {}

    def box(self, number: int, address: int, rows: int, columns: int, stride: int) -> Any:
        """The arguments that describe descriptor ``number``: a (rows, columns) matrix in memory.

        ``stride``: elements from one row to the next. Raises BackendError if TMA cannot read it.
        """
        key = (number, address, rows, columns, stride)
        found = self._boxes.get(key)
        if found is None:
            if len(self._boxes) >= MAX_BOXES:
                self._boxes.clear()
            self._check(*key)
            found = self._boxes[key] = self._encode(number, address, [rows, columns], [stride, 1])
        return found

    def stack(self, number: int, address: int, slots: int, rows: int, columns: int) -> Any:
        """The arguments that describe descriptor ``number``: contiguous (slots, rows, columns).

        Raises BackendError if TMA cannot read it.
        """
        key = (number, address, slots, rows, columns, 0)
        found = self._boxes.get(key)
        if found is None:
            if len(self._boxes) >= MAX_BOXES:
                self._boxes.clear()
            self._check(number, address, rows, columns, columns)
            shape, strides = [slots, rows, columns], [rows * columns, columns, 1]
            found = self._boxes[key] = self._encode(number, address, shape, strides)
        return found

    def __call__(self, grid: tuple[int, int], stream: int, arguments: tuple[Any, ...]) -> None:
        """Enqueue one launch. ``arguments``: boxes, addresses and integers, in order."""
        self.start(*grid, 1, stream, *self.static, *arguments, *self.constants)

    def _start_publicly(self, x: int, y: int, z: int, stream: int, *arguments: object) -> None:
        self._compiled[(x, y, z)](*arguments, stream=stream)

    def integers(self, values: dict[str, int], has_bias: int) -> tuple[int, ...]:
        """The kernel's integer arguments, in order."""
        values = {**values, "has_bias": has_bias}
        return tuple(values[name] for name in self._integers)

    def _check(self, number: int, address: int, rows: int, columns: int, stride: int) -> None:
        pitch = stride * self._types[number].dtype.itemsize
        if address % TMA_BYTES or (rows > 1 and pitch % TMA_BYTES):
            msg = (
                f"TMA reads rows that start on {TMA_BYTES} bytes; a {rows}x{columns} operand lies "
                f"at {address:#x} with rows {pitch} bytes apart"
            )
            raise BackendError(msg)

    def _encode(
        self, number: int, address: int, shape: list[int], strides: list[int]
    ) -> tuple[Any, ...]:
        kind = self._types[number]
        base = _Address(address, kind.dtype)
        return (TensorDescriptor(base, shape, strides, list(kind.block), kind.layout),)


class DirectLauncher(Launcher):
    """Launches by the C function behind Triton 3.6's launcher."""

    def __init__(
        self,
        form: Form,
        device: int,
        compiled: Any,
        direct: Callable[..., None],
    ) -> None:
        super().__init__(form, device, compiled)
        self.start = direct
        self._metadata = compiled.metadata.tensordesc_meta
        flags = (compiled.metadata.launch_cooperative_grid, compiled.metadata.launch_pdl)
        nothing = (None, None)  # scratch memory of kernels that ask for it
        hooks = (None, None, None)
        self.static = (compiled.function, *flags, *nothing, compiled.packed_metadata, *hooks)
        self._fill = driver.active.utils.fill_tma_descriptor

    def _encode(
        self, number: int, address: int, shape: list[int], strides: list[int]
    ) -> tuple[Any, ...]:
        from triton.backends.nvidia.driver import TMA_DTYPE_DEVICE_TO_HOST

        box = self._metadata[number]
        element_type = TMA_DTYPE_DEVICE_TO_HOST[box["elem_type"]]
        descriptor = self._fill(
            address,
            box["swizzle"],
            box["elem_size"],
            element_type,
            box["block_size"],
            shape,
            strides,
            0,  # fill with zeros outside
        )
        if self._types[number].dtype in PROMOTED:
            promote(descriptor, address, box, element_type, shape, strides[0])
        return (descriptor, *shape, *strides)


class _Address:
    """What TensorDescriptor asks of a tensor."""

    def __init__(self, address: int, dtype: torch.dtype) -> None:
        self._address = address
        self.dtype = dtype

    def data_ptr(self) -> int:
        """The address."""
        return self._address


def _c_function(run: Any) -> Callable[..., None] | None:
    """The C function that Triton 3.6 wraps to make descriptors, None if it is not where it was."""
    wrapper = getattr(run, "launch", None)
    if not inspect.isfunction(wrapper):
        return None
    found = inspect.getclosurevars(wrapper).nonlocals.get("launcher")
    return found if inspect.isbuiltin(found) else None
