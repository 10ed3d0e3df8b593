"""Cases and operands of ``grouped.py``: DeepGEMM's own, and MiniMax-M2.5's experts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from blockscale.formats import FP8_1X128_FP32, FP8_128X128_FP32, K_MAJOR, MN_MAJOR_TMA_ALIGNED
from blockscale.tensor import BlockScaledTensor, as_stored

if TYPE_CHECKING:
    from collections.abc import Iterator

SHAPES = ((4096, 7168), (7168, 2048), (6144, 7168), (7168, 3072))
CONTIGUOUS = ((4, 8192), (8, 4096))
MASKED = ((32, 192), (6, 1024), (32, 20), (6, 20))
MASKED_SLOT = 4096
MINIMAX_SHAPES = ((3072, 3072), (3072, 1536))
MINIMAX_EXPERTS, MINIMAX_TOP = 256, 8
MINIMAX_PREFILL, MINIMAX_DECODE, MINIMAX_SLOT = 4096, (1, 16, 64, 128, 512, 1024), 128
ALIGNMENT = 128
# Rows of a row block by tokens: what plans take, and what they might.
LOW_BLOCKS = {
    1: (8, 16, 64),
    16: (8, 16, 64),
    64: (8, 16, 64),
    128: (8, 16, 32, 64),
    512: (16, 64),
    1024: (64, 128),
}
ROTATED_BYTES = 300 << 20
MAX_COPIES = 4


@dataclass(frozen=True, slots=True)
class Case:
    """One product. ``tokens``: of a routed case, sent to 8 of the groups each; else ``rows``."""

    family: str
    layout: str
    groups: int
    rows: int
    n: int
    k: int
    slot: int = 0
    tokens: int = 0
    alignment: int = ALIGNMENT

    @property
    def name(self) -> str:
        """Unique; also what a compiling process is told."""
        what = f"t{self.tokens}" if self.tokens else f"{self.groups}x{self.rows}"
        layout = self.layout if self.alignment == ALIGNMENT else f"blocks{self.alignment}"
        return f"{self.family}-{layout}-{what}-{self.n}x{self.k}"

    @property
    def likely(self) -> int:
        """Rows of a group, as the host expects them (DeepGEMM's tests: the mean and one)."""
        return self.tokens * MINIMAX_TOP // self.groups + 1 if self.tokens else self.rows

    @property
    def has_own_kernels(self) -> bool:
        """Whether it is not the same kernels as another case: only DeepGEMM compiles N and K in."""
        return self.alignment == ALIGNMENT or (self.n, self.k) == MINIMAX_SHAPES[0]

    def counts(self, seed: int) -> list[int]:
        """Rows of each group."""
        generator = torch.Generator().manual_seed(seed)
        if self.tokens:
            chances = torch.ones(self.tokens, self.groups)
            picks = torch.multinomial(chances, MINIMAX_TOP, generator=generator)
            return torch.bincount(picks.flatten(), minlength=self.groups).tolist()
        spread = 0.7 + 0.6 * torch.rand(self.groups, generator=generator)
        found = (spread * self.rows).int()
        if self.layout == "contiguous":
            found = (found + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT
        return found.tolist()


@dataclass(frozen=True, slots=True)
class Copy:
    """Operands of one call: rows by layout, their counts and where each group's rows start."""

    weight: BlockScaledTensor
    activation: BlockScaledTensor
    routing: torch.Tensor
    counts: list[int]
    starts: list[int]


def all_cases() -> Iterator[Case]:
    """MiniMax's first, so that a short time has something of everything."""
    for n, k in MINIMAX_SHAPES:
        for tokens in MINIMAX_DECODE:
            yield Case("minimax", "masked", MINIMAX_EXPERTS, 0, n, k, MINIMAX_SLOT, tokens)
            for low in LOW_BLOCKS[tokens]:
                yield Case("minimax", "contiguous", MINIMAX_EXPERTS, 0, n, k, 0, tokens, low)
        yield Case("minimax", "contiguous", MINIMAX_EXPERTS, 0, n, k, 0, MINIMAX_PREFILL)
    for n, k in SHAPES:
        for groups, rows in MASKED:
            yield Case("masked", "masked", groups, rows, n, k, MASKED_SLOT)
    for n, k in SHAPES:
        for groups, rows in CONTIGUOUS:
            yield Case("contiguous", "contiguous", groups, rows, n, k)


@lru_cache(maxsize=2)
def weights(groups: int, n: int, k: int, seed: int) -> BlockScaledTensor:
    """Normal codes that use E4M3's range, and scales near one another; the last two are kept."""
    generator = torch.Generator("cuda").manual_seed(seed)
    codes = torch.empty((groups, n, k), dtype=torch.float8_e4m3fn, device="cuda")
    for group in range(groups):
        codes[group] = normal_codes((n, k), generator)
    shape = (groups, -(-n // 128), -(-k // 128))
    scales = torch.rand(shape, generator=generator, device="cuda") * 1e-3 + 1e-4
    return BlockScaledTensor(codes, scales, FP8_128X128_FP32, K_MAJOR)


def empty_weight(case: Case) -> BlockScaledTensor:
    """Memory of the right size: what compiling needs."""
    codes = torch.empty((case.groups, case.n, case.k), dtype=torch.uint8, device="cuda")
    shape = (case.groups, -(-case.n // 128), -(-case.k // 128))
    scales = torch.empty(shape, device="cuda")
    return BlockScaledTensor(codes.view(torch.float8_e4m3fn), scales, FP8_128X128_FP32, K_MAJOR)


def normal_codes(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Normal numbers up to 448."""
    values = torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)
    return values.mul_(110).clamp_(-448, 448).to(torch.float8_e4m3fn)


def make_copies(case: Case) -> list[Copy]:
    """Different rows and, where all weights fit the L2 cache some times over, different weights."""
    every = case.groups * case.n * case.k
    stacks = max(1, min(2, math.ceil(ROTATED_BYTES / every)))
    touched = min(case.groups, case.tokens * MINIMAX_TOP or case.groups) * case.n * case.k
    count = max(2, min(MAX_COPIES, math.ceil(ROTATED_BYTES / touched)))
    key = (case.groups, case.n, case.k)
    return [make_copy(case, seed, weights(*key, seed % stacks)) for seed in range(count)]


def make_copy(case: Case, seed: int, weight: BlockScaledTensor, *, is_empty: bool = False) -> Copy:
    """Rows of every group and where they lie."""
    counts = case.counts(seed)
    generator = torch.Generator("cuda").manual_seed(1000 + seed)
    if case.layout == "masked":
        slots, rows = case.groups, case.slot
        starts = [group * case.slot for group in range(case.groups)]
        routing = torch.tensor(counts, dtype=torch.int32)
    else:
        blocks = torch.tensor([-(-count // case.alignment) for count in counts])
        routing = torch.arange(case.groups, dtype=torch.int32).repeat_interleave(blocks)
        slots, rows = 1, int(blocks.sum()) * case.alignment
        starts = ((blocks.cumsum(0) - blocks) * case.alignment).tolist()
    codes = (torch.empty if is_empty else torch.zeros)(
        (slots * rows, case.k), dtype=torch.uint8, device="cuda"
    )
    codes = codes.view(torch.float8_e4m3fn)
    stored = MN_MAJOR_TMA_ALIGNED.stored(rows, case.k, FP8_1X128_FP32)
    flat = torch.rand(slots * stored.elements, generator=generator, device="cuda") + 0.5
    leading = (slots,) if case.layout == "masked" else ()
    if not is_empty:
        for count, start in zip(counts, starts, strict=True):
            codes[start : start + count] = normal_codes((count, case.k), generator)
    if is_empty:
        routing = torch.zeros_like(routing) if leading else torch.full_like(routing, -1)
    data = codes.view(*leading, rows, case.k)
    scales = as_stored(flat, stored, leading)
    activation = BlockScaledTensor(data, scales, FP8_1X128_FP32, MN_MAJOR_TMA_ALIGNED)
    return Copy(weight, activation, routing.cuda(), counts, starts)


def wide_weight(copy: Copy, group: int) -> torch.Tensor:
    """One group's weight in float64."""
    scales = copy.weight.scales[group].double().repeat_interleave(128, 0)[: copy.weight.mn]
    return copy.weight.data[group].double() * scales.repeat_interleave(128, 1)[:, : copy.weight.k]


def wide_rows(copy: Copy, group: int, rows: slice, codes: torch.Tensor) -> torch.Tensor:
    """Some rows of the activation in float64; ``rows`` counts from the first slot's first."""
    scales, offset = copy.activation.scales, 0
    if copy.activation.leading:
        scales, offset = scales[group], copy.starts[group]
    own = scales[rows.start - offset : rows.stop - offset].double()
    return codes[rows].double() * own.repeat_interleave(128, 1)[:, : copy.weight.k]
