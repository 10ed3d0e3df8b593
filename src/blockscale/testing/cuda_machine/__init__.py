"""Runs ``kernels/cuda/gemm.cu`` on a pretend Hopper: the same source, compiled for the CPU.

``machine.hpp`` says what is pretended. Every thread is a fiber, copies come late and in any order;
reported are: a slot filled while it is read or read while it is filled, stores that are not fenced,
wgmmas without a fence, lanes that part, blocks that end too early, waits that never end.
"""

from __future__ import annotations

import ctypes
import hashlib
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from blockscale.kernels.cpu.build import find_compiler
from blockscale.kernels.cuda.launch import Problem
from blockscale.kernels.cuda.work import Grouping, aligned_scale_stride
from blockscale.tensor import torch_dtype

if TYPE_CHECKING:
    from blockscale.kernels.cuda.work import Box, Form, Work

HERE = Path(__file__).parent
KERNELS = Path(__file__).parents[2] / "kernels" / "cuda"
FLAGS = ("-std=c++17", "-O1", "-fPIC", "-shared", "-Wall", "-Wno-unused")
TIME_LIMIT_S = 300
# What is compiled as it is; the machine has its own of the other files.
SOURCES = ("gemm.cu", "units.cuh", "producer.cuh", "flight.cuh", "results.cuh")
CACHE = Path(tempfile.gettempdir()) / "blockscale-cuda-machine"


class EmulationError(AssertionError):
    """The kernel did what the hardware forbids."""


@dataclass(frozen=True, slots=True)
class Trial:
    """How one run differs from another.

    ``seed``: of the order of things. ``change``: a piece of ``gemm.cu`` or what it includes, and
    what to put in its place, to see that it is noticed.
    """

    seed: int = 0
    change: tuple[str, str] | None = None


FIRST = Trial()


class _Map(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("rows", ctypes.c_long),
        ("columns", ctypes.c_long),
        ("pitch", ctypes.c_long),
        ("box_rows", ctypes.c_int),
        ("box_columns", ctypes.c_int),
        ("element", ctypes.c_int),
        ("swizzle", ctypes.c_int),
        ("is_weight", ctypes.c_bool),
        ("slots", ctypes.c_long),
        ("dealt", ctypes.c_int),
    )


class _Run(ctypes.Structure):
    _fields_ = (
        ("a", _Map),
        ("a_last", _Map),
        ("b", _Map),
        ("a_scales", _Map),
        ("a_scales_last", _Map),
        ("out", _Map),
        ("problem", Problem),
        ("b_scale_count", ctypes.c_long),
        ("bias_bytes", ctypes.c_long),
        ("routing_count", ctypes.c_long),
        ("a_codes", ctypes.c_void_p),
        ("a_bytes", ctypes.c_long),
        ("grid", ctypes.c_int),
        ("seed", ctypes.c_uint32),
    )


def sources(change: tuple[str, str] | None = None) -> dict[str, str]:
    """The kernel's texts by file name; ``change``: a piece of them, and what takes its place."""
    texts = {name: (KERNELS / name).read_text(encoding="utf-8") for name in SOURCES}
    if change is None:
        return texts
    count = sum(text.count(change[0]) for text in texts.values())
    assert count == 1, f"the kernel has {change[0]!r} not once, but {count} times"
    return {name: text.replace(*change) for name, text in texts.items()}


