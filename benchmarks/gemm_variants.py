"""What ``gemm.py`` times: backends' own calls on copies of a weight, bound once for an (N, K).

Copies together are several times the L2 cache, so that a replay over all of them reads weights from
memory, as a model does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import TYPE_CHECKING, Any

import torch

from blockscale.backends.registry import BACKENDS, runnable_backend_named
from blockscale.errors import BlockscaleError
from blockscale.formats import FP8_1X128_FP32, FP8_128X128_FP32, MN_MAJOR_TMA_ALIGNED, DType
from blockscale.kernels.cuda.product import CudaProduct
from blockscale.kernels.gluon.choice import promising
from blockscale.kernels.gluon.product import GluonProduct
from blockscale.planning.decision import Offer
from blockscale.planning.planner import plan_linear
from blockscale.planning.policy import PlanPolicy
from blockscale.planning.request import LinearRequest
from blockscale.probe import detect_device
from blockscale.reference import dequantize, quantize, relayout
from blockscale.tensor import torch_dtype
from gemm_summary import OURS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from blockscale.formats import ScaleLayout
    from blockscale.planning.decision import MRange
    from blockscale.planning.device import Device
    from blockscale.planning.plan import LinearPlan
    from blockscale.tensor import BlockScaledTensor

BF16_MATMUL = "bf16_matmul"
ROTATED_BYTES = 200 << 20
MAX_COPIES = 32
# Rows that are compared with float64: the first and the last.
CHECKED_ROWS = 256
# Relative to the norm of the product; bf16_matmul rounds its operands.
LIMITS = {DType.FLOAT32: 3e-4, DType.FLOAT16: 5e-4, DType.BFLOAT16: 2.5e-3}
BF16_OPERANDS_LIMIT = 1e-2


def copies_for(m: int, n: int, k: int, most: int = MAX_COPIES) -> int:
    """How many operands and results together are several times the L2 cache; at most ``most``."""
    return max(2, min(most, math.ceil(ROTATED_BYTES / (n * k + m * k + 2 * m * n))))


@cache
def this_device() -> Device:
    """``detect_device``, once."""
    return detect_device()


def normal(rows: int, k: int, seed: int) -> torch.Tensor:
    """Normal values, the same for a seed."""
    generator = torch.Generator(device="cuda").manual_seed(seed)
    return torch.randn(rows, k, generator=generator, device="cuda")


@dataclass(frozen=True, slots=True)
class Bound:
    """A backend's products, one for each copy of the weight, and what its offer says of M.

    ``layout``: how it wants activations' scales.
    """

    products: list[Any]
    layout: ScaleLayout
    m_range: MRange


class Weights:
    """Copies of an (n, k) weight, and what backends made of them."""

    def __init__(self, n: int, k: int, count: int) -> None:
        self.n, self.k = n, k
        self.copies = [
            quantize(normal(n, k, seed), FP8_128X128_FP32) for seed in range(n + k, n + k + count)
        ]
        self._bound: dict[tuple[str, DType], Bound | None] = {}
        self._plans: dict[DType, LinearPlan] = {}

    @cached_property
    def exact(self) -> torch.Tensor:
        """The first copy's values, in float64, transposed."""
        return dequantize(self.copies[0]).double().T

    @cached_property
    def bf16(self) -> list[torch.Tensor]:
        """All copies' values, rounded to bfloat16, transposed."""
        return [dequantize(copy).to(torch.bfloat16).t() for copy in self.copies]

    def bound(self, backend: str, dtype: DType) -> Bound | None:
        """The backend's products; None if it cannot, with its words printed."""
        key = backend, dtype
        if key not in self._bound:
            self._bound[key] = self._bind(backend, dtype)
        return self._bound[key]

    def _bind(self, name: str, dtype: DType) -> Bound | None:
        evaluated = next(backend for backend in BACKENDS if backend.name == name)
        offer = evaluated.evaluate(self._request(dtype), this_device())
        if not isinstance(offer, Offer) or offer.activation is None:
            print(f"{name} {dtype.value}: makes no offer for {self.n}x{self.k}", flush=True)
            return None
        try:
            backend = runnable_backend_named(name)
            layout = offer.weight.layout
            products = [backend.bind(relayout(copy, layout), offer) for copy in self.copies]
        except (BlockscaleError, ImportError, RuntimeError) as error:
            say_failed(name, dtype, error)
            return None
        return Bound(products, offer.activation.layout, offer.m_range)

    def planned(self, m: int, dtype: DType) -> str | None:
        """Which of blockscale's own kernels the planner takes for ``m`` tokens, if any."""
        plan = self._plans.get(dtype)
        if plan is None:
            own = [backend for backend in BACKENDS if backend.name in OURS]
            plan = plan_linear(self._request(dtype), this_device(), PlanPolicy(), own)
            self._plans[dtype] = plan
        return plan.choice_for(m).offer.backend if plan.is_servable else None

    def _request(self, dtype: DType) -> LinearRequest:
        return LinearRequest("bench", self.n, self.k, FP8_128X128_FP32, dtype, dtype)


