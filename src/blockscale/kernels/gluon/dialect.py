"""The names that Gluon changed between Triton 3.6 and 3.9; everything else is the same in all four.

Source: the modules themselves, facts/kernels.md 2.2. Runs were made with 3.6 only.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

if hasattr(gluon, "GluonASTSource"):
    GluonSource = gluon.GluonASTSource  # 3.9
else:
    from triton.experimental.gluon._runtime import GluonASTSource as GluonSource

# 3.8 renamed both; 3.6 and 3.7 have the long names only.
load_box = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
store_box = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global

# 3.7 renamed it. Synchronizes the warps of one partition, not of the whole block.
partition_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier

__all__ = ["GluonSource", "load_box", "partition_barrier", "store_box"]
