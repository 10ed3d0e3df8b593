"""Fills Triton's disk cache on all cores, before anything is measured.

    python benchmarks/ahead.py [--workers 16] [PART ...]     parts: moe_layer, tensor_parallel, ...

A kernel is compiled when the first call needs it, a second or more each, one after the other. Here
the host code of the layers that a benchmark runs is asked for its kernels (weights are on torch's
meta device, launchers only take notes), and many processes compile them. No GPU is needed or used,
but for DeepGEMM, where it is installed: it builds with nvcc, one kernel at a time, when it is
called. ``gemm`` calls it on zeros, a process for each shape and number of tokens. And but for the
kernel of transformers, where its sources are (``finegrained.py``).
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import importlib.util
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from blockscale.formats import (
    FP8_1X128_FP32,
    FP8_128X128_FP32,
    K_MAJOR,
    MN_MAJOR_TMA_ALIGNED,
)
from blockscale.tensor import BlockScaledTensor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from types import ModuleType

    from blockscale.formats import BlockFormat, ScaleLayout
    from blockscale.kernels.cuda.work import Form as CudaFormOfWork
    from blockscale.kernels.gluon.build import Form
    from blockscale.kernels.triton.build import Variant
    from blockscale.planning.decision import GroupedRows
    from finegrained import Launch

    Compiled = "Kernel | CudaForm | Form | DeepGemmCall | Launch"

H100_PROCESSORS = 132
HALVES = ("float16", "bfloat16")
OUTPUTS = (torch.bfloat16, torch.float16, torch.float32)
QUANTIZED = (FP8_1X128_FP32, MN_MAJOR_TMA_ALIGNED)
# NVRTC's binding, which the cuda backend needs.
NVRTC = "cuda.bindings"


@dataclass(frozen=True, slots=True)
class Linear:
    """A dense layer (n, k) for some numbers of tokens and one dtype."""

    n: int
    k: int
    tokens: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class Experts:
    """A layer of experts: w13 (2 inner, hidden), w2 (hidden, inner)."""

    experts: int
    hidden: int
    inner: int
    choices: int
    tokens: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class Kernel:
    """A Triton kernel to compile, as another process is told: a Variant without its function."""

    module: str
    name: str
    fields: tuple[tuple[str, Any], ...]

    @classmethod
    def of(cls, variant: Variant) -> Kernel:
        """The description of a variant."""
        names = [field.name for field in dataclasses.fields(variant) if field.name != "kernel"]
        fields = tuple((name, getattr(variant, name)) for name in names)
        return cls(variant.kernel.__module__, variant.kernel.__name__, fields)

    def compile(self) -> None:
        """Have the disk cache hold it for SM90."""
        from blockscale.kernels.triton.build import Variant

        kernel = getattr(importlib.import_module(self.module), self.name)
        Variant(kernel, **dict(self.fields)).compile(90)


@dataclass(frozen=True, slots=True)
class CudaForm:
    """A form of the CUDA C++ kernel; what NVRTC makes is kept on disk."""

    form: CudaFormOfWork

    @property
    def name(self) -> str:
        """As in the list of kernels."""
        return f"cuda {self.form.name}"

    def compile(self) -> None:
        """Have the cache hold it."""
        from blockscale.kernels.cuda.build import compile_form

        compile_form(self.form)


@dataclass(frozen=True, slots=True)
class DeepGemmCall:
    """One dense product by DeepGEMM, on zeros; it keeps what it builds in ~/.deep_gemm."""

    n: int
    k: int
    m: int

    @property
    def name(self) -> str:
        """As in the list of kernels."""
        return f"deep_gemm {self.m}x{self.n}x{self.k}"

    def compile(self) -> None:
        """Call it once, as the backend does."""
        from blockscale.backends.registry import runnable_backend_named
        from blockscale.planning.decision import Offer, OperandForm
        from blockscale.tensor import empty_scales

        offer = Offer("deep_gemm", OperandForm(FP8_128X128_FP32, K_MAJOR), OperandForm(*QUANTIZED))

        def zeros(rows: int, fmt: BlockFormat, layout: ScaleLayout) -> BlockScaledTensor:
            codes = torch.zeros((rows, self.k), dtype=torch.uint8, device="cuda")
            scales = empty_scales(rows, self.k, fmt, layout, codes.device)
            return BlockScaledTensor(codes.view(torch.float8_e4m3fn), scales, fmt, layout)

        weight, activation = zeros(self.n, FP8_128X128_FP32, K_MAJOR), zeros(self.m, *QUANTIZED)
        out = torch.empty((self.m, self.n), dtype=torch.bfloat16, device="cuda")
        multiply: Any = runnable_backend_named("deep_gemm").bind(weight, offer)
        multiply(activation, out, None)
        torch.cuda.synchronize()


def deep_gemm_calls() -> list[DeepGemmCall]:
    """What ``gemm.py`` compares with; nothing where DeepGEMM is not installed."""
    if not is_installed("deep_gemm"):
        return []
    from gemm import SHAPES, TOKENS

    shapes = [tuple(map(int, shape.split("x"))) for shape in SHAPES.split(",")]
    # The largest first: among them are those that take longest.
    tokens = sorted(map(int, TOKENS.split(",")), reverse=True)
    return [DeepGemmCall(n, k, m) for m in tokens for n, k in shapes]


def finegrained_launches() -> list[Launch]:
    """What ``transformers_model.py`` compares with; nothing where its sources are not."""
    from finegrained import is_here, launches

    if not is_here():
        return []
    # Sizes of layers are not compiled in.
    n, k = QWEN3_8B[0]
    # The tallest tiles first: they take longest.
    tokens = MODEL_TOKENS[::-1]
    return [one for dtype in HALVES for one in launches(n, k, tokens, dtype)]


def kernels_of(layers: Iterable[Linear | Experts]) -> list[Kernel | CudaForm | Form]:
    """All that these layers launch, Gluon's first: they take longest. Imports Triton."""
    found: dict[Kernel | CudaForm | Form, None] = {}
    for layer in layers:
        by_kind = LINEAR if isinstance(layer, Linear) else EXPERTS
        for kernels in by_kind:
            found |= dict.fromkeys(kernels(layer))
    return sorted(found, key=lambda kernel: isinstance(kernel, Kernel))


