"""Block-scaled FP8 GEMM for Hopper, written in Gluon.

===============  ===================================================================================
module           holds
===============  ===================================================================================
``choice``       which tile and which split serve (M, N, K): pure Python, no Triton
``dialect``      the names that Gluon changed between Triton 3.6 and 3.9
``schedule``     device code: which tile comes next, which pipeline slot comes next
``split``        device code: adding up the pieces of a split sum, always in the same order
``dense``        the persistent, warp-specialised kernel
``small_m``      the kernel for few tokens: weights take the rows of the tensor-core tile
``build``        compiling a kernel, with or without a GPU
``launch``       the hot call: descriptors, grid, launch
===============  ===================================================================================

Only ``choice`` can be imported without Triton.
"""
