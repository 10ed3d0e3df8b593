"""Which records of ``grouped.py`` still say what a kernel takes, case by case.

A time counts if it is of the kernel that is chosen today, so that one timed before a form was added
drops out where that form is chosen, and if it is not of a source that is known to be slower.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import cache
from statistics import median
from typing import TYPE_CHECKING, Any

from blockscale.backends.registry import BACKENDS
from blockscale.formats import FP8_128X128_FP32, DType
from blockscale.kernels.cuda import grouped_choice as cuda_choice
from blockscale.kernels.gluon import grouped_choice as gluon_choice
from blockscale.planning.decision import Offer
from blockscale.planning.device import Device
from blockscale.planning.request import LinearRequest
from grouped_cases import MINIMAX_TOP, Case, all_cases

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

FAMILIES = ("gluon", "cuda")
DEEP_GEMM = "deep_gemm"
PROCESSORS = 132
OUT_BYTES = 2
# Sources whose Gluon loop had a branch: 5 to 18 % slower, but for the kernels of few rows, which
# have another loop (perf-log G33).
SLOW_GLUON, FEW = frozenset({"1d3604f", "71f0fd6"}), "few"


@dataclass(frozen=True, slots=True)
class Product:
    """What is timed, on one machine, whatever the arrangement of its rows."""

    machine: str
    out_dtype: str
    experts: int
    n: int
    k: int
    tokens: int

    @property
    def rows(self) -> float:
        """Of a group, the mean."""
        return self.tokens * MINIMAX_TOP / self.experts


@dataclass(frozen=True, slots=True)
class Times:
    """Microseconds of a product by backend.

    ``planned``: with rows as the backend's offer lists them for so many tokens; ``masked``: in
    slots, which no offer lists.
    """

    planned: dict[str, float]
    masked: dict[str, float]


def is_sound(record: dict[str, Any]) -> bool:
    """Whether its source is not known for a slower kernel."""
    is_slow = record["backend"] == "gluon" and record["commit"] in SLOW_GLUON
    return not is_slow or FEW in record["detail"]


def read(paths: Iterable[Path]) -> tuple[dict[Product, Times], Counter[str]]:
    """The times that count, the middle of the newest source's; how many do not, by reason."""
    cases = {case.name: case for case in all_cases()}
    taken: dict[tuple[Product, Case, str], dict[str, list[float]]] = defaultdict(dict)
    left: Counter[str] = Counter()
    for path in paths:
        for record in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
            case = cases.get(record["case"])
            reason = why_not(record, case)
            if case is None or reason:
                left[reason] += 1
                continue
            key = (product_of(case, path.parent.name, record["out_dtype"]), case, record["backend"])
            taken[key].setdefault(record["commit"], []).append(record["time_us"])
    found: dict[Product, Times] = defaultdict(lambda: Times({}, {}))
    for (product, case, backend), by_commit in taken.items():
        time_us = median(list(by_commit.values())[-1])
        if case.layout == "masked":
            found[product].masked[backend] = time_us
        elif case.alignment == offered_alignment(backend, case.groups, product.tokens):
            found[product].planned[backend] = time_us
    return {
        product: times for product, times in found.items() if times.planned or times.masked
    }, left


def why_not(record: dict[str, Any], case: Case | None) -> str:
    """Why a record does not count; empty if it does."""
    if case is None:
        return "of a case that is gone"
    if not is_sound(record):
        return "of a source whose Gluon loop is slower"
    name = record["backend"]
    if name in FAMILIES and record["detail"] != chosen(name, case, record["out_dtype"]):
        return "not what is chosen today"
    return ""


def product_of(case: Case, machine: str, out_dtype: str) -> Product:
    """A case without how its rows lie."""
    tokens = case.tokens or case.groups * case.rows // MINIMAX_TOP
    return Product(machine, out_dtype, case.groups, case.n, case.k, tokens)


@cache
def chosen(family: str, case: Case, out_dtype: str) -> str:
    """The name of what serves a case today."""
    if case.layout == "masked":
        rows = (case.groups, case.slot, case.likely)
        if family == "gluon":
            return gluon_choice.choose_masked(*rows, OUT_BYTES).name
        shape = (case.n, case.k)
        return cuda_choice.choose_masked(rows, shape, DType(out_dtype), PROCESSORS).name
    blocks = sum(-(-count // case.alignment) for count in case.counts(0))
    rows = (case.groups, blocks, case.alignment)
    if family == "gluon":
        return gluon_choice.choose_contiguous(*rows, case.n, OUT_BYTES, PROCESSORS).name
    shape = (case.n, case.k)
    return cuda_choice.choose_contiguous(rows, shape, DType(out_dtype), PROCESSORS).name


@cache
def offered_alignment(backend: str, experts: int, tokens: int) -> int | None:
    """Rows of a row block that a backend wants for so many tokens; None if it has no offer."""
    out = DType.BFLOAT16
    request = LinearRequest("experts", 4096, 4096, FP8_128X128_FP32, out, out, experts=experts)
    known = next((one for one in BACKENDS if one.name == backend), None)
    answer = known.evaluate(request, Device.named("sm_90")) if known else None
    if not isinstance(answer, Offer):
        return None
    return next(rows.alignment for rows in answer.rows if rows.m_range.contains(tokens))
