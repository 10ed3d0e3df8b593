"""The other control for racecheck: a ring of slots, filled by one warp and read by four.

It puts scales and takes them as the Gluon kernels do, and does nothing else. That it is right can
be read off: a slot is filled when the readers gave it back, and given back when all of their warps,
having read it, have met. See ``racecheck``.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from blockscale.kernels.gluon.dialect import own_barrier_layout, partition_barrier
from blockscale.kernels.gluon.schedule import (
    allocate_scale_slots,
    hand_over_scale,
    next_slot,
    take_scale,
)
from hand_over import PRODUCER_REGISTERS, PROGRAMS, REGISTERS, WARPS

STAGES = 4
THREADS = gl.constexpr(32 * WARPS)


@gluon.jit
def _fill(ring, rounds, STAGES: gl.constexpr):
    """The writer: 0, 1, 2 and so on."""
    slots, full, empty = ring
    slot = 0
    phase = 1
    for number in range(rounds):
        mbarrier.wait(empty.index(slot), phase)
        hand_over_scale(number.to(gl.float32), slots, full, slot)
        slot, phase = next_slot(slot, phase, STAGES)


@gluon.jit
def _add(ring, out, rounds, STAGES: gl.constexpr):
    """The readers: each thread adds up what it reads."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    slots, full, empty = ring
    total = gl.zeros((THREADS,), gl.float32, LAYOUT)
    slot = 0
    phase = 0
    for _ in range(rounds):
        mbarrier.wait(full.index(slot), phase)
        total += take_scale(slots, slot, LAYOUT)
        partition_barrier()
        mbarrier.arrive(empty.index(slot), count=1)
        slot, phase = next_slot(slot, phase, STAGES)
    gl.store(out + gl.arange(0, THREADS, layout=LAYOUT), total)


@gluon.jit
def scale_ring_kernel(out, rounds, STAGES: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr):
    """Each thread's sum of the numbers below ``rounds``, into its program's place in ``out``."""
    OWN: gl.constexpr = own_barrier_layout(1)
    slots = allocate_scale_slots(STAGES)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], OWN)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], OWN)
    for slot in gl.static_range(STAGES):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=1)
    ring = (slots, full, empty)
    place = out + gl.program_id(0) * THREADS
    gl.warp_specialize(
        [(_add, (ring, place, rounds, STAGES)), (_fill, (ring, rounds, STAGES))],
        [1],
        [PRODUCER_REGISTERS],
    )


def wrong_sums(rounds: int) -> float:
    """Run it once; the share of sums that are wrong."""
    out = torch.full((PROGRAMS * 32 * WARPS,), -1.0, device="cuda")
    scale_ring_kernel[(PROGRAMS,)](
        out, rounds, STAGES, PRODUCER_REGISTERS, num_warps=WARPS, maxnreg=REGISTERS
    )
    return float((out != rounds * (rounds - 1) // 2).double().mean())
