"""The control for racecheck: a Gluon kernel that only hands work to warps; see ``racecheck``.

Its warps meet as those of the kernels do, at barriers of a partition and at mbarriers, and share
nothing else.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from blockscale.kernels.gluon.dialect import own_barrier_layout, partition_barrier

# As the kernels: one warp with few registers beside four.
REGISTERS, PRODUCER_REGISTERS, WARPS = 128, 24, 4
# Numbers that the partitions write for each program.
PARTITIONS = 2
PROGRAMS = 8


@gluon.jit
def _tell(out, place, rounds, barriers, MBARRIERS: gl.constexpr):
    """A partition: its warps meet ``rounds`` times, then it says so, and arrives."""
    met = 0
    for _ in range(rounds):
        partition_barrier()
        met += 1
    gl.store(out + place, met)
    for number in gl.static_range(MBARRIERS):
        mbarrier.arrive(barriers.index(number), count=1)


@gluon.jit
def _hear(out, place, rounds, barriers, MBARRIERS: gl.constexpr):
    """A partition: it waits for the other one's arrivals, then does as that one did."""
    for number in gl.static_range(MBARRIERS):
        mbarrier.wait(barriers.index(number), 0)
    met = 0
    for _ in range(rounds):
        partition_barrier()
        met += 1
    gl.store(out + place, met)


@gluon.jit
def hand_over_kernel(out, rounds, MBARRIERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr):
    """Two partitions that each write ``rounds`` to their place in ``out``."""
    place = gl.program_id(0) * 2
    barriers = out
    if MBARRIERS > 0:
        barriers = gl.allocate_shared_memory(gl.int64, [MBARRIERS, 1], own_barrier_layout(1))
        for number in gl.static_range(MBARRIERS):
            mbarrier.init(barriers.index(number), count=1)
    gl.warp_specialize(
        [
            (_tell, (out, place, rounds, barriers, MBARRIERS)),
            (_hear, (out, place + 1, rounds, barriers, MBARRIERS)),
        ],
        [1],
        [PRODUCER_REGISTERS],
    )


def wrong_counts(rounds: int, mbarriers: int) -> float:
    """Run it once; the share of numbers that are not ``rounds``."""
    out = torch.full((PROGRAMS * PARTITIONS,), -1, dtype=torch.int32, device="cuda")
    hand_over_kernel[(PROGRAMS,)](
        out, rounds, mbarriers, PRODUCER_REGISTERS, num_warps=WARPS, maxnreg=REGISTERS
    )
    return float((out != rounds).double().mean())