@cache
def library(form: Form, change: tuple[str, str] | None = None) -> ctypes.CDLL:
    """The kernel in this form for the CPU, compiled when its sources have changed."""
    compiler = find_compiler()
    assert compiler is not None, "needs a C++ compiler (apt install g++)"
    texts = sources(change)
    own = (path.read_bytes() for path in sorted(HERE.glob("*.[ch]*")))
    everything = [*(text.encode() for text in texts.values()), *own]
    macros = [f"-D{name}={value}" for name, value in form.macros.items()]
    key = hashlib.sha256(b"\0".join([*everything, *map(str.encode, (*FLAGS, *macros))]))
    CACHE.mkdir(parents=True, exist_ok=True)
    target = CACHE / f"{form.name}-{key.hexdigest()[:16]}.so"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            for name, text in texts.items():
                (Path(folder) / name).write_text(text, encoding="utf-8")
            built = Path(folder) / "machine.so"
            command = [compiler, *FLAGS, f"-I{HERE}", f"-I{folder}", *macros]
            subprocess.run(  # noqa: S603 - a compiler found on PATH, our own source
                [*command, str(HERE / "run.cpp"), "-o", str(built)],
                check=True,
                timeout=TIME_LIMIT_S,
            )
            built.replace(target)
    loaded = ctypes.CDLL(str(target))
    loaded.run.restype = ctypes.c_char_p
    return loaded


def multiply(
    work: Work,
    a: tuple[torch.Tensor, torch.Tensor],
    b: tuple[torch.Tensor, torch.Tensor],
    out: torch.Tensor,
    extra: torch.Tensor | None = None,
    trial: Trial = FIRST,
) -> None:
    """Run ``work`` on the pretend Hopper. Raises EmulationError for what the hardware forbids.

    ``a``, ``b``: codes and scales as ``CudaProduct.multiply`` takes them, or as the methods of
    ``CudaGroupedProduct``; ``out`` has the form's dtype. ``extra``: the bias, or of groups what the
    device is told of their rows.
    """
    (codes, scales), (weight, weight_scales) = a, b
    form = work.form
    (m, k), n = codes.shape[-2:], weight.shape[-2]
    slots = codes.shape[0] if form.grouping is Grouping.MASKED else 1
    assert out.dtype == torch_dtype(form.out)
    grouped = form.grouping is not Grouping.NOTHING
    bias, routing = (None, extra) if grouped else (extra, None)
    loaded = library(form, trial.change)
    # The activation comes when the kernel ahead ends; until then its place holds NaN.
    arriving = torch.full_like(codes.contiguous().view(torch.uint8), 0xFF)
    final = codes.contiguous()
    a_box, last_box, b_box, scale_box, last_scale_box, out_box = work.boxes
    problem = Problem(
        weight_scales.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        out.data_ptr(),
        m,
        n,
        work.k_blocks,
        weight_scales.stride(-2),
        work.unit_rows,
        work.unit_columns,
        work.band,
        work.last_rows,
        work.early_blocks,
        0 if routing is None else m // routing.numel(),
        slots,
        0 if routing is None else routing.data_ptr(),
    )
    scale_rows = slots * work.k_blocks
    run = _Run(
        _map(arriving.data_ptr(), slots * m, k, k, a_box),
        _map(arriving.data_ptr(), slots * m, k, k, last_box),
        _map(weight.data_ptr(), weight.numel() // k, k, weight.stride(-2), b_box, is_weight=True),
        _map(scales.data_ptr(), scale_rows, m, aligned_scale_stride(m), scale_box),
        _map(scales.data_ptr(), scale_rows, m, aligned_scale_stride(m), last_scale_box),
        _map(out.data_ptr(), m, n, out.stride(-2), out_box),
        problem,
        weight_scales.numel(),
        0 if bias is None else bias.nbytes,
        0 if routing is None else routing.numel(),
        final.data_ptr(),
        final.nbytes,
        work.blocks,
        trial.seed,
    )
    run.out.slots = slots
    failure = loaded.run(ctypes.byref(run)).decode()
    if failure:
        raise EmulationError(failure)


def _map(
    address: int, rows: int, columns: int, stride: int, box: Box, *, is_weight: bool = False
) -> _Map:
    element = box.element_bytes
    return _Map(
        address,
        rows,
        columns,
        stride * element,
        box.rows,
        box.columns,
        element,
        box.swizzle,
        is_weight,
        1,
        box.dealt,
    )
