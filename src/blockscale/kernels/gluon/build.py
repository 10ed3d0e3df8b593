"""Compiling a kernel: the same call with a GPU (``launch``) and without one (tests, CI).

A kernel is compiled for a variant and an output dtype, not for a shape: M, N and K are arguments.
Triton keeps what it compiled in its cache directory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import triton
from triton.experimental.gluon import language as gl

from blockscale.errors import BackendError
from blockscale.kernels.gluon.dense import dense_kernel
from blockscale.kernels.gluon.dialect import GluonSource
from blockscale.kernels.gluon.small_m import small_m_kernel
from blockscale.kernels.gluon.work import (
    DENSE_REGISTERS,
    K_BLOCK,
    SMALL_REGISTERS,
    WAVE_ROWS,
    DenseVariant,
    scale_box,
)

if TYPE_CHECKING:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import CompiledKernel

    from blockscale.kernels.gluon.work import SmallVariant

WARPS = 4

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

    variant: DenseVariant | SmallVariant
    out_dtype: torch.dtype
    overlap: bool = False

    @property
    def name(self) -> str:
        """The variant and the dtype."""
        return f"{self.variant.name} {self.out_dtype}".replace("torch.", "")

    @property
    def kernel(self) -> Any:
        """The Gluon function."""
        return dense_kernel if isinstance(self.variant, DenseVariant) else small_m_kernel

    @property
    def constants(self) -> dict[str, int]:
        """The kernel's compile-time parameters with their values, in order."""
        return self.variant.constants(overlap=self.overlap)


@dataclass(frozen=True, slots=True)
class BoxType:
    """A TMA descriptor's compile-time part: elements, the box that one copy moves, its swizzle."""

    dtype: torch.dtype
    block: tuple[int, int]
    is_swizzled: bool = True

    @property
    def layout(self) -> gl.NVMMASharedLayout:
        """How the box lies in shared memory; unswizzled where it is read element by element."""
        _, element = ELEMENTS[self.dtype]
        if self.is_swizzled:
            return gl.NVMMASharedLayout.get_default_for(list(self.block), element)
        bits = element.primitive_bitwidth
        return gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=bits, rank=2)

    @property
    def signature(self) -> str:
        """Triton's spelling."""
        name, _ = ELEMENTS[self.dtype]
        rows, columns = self.block
        return f"tensordesc<{name}[{rows},{columns}],{self.layout!r}>"


def compile_form(form: Form, target: GPUTarget) -> CompiledKernel:
    """The compiled kernel. Raises BackendError, with Triton's own words, if it cannot be."""
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
    is_dense = isinstance(form.variant, DenseVariant)
    options = {
        "num_warps": WARPS,
        "maxnreg": DENSE_REGISTERS if is_dense else SMALL_REGISTERS,
        # FFMA, not FMUL and FADD: off by default from Triton 3.10 on.
        "enable_fp_fusion": True,
        "launch_pdl": form.overlap,
    }
    try:
        return triton.compile(source, target=target, options=options)
    except Exception as error:
        msg = f"Triton {triton.__version__} cannot compile {form.name}: {error}"
        raise BackendError(msg) from error


def boxes(form: Form) -> dict[str, BoxType]:
    """The kernel's descriptors by parameter, in order."""
    variant = form.variant
    float8 = torch.float8_e4m3fn
    if isinstance(variant, DenseVariant):
        return {
            "a": BoxType(float8, (variant.rows, K_BLOCK)),
            "b": BoxType(float8, (variant.columns, K_BLOCK)),
            "a_scale_boxes": BoxType(torch.float32, (1, variant.rows), is_swizzled=False),
            "out": BoxType(form.out_dtype, (WAVE_ROWS, variant.columns)),
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
        name for name in form.kernel.arg_names if name not in fixed and types[name] == "i32"
    )


def _types(form: Form) -> dict[str, str]:
    out, _ = ELEMENTS[form.out_dtype]
    types = dict.fromkeys(form.kernel.arg_names, "i32")
    types |= dict.fromkeys(("a_scales", "b_scales", "workspace"), "*fp32")
    types |= {"out": f"*{out}", "bias": f"*{out}", "tickets": "*i32"}
    return types | {name: box.signature for name, box in boxes(form).items()}


def _divisors(form: Form) -> dict[str, int]:
    """What is known to divide an address (in bytes) or an integer."""
    if isinstance(form.variant, DenseVariant):
        return {"workspace": 16}
    # Rows of the output start on 16 bytes (the backend's gate): N is a multiple of 16 bytes of it.
    return {"workspace": 16, "out": 16, "n": 16 // form.out_dtype.itemsize}
