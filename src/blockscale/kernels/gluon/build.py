"""Compiling a kernel: the same call with a GPU (``launch``) and without one (tests, CI).

A kernel is compiled for a variant and an output dtype, not for a shape: M, N and K are arguments.
Triton keeps what it compiled in its cache directory.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl

from blockscale.errors import BackendError
from blockscale.kernels.gluon.dense import dense_kernel
from blockscale.kernels.gluon.dialect import HAS_PAIRS, GluonSource, in_each_program
from blockscale.kernels.gluon.grouped import grouped_kernel
from blockscale.kernels.gluon.grouped_small import grouped_small_kernel
from blockscale.kernels.gluon.grouped_work import (
    GROUP_ROWS,
    AnyGroupedVariant,
    GroupedSmallVariant,
    GroupedVariant,
)
from blockscale.kernels.gluon.pair_work import PAIR, PairVariant
from blockscale.kernels.gluon.paired import paired_kernel
from blockscale.kernels.gluon.small_m import small_m_kernel
from blockscale.kernels.gluon.work import (
    CONSUMERS,
    DENSE_REGISTERS,
    K_BLOCK,
    SMALL_REGISTERS,
    WAVE_ROWS,
    DenseVariant,
    SmallVariant,
    scale_box,
)

if TYPE_CHECKING:
    from triton.compiler import CompiledKernel

SM90 = 90
WARP_SIZE = 32
WARPS = 4
KERNELS = {
    DenseVariant: dense_kernel,
    PairVariant: paired_kernel,
    SmallVariant: small_m_kernel,
    GroupedVariant: grouped_kernel,
    GroupedSmallVariant: grouped_small_kernel,
}

# Triton's spelling of the element types.
ELEMENTS = {
    torch.float8_e4m3fn: ("fp8e4nv", gl.float8e4nv),
    torch.bfloat16: ("bf16", gl.bfloat16),
    torch.float16: ("fp16", gl.float16),
    torch.float32: ("fp32", gl.float32),
}


@dataclass(frozen=True, slots=True)
class Form:
    """What is compiled: a variant, the output dtype, and whether launches overlap.

    ``overlap``: the kernel may be launched while the one before it still runs, and waits for it
    itself (programmatic dependent launch).
    """

    variant: DenseVariant | PairVariant | SmallVariant | AnyGroupedVariant
    out_dtype: torch.dtype
    overlap: bool = False

    @property
    def name(self) -> str:
        """The variant and the dtype."""
        return f"{self.variant.name} {self.out_dtype}".replace("torch.", "")

    @property
    def kernel(self) -> Any:
        """The Gluon function."""
        return KERNELS[type(self.variant)]

    @property
    def constants(self) -> dict[str, int]:
        """The kernel's compile-time parameters with their values, in order."""
        return self.variant.constants(overlap=self.overlap)

    @property
    def is_wide(self) -> bool:
        """Whether one program has a multiprocessor to itself, and two consumers."""
        if isinstance(self.variant, DenseVariant):
            return self.variant.consumers == CONSUMERS
        return isinstance(self.variant, GroupedVariant | PairVariant)

    @property
    def programs(self) -> int:
        """Programs of a cluster."""
        return PAIR if isinstance(self.variant, PairVariant) else 1


@dataclass(frozen=True, slots=True)
class BoxType:
    """A TMA descriptor's compile-time part: elements, the box that one copy moves, its swizzle.

    ``clusters``: how the box lies in the programs of a cluster, in Triton's words; empty if there
    is but one.
    """

    dtype: torch.dtype
    block: tuple[int, ...]
    is_swizzled: bool = True
    clusters: tuple[tuple[int, ...], ...] = ()

    @property
    def layout(self) -> gl.NVMMASharedLayout:
        """How the box lies in shared memory; unswizzled where it is read element by element."""
        _, element = ELEMENTS[self.dtype]
        clusters = {"cga_layout": [list(basis) for basis in self.clusters]} if self.clusters else {}
        if self.is_swizzled:
            return gl.NVMMASharedLayout.get_default_for(list(self.block), element, **clusters)
        return gl.NVMMASharedLayout(
            swizzle_byte_width=0,
            element_bitwidth=element.primitive_bitwidth,
            rank=len(self.block),
            **clusters,
        )

    @property
    def signature(self) -> str:
        """Triton's spelling."""
        name, _ = ELEMENTS[self.dtype]
        sizes = ",".join(map(str, self.block))
        return f"tensordesc<{name}[{sizes}],{self.layout!r}>"


