"""What a launch over groups does: which compiled kernel, how many programs. Plain values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from blockscale.kernels.gluon.work import (
    BAND,
    CONSUMERS,
    FLOAT_BYTES,
    HALF_SHARED_BYTES,
    K_BLOCK,
    MAX_STAGES,
    RESERVED_BYTES,
    SHARED_BYTES,
    TURN_FLOATS_BYTES,
    TURN_HALVES_BYTES,
    WAVE_ROWS,
    scale_box,
)

# Registers a thread of the producer and of the consumers, by the groups that the producer holds. It
# also finds items, so it needs more than dense's, and the consumers get less: 128 threads with the
# first and 256 with the second share what 384 have.
REGISTERS = {256: (40, 232), 512: (64, 216)}
# The mailbox and its barriers.
MAILBOX_BYTES = 256
# One warp holds the counts of all groups: a power of two of them, at least one a lane.
MIN_GROUPS = 32
MAX_GROUPS = max(REGISTERS)
# Rows that belong to one group in the contiguous layout (DeepGEMM's alignment on SM90).
GROUP_ROWS = 128
# Programs of the kernel for few rows that share a multiprocessor.
SMALL_PROGRAMS = 2


@dataclass(frozen=True, slots=True)
class GroupedVariant:
    """One compiled form of the grouped kernel.

    ``groups``: 0 for the contiguous layout, else how many groups the masked one may have.
    """

    rows: int
    columns: int
    stages: int
    buffers: int
    groups: int = 0

    def constants(self, *, overlap: bool) -> dict[str, int]:
        """The kernel's compile-time parameters, in order; ``overlap``: see ``build.Form``."""
        return {
            "BM": self.rows,
            "STAGES": self.stages,
            "BUFFERS": self.buffers,
            "BAND": BAND,
            "MASKED": self.groups > 0,
            "GROUPS": self.groups,
            "OVERLAP": overlap,
            "CONSUMER_REGISTERS": registers(self.groups)[1],
            "PRODUCER_REGISTERS": registers(self.groups)[0],
        }

    @property
    def name(self) -> str:
        """``contiguous-256x128s3b2``, ``masked-128x128s5b1g32``."""
        tile = f"{self.rows}x{self.columns}s{self.stages}b{self.buffers}"
        return f"masked-{tile}g{self.groups}" if self.groups else f"contiguous-{tile}"


def grouped_variant(rows: int, columns: int, out_bytes: int, groups: int = 0) -> GroupedVariant:
    """The variant of a tile with the deepest ring that fits beside the staging buffers.

    ``groups``: for the masked layout, how many there are; 0 for the contiguous one.
    """
    waves = rows // (CONSUMERS * WAVE_ROWS)
    buffers = waves if out_bytes < FLOAT_BYTES else 1
    staging = CONSUMERS * buffers * WAVE_ROWS * columns * out_bytes
    slot = (rows + columns) * K_BLOCK + rows * FLOAT_BYTES
    room = SHARED_BYTES - RESERVED_BYTES - MAILBOX_BYTES - staging
    return GroupedVariant(rows, columns, min(MAX_STAGES, room // slot), buffers, held(groups))


@dataclass(frozen=True, slots=True)
class GroupedSmallVariant:
    """One compiled form of the kernel for few rows a group: weight rows x tokens, depth of ring.

    ``beside``: programs on one multiprocessor.

    ``groups`` as in ``GroupedVariant``; contiguous row blocks have ``tokens`` rows.
    """

    weights: int
    tokens: int
    stages: int
    groups: int
    beside: int = SMALL_PROGRAMS

    def constants(self, *, overlap: bool) -> dict[str, int]:
        """The kernel's compile-time parameters, in order; ``overlap``: see ``build.Form``."""
        return {
            "STAGES": self.stages,
            "MASKED": self.groups > 0,
            "GROUPS": self.groups,
            "OVERLAP": overlap,
            "PRODUCER_REGISTERS": registers(self.groups)[0],
        }

    @property
    def name(self) -> str:
        """``contiguous-few64x16s8``, ``masked-few64x16s8g256``: weights before tokens."""
        alone = "alone" if self.beside == 1 else ""
        tile = f"few{self.weights}x{self.tokens}s{self.stages}{alone}"
        return f"masked-{tile}g{self.groups}" if self.groups else f"contiguous-{tile}"


def grouped_small_variant(
    weights: int, tokens: int, out_bytes: int, groups: int = 0, beside: int = SMALL_PROGRAMS
) -> GroupedSmallVariant:
    """The variant of a tile with a ring of 8 slots or as many as ``beside`` programs' room has."""
    slot = (weights + tokens) * K_BLOCK + scale_box(tokens) * FLOAT_BYTES
    turn = TURN_HALVES_BYTES
    if out_bytes == FLOAT_BYTES:
        turn = min(TURN_FLOATS_BYTES, weights * tokens * FLOAT_BYTES)
    shared = HALF_SHARED_BYTES if beside == SMALL_PROGRAMS else SHARED_BYTES
    stages = min(
        MAX_STAGES * SMALL_PROGRAMS // beside,
        (shared - RESERVED_BYTES - MAILBOX_BYTES - turn) // slot,
    )
    return GroupedSmallVariant(weights, tokens, stages, held(groups), beside)


def held(groups: int) -> int:
    """Of how many groups the compiled kernel keeps the counts: 0, or a power of two from 32 on."""
    return max(MIN_GROUPS, 1 << (groups - 1).bit_length()) if groups else 0


def registers(groups: int) -> tuple[int, int]:
    """A thread's registers: in the producer, in a consumer of the kernel that has two."""
    return next(found for most, found in REGISTERS.items() if groups <= most)


AnyGroupedVariant: TypeAlias = GroupedVariant | GroupedSmallVariant