def compile_kernels(kernels: Sequence[Compiled], workers: int) -> list[str]:
    """Compile them in a pool of processes; gives what could not be, and why."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context) as pool:
        return [words for words in pool.map(compile_one, kernels) if words]


def compile_one(kernel: Compiled) -> str:
    """Compile one; nothing, or what went wrong: the others are still wanted."""
    from blockscale.kernels.gluon.build import compile_ahead
    from finegrained import Launch

    try:
        if isinstance(kernel, (Kernel, CudaForm, DeepGemmCall, Launch)):
            kernel.compile()
        else:
            compile_ahead(kernel)
    except Exception as error:  # noqa: BLE001 - whatever a compiler raises
        return f"{kernel.name}: {' '.join(str(error).split())[:300]}"
    return ""


def without_a_gpu() -> None:
    """Answer for an H100: to ask CUDA would take seconds and GPU memory."""
    properties = SimpleNamespace(
        major=9,
        minor=0,
        multi_processor_count=H100_PROCESSORS,
        shared_memory_per_multiprocessor=228 << 10,
    )
    answers: dict[str, Any] = {
        "current_device": lambda: 0,
        "get_device_properties": lambda *_: properties,
        "get_device_capability": lambda *_: (9, 0),
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)


def _weight(n: int, k: int, experts: int | None = None) -> BlockScaledTensor:
    leading = () if experts is None else (experts,)
    codes = torch.empty((*leading, n, k), dtype=torch.float8_e4m3fn, device="meta")
    grid = (*leading, *FP8_128X128_FP32.block.grid(n, k))
    return BlockScaledTensor(codes, torch.empty(grid, device="meta"), FP8_128X128_FP32, K_MAJOR)


@contextmanager
def collected(module: ModuleType) -> Iterator[list[Kernel]]:
    """While it is entered, the module's launchers only say what they would compile."""
    found: list[Kernel] = []
    parts: Any = module
    original = parts.launcher

    def launcher(variant: Variant, _: int) -> Callable[..., None]:
        found.append(Kernel.of(variant))
        return lambda *_: None

    parts.launcher = launcher
    try:
        yield found
    finally:
        parts.launcher = original


