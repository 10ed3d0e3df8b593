"""What Gluon changed between Triton 3.6 and 3.9, in one place; everything else is the same in all.

===================  ========================  ============  =======================  =============
Triton               3.6                       3.7           3.8                      3.9
===================  ========================  ============  =======================  =============
TMA copies           ``async_copy_*``          as 3.6        ``async_load``, _store   as 3.8
partition barrier    ``thread_barrier``        ``barrier``   as 3.7                   as 3.7
layouts of clusters  not for barriers          ``cga_``      as 3.7                   as 3.7
multicast            no                        [1]_          yes                      yes
cast of a view       ``_reinterpret``          as 3.6        as 3.6                   public
AST source           ``gluon._runtime``        as 3.6        as 3.6                   ``gluon``
===================  ========================  ============  =======================  =============

.. [1] There, but an arrival reaches the own program's barrier only: of no use to pairs.

Source: the modules themselves, in the wheels of these releases. ``make test-triton-versions``
compiles every form under each release; runs on a GPU were made with 3.6 only.
"""

from __future__ import annotations

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

if hasattr(gluon, "GluonASTSource"):
    GluonSource = gluon.GluonASTSource  # 3.9
else:
    from triton.experimental.gluon._runtime import GluonASTSource as GluonSource

RELEASE = tuple(int(part) for part in triton.__version__.split(".")[:2])
# Whether pairs of programs can be compiled: a copy that fills the slots of both, and an arrival of
# one at the other's barrier.
HAS_PAIRS = RELEASE >= (3, 8)

# 3.8 renamed both; 3.6 and 3.7 have the long names only.
load_box = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
store_box = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global

# 3.7 renamed it. Synchronizes the warps of one partition, not of the whole block.
partition_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier


@gluon.constexpr_function
def in_each_program(rank, programs):
    """The part of a layout that says that each program of a cluster has all of it.

    For Triton the programs' values are then one and the same. In our pairs they are not: each has
    its own, and Triton need not know (``paired``).
    """
    return [[0] * rank] * (programs - 1)


@gluon.constexpr_function
def whole_in_each_program(layout, programs):
    """A matrix's layout in shared memory, but with all of it in each program of a cluster."""
    return gl.NVMMASharedLayout(
        swizzle_byte_width=layout.swizzle_byte_width,
        element_bitwidth=layout.element_bitwidth,
        rank=2,
        cga_layout=in_each_program(2, programs),
    )


@gluon.constexpr_function
def own_barrier_layout(programs):
    """Barriers that each program has for itself: (number, programs) of them."""
    return mbarrier.MBarrierLayout(cga_layout=[[1]]) if programs > 1 else mbarrier.MBarrierLayout()


@gluon.constexpr_function
def pair_barrier_layout():
    """Barriers of a pair, (number, 1) of them, in the first program's memory.

    Both arrive, only the first one waits, and a count is that of each of the two.
    """
    return mbarrier.MBarrierLayout(cga_layout=[[0]])


@gluon.jit
def number_in_pair():
    """0 in the first program of a pair, 1 in the second."""
    return gl.inline_asm_elementwise(
        "mov.u32 $0, %cluster_ctarank;", "=r", [], dtype=gl.int32, is_pure=True, pack=1
    )


if RELEASE >= (3, 9):

    @gluon.jit
    def seen_as(view, SHAPE: gl.constexpr, LAYOUT: gl.constexpr):
        """The same shared memory under another shape and layout."""
        return view.reinterpret(view.dtype, SHAPE, LAYOUT)

else:

    @gluon.jit
    def seen_as(view, SHAPE: gl.constexpr, LAYOUT: gl.constexpr):
        """The same shared memory under another shape and layout."""
        return view._reinterpret(view.dtype, SHAPE, LAYOUT)  # noqa: SLF001 - its only name before 3.9


__all__ = [
    "HAS_PAIRS",
    "RELEASE",
    "GluonSource",
    "in_each_program",
    "load_box",
    "number_in_pair",
    "own_barrier_layout",
    "pair_barrier_layout",
    "partition_barrier",
    "seen_as",
    "store_box",
    "whole_in_each_program",
]
