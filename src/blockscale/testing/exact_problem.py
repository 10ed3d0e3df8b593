"""Products on a GPU that need no tolerance, whichever kernel computes them.

Small whole numbers with powers of two as scales: every sum is exact in float32 and in the tensor
cores' narrower sums, so that a kernel must give the float64 product, rounded once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from blockscale.formats import FP8_1X128_FP32, FP8_128X128_FP32, K_MAJOR, MN_MAJOR_TMA_ALIGNED
from blockscale.tensor import BlockScaledTensor, empty_scales

if TYPE_CHECKING:
    from collections.abc import Callable

    # A weight to what multiplies it: called with (activation, out, bias), told by ``use`` how.
    ProductOf: TypeAlias = Callable[[BlockScaledTensor], Any]


class ExactProblem:
    """An (m, k) activation and an (n, k) weight of whole numbers, and their float64 product.

    What lies behind the operands is NaN: rows of codes beyond m, the padding of scales.
    """

    def __init__(self, m: int, n: int, k: int, product_of: ProductOf) -> None:
        self.m, self.n, self.k = m, n, k
        generator = torch.Generator("cuda").manual_seed(m + 31 * n + 1009 * k)
        blocks = -(-k // 128)

        def whole(low: int, high: int, *shape: int) -> torch.Tensor:
            return torch.randint(low, high, shape, generator=generator, device="cuda").float()

        codes = torch.full((m + 8, k), float("nan"), device="cuda").to(torch.float8_e4m3fn)
        codes[:m] = whole(-4, 5, m, k).to(torch.float8_e4m3fn)
        scales = empty_scales(m, k, FP8_1X128_FP32, MN_MAJOR_TMA_ALIGNED, "cuda")
        padded = scales.as_strided((blocks, scales.stride(1)), (scales.stride(1), 1))
        padded.fill_(float("nan"))
        scales.copy_(2.0 ** whole(-3, 4, m, blocks))
        self.activation = BlockScaledTensor(codes[:m], scales, FP8_1X128_FP32, MN_MAJOR_TMA_ALIGNED)
        self.weight = BlockScaledTensor(
            whole(-4, 5, n, k).to(torch.float8_e4m3fn),
            2.0 ** whole(-3, 4, -(-n // 128), blocks),
            FP8_128X128_FP32,
            K_MAJOR,
        )
        self.product = product_of(self.weight)

    @property
    def expected(self) -> torch.Tensor:
        """The product in float64."""
        return wide(self.activation, rows=1) @ wide(self.weight, rows=128).T

    def run(
        self, work: object | None, dtype: torch.dtype, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The kernel's result; raises if it wrote outside, shows NaN where it wrote nothing."""
        guard = 64
        memory = torch.full((self.m * self.n + 2 * guard,), float("nan"), device="cuda").to(dtype)
        out = memory[guard : guard + self.m * self.n].view(self.m, self.n)
        if work is not None:
            self.product.use(work, self.m, dtype)
        self.product(self.activation, out, bias)
        assert memory[:guard].isnan().all()
        assert memory[guard + self.m * self.n :].isnan().all()
        return out


def wide(tensor: BlockScaledTensor, rows: int) -> torch.Tensor:
    """Float64 values of codes times scales, each scale for ``rows`` rows and 128 columns."""
    scales = tensor.scales.double().repeat_interleave(rows, 0)[: tensor.mn]
    return tensor.data.double() * scales.repeat_interleave(128, 1)[:, : tensor.k]
