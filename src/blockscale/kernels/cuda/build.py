"""Compiles ``gemm.cu`` by NVRTC, once for each form, into a cache directory.

NVRTC and its Python binding come with ``pip install 'blockscale[cuda]'``; neither a CUDA toolkit
nor a GPU is needed. A form takes one to two seconds.
"""

from __future__ import annotations

import hashlib
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from blockscale.errors import BackendError
from blockscale.kernels.cache import cache_directory

if TYPE_CHECKING:
    from collections.abc import Iterable

    from blockscale.kernels.cuda.work import Form

HERE = Path(__file__).parent
SOURCE = HERE / "gemm.cu"
HEADERS = ("primitives.cuh", "wgmma.cuh", "units.cuh", "producer.cuh", "flight.cuh", "results.cuh")
KERNEL = "block_fp8_gemm"
OPTIONS: tuple[str, ...] = ("--gpu-architecture=sm_90a", "--std=c++17")


def compile_form(form: Form) -> bytes:
    """The form's cubin, from the cache if it has one of these sources and this NVRTC.

    Raises BackendError, with NVRTC's own words, if it cannot be built.
    """
    return _compile_form(form, OPTIONS)


@cache
def _compile_form(form: Form, usual: tuple[str, ...]) -> bytes:
    options = (*usual, *(f"-D{name}={value}" for name, value in form.macros.items()))
    target = cache_directory() / f"block_fp8-{form.name}-{_key(options)}.cubin"
    if target.exists():
        return target.read_bytes()
    cubin = _compile(options)
    # Renamed: parallel processes may all do it, none sees half.
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        written = Path(scratch) / "kernel.cubin"
        written.write_bytes(cubin)
        written.replace(target)
    return cubin


def compile_all(forms: Iterable[Form], workers: int) -> None:
    """Fill the cache, on so many processors. Raises BackendError as ``compile_form``."""
    with ProcessPoolExecutor(workers) as pool:
        for _ in pool.map(compile_form, dict.fromkeys(forms)):
            pass


def sources() -> dict[str, bytes]:
    """The kernel and its headers, by name."""
    return {name: (HERE / name).read_bytes() for name in (SOURCE.name, *HEADERS)}


def _key(options: tuple[str, ...]) -> str:
    """Changes with the sources, the options and NVRTC."""
    version = nvrtc().nvrtcVersion()[1:]
    parts = (*sources().values(), *(option.encode() for option in options), repr(version).encode())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _compile(options: tuple[str, ...]) -> bytes:
    binding = nvrtc()
    texts = sources()
    names = [name.encode() for name in HEADERS]
    program = _checked(
        binding.nvrtcCreateProgram(
            texts[SOURCE.name],
            SOURCE.name.encode(),
            len(names),
            [texts[name] for name in HEADERS],
            names,
        )
    )
    status = binding.nvrtcCompileProgram(program, len(options), [o.encode() for o in options])[0]
    if status != binding.nvrtcResult.NVRTC_SUCCESS:
        log = b" " * _checked(binding.nvrtcGetProgramLogSize(program))
        binding.nvrtcGetProgramLog(program, log)
        words = " ".join(log.decode(errors="replace").strip("\0 ").split())[:500]
        msg = f"NVRTC failed on {SOURCE.name}: {words}"
        raise BackendError(msg)
    cubin = b" " * _checked(binding.nvrtcGetCUBINSize(program))
    _checked(binding.nvrtcGetCUBIN(program, cubin))
    binding.nvrtcDestroyProgram(program)
    return cubin


def _checked(answer):
    """What a call of the binding gives beside its status."""
    status, *values = answer
    if status != nvrtc().nvrtcResult.NVRTC_SUCCESS:
        msg = f"NVRTC failed: {status}"
        raise BackendError(msg)
    return values[0] if values else None


@cache
def nvrtc():
    """NVRTC, by its Python binding. Raises BackendError if either is missing."""
    try:
        from cuda.bindings import nvrtc as binding

        binding.nvrtcVersion()
    except (ImportError, OSError, RuntimeError) as error:
        words = " ".join(str(error).split())[:200]
        msg = f"the cuda backend compiles by NVRTC (pip install 'blockscale[cuda]'): {words}"
        raise BackendError(msg) from error
    return binding
