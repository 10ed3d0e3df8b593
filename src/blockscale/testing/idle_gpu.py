"""A GPU that does nothing, for measuring host code on a machine without one.

``start`` gives this process a CUDA driver whose calls succeed at once (``idle_driver.c``) and tells
torch and Triton of one SM90 device. Kernels are compiled, loaded and launched by the code that a
GPU would see; tensors stay on the CPU. Results are whatever the memory held.

What differs from a GPU: allocations come from the CPU's allocator, a launch costs nothing in the
driver, and the device and stream are read by a C function that looks nothing up.
"""

from __future__ import annotations

import atexit
import ctypes
import operator
import shutil
import subprocess
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch

SOURCE = Path(__file__).with_name("idle_driver.c")
# The driver's name, which Triton links and loads.
NAME = "libcuda.so.1"
CAPABILITY = (9, 0)
# Multiprocessors of an H100 SXM (NVIDIA, H100 data sheet), shared memory of each (CUDA programming
# guide, compute capability 9.0).
PROPERTIES = SimpleNamespace(
    major=9, minor=0, multi_processor_count=132, shared_memory_per_multiprocessor=228 << 10
)


class IdleDriver:
    """What the driver was asked for since it was loaded."""

    def __init__(self, library: ctypes.CDLL) -> None:
        for name in ("idle_launches", "idle_descriptors"):
            getattr(library, name).restype = ctypes.c_uint64
        self._library = library

    @property
    def launches(self) -> int:
        """Kernels."""
        return int(self._library.idle_launches())

    @property
    def descriptors(self) -> int:
        """TMA descriptors that were encoded."""
        return int(self._library.idle_descriptors())


def start() -> IdleDriver:
    """From now on this process has an idle GPU; there is no way back.

    Raises RuntimeError where it would hide a real one, and without a C compiler.
    """
    compiler = shutil.which("gcc") or shutil.which("cc")
    if torch.cuda.is_available() or compiler is None:
        msg = "an idle GPU needs a machine without a GPU, and a C compiler (apt install gcc)"
        raise RuntimeError(msg)
    folder = Path(tempfile.mkdtemp(prefix="idle-gpu-"))
    # Triton links its launchers with it as kernels come.
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    command = [compiler, "-O2", "-shared", "-fPIC", f"-Wl,-soname,{NAME}", str(SOURCE)]
    subprocess.run([*command, "-o", str(folder / NAME)], check=True)  # noqa: S603 - our own source
    library = ctypes.CDLL(str(folder / NAME), mode=ctypes.RTLD_GLOBAL)
    _tell_torch()
    _tell_triton(folder)
    return IdleDriver(library)


def _tell_torch() -> None:
    # C functions that cost what torch's own do: () -> 0 and 0 -> 0.
    known = {"_cuda_getDevice": int, "_cuda_getCurrentRawStream": operator.index}
    for name, function in known.items():
        setattr(torch._C, name, function)  # noqa: SLF001 - where a CUDA build of torch has them
    answers = {
        "_initialized": True,
        "get_device_capability": lambda _=None: CAPABILITY,
        "get_device_properties": lambda _=None: PROPERTIES,
        "is_current_stream_capturing": lambda: False,
        "synchronize": lambda _=None: None,
        "device": _Current,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)


class _Current:
    """``torch.cuda.device``: the one device is current already."""

    def __init__(self, _: object) -> None:
        """Nothing to remember."""

    def __enter__(self) -> None:
        """Nothing to switch."""

    def __exit__(self, *_: object) -> None:
        """Nothing to restore."""


def _tell_triton(folder: Path) -> None:
    # Only here: Triton is not needed to import blockscale.testing.
    from triton import knobs  # noqa: PLC0415 - as above
    from triton.backends.nvidia.driver import CudaDriver  # noqa: PLC0415 - as above
    from triton.runtime import driver  # noqa: PLC0415 - as above

    knobs.nvidia.libcuda_path = str(folder)
    driver.set_active(CudaDriver())
