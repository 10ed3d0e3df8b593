"""The definition of correct: plain torch, slow, runs anywhere, bit for bit what kernels must give.

Four verbs that are never mixed: ``quantize`` (float to blocks), ``dequantize`` (back),
``requantize`` (another format: data and scales change, may lose), ``relayout`` (same values, other
memory, exact). ``refine`` repeats scales for smaller blocks: exact too. Nothing here rounds a scale
alone.
"""

from blockscale.reference.grouped import contiguous_matmul, expert_of, masked_matmul
from blockscale.reference.layout import refine, relayout, scale_values
from blockscale.reference.matmul import block_scaled_matmul
from blockscale.reference.quantize import dequantize, quantize
from blockscale.reference.requantize import Requantized, requantize

__all__ = [
    "Requantized",
    "block_scaled_matmul",
    "contiguous_matmul",
    "dequantize",
    "expert_of",
    "masked_matmul",
    "quantize",
    "refine",
    "relayout",
    "requantize",
    "scale_values",
]
