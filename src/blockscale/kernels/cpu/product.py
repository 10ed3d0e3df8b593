"""activation x weight^T with block-scaled FP8 weights, on a CPU, activations not quantized."""

from __future__ import annotations

import torch

from blockscale.kernels.cpu.build import library

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

# Above this many tokens a dequantized tile and a float32 matrix product are faster than decoding
# each weight once for every four tokens (benchmarks/cpu_linear.py).
MAX_DIRECT_TOKENS = 8

# Float32 scratch of the large-M path: 16 MB stays within a server's last-level cache slice.
SCRATCH_ELEMENTS = 4 << 20


def multiply_direct(
    activation: torch.Tensor,
    data: torch.Tensor,
    scales: torch.Tensor,
    block: tuple[int, int],
    out: torch.Tensor,
    bias: torch.Tensor | None,
) -> None:
    """Write activation (m, k) x weight (n, k)^T + bias into ``out`` (m, n), decoding on the fly.

    ``data``: E4M3 codes, contiguous; ``scales``: float32, contiguous, one for each ``block``.
    ``activation``, ``bias`` and ``out`` share a dtype of ``DTYPE_CODES``; activation rows may be
    strided. Sums are float32, rounded once; bits do not depend on the number of threads.
    """
    m, k = activation.shape
    library().blockscale_product(
        activation.data_ptr(),
        data.data_ptr(),
        scales.data_ptr(),
        None if bias is None else bias.data_ptr(),
        out.data_ptr(),
        DTYPE_CODES[out.dtype],
        m,
        out.shape[1],
        k,
        activation.stride(0),
        *block,
        torch.get_num_threads(),
    )


def multiply_tiled(
    activation: torch.Tensor,
    data: torch.Tensor,
    scales: torch.Tensor,
    block: tuple[int, int],
    out: torch.Tensor,
    bias: torch.Tensor | None,
) -> None:
    """As ``multiply_direct``, for many tokens: dequantize a tile of rows, multiply, go on.

    Extra memory: ``SCRATCH_ELEMENTS`` float32 values (at least one row) and a float32 copy of the
    activation, whatever the layer's size.
    """
    wide = activation.float()
    n, k = data.shape
    rows = max(1, min(n, SCRATCH_ELEMENTS // k))
    scratch = torch.empty((rows, k))
    for first in range(0, n, rows):
        count = min(rows, n - first)
        tile = dequantize_rows(data, scales, block, first, scratch[:count])
        product = wide @ tile.T
        if bias is not None:
            product += bias[first : first + count].float()
        out[:, first : first + count] = product


def dequantize_rows(
    data: torch.Tensor,
    scales: torch.Tensor,
    block: tuple[int, int],
    first: int,
    out: torch.Tensor,
) -> torch.Tensor:
    """Weight rows [first, first + len(out)) as float32 in ``out``, bit for bit the reference's."""
    library().blockscale_dequantize(
        data.data_ptr(),
        scales.data_ptr(),
        out.data_ptr(),
        first,
        out.shape[0],
        data.shape[1],
        *block,
        torch.get_num_threads(),
    )
    return out
