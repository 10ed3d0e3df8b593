"""Times many tiles of the plain Triton GEMM on many shapes: what ``kernels.triton.tiles`` rests on.

    python benchmarks/triton_sweep.py --out FILE [--seconds 100] [--seed 0]

Like ``gluon_sweep``: random (M, N, K) of real models, CUDA graphs over rotated weights, tiles in
turns. One JSON line for each (M, N, K): {"m", "n", "k", "chosen", "times": {tile: us}}.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from blockscale.formats import FP8_128X128_FP32
from blockscale.kernels.triton.product import TritonProduct, gemm_variant
from blockscale.kernels.triton.tiles import TOKEN_BOUNDS, Product, Tile, tile_for
from blockscale.reference import quantize
from gluon_sweep import TOKENS, quantized_tokens, real_shapes, rotated_weights
from record import machine, versions
from timing import replay_in_turns

if TYPE_CHECKING:
    from blockscale.tensor import BlockScaledTensor

ROUNDS, REPLAYS = 5, 2
TILES = (
    *(
        Tile(16, c, w, s, swaps=t)
        for c in (64, 128)
        for w in (4, 8)
        for s in (4, 8)
        for t in (True,)
    ),
    *(Tile(16, c, w, s) for c in (16, 32, 64, 128) for w in (4, 8) for s in (4, 6, 8)),
    *(Tile(32, c, w, s, swaps=True) for c in (64, 128) for w in (4, 8) for s in (4, 8)),
    *(Tile(32, c, w, s) for c in (32, 64, 128) for w in (4, 8) for s in (4, 6)),
    *(Tile(64, c, w, s) for c in (32, 64, 128) for w in (4, 8) for s in (3, 4, 6)),
    *(Tile(128, c, w, s) for c in (32, 64, 128) for w in (4, 8) for s in (3, 4)),
)
SHARED_BYTES = 227 << 10


def main() -> int:
    """Compile everything on all cores, then measure until the time is up."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    started = time.monotonic()
    usable = [tile for tile in TILES if fits(tile)]
    with ProcessPoolExecutor() as pool:
        compiled = list(pool.map(compiles, usable))
    tiles = [tile for tile, ok in zip(usable, compiled, strict=True) if ok]
    print(f"{len(tiles)} tiles in {time.monotonic() - started:.0f} s", flush=True)
    draw = random.Random(options.seed)  # noqa: S311 - a sample, not a secret
    shapes = [(n, k) for n, k in real_shapes() if k % 128 == 0]
    with options.out.open("w", encoding="utf-8") as file:
        file.write(json.dumps({"machine": machine(), "versions": versions()}) + "\n")
        while time.monotonic() - started < options.seconds:
            n, k = draw.choice(shapes)
            weights = rotated_weights(n, k)
            for m in draw.sample(TOKENS, 4):
                line = {"m": m, "n": n, "k": k, "chosen": name(chosen(m, n, k))}
                file.write(json.dumps({**line, "times": times(weights, m, tiles)}) + "\n")
            file.flush()
    return 0


def fits(tile: Tile) -> bool:
    """Whether its ring lies within shared memory."""
    return (tile.rows + tile.columns) * 128 * tile.num_stages <= SHARED_BYTES


def name(tile: Tile) -> str:
    """``16x64 w4 s8`` and ``t`` where the operands change places."""
    turned = " t" if tile.swaps else ""
    return f"{tile.rows}x{tile.columns} w{tile.num_warps} s{tile.num_stages}{turned}"


def chosen(m: int, n: int, k: int) -> Tile:
    """What the backend takes today."""
    bound = next((b for b in TOKEN_BOUNDS if b is None or m <= b), None)
    largest = 2 * max(b for b in TOKEN_BOUNDS if b is not None)
    return tile_for(Product(bound or largest, n, k, 128, 128, (9, 0), 132))


def compiles(tile: Tile) -> bool:
    """Put one tile's kernel into Triton's disk cache (in a process of the pool)."""
    weight = quantize(torch.zeros(256, 256), FP8_128X128_FP32)
    try:
        gemm_variant(weight, tile, torch.float16, is_aligned=True).compile(90)
    except Exception:  # noqa: BLE001 - a tile that Triton cannot compile is left out
        return False
    return True


def times(weights: list[BlockScaledTensor], m: int, tiles: list[Tile]) -> dict[str, float]:
    """Microseconds of one product by tile; tiles of far more or fewer rows than m are left out."""
    n, k = weights[0].data.shape
    activation = quantized_tokens(m, k)
    out = torch.empty((m, n), dtype=torch.float16, device="cuda")
    graphs = {}
    for tile in tiles:
        if tile.rows > max(16, 2 * m) or m > 16 * tile.rows:
            continue
        products = [TritonProduct(w, [tile] * len(TOKEN_BOUNDS)) for w in weights]
        products[0](activation, out, None)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for product in products:
                product(activation, out, None)
        graphs[name(tile)] = graph
    taken = replay_in_turns(graphs, ROUNDS, REPLAYS)
    return {tile: round(statistics.median(t) / len(weights), 3) for tile, t in taken.items()}


if __name__ == "__main__":
    sys.exit(main())
