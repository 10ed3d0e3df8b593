"""The kernels that a plan will launch: what to build before the first request arrives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from blockscale.formats import DType
    from blockscale.planning.decision import MRange
    from blockscale.planning.plan import LinearPlan, ModelPlan


@dataclass(frozen=True, slots=True)
class Kernel:
    """One backend on one shape. ``experts`` None: a dense layer. ``layers``: how many run it."""

    backend: str
    n: int
    k: int
    experts: int | None
    activation_dtype: DType
    out_dtype: DType
    weight_form: str
    m_range: MRange
    layers: int


@dataclass(frozen=True, slots=True)
class WarmUp:
    """Layers that differ in what is built: one plan for each, and the kernels of all."""

    plans: tuple[LinearPlan, ...]
    kernels: tuple[Kernel, ...]


def warm_up_of(plan: ModelPlan) -> WarmUp:
    """Each distinct kernel of a plan once, in order of first use."""
    plans: dict[tuple[object, ...], LinearPlan] = {}
    counts: dict[tuple[object, ...], int] = {}
    for layer in plan.layers:
        if layer.is_servable:
            key = _key(layer)
            plans.setdefault(key, layer)
            counts[key] = counts.get(key, 0) + 1
    kernels = tuple(
        kernel for key, layer in plans.items() for kernel in _kernels(layer, counts[key])
    )
    return WarmUp(tuple(plans.values()), kernels)


def kernel_document(kernel: Kernel) -> dict[str, Any]:
    """A kernel as JSON values."""
    return {
        "backend": kernel.backend,
        "n": kernel.n,
        "k": kernel.k,
        "experts": kernel.experts,
        "activation_dtype": kernel.activation_dtype.value,
        "out_dtype": kernel.out_dtype.value,
        "weight_form": kernel.weight_form,
        "min_m": kernel.m_range.min_m,
        "max_m": kernel.m_range.max_m,
        "layers": kernel.layers,
    }


def _key(layer: LinearPlan) -> tuple[object, ...]:
    request = layer.request
    return (
        (request.n, request.k, request.experts, request.format, request.has_bias),
        (request.activation_dtype, request.out_dtype, layer.weight),
        tuple((choice.m_range, choice.offer) for choice in layer.choices),
    )


def _kernels(layer: LinearPlan, count: int) -> list[Kernel]:
    request, weight = layer.request, layer.weight
    assert weight is not None
    return [
        Kernel(
            choice.offer.backend,
            request.n,
            request.k,
            request.experts,
            request.activation_dtype,
            request.out_dtype,
            f"{weight.format} {weight.layout}",
            choice.m_range,
            count,
        )
        for choice in layer.choices
    ]
