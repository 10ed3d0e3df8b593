"""Plain Triton kernels: activation quantization, fused producers of activations, GEMM.

===================  ===============================================================================
module               holds
===================  ===============================================================================
``arithmetic``       device code: the quantization rule, exact division, exponential
``scales``           device code: writing scales straight into any layout
``quantize_kernel``  the activation quantizer
``words``            device code: two-byte floats in pairs, two by one instruction
``fused_kernel``     SiLU-and-multiply, quantized
``normalize_kernel`` (add and) RMSNorm, quantized
``gemm_kernel``      the block-scaled product
``tiles``            which tile serves (M, N): pure Python, no Triton
``build``            compiling a kernel, with or without a GPU; the hot launch
``destination``      what a quantizer is made for, and where its results go
``quantize``         torch-facing: quantizers bound to a format, a layout, a dtype and a device
``normalize``        torch-facing: the RMSNorm quantizer, and how it cuts a row
``product``          torch-facing: a weight ready to multiply
===================  ===============================================================================

Only ``tiles`` can be imported without Triton. Every kernel has a twin in ``blockscale.reference``
and must give its bits, except the GEMM, whose sums are the tensor core's.
"""