def _gluon(layer: Linear) -> Iterator[Form]:
    from blockscale.kernels.gluon.build import Form
    from blockscale.kernels.gluon.choice import choose

    dtype = getattr(torch, layer.dtype)
    for m in layer.tokens:
        work = choose(m, layer.n, layer.k, dtype.itemsize, H100_PROCESSORS)
        yield Form(work.variant, dtype, overlap=True)


def _gluon_experts(layer: Experts) -> Iterator[Form]:
    from blockscale.backends.gluon import ALIGNMENTS
    from blockscale.backends.own_kernels import row_blocks
    from blockscale.kernels.gluon.build import Form
    from blockscale.kernels.gluon.grouped_choice import choose_contiguous
    from blockscale.reference.experts import contiguous_rows

    dtype = getattr(torch, layer.dtype)
    offered = row_blocks(layer.experts, ALIGNMENTS)
    for tokens in layer.tokens:
        alignment = _alignment(offered, tokens)
        blocks = contiguous_rows(tokens * layer.choices, layer.experts, alignment) // alignment
        for n in (2 * layer.inner, layer.hidden):
            variant = choose_contiguous(
                layer.experts, blocks, alignment, n, dtype.itemsize, H100_PROCESSORS
            )
            yield Form(variant, dtype, overlap=True)


def _cuda(layer: Linear) -> Iterator[CudaForm]:
    from blockscale.formats import DType
    from blockscale.kernels.cuda.choice import choose

    if not is_installed(NVRTC):
        return
    for m in layer.tokens:
        work = choose(m, layer.n, layer.k, DType(layer.dtype), H100_PROCESSORS)
        yield CudaForm(work.form)


