"""Whether accesses of shared memory are ordered: vector clocks for the pretend Hopper.

Each partition and each copy counts its own time and knows how far it has seen each other's; what it
knows goes with its arrivals to a barrier, and from there to those that wait. Two accesses of the
same bytes, at least one a write, are a race unless the later one has seen the earlier: whatever
order they happened to come in on this run.

(The partition is one thread here. That its warps wait for one another before one of them arrives is
for ``tests/kernels_gluon/test_gluon_build.py``.)
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_NUMBERS = count()


@dataclass(slots=True)
class Clock:
    """One thread's, or one copy's."""

    seen: dict[int, int] = field(default_factory=dict)
    number: int = field(default_factory=lambda: next(_NUMBERS))

    def __post_init__(self) -> None:
        self.seen[self.number] = 1

    @property
    def time(self) -> int:
        """Its own."""
        return self.seen[self.number]

    def child(self) -> Clock:
        """Of what starts now: it has seen all that this one has."""
        child = Clock(dict(self.seen))
        self.seen[self.number] += 1
        return child

    def publish(self, known: dict[int, int]) -> None:
        """Let those that see ``known`` know all up to now."""
        merge(known, self.seen)
        self.seen[self.number] += 1


def merge(into: dict[int, int], seen: dict[int, int]) -> None:
    """Know what both know."""
    for number, time in seen.items():
        into[number] = max(time, into.get(number, 0))


class History:
    """The accesses of one allocation that a later one could race with."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # By thread, bytes, and whether it wrote: when.
        self._last: dict[tuple[int, int, int, bool], int] = {}

    def races(self, data: torch.Tensor, clock: Clock, *, writes: bool) -> bool:
        """Note an access; whether one before it has not been seen."""
        start, end = _span(data)
        with self._lock:
            # A copy: those that are noted at the same time wait.
            for key, time in list(self._last.items()):
                number, first, last, wrote = key
                if first >= end or start >= last:
                    continue
                if (wrote or writes) and clock.seen.get(number, 0) < time:
                    return True
                # Who has seen this write has seen what it has.
                if writes and start <= first and last <= end:
                    del self._last[key]
            self._last[clock.number, start, end, writes] = clock.time
        return False


def _span(data: torch.Tensor) -> tuple[int, int]:
    """Bytes of the allocation, from the first to the last; rows of a part are whole."""
    first = int(data.storage_offset())
    reach = sum((size - 1) * step for size, step in zip(data.shape, data.stride(), strict=True))
    return first * data.itemsize, (first + reach + 1) * data.itemsize
