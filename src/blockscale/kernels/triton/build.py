"""Compiling a kernel for a GPU, present or not, and launching it at the least cost.

Triton's own launcher looks at every argument of every call to decide which compiled variant fits;
that costs 20 us and more. Here the variant is a value, decided once by its owner, and what is left
of a launch is one call into C.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver

if TYPE_CHECKING:
    from collections.abc import Callable

WARP_SIZE = 32

# The release whose launcher's insides were read: triton/backends/nvidia/driver.py.
KNOWN_RELEASE = "3.6."

# Triton's spelling of pointed-to types.
TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.float8_e8m0fnu: "u8",
    torch.int32: "i32",
}


@dataclass(frozen=True, slots=True)
class Variant:
    """One kernel with everything that is compiled into it.

    ``arguments``: the run-time parameters in order, each with its type and the power of two that
    divides its value (its address in bytes, for a pointer; 1 if unknown). ``constants``: the rest,
    in order. ``contracts``: whether a multiplication and an addition may be joined. ``overlaps``:
    launched before the kernel ahead has ended; the kernel waits for it itself. ``most_registers``:
    of a thread, None for the compiler's choice.
    """

    kernel: Any = field(hash=False)
    arguments: tuple[tuple[str, str, int], ...]
    constants: tuple[tuple[str, Any], ...]
    num_warps: int
    num_stages: int = 1
    contracts: bool = False
    overlaps: bool = False
    most_registers: int | None = None

    def source(self) -> ASTSource:
        """What Triton's compiler takes."""
        signature = {name: kind for name, kind, _ in self.arguments}
        signature.update({name: "constexpr" for name, _ in self.constants})
        # A launch passes values by place, so a name out of order would be another's value.
        if list(signature) != self.kernel.arg_names:
            msg = f"{self.kernel.__name__} takes {self.kernel.arg_names}, not {list(signature)}"
            raise TypeError(msg)
        places = {name: (self.kernel.arg_names.index(name),) for name in signature}
        return ASTSource(
            self.kernel,
            signature,
            {places[name]: value for name, value in self.constants},
            {
                places[name]: [["tt.divisibility", divisor]]
                for name, _, divisor in self.arguments
                if divisor > 1
            },
        )

    def compile(self, architecture: int) -> Any:
        """The compiled kernel, from Triton's disk cache if it is there. Needs no GPU."""
        return triton.compile(
            self.source(),
            target=GPUTarget("cuda", architecture, WARP_SIZE),
            options={
                "num_warps": self.num_warps,
                "num_stages": self.num_stages,
                "enable_fp_fusion": self.contracts,
                "launch_pdl": self.overlaps,
                "maxnreg": self.most_registers,
            },
        )


class Launcher:
    """A variant loaded on one device. Calling it enqueues it on the device's current stream.

    Who knows device and stream already, and runs often, calls ``start`` as ``_launch`` does:
    ``start(*grid, stream, *static, *arguments, *constants)`` is one call into C.
    """

    __slots__ = ("_current_device", "_current_stream", "_device", "constants", "start", "static")

    def __init__(self, variant: Variant, device: int) -> None:
        major, minor = torch.cuda.get_device_capability(device)
        with torch.cuda.device(device):
            compiled = variant.compile(major * 10 + minor)
            # The property loads the module and builds the C launcher.
            self.start, self.static = _starter(compiled, compiled.run)
        self.constants = tuple(value for _, value in variant.constants)
        self._device = device
        self._current_device = driver.active.get_current_device
        self._current_stream = driver.active.get_current_stream

    def __call__(self, programs: int, *arguments: object) -> None:
        """Run ``programs`` programs. Pointers are addresses, None for one that is not read."""
        # A layer may be on another GPU than the current one: accelerate's hooks do not switch.
        if self._current_device() != self._device:
            with torch.cuda.device(self._device):
                self._launch(programs, arguments)
            return
        self._launch(programs, arguments)

    def _launch(self, programs: int, arguments: tuple[object, ...]) -> None:
        stream = self._current_stream(self._device)
        self.start(programs, 1, 1, stream, *self.static, *arguments, *self.constants)


def _starter(compiled: Any, run: Any) -> tuple[Callable[..., None], tuple[object, ...]]:
    """``Launcher.start`` and ``static``: Triton's C function where it is known."""
    if triton.__version__.startswith(KNOWN_RELEASE) and inspect.isbuiltin(run.launch):
        flags = (run.launch_cooperative_grid, run.launch_pdl)
        # No scratch memory, no hooks.
        static = (compiled.function, *flags, None, None, compiled.packed_metadata, None, None, None)
        return run.launch, static

    def start_publicly(x: int, y: int, z: int, stream: int, *arguments: object) -> None:
        if x:
            compiled[(x, y, z)](*arguments, stream=stream)

    return start_publicly, ()


@cache
def launcher(variant: Variant, device: int) -> Launcher:
    """The launcher of a variant on a device, made once: (programs, *arguments) -> None."""
    return Launcher(variant, device)