def is_installed(module: str) -> bool:
    """Whether it could be imported; a parent that is not there is an answer too."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _alignment(rows: Sequence[GroupedRows], tokens: int) -> int:
    return next(one.alignment for one in rows if one.m_range.contains(tokens))


def _triton(layer: Linear) -> list[Kernel]:
    from blockscale.kernels.triton import product

    with collected(product) as found:
        # As the backend prepares a weight: for every output.
        product.TritonProduct(_weight(layer.n, layer.k)).compile(OUTPUTS)
    return found


def _triton_experts(layer: Experts) -> list[Kernel]:
    from blockscale.kernels.triton import grouped_product

    with collected(grouped_product) as found:
        for n, k in ((2 * layer.inner, layer.hidden), (layer.hidden, layer.inner)):
            weight = _weight(n, k, layer.experts)
            grouped_product.GroupedTritonProduct(weight).compile(OUTPUTS)
    return found


def _quantize(layer: Linear) -> list[Kernel]:
    from blockscale.kernels.triton import quantize

    dtype = getattr(torch, layer.dtype)
    spec = quantize.QuantizerSpec(*QUANTIZED, dtype, layer.k, 0, overlaps=True)
    with collected(quantize) as found:
        quantize.TiledQuantizer(spec, quantize.activation_variant, layer.k)
    return found


def _rows(layer: Experts) -> list[Kernel]:
    from blockscale.backends import gluon, triton
    from blockscale.backends.own_kernels import row_blocks
    from blockscale.kernels.triton import rows

    dtype = getattr(torch, layer.dtype)
    offered = [row_blocks(layer.experts, backend.ALIGNMENTS) for backend in (gluon, triton)]
    used = {_alignment(group, tokens) for group in offered for tokens in layer.tokens}
    with collected(rows) as found:
        for alignment in sorted(used):
            sizes = (layer.experts, dtype, layer.hidden, layer.inner, 0)
            rows.ContiguousRows(rows.RowsSpec(*QUANTIZED, alignment, *sizes, overlaps=True))
    return found


LINEAR = (_gluon, _cuda, _triton, _quantize)
EXPERTS = (_gluon_experts, _triton_experts, _rows)

QWEN3_8B = ((4096, 4096), (1024, 4096), (12288, 4096), (4096, 12288))
MODEL_TOKENS = (1, 8, 16, 32, 64, 512, 4096)
QWEN3_8B_HALVES = ((2048, 4096), (512, 4096), (4096, 2048), (6144, 4096), (4096, 6144))


def _moe_layer() -> Iterator[Linear | Experts]:
    tokens = (1, 2, 4, 8, 16, 32, 64, 128, 4096)
    for n, k in ((8192, 3072), (3072, 6144)):
        yield Linear(n, k, tokens, "float16")
    yield Experts(256, 3072, 1536, 8, tokens, "float16")


def _transformers_model() -> Iterator[Linear | Experts]:
    for dtype in HALVES:
        for n, k in QWEN3_8B:
            yield Linear(n, k, MODEL_TOKENS, dtype)


def _tensor_parallel() -> Iterator[Linear | Experts]:
    for n, k in (*QWEN3_8B, *QWEN3_8B_HALVES):
        for dtype in HALVES:
            yield Linear(n, k, (1, 16, 64, 4096), dtype)
        yield Linear(n, k, (64,), "float32")


def _gemm() -> Iterator[Linear | Experts]:
    from gemm import SHAPES, TOKENS

    tokens = tuple(map(int, TOKENS.split(",")))
    for dtype in (*HALVES, "float32"):
        for shape in SHAPES.split(","):
            n, k = map(int, shape.split("x"))
            yield Linear(n, k, tokens, dtype)


def _fp16_model() -> Iterator[Linear | Experts]:
    for n, k in ((8192, 3072), (3072, 6144), (3072, 3072), (3072, 1536)):
        yield Linear(n, k, (1, 8, 16, 64, 4096), "float16")


def _call_overhead() -> Iterator[Linear | Experts]:
    yield Linear(256, 256, (4,), "bfloat16")


PARTS: dict[str, Callable[[], Iterator[Linear | Experts]]] = {
    "moe_layer": _moe_layer,
    "transformers_model": _transformers_model,
    "tensor_parallel": _tensor_parallel,
    "gemm": _gemm,
    "fp16_model": _fp16_model,
    "call_overhead": _call_overhead,
}


def main() -> int:
    """Compile what the named benchmarks launch, all of them by default."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--workers", type=int)
    parser.add_argument("--list", action="store_true", help="say which, compile none")
    options = parser.parse_args()
    unknown = sorted(set(options.parts) - set(PARTS))
    if unknown:
        parser.error(f"no such part: {', '.join(unknown)}; there are {', '.join(PARTS)}")
    started = time.perf_counter()
    without_a_gpu()
    layers = dict.fromkeys(layer for part in options.parts or PARTS for layer in PARTS[part]())
    kernels: list[Compiled] = [*kernels_of(layers)]
    if "gemm" in (options.parts or PARTS):
        kernels += deep_gemm_calls()
    if "transformers_model" in (options.parts or PARTS):
        kernels[:0] = finegrained_launches()
    print(f"{len(kernels)} kernels of {len(layers)} layers", flush=True)
    if options.list:
        print("\n".join(kernel.name for kernel in kernels))
        return 0
    failures = compile_kernels(kernels, options.workers or os.cpu_count() or 1)
    print("\n".join([*failures, f"compiled in {time.perf_counter() - started:.1f} s"]), flush=True)
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
