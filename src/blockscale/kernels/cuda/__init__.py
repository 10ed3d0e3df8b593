"""Dense block-FP8 GEMM for Hopper in CUDA C++, compiled by NVRTC: ``gemm.cu``."""
