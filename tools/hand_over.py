"""The control for racecheck: a Gluon kernel that only hands work to warps; see ``racecheck``."""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from blockscale.kernels.gluon.dialect import partition_barrier

# As the kernels: one warp with few registers beside four.
REGISTERS, PRODUCER_REGISTERS, WARPS = 128, 24, 4
# Numbers that a partition writes for each program.
PARTITIONS = 2
PROGRAMS = 8


@gluon.jit
def _count(out, place, rounds):
    """A partition: its warps meet ``rounds`` times, then it says so. No shared memory."""
    met = 0
    for _ in range(rounds):
        partition_barrier()
        met += 1
    gl.store(out + place, met)


@gluon.jit
def hand_over_kernel(out, rounds, PRODUCER_REGISTERS: gl.constexpr):
    """Two partitions that each write ``rounds`` to their place in ``out``."""
    place = gl.program_id(0) * 2
    gl.warp_specialize(
        [(_count, (out, place, rounds)), (_count, (out, place + 1, rounds))],
        [1],
        [PRODUCER_REGISTERS],
    )


def wrong_counts(rounds: int) -> float:
    """Run it once; the share of numbers that are not ``rounds``."""
    out = torch.full((PROGRAMS * PARTITIONS,), -1, dtype=torch.int32, device="cuda")
    hand_over_kernel[(PROGRAMS,)](
        out, rounds, PRODUCER_REGISTERS, num_warps=WARPS, maxnreg=REGISTERS
    )
    return float((out != rounds).double().mean())
