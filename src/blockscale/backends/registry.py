"""All backends in order of preference. Importing this loads no provider and no torch.

The order, and why: DeepGEMM is the fastest public kernel where it can run (docs/performance.md);
TRT-LLM next on SM100; then blockscale's own Hopper kernels, in Gluon and in CUDA C++, which share
token counts by their estimates (docs/adr, 10 and 11); cuBLASLt; the CUTLASS kernels of SM120 and
SM100; plain Triton, which takes any shape; FlashInfer's SM90 kernel only on request, since its
accuracy was disputed; the CPU kernel; the reference last. Backends of other packages come before
all of them: who installs one wants it tried.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, cast

from blockscale.backends.cpu import Cpu
from blockscale.backends.cuda import Cuda
from blockscale.backends.deep_gemm import DeepGemm
from blockscale.backends.external import ExternalBackend, external_backends
from blockscale.backends.flashinfer import FlashInferCutlass, FlashInferTrtllm
from blockscale.backends.flashinfer_sm90 import FlashInferSm90
from blockscale.backends.gluon import Gluon
from blockscale.backends.reference import Reference
from blockscale.backends.sgl_cutlass import SglCutlass
from blockscale.backends.torch_scaled_mm import TorchScaledMm
from blockscale.backends.triton import Triton
from blockscale.errors import BackendError

if TYPE_CHECKING:
    from blockscale.backends.base import Backend
    from blockscale.planning.decision import PlannableBackend

# Those of blockscale itself; ``all_backends`` has other packages' too.
BACKENDS: tuple[PlannableBackend, ...] = (
    DeepGemm(),
    FlashInferTrtllm(),
    Cuda(),
    Gluon(),
    TorchScaledMm(),
    SglCutlass(),
    FlashInferCutlass(),
    Triton(),
    FlashInferSm90(),
    Cpu(),
    Reference(),
)

# What the numbers of a backend depend on beside the device: its provider, and blockscale itself
# where the kernel is ours. A plan file is refused where one of these has another version.
_PACKAGES: dict[str, tuple[str, ...]] = {
    "deep_gemm": ("sgl-deep-gemm",),
    "flashinfer_trtllm": ("flashinfer-python",),
    "gluon": ("blockscale", "triton"),
    "torch_scaled_mm": ("torch",),
    "sgl_cutlass": ("sgl-kernel",),
    "flashinfer_cutlass": ("flashinfer-python",),
    "triton": ("blockscale", "triton"),
    "cuda": ("blockscale", "cuda-bindings"),
    "flashinfer_sm90": ("flashinfer-python",),
    "cpu": ("blockscale",),
    "reference": ("blockscale", "torch"),
}


@cache
def _external() -> tuple[ExternalBackend, ...]:
    return external_backends([backend.name for backend in BACKENDS])


def all_backends() -> tuple[PlannableBackend, ...]:
    """``BACKENDS``, and before them those that installed packages register.

    Raises BackendError, naming the package, if one of those cannot be loaded.
    """
    return (*(one.backend for one in _external()), *BACKENDS)


def external_packages() -> tuple[str, ...]:
    """The distributions that backends of other packages depend on; raises as ``all_backends``."""
    return tuple(dict.fromkeys(name for one in _external() for name in one.packages))


def packages_of(name: str) -> tuple[str, ...]:
    """The distributions whose versions a plan for this backend holds for."""
    for one in _external():
        if one.backend.name == name:
            return one.packages
    return _PACKAGES[name]


def backend_named(name: str) -> PlannableBackend:
    """The backend of that name. Raises BackendError, listing the known ones, if there is none."""
    known_ones = all_backends()
    for backend in known_ones:
        if backend.name == name:
            return backend
    known = ", ".join(backend.name for backend in known_ones)
    msg = f"no backend is called {name!r}; known: {known}"
    raise BackendError(msg)


def runnable_backend_named(name: str) -> Backend:
    """The backend of that name, if blockscale can run it. Raises BackendError if it cannot."""
    backend = backend_named(name)
    if not hasattr(backend, "bind"):
        msg = f"backend {name!r} can be planned but blockscale has no run for it yet"
        raise BackendError(msg)
    return cast("Backend", backend)
