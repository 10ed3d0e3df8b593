"""Stored matrices quantized a strip of rows at a time, in memory that is allocated once.

The bits are those of ``reference.quantize``: the same float32 division by the same scales. The
reference makes a dozen temporaries of the matrix's size; here a strip stays in the cache.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from blockscale.checkpoint.read import read_into
from blockscale.checkpoint.tensors import torch_dtype
from blockscale.errors import CheckpointError
from blockscale.formats import ScaleFormat, round_up
from blockscale.reference.layout import restate
from blockscale.reference.quantize import codes_of_amax

if TYPE_CHECKING:
    from collections.abc import Callable

    from blockscale.checkpoint.header import TensorEntry
    from blockscale.formats import BlockFormat

# Of one element: as stored (at most float32), as float32, as a code.
BYTES_PER_ELEMENT = 4 + 4 + 1
# Beyond the last-level cache of one core nothing is gained.
STRIP_BYTES = 9 << 20
SIGNLESS = {2: 0x7FFF, 4: 0x7FFFFFFF}
INTEGERS = {2: torch.int16, 4: torch.int32}


def resident_bytes() -> int:
    """Memory that this process has resident now (0 where /proc does not tell)."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


class StripQuantizer:
    """Quantizes matrices to ``fmt``; one for each thread.

    ``max_bytes`` bounds its buffers. They grow beyond ``STRIP_BYTES`` only for a matrix one row of
    whose blocks needs more.
    """

    def __init__(self, fmt: BlockFormat, max_bytes: int) -> None:
        self._format = fmt
        self._max_bytes = max_bytes
        self._capacity = 0

    def quantize(self, entry: TensorEntry, emit: Callable[[memoryview], None]) -> bytes:
        """Hand all codes to ``emit``, strip by strip; give back the scales as float32.

        Raises CheckpointError, naming file and tensor, if a block holds NaN or Inf, or one row of
        blocks needs more memory than allowed.
        """
        rows, columns = entry.shape
        block = self._format.block
        padded = round_up(columns, block.k)
        self._reserve(entry, block.mn * padded)
        per_strip = self._capacity // (block.mn * padded) * block.mn
        # Made before the first strip: small tensors between large temporaries pin the heap.
        scales = torch.empty(block.grid(rows, columns))
        for first in range(0, rows, per_strip):
            count = min(per_strip, rows - first)
            grid = self._scales(entry, first, count)
            scales[first // block.mn : first // block.mn + grid.shape[0]] = grid
            emit(memoryview(self._codes.numpy())[: count * columns])  # type: ignore[arg-type]  # numpy arrays have the buffer protocol
        return scales.numpy().tobytes()

    def _reserve(self, entry: TensorEntry, least: int) -> None:
        if least * BYTES_PER_ELEMENT > self._max_bytes:
            raise CheckpointError(
                entry.path,
                f"one row of its blocks needs {least * BYTES_PER_ELEMENT} bytes of buffers, but "
                f"{self._max_bytes} are allowed; allow more memory or fewer workers",
                tensor=entry.name,
            )
        wanted = max(least, min(self._max_bytes, STRIP_BYTES) // BYTES_PER_ELEMENT)
        if wanted <= self._capacity:
            return
        self._raw = torch.empty(wanted, dtype=torch.float32)
        self._work = torch.empty(wanted, dtype=torch.float32)
        self._codes = torch.empty(wanted, dtype=torch.uint8)
        self._capacity = wanted

    def _scales(self, entry: TensorEntry, first: int, count: int) -> torch.Tensor:
        """Read one strip, leave its codes in ``self._codes``, give back its scales."""
        columns, block = entry.shape[1], self._format.block
        dtype = torch_dtype(entry)
        strip = self._raw.view(torch.uint8)[: count * columns * dtype.itemsize]
        read_into(entry, first * columns * dtype.itemsize, memoryview(strip.numpy()))  # type: ignore[arg-type]  # as above
        stored = strip.view(dtype).view(count, columns)
        tall, wide = round_up(count, block.mn), round_up(columns, block.k)
        amax = self._amax(stored, tall, wide)
        scales = restate(codes_of_amax(amax, self._format), self._format.scale, ScaleFormat.FP32)
        if not bool(torch.isfinite(scales).all()):
            raise CheckpointError(
                entry.path,
                f"holds NaN or Inf in rows {first} to {first + count - 1}; repair it, or keep the "
                "layer unquantized with --keep",
                tensor=entry.name,
            )
        work = self._work[: tall * wide].view(tall, wide)
        work[:count, :columns] = stored
        blocks = work.view(tall // block.mn, block.mn, wide // block.k, block.k)
        # |x| <= amax, so |x / scale| rounds to at most 448 and nothing is clamped.
        blocks.div_(scales[:, None, :, None])
        codes = self._codes[: count * columns].view(torch.float8_e4m3fn).view(count, columns)
        codes.copy_(work[:count, :columns])
        return scales

    def _amax(self, stored: torch.Tensor, tall: int, wide: int) -> torch.Tensor:
        """The largest magnitude of each block, as float32.

        Without their sign bit floats are ordered as integers, NaN above all.
        """
        block = self._format.block
        count, columns = stored.shape
        integer = INTEGERS[stored.dtype.itemsize]
        bits = self._work.view(integer)[: tall * wide].view(tall, wide)
        if (tall, wide) != (count, columns):
            bits.zero_()
        torch.bitwise_and(
            stored.view(integer), SIGNLESS[stored.dtype.itemsize], out=bits[:count, :columns]
        )
        largest = bits.view(tall // block.mn, block.mn, wide).amax(1)
        largest = largest.view(-1, wide // block.k, block.k).amax(2)
        return largest.view(stored.dtype).float()