@dataclass(frozen=True, slots=True)
class Variant:
    """Something to time. ``calls``: one for each copy, writing into ``outs``."""

    backend: str
    dtype: DType
    calls: list[Callable[[], object]]
    outs: list[torch.Tensor]
    detail: str = ""
    is_planned: bool = False

    @property
    def name(self) -> str:
        """Unique within a shape."""
        return f"{self.backend} {self.dtype.value} {self.detail}".strip()

    def run(self) -> None:
        """All copies, one after the other."""
        for call in self.calls:
            call()


class Problem:
    """``m`` tokens for copies of a weight: activations, and a result for each output type."""

    def __init__(self, m: int, weights: Weights) -> None:
        self.m, self.weights = m, weights
        self.count = copies_for(m, weights.n, weights.k, len(weights.copies))
        self.activations = [
            quantize(normal(m, weights.k, seed), FP8_1X128_FP32) for seed in range(self.count)
        ]
        self._moved: dict[ScaleLayout, list[BlockScaledTensor]] = {}
        self._outs: dict[DType, list[torch.Tensor]] = {}

    def moved(self, layout: ScaleLayout) -> list[BlockScaledTensor]:
        """The activations with scales in this layout."""
        if layout not in self._moved:
            self._moved[layout] = [relayout(one, layout) for one in self.activations]
        return self._moved[layout]

    def outs(self, dtype: DType) -> list[torch.Tensor]:
        """Results, shared by all variants that write this type: each is checked when it wrote."""
        if dtype not in self._outs:
            shape = self.m, self.weights.n
            empty = partial(torch.empty, shape, dtype=torch_dtype(dtype), device="cuda")
            self._outs[dtype] = [empty() for _ in range(self.count)]
        return self._outs[dtype]

    @cached_property
    def rows(self) -> torch.Tensor:
        """The rows that are checked."""
        m = self.m
        rows = sorted({*range(min(m, CHECKED_ROWS)), *range(max(0, m - CHECKED_ROWS), m)})
        return torch.tensor(rows, device="cuda")

    @cached_property
    def expected(self) -> torch.Tensor:
        """The first copy's product in these rows, of the dequantized operands, in float64."""
        return dequantize(self.activations[0])[self.rows].double() @ self.weights.exact

    def variant(self, name: str, dtype: DType) -> Variant | None:
        """A backend on this problem, run once; None if it cannot, with its words printed."""
        if name == BF16_MATMUL:
            return self._bf16_matmul()
        bound = self.weights.bound(name, dtype)
        if bound is None or not bound.m_range.contains(self.m):
            return None
        first, detail = bound.products[0], ""
        if isinstance(first, (GluonProduct, CudaProduct)):
            detail = first.work(self.m, torch_dtype(dtype)).name
        is_planned = name in OURS and self.weights.planned(self.m, dtype) == name
        calls = self._calls(bound.products, dtype, bound.layout)
        variant = Variant(name, dtype, calls, self.outs(dtype), detail, is_planned)
        try:
            calls[0]()
        except (BlockscaleError, ImportError, RuntimeError) as error:
            say_failed(name, dtype, error)
            return None
        return variant

    def experiments(self, dtype: DType) -> Iterator[Variant]:
        """Every Gluon candidate that the choice does not hold for much slower than what it took."""
        n, k, out = self.weights.n, self.weights.k, torch_dtype(dtype)
        processors = torch.cuda.get_device_properties(0).multi_processor_count
        for work in promising(self.m, n, k, dtype.bytes, processors):
            products = [GluonProduct(copy) for copy in self.weights.copies[: self.count]]
            for product in products:
                product.use(work, self.m, out)
            calls = self._calls(products, dtype, MN_MAJOR_TMA_ALIGNED)
            yield Variant("gluon", dtype, calls, self.outs(dtype), f"candidate: {work.name}")

    def is_right(self, variant: Variant) -> bool:
        """Whether the first copy's result is near the float64 product, in its checked rows."""
        variant.outs[0].fill_(float("nan"))
        variant.calls[0]()
        error = (variant.outs[0][self.rows].double() - self.expected).norm() / self.expected.norm()
        bf16 = variant.backend == BF16_MATMUL
        limit = BF16_OPERANDS_LIMIT if bf16 else LIMITS[variant.dtype]
        if not error <= limit:
            print(f"WRONG {variant.name}: relative error {error:.2e}, not timed", flush=True)
            return False
        return True

    def _calls(
        self, products: Sequence[Any], dtype: DType, layout: ScaleLayout
    ) -> list[Callable[[], object]]:
        operands = zip(products, self.moved(layout), self.outs(dtype), strict=False)
        return [partial(multiply, activation, out, None) for multiply, activation, out in operands]

    def _bf16_matmul(self) -> Variant:
        activations = [dequantize(one).to(torch.bfloat16) for one in self.activations]
        outs = self.outs(DType.BFLOAT16)
        operands = zip(activations, self.weights.bf16, outs, strict=False)
        calls: list[Callable[[], object]] = [partial(torch.mm, a, b, out=o) for a, b, o in operands]
        return Variant(BF16_MATMUL, DType.BFLOAT16, calls, outs)


def say_failed(name: str, dtype: DType, error: Exception) -> None:
    """A line that a backend failed, and its words."""
    print(f"{name} {dtype.value}: {' '.join(str(error).split())[:200]}", flush=True)
