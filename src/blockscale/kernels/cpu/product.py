"""activation x weight^T with block-scaled FP8 weights, on a CPU, activations not quantized."""

from __future__ import annotations

import torch

from blockscale.kernels.cpu.build import library

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

# Above this many tokens a dequantized tile and a float32 matrix product are faster than decoding
# each weight once for every four tokens. No committed benchmark sets this bound yet.
MAX_DIRECT_TOKENS = 8

# Float32 scratch of the large-M path: 16 MB stays within a server's last-level cache slice.
SCRATCH_ELEMENTS = 4 << 20


class WeightOnlyProduct:
    """A prepared weight, ready to multiply: out = activation x weight^T + bias.

    ``data``: (n, k) E4M3 codes, stride 1 along k; rows may have gaps. ``scales``: float32,
    contiguous, one per ``block``.
    Sums are float32, rounded once; the bits do not depend on the number of threads.
    """

    def __init__(self, data: torch.Tensor, scales: torch.Tensor, block: tuple[int, int]) -> None:
        self._data, self._scales, self._block = data, scales, block
        self._n, self._k = data.shape
        self._row_stride = data.stride(0)
        self._library = library()
        # Looked up once: a layer of SmolLM2 takes 20 us, a lookup 1 us.
        self._pointers = data.data_ptr(), scales.data_ptr()

    def __call__(
        self, activation: torch.Tensor, out: torch.Tensor, bias: torch.Tensor | None
    ) -> None:
        """Write into ``out`` (m, n), contiguous; ``activation`` (m, k) has stride 1 along k.

        ``activation``, ``bias`` and ``out`` share a dtype of ``DTYPE_CODES``.
        """
        m = activation.shape[0]
        if m > MAX_DIRECT_TOKENS:
            self._multiply_tiled(activation, out, bias)
            return
        self._library.blockscale_product(
            activation.data_ptr(),
            *self._pointers,
            None if bias is None else bias.data_ptr(),
            out.data_ptr(),
            DTYPE_CODES[out.dtype],
            m,
            self._n,
            self._k,
            activation.stride(0),
            self._row_stride,
            *self._block,
            torch.get_num_threads(),
        )

    def _multiply_tiled(
        self, activation: torch.Tensor, out: torch.Tensor, bias: torch.Tensor | None
    ) -> None:
        """Dequantize a tile of weight rows, multiply, go on.

        Extra memory: ``SCRATCH_ELEMENTS`` float32 values (at least one row) and a float32 copy of
        the activation, whatever the layer's size.
        """
        wide = activation.float()
        rows = max(1, min(self._n, SCRATCH_ELEMENTS // self._k))
        scratch = torch.empty((rows, self._k))
        for first in range(0, self._n, rows):
            count = min(rows, self._n - first)
            tile = dequantize_rows(self._data, self._scales, self._block, first, scratch[:count])
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
        data.stride(0),
        *block,
        torch.get_num_threads(),
    )
    return out