def compile_form(form: Form, target: GPUTarget) -> CompiledKernel:
    """The compiled kernel. Raises BackendError, with Triton's own words, if it cannot be."""
    if form.programs > 1 and not HAS_PAIRS:
        msg = f"{form.name} needs Triton 3.8 or newer, for multicast; this is {triton.__version__}"
        raise BackendError(msg)
    fixed = form.constants
    names = form.kernel.arg_names
    types = _types(form)
    signature = {name: "constexpr" if name in fixed else types[name] for name in names}
    source = GluonSource(
        form.kernel,
        signature,
        constexprs={(names.index(name),): value for name, value in fixed.items()},
        attrs={
            (names.index(name),): [["tt.divisibility", divisor]]
            for name, divisor in _divisors(form).items()
        },
    )
    options = {
        "num_warps": WARPS,
        "maxnreg": DENSE_REGISTERS if form.is_wide else SMALL_REGISTERS,
        # FFMA, not FMUL and FADD: off by default from Triton 3.10 on.
        "enable_fp_fusion": True,
        "launch_pdl": form.overlap,
        "num_ctas": form.programs,
    }
    try:
        return triton.compile(source, target=target, options=options)
    except Exception as error:
        msg = f"Triton {triton.__version__} cannot compile {form.name}: {error}"
        raise BackendError(msg) from error


def compile_ahead(form: Form) -> None:
    """Have Triton's disk cache hold the kernel for SM90: what a pool of processes is given."""
    compile_form(form, GPUTarget("cuda", SM90, WARP_SIZE))


def boxes(form: Form) -> dict[str, BoxType]:
    """The kernel's descriptors by parameter, in order."""
    variant = form.variant
    float8 = torch.float8_e4m3fn
    if isinstance(variant, DenseVariant):
        return {
            "a": BoxType(float8, (variant.rows, K_BLOCK)),
            "b": BoxType(float8, (variant.wide, K_BLOCK)),
            "b_rest": BoxType(float8, (variant.rest or variant.wide, K_BLOCK)),
            "a_scale_boxes": BoxType(torch.float32, (1, variant.rows), is_swizzled=False),
            "out": BoxType(form.out_dtype, (WAVE_ROWS, variant.store_columns)),
        }
    if isinstance(variant, PairVariant):
        tile = Form(variant.tile, form.out_dtype)
        whole = tuple(map(tuple, in_each_program(2, PAIR)))
        found = {name: replace(box, clusters=whole) for name, box in boxes(tile).items()}
        # The second program's rows after the first one's (``epilogue``).
        block = (PAIR * WAVE_ROWS, variant.tile.store_columns)
        return found | {"out": BoxType(form.out_dtype, block, clusters=((1, 0),))}
    if isinstance(variant, GroupedVariant):
        return {
            "a": BoxType(float8, (GROUP_ROWS, K_BLOCK)),
            "b": BoxType(float8, (variant.columns, K_BLOCK)),
            "a_scale_boxes": BoxType(torch.float32, (1, variant.rows), is_swizzled=False),
            "out": BoxType(form.out_dtype, (1, WAVE_ROWS, variant.columns)),
        }
    return {
        "a": BoxType(float8, (variant.tokens, K_BLOCK)),
        "b": BoxType(float8, (variant.weights, K_BLOCK)),
        "a_scale_boxes": BoxType(torch.float32, (1, scale_box(variant.tokens)), is_swizzled=False),
    }


def integers(form: Form) -> tuple[str, ...]:
    """The kernel's integer parameters, in order."""
    fixed, types = form.constants, _types(form)
    return tuple(
        name
        for name in form.kernel.arg_names
        if name not in fixed and types[name] in {"i32", "i64"}
    )


def _types(form: Form) -> dict[str, str]:
    out, _ = ELEMENTS[form.out_dtype]
    types = dict.fromkeys(form.kernel.arg_names, "i32")
    types |= dict.fromkeys(("b_scales", "workspace"), "*fp32")
    types |= {"out": f"*{out}", "bias": f"*{out}", "tickets": "*i32", "routing": "*i32"}
    types["slot_stride"] = "i64"
    return types | {name: box.signature for name, box in boxes(form).items()}


def _divisors(form: Form) -> dict[str, int]:
    """What is known to divide an address (in bytes) or an integer."""
    if isinstance(form.variant, PairVariant):
        return {}
    if isinstance(form.variant, DenseVariant):
        return {"workspace": 16}
    if isinstance(form.variant, GroupedVariant):
        return {}
    if isinstance(form.variant, GroupedSmallVariant):
        width = 16 // form.out_dtype.itemsize
        return {"out": 16, "n": width, "slot_stride": width}
    # Rows of the output start on 16 bytes (the backend's gate): N is a multiple of 16 bytes of it.
    return {"workspace": 16, "out": 16, "n": 16 // form.out_dtype.itemsize}
