"""Block-scaled FP8 GEMM for Hopper, written in Gluon.

===============  ===================================================================================
module           holds
===============  ===================================================================================
``choice``       which tile and which split serve (M, N, K): an analytic model
``work``         what a launch does, as plain values
``dialect``      what Gluon changed between Triton 3.6 and 3.9
``schedule``     device code: which tile comes next, which pipeline slot comes next
``split``        device code: adding up the pieces of a split sum, always in the same order
``waves``        device code: multiplying one tile, scaling as it goes
``epilogue``     device code: bias, rounding, staging and stores of a tile
``dense``        the persistent, warp-specialised kernel
``paired``       the same for pairs of programs that share an operand (multicast, Triton 3.8), with
                 its plain values in ``pair_work``; nothing chooses it yet
``small_m``      the kernel for few tokens: weights take the rows of the tensor-core tile
``grouped*``     the same for groups: ``grouped``, ``grouped_small``, with their own schedule, plain
                 values, choice and product
``build``        compiling a kernel, with or without a GPU
``descriptor``   TMA descriptors that bring 256 bytes into L2 where they ask for 128
``launch``       a kernel loaded on a device: descriptors, launch
``product``      torch-facing: a weight ready to multiply
===============  ===================================================================================

Only ``choice``, ``work``, ``pair_work`` and their grouped twins can be imported without Triton.
``blockscale.testing.gluon_kernels`` runs the device code on the CPU.
"""
