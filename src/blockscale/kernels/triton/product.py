"""A weight ready to multiply: its addresses, tiles and compiled kernels, looked up once."""

from __future__ import annotations

from math import gcd
from typing import TYPE_CHECKING, NamedTuple

import torch

from blockscale.formats import ceil_div, round_up
from blockscale.formats.layout import TMA_STRIDE_BYTES
from blockscale.kernels.step import device_index
from blockscale.kernels.triton.build import TYPES, Variant, launcher
from blockscale.kernels.triton.gemm_kernel import gemm_kernel
from blockscale.kernels.triton.tiles import TOKEN_BOUNDS, Product, Tile, tile_for

if TYPE_CHECKING:
    from collections.abc import Sequence

    from blockscale.kernels.step import ProductStart, Scratch
    from blockscale.kernels.triton.build import Launcher
    from blockscale.tensor import BlockScaledTensor

# Rows of tiles that share a band of L2 (gemm_kernel.tile_position).
BAND = 8
VECTOR = 16
FLOAT_BYTES = 4
NO_LIMIT = 2**63 - 1


class Step(NamedTuple):
    """What serves token counts up to ``max_m``."""

    max_m: int
    rows: int
    tiles_across: int
    launch: Launcher


class TritonProduct:
    """out = activation x weight^T (+ bias) for one prepared weight.

    ``weight``: (n, k) E4M3FN with float32 scales in ``K_MAJOR``, contiguous. Its storages are read
    where they lie and kept alive, so values written into them later are served. ``tiles``: one for
    each of ``TOKEN_BOUNDS``, None for ``tile_for``'s choice. Deterministic.
    """

    def __init__(self, weight: BlockScaledTensor, tiles: Sequence[Tile] | None = None) -> None:
        self._weight = weight
        self._n, self._k = weight.data.shape
        self._row_divisor = gcd(self._k, VECTOR)
        self._device = device_index(weight.data)
        self._tiles = tuple(tiles) if tiles is not None else self._chosen_tiles()
        self._addresses = weight.data.data_ptr(), weight.scales.data_ptr()
        self._steps: dict[tuple[torch.dtype, bool], tuple[Step, ...]] = {}

    def __call__(
        self, activation: BlockScaledTensor, out: torch.Tensor, bias: torch.Tensor | None
    ) -> None:
        """Enqueue the product on the current stream of the weight's device.

        ``activation``: (m, k) codes in blocks of 1 x block.k, float32 scales in
        ``MN_MAJOR_TMA_ALIGNED``. ``out``: a contiguous (m, n) matrix. ``bias``: (n,) in out's
        dtype, added to the float32 sums before they are rounded. m >= 1.
        """
        codes = activation.data
        address, stride = codes.data_ptr(), codes.stride(0)
        out_address = out.data_ptr()
        is_aligned = (address | out_address) % VECTOR == 0 and stride % self._row_divisor == 0
        m = out.shape[0]
        step = self._step(m, out.dtype, is_aligned=is_aligned)
        step.launch(
            -(-m // step.rows) * step.tiles_across,
            address,
            activation.scales.data_ptr(),
            *self._addresses,
            None if bias is None else bias.data_ptr(),
            out_address,
            m,
            self._n,
            self._k,
            stride,
            activation.scales.stride(1),
            int(bias is not None),
        )

    def workspace_bytes(self, m: int, out_dtype: torch.dtype) -> int:  # noqa: ARG002 - as ``step.StepProduct``
        """None."""
        return 0

    def start_for(self, m: int, out_dtype: torch.dtype, scratch: Scratch) -> ProductStart:
        """The launch for m tokens as ``step.StepProduct`` has it."""
        scales = scratch.scales
        step = self._step(m, out_dtype, is_aligned=True)
        grid = (-(-m // step.rows) * step.tiles_across, 1, 1)
        launch, static, constants = step.launch.start, step.launch.static, step.launch.constants
        weight, weight_scales = self._addresses
        align = TMA_STRIDE_BYTES // FLOAT_BYTES
        shape = (m, self._n, self._k, self._k, round_up(m, align))
        plain, biased = ((*shape, has_bias, *constants) for has_bias in (0, 1))

        def start(stream: int, base: int, out: int, bias: int | None) -> None:
            places = (base, base + scales, weight, weight_scales, bias, out)
            if (base | out) % VECTOR:
                other = self._step(m, out_dtype, is_aligned=False)
                programs = -(-m // other.rows) * other.tiles_across
                other.launch(programs, *places, *shape, int(bias is not None))
                return
            launch(*grid, stream, *static, *places, *(plain if bias is None else biased))

        return start

    def launcher_for(self, m: int, out_dtype: torch.dtype) -> Launcher:
        """What ``start_for`` launches."""
        return self._step(m, out_dtype, is_aligned=True).launch

    def compile(self, out_dtypes: Sequence[torch.dtype]) -> None:
        """Build every kernel that serves one of these output dtypes."""
        for out_dtype in out_dtypes:
            self.steps(out_dtype, is_aligned=True)

    def steps(self, out_dtype: torch.dtype, *, is_aligned: bool) -> tuple[Step, ...]:
        """Compiled for every token count.

        ``is_aligned``: codes and result start on 16 bytes, and rows of codes as rows of k would.
        """
        return tuple(
            Step(
                NO_LIMIT if bound is None else bound,
                tile.rows,
                ceil_div(self._n, tile.columns),
                launcher(
                    gemm_variant(self._weight, tile, out_dtype, is_aligned=is_aligned), self._device
                ),
            )
            for bound, tile in zip(TOKEN_BOUNDS, self._tiles, strict=True)
        )

    def _step(self, m: int, out_dtype: torch.dtype, *, is_aligned: bool) -> Step:
        key = (out_dtype, is_aligned)
        steps = self._steps.get(key)
        if steps is None:
            steps = self._steps[key] = self.steps(out_dtype, is_aligned=is_aligned)
        for step in steps:
            if m <= step.max_m:
                break
        return step

    def _chosen_tiles(self) -> tuple[Tile, ...]:
        properties = torch.cuda.get_device_properties(self._device)
        block = self._weight.format.block
        # Above the last bound the largest tile nearly always has enough to do.
        largest = 2 * max(bound for bound in TOKEN_BOUNDS if bound is not None)
        return tuple(
            tile_for(
                Product(
                    largest if bound is None else bound,
                    self._n,
                    self._k,
                    block.mn,
                    block.k,
                    (properties.major, properties.minor),
                    properties.multi_processor_count,
                )
            )
            for bound in TOKEN_BOUNDS
        )


def gemm_variant(
    weight: BlockScaledTensor, tile: Tile, out_dtype: torch.dtype, *, is_aligned: bool
) -> Variant:
    """The kernel for one tile. Of n and k only their divisors are compiled in."""
    n, k = weight.data.shape
    block = weight.format.block
    alignment = gcd(k, VECTOR) if is_aligned else 1
    pointer = "*" + TYPES[out_dtype]
    arguments = (
        ("activation", "*fp8e4nv", VECTOR if is_aligned else 1),
        ("activation_scales", "*fp32", 4),
        ("weight", "*fp8e4nv", VECTOR),
        ("weight_scales", "*fp32", VECTOR),
        ("bias", pointer, out_dtype.itemsize),
        ("out", pointer, VECTOR if is_aligned else out_dtype.itemsize),
        ("m", "i32", 1),
        ("n", "i32", VECTOR if n % VECTOR == 0 else 1),
        ("k", "i32", gcd(k, VECTOR)),
        ("activation_stride", "i32", alignment),
        ("activation_scales_stride", "i32", 4),
        ("has_bias", "i32", 1),
    )
    constants = (
        ("TILE_M", tile.rows),
        ("TILE_N", tile.columns),
        ("BLOCK_N", block.mn),
        ("BLOCK_K", block.k),
        ("WHOLE_BLOCKS", k % block.k == 0),
        ("SWAPS", tile.swaps),
        ("STAGES", tile.num_stages),
        ("BAND", BAND),
    )
    return Variant(
        gemm_kernel, arguments, constants, tile.num_warps, tile.num_stages, contracts=True
    )
