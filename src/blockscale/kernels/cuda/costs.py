"""What a launch of ``gemm.cu`` takes, in clocks: an analytic model that compares its forms.

It does not predict microseconds. It is Gluon's (``kernels.gluon.costs``, which says what each bound
is) for what this kernel does otherwise: an operand that two blocks copy for each other asks L2 for
half of its bytes, but costs a launch of clusters, and a hand-over between the blocks for each K
block; a wave's results leave in boxes, each with its own wait and store.

The constants are rounded from a search on an H100's sweep; what they leave is corrected by form
(``corrections``), so that they need not be exact.
"""

from __future__ import annotations

from math import ceil

from blockscale.kernels.corrected import Estimate, together
from blockscale.kernels.cuda.work import K_BLOCK, Share, Work

# Bytes a clock.
L2_OF_ONE, L2_OF_ALL, MEMORY = 120.0, 7300.0, 1250.0
LINE_BYTES = 128
# From asking for a K block to having it.
LATENCY = 800.0
# As in ``kernels.gluon.costs``: of a row that TMA fills with zeros.
OUTSIDE_ROW_CLOCKS = 5.0
# Limits that are near one another hinder one another: sums of this power.
BLOCK_POWER, MEMORY_POWER = 6.0, 1.5
# From the launch to the first wave, beside the first slot's copy: where a block has a
# multiprocessor to itself, where two share one (the next launch's blocks then find room beside this
# one's last), and more for clusters.
START, BESIDE_START, CLUSTER_START = 7200.0, 6600.0, 900.0
# From one unit to the next.
ROUND_CLOCKS = 100.0
FIRST_SLOT_RATE = 74.0
# A K block's hand-over between the blocks of a cluster, and how much later its copy arrives.
CLUSTER_BLOCK_CLOCKS, CLUSTER_LATENCY = 70.0, 440.0
# From a wave's end to the next one's start, beside its FFMAs.
WAVE_CLOCKS = 45.0
# Rounding and staging one wave: at all, a column, a box.
WRITE_CLOCKS, WRITE_COLUMN_CLOCKS, WRITE_BOX_CLOCKS = 170.0, 0.5, 160.0


def estimate(work: Work, m: int, n: int) -> Estimate:
    """The model's time of one launch."""
    form = work.form
    k = work.k_blocks * K_BLOCK
    memory = (n * k + m * k + m * n * form.out.bytes) / MEMORY
    boxes = ceil(form.columns * form.out.bytes / form.stores.box_bytes)
    write = WRITE_CLOCKS + form.columns * WRITE_COLUMN_CLOCKS + boxes * WRITE_BOX_CLOCKS
    unit = work.k_blocks * _block(work, m) + form.waves * write + ROUND_CLOCKS
    body = rounds(work) * unit
    start = START if form.beside == 1 else BESIDE_START
    start += (form.cluster - 1) * CLUSTER_START
    first_slot = (form.rows + form.columns) * K_BLOCK / FIRST_SLOT_RATE
    return Estimate(start + first_slot + together(MEMORY_POWER, body, memory), memory)


def rounds(work: Work) -> int:
    """Units that the busiest cluster computes one after the other."""
    return ceil(work.turns)


def outside_share(work: Work, m: int) -> float:
    """Rows beyond M, as a share of all rows of tiles."""
    rows = row_tiles(work, m) * work.form.rows
    return (rows - m) / rows


def lines(k: int) -> int:
    """Lines of L2 that a row of a K block lies in: two where ``k`` is not whole lines.

    At K of 2736 and 5472, 128x128 took up to 1.5 times as long as 256x128, which asks for fewer
    rows, and at K of 5120 as long (M of 4096 and more; H100, 2026-11-27).
    """
    return 1 if k % LINE_BYTES == 0 else 2


def row_tiles(work: Work, m: int) -> int:
    """Tiles one below the other."""
    return ceil(m / work.form.rows)


def _block(work: Work, m: int) -> float:
    """One K block of one tile: the slowest of tensor cores, a consumer's chain, L2 and latency."""
    form = work.form
    # 64 x n x 128 takes 2 n clocks of the tensor cores; 64 x n FFMAs over 128 threads n / 2 more.
    tensor = work.crowd * form.consumers * form.waves * 2 * form.columns
    chain = form.waves * (2.5 * form.columns + WAVE_CLOCKS)
    row_bytes = lines(work.k) * LINE_BYTES
    arriving = (form.rows + form.columns) * row_bytes
    shared = {Share.NOTHING: 0, Share.ACTIVATION: form.rows, Share.WEIGHT: form.columns}
    asked = arriving - shared[form.share] * row_bytes / 2
    block = together(
        BLOCK_POWER,
        chain,
        tensor,
        work.crowd * arriving / L2_OF_ONE,
        work.blocks * asked / L2_OF_ALL,
        (LATENCY + (form.cluster - 1) * CLUSTER_LATENCY + chain) / form.stages,
    )
    tiles = row_tiles(work, m)
    outside = (tiles - 1) * form.rows + work.last_rows - m
    if outside:
        filling = OUTSIDE_ROW_CLOCKS * outside * work.crowd
        block += (together(BLOCK_POWER, block, filling) - block) / tiles
    return block + (form.cluster - 1) * CLUSTER_BLOCK_CLOCKS
