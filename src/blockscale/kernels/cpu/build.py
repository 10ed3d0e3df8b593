"""Builds ``block_fp8.cpp`` for this processor, once, into a cache directory.

The library has a plain C interface, so the compiler sees no torch headers and takes about two
seconds. OpenMP symbols stay unresolved at link time and bind to the OpenMP runtime that torch has
loaded: a second runtime would bring a second pool of spinning threads.
"""

from __future__ import annotations

import ctypes
import hashlib
import platform
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

import torch

from blockscale.errors import BackendError
from blockscale.kernels.cache import cache_directory

SOURCE = Path(__file__).with_name("block_fp8.cpp")
ABI = 3
COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-march=native")
TIME_LIMIT_S = 300


def find_compiler() -> str | None:
    """The path of a C++ compiler, None if there is none."""
    return next((found for name in COMPILERS if (found := shutil.which(name))), None)


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL:
    """The loaded kernel library, built first if the cache has none for this source and machine.

    Raises BackendError, with the compiler's own words, if it cannot be built.
    """
    compiler = find_compiler()
    if compiler is None:
        msg = "the cpu backend needs a C++ compiler (apt install g++); none of c++, g++, clang++"
        raise BackendError(msg)
    openmp = _openmp_runtime()
    flags = (*FLAGS, "-fopenmp") if openmp else FLAGS
    target = cache_directory() / f"block_fp8-{_key(compiler, flags)}.so"
    if not target.exists():
        _build(compiler, flags, target)
    if openmp:
        ctypes.CDLL(openmp, mode=ctypes.RTLD_GLOBAL)
    try:
        loaded = ctypes.CDLL(str(target))
        abi = loaded.blockscale_abi()
    except (OSError, AttributeError) as error:
        msg = f"{target} cannot be loaded ({error}); delete it and try again"
        raise BackendError(msg) from error
    if abi != ABI:
        msg = f"{target} has ABI {abi}, expected {ABI}; delete it and try again"
        raise BackendError(msg)
    return _declared(loaded)


def _declared(loaded: ctypes.CDLL) -> ctypes.CDLL:
    pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    loaded.blockscale_product.argtypes = [pointer] * 5 + [number] + [size] * 7 + [number]
    loaded.blockscale_product.restype = None
    loaded.blockscale_grouped_product.argtypes = [pointer] * 5 + [number] + [size] * 9 + [number]
    loaded.blockscale_grouped_product.restype = None
    loaded.blockscale_dequantize.argtypes = [pointer] * 3 + [size] * 6 + [number]
    loaded.blockscale_dequantize.restype = None
    return loaded


def _openmp_runtime() -> str | None:
    """The GNU OpenMP library that torch has loaded, None if it uses another or none."""
    bundled = sorted(Path(torch.__file__).parent.glob("lib/libgomp*.so*"))
    if bundled:
        return str(bundled[0])
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return None
    lines = maps.read_text(encoding="utf-8", errors="replace").splitlines()
    return next((line.split()[-1] for line in lines if "/libgomp" in line), None)


def _key(compiler: str, flags: tuple[str, ...]) -> str:
    """Changes with the source, the compiler, the flags and the processor (-march=native)."""
    version = subprocess.run(  # noqa: S603 - a compiler found on PATH
        [compiler, "--version"], capture_output=True, check=False, timeout=TIME_LIMIT_S
    ).stdout
    parts = (SOURCE.read_bytes(), version, " ".join(flags).encode(), _processor().encode())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return platform.processor() or platform.machine()
    lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))


def _build(compiler: str, flags: tuple[str, ...], target: Path) -> None:
    """Compile beside the target and rename: parallel processes may all do it, none sees half."""
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        compiled, linked = Path(scratch) / "kernel.o", Path(scratch) / "kernel.so"
        _call([compiler, *flags, "-c", str(SOURCE), "-o", str(compiled)])
        # Linked without -fopenmp, so that GOMP_* stay open for torch's runtime.
        _call([compiler, "-shared", str(compiled), "-o", str(linked)])
        linked.replace(target)


def _call(command: list[str]) -> None:
    result = subprocess.run(  # noqa: S603 - a compiler found on PATH, our own source
        command, capture_output=True, text=True, check=False, timeout=TIME_LIMIT_S
    )
    if result.returncode != 0:
        first = next(iter(result.stderr.strip().splitlines()), "no message")
        msg = f"the C++ compiler failed on {SOURCE.name}: {first}"
        raise BackendError(msg)
