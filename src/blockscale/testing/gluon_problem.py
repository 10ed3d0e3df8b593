"""One product for the kernels on the pretend GPU (``gluon_kernels``), with its exact result."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from blockscale.kernels.gluon.pair_work import PAIR, PairVariant
from blockscale.kernels.gluon.work import DenseVariant, aligned_scale_stride, scale_box
from blockscale.testing.gluon_kernels import load_kernels
from blockscale.testing.gluon_machine import Box, EmulationError, Pointer, launch

if TYPE_CHECKING:
    from types import SimpleNamespace

    from blockscale.kernels.gluon.pair_work import PairWork
    from blockscale.kernels.gluon.work import Work

KERNELS = load_kernels()


class Problem:
    """Operands in the kernels' layouts, and the product in float64."""

    def __init__(self, m: int, n: int, k: int, *, whole_numbers: bool = True) -> None:
        generator = torch.Generator().manual_seed(m + 31 * n + 1009 * k)
        blocks = -(-k // 128)
        shapes = ((m, k), (n, k))
        if whole_numbers:
            a, b = (torch.randint(-4, 5, s, generator=generator).float() for s in shapes)
            grids = ((m, blocks), (-(-n // 128), blocks))
            exponents = [torch.randint(-3, 4, s, generator=generator) for s in grids]
            a_scales, b_scales = (2.0**e for e in exponents)
        else:
            a, b = (torch.randn(s, generator=generator) for s in shapes)
            a_scales = torch.rand((m, blocks), generator=generator) + 0.5
            b_scales = torch.rand((-(-n // 128), blocks), generator=generator) + 0.5
        self.m, self.n, self.k = m, n, k
        self.a, self.b = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)
        self.b_scales = b_scales
        # Padding is NaN: reading it would show.
        self.a_scales = torch.full((blocks, aligned_scale_stride(m)), float("nan"))
        self.a_scales[:, :m] = a_scales.T
        wide_a = self.a.double() * a_scales.double().repeat_interleave(128, 1)[:, :k]
        rows = b_scales.double().repeat_interleave(128, 0)[:n]
        self.product = wide_a @ (self.b.double() * rows.repeat_interleave(128, 1)[:, :k]).T

    def run(
        self,
        work: Work | PairWork,
        dtype: torch.dtype = torch.float32,
        bias: torch.Tensor | None = None,
        kernels: SimpleNamespace | None = None,
    ) -> torch.Tensor:
        """The kernel's result; NaN where it wrote nothing. ``kernels``: others than ours."""
        kernels = kernels or KERNELS
        variant = work.variant
        out = torch.full((self.m, self.n), float("nan"), dtype=dtype)
        tickets = torch.zeros(max(1, work.tickets), dtype=torch.int32)
        workspace = torch.full((max(1, work.workspace_elements),), float("nan"))
        arguments: dict[str, Any] = {
            **variant.constants(overlap=True),
            **work.arguments(self.m, self.n, self.b_scales.stride(0)),
            "has_bias": int(bias is not None),
            "b_scales": Pointer(self.b_scales.flatten()),
            "bias": Pointer(torch.empty(0, dtype=dtype) if bias is None else bias),
            "workspace": Pointer(workspace),
            "tickets": Pointer(tickets),
        }
        scales = self.a_scales[:, : self.m]
        cluster = 1
        if isinstance(variant, DenseVariant | PairVariant):
            tile = variant if isinstance(variant, DenseVariant) else variant.tile
            kernel, rows, columns = kernels.dense_kernel, tile.rows, tile.wide
            arguments["b_rest"] = Box(self.b, (tile.rest or columns, 128))
            arguments["out"] = Box(out, (64, tile.store_columns))
            arguments["a_scale_boxes"] = Box(scales, (1, rows))
            if isinstance(variant, PairVariant):
                kernel, cluster = kernels.paired_kernel, PAIR
                arguments["out"] = Box(out, (PAIR * 64, tile.store_columns), is_halved=True)
        else:
            kernel, rows, columns = kernels.small_m_kernel, variant.tokens, variant.weights
            arguments["out"] = Pointer(out.view(-1))
            arguments["a_scale_boxes"] = Box(scales, (1, scale_box(variant.tokens)))
        arguments["a"] = Box(self.a, (rows, 128))
        arguments["b"] = Box(self.b, (columns, 128))
        launch(kernel, work.grid, arguments, cluster)
        if tickets.any():
            msg = "tickets must be zero again after a launch"
            raise EmulationError(msg)
        return out
