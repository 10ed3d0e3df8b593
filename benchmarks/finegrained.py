"""transformers' own FP8 kernel, from its sources, where the Hub cannot be reached.

``.whl/finegrained_fp8`` is the package of that name out of the kernels-community sources, version
4, the one that transformers 5.17 and 5.24 ask for: plain Triton, so that its build adds nothing but
a namespace for its operators. With the Hub, and on bfloat16, transformers would call DeepGEMM.
"""

from __future__ import annotations

import hashlib
import importlib
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

FOLDER = Path(__file__).resolve().parent.parent / ".whl"
PACKAGE = "finegrained_fp8"
BLOCK = 128


def is_here() -> bool:
    """Whether its sources are, and a compiler instead of Triton's interpreter."""
    from triton import knobs

    return (FOLDER / PACKAGE / "matmul.py").is_file() and not knobs.runtime.interpret


def kernel() -> ModuleType:
    """The package. Imports Triton."""
    name = f"{PACKAGE}._ops"
    if name not in sys.modules:
        made: Any = ModuleType(name)
        made.ops = getattr(torch.ops, PACKAGE)
        made.add_op_namespace_prefix = lambda operator: f"{PACKAGE}::{operator}"
        sys.modules[name] = made
        sys.path.insert(0, str(FOLDER))
    return importlib.import_module(PACKAGE)


def give_to_transformers() -> str:
    """Put it where transformers keeps what it got from the Hub; says which sources these are."""
    from transformers.integrations import finegrained_fp8

    found = kernel()
    parts = (found.matmul_2d, found.matmul_batched, found.matmul_grouped)
    finegrained_fp8._FINEGRAINED_FP8 = finegrained_fp8.FineGrainedFP8(*parts)  # noqa: SLF001 - its own loader starts with the Hub
    sources = b"".join(path.read_bytes() for path in sorted((FOLDER / PACKAGE).glob("*.py")))
    return f"kernels-community sources, sha256 {hashlib.sha256(sources).hexdigest()[:16]}"


@dataclass(frozen=True, slots=True)
class Launch:
    """One of the launches that it times to choose from, for m tokens of an (n, k) layer."""

    dtype: str
    m: int
    n: int
    k: int
    config: int

    @property
    def name(self) -> str:
        """As in the list of kernels."""
        return f"{PACKAGE} {self.dtype} {self.m}x{self.n}x{self.k} #{self.config}"

    def compile(self) -> None:
        """Have Triton's disk cache hold it for this machine's GPU."""
        parts = importlib.import_module(f"{kernel().__name__}.matmul")
        tuned: Any = parts.w8a8_block_dynamic_fp8_matmul_kernel
        values = getattr(torch, self.dtype)
        m, n, k = self.m, self.n, self.k
        tuned.fn.warmup(
            *(values, torch.float8_e4m3fn, values, torch.float32),
            *(m, n, k),
            *(k, 1, 1, k, n, 1, 1, -(-k // BLOCK)),
            grid=(1, 1),
            BLOCK_SIZE_M=parts.adaptive_block_size_m(m),
            BLOCK_SIZE_N=BLOCK,
            BLOCK_SIZE_K=BLOCK,
            GROUP_SIZE_M=parts.GROUP_SIZE_M,
            **tuned.configs[self.config].all_kwargs(),
        )


def launches(n: int, k: int, tokens: Sequence[int], dtype: str) -> Iterator[Launch]:
    """All that may be launched for these numbers of tokens, each machine code once."""
    parts = importlib.import_module(f"{kernel().__name__}.matmul")
    count = len(parts.w8a8_block_dynamic_fp8_matmul_kernel.configs)
    met = set()
    for m in tokens:
        # Triton compiles anew for an integer that is 1, or a multiple of 16.
        key = (parts.adaptive_block_size_m(m), m == 1, m % 16 == 0)
        if key not in met:
            met.add(key)
            yield from (Launch(dtype, m, n, k, config) for config in range(count))
