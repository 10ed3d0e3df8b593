"""What the Triton kernels become on Blackwell and on Hopper, read from PTX, without a GPU.

That they compile to the right instructions is all that is known: nothing here ran on a Blackwell.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch

import blockscale
from blockscale.errors import BackendError
from blockscale.formats import FP8_128X128_FP32, BlockShape
from blockscale.kernels.triton.tiles import Product, Tile, tile_for
from blockscale.reference import quantize

pytest.importorskip("triton", reason="compiles kernels without a GPU")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="compiles nothing"
)

MMA = re.compile(r"tcgen05\.mma[\w.:]*|wgmma\.mma_async[\w.]*|mma\.sync[\w.]*")
FP8_ON_SM100 = "tcgen05.mma.cta_group::1.kind::f8f6f4"
# Triton 3.6 writes .scale_vec::1X, later ones .block32: one scale for 32 elements either way.
SCALED = re.compile(
    r"tcgen05\.mma\.cta_group::1\.kind::mxf8f6f4\.block_scale\.(scale_vec::1X|block32)"
)
SCALED_TILE = Tile(128, 128, 4, 3)
SOURCES = Path(blockscale.__file__).parent


def products(ptx: str) -> set[str]:
    """The matrix instructions in it."""
    return set(MMA.findall(ptx))


def chosen(m: int, capability: tuple[int, int]) -> Tile:
    return tile_for(Product(m, 4096, 7168, 128, 128, capability, 148))


@pytest.mark.parametrize("m", [1, 512, 8192])
def test_float32_scales_are_promoted_from_fp8_products(m: int) -> None:
    """The tile that a B200 would get: FP8 tensor cores, sums in tensor memory, FFMA after them."""
    from blockscale.kernels.triton.product import gemm_variant

    weight = quantize(torch.zeros(256, 512), FP8_128X128_FP32)
    tile = chosen(m, (10, 0))
    compiled = gemm_variant(weight, tile, torch.float16, is_aligned=True).compile(100)
    ptx = compiled.asm["ptx"]
    assert ".target sm_100a" in ptx
    assert products(ptx) == {FP8_ON_SM100}
    assert "tcgen05.ld" in ptx
    elements = tile.rows * tile.columns // (32 * tile.num_warps)
    # Some are written for two elements at once.
    fused = ptx.count("fma.rn.f32 ") + 2 * ptx.count("fma.rn.f32x2 ")
    assert fused >= elements


def test_the_smallest_tile_multiplies_in_float16() -> None:
    """Few tokens, few columns: too small for tensor memory, and E4M3 is exact in float16."""
    from blockscale.kernels.triton.product import gemm_variant

    weight = quantize(torch.zeros(256, 512), FP8_128X128_FP32)
    tile = tile_for(Product(1, 256, 512, 128, 128, (10, 0), 148))
    assert (tile.rows, tile.columns) == (16, 16)
    compiled = gemm_variant(weight, tile, torch.float16, is_aligned=True).compile(100)
    assert products(compiled.asm["ptx"]) == {"mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"}


def test_hopper_multiplies_fp8_codes() -> None:
    """The same kernel on sm_90: E4M3 operands, none turned into bfloat16."""
    from blockscale.kernels.triton.product import gemm_variant

    weight = quantize(torch.zeros(256, 512), FP8_128X128_FP32)
    tile = chosen(8192, (9, 0))
    compiled = gemm_variant(weight, tile, torch.float16, is_aligned=True).compile(90)
    found = products(compiled.asm["ptx"])
    assert found
    assert all(name.endswith(".f32.e4m3.e4m3") for name in found)


@pytest.mark.parametrize("block", [BlockShape(128, 128), BlockShape(1, 32)], ids=str)
def test_ue8m0_scales_go_to_the_tensor_core(block: BlockShape) -> None:
    from blockscale.kernels.triton.scaled_kernel import compile_scaled, scaled_variant

    ptx = compile_scaled(scaled_variant(block, SCALED_TILE, torch.bfloat16), 100).asm["ptx"]
    (found,) = products(ptx)
    assert SCALED.fullmatch(found)


def test_scaled_products_are_refused_where_triton_would_use_bfloat16() -> None:
    from blockscale.kernels.triton.scaled_kernel import compile_scaled, scaled_variant

    variant = scaled_variant(BlockShape(128, 128), SCALED_TILE, torch.bfloat16)
    with pytest.raises(BackendError, match=r"sm_90 apply no UE8M0 scales"):
        compile_scaled(variant, 90)
    # What the refusal is for. When this fails, Triton has learnt something: look again.
    (found,) = products(variant.compile(90).asm["ptx"])
    assert found.endswith(".bf16.bf16")
    with pytest.raises(BackendError, match=r"128 rows of tokens or more, not Tile\(rows=64"):
        scaled_variant(BlockShape(128, 128), Tile(64, 128, 4, 2), torch.bfloat16)


def test_only_the_guarded_module_asks_for_scaled_products() -> None:
    """``dot_scaled`` stands in one file, and no backend imports that file."""
    texts = {
        path.relative_to(SOURCES).as_posix(): path.read_text(encoding="utf-8")
        for path in SOURCES.rglob("*.py")
    }
    kernel = "kernels/triton/scaled_kernel.py"
    assert {name for name, text in texts.items() if "dot_scaled" in text} == {kernel}
    assert {name for name, text in texts.items() if "mma_scaled" in text} == set()
    assert {name for name, text in texts.items() if "scaled_kernel" in text} == set()
