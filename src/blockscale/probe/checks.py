"""One backend, one output dtype, on this machine, against the float64 reference.

Exact claims first (scale fingerprints, integers, quantized codes and scales bit for bit), then the
kernel error on normal data. Outputs start as NaN, so that an element nobody wrote is seen.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch

from blockscale.formats import FP8_128X128_FP32, FP8_128X128_UE8M0, PowerOfTwo
from blockscale.modules.prepare import prepare_weight
from blockscale.planning.decision import Offer, Readiness
from blockscale.planning.plan import Choice, LinearPlan
from blockscale.planning.planner import conversion_step
from blockscale.planning.policy import PlanPolicy
from blockscale.planning.request import LinearRequest
from blockscale.probe import cases
from blockscale.probe.expert_cases import EXPERTS
from blockscale.probe.expert_checks import check_experts
from blockscale.probe.items import items_of
from blockscale.probe.outcome import (
    MAX_RELATIVE_ERROR,
    Outcome,
    WrongNumbersError,
    check_same,
    place_of,
)
from blockscale.reference import dequantize, quantize, relayout
from blockscale.tensor import BlockScaledTensor, torch_dtype

if TYPE_CHECKING:
    from collections.abc import Callable

    from blockscale.backends.base import Backend, Multiply, StepBackend
    from blockscale.formats import DType
    from blockscale.planning.device import Device
    from blockscale.probe.items import Item


def check_backend(
    backend: Backend, device: Device, dtype: DType, started: Callable[[str], None]
) -> Outcome:
    """Run every check that the backend's own gates let pass, in this process.

    ``started`` is called with a description before each item. Raises WrongNumbersError; whatever
    the provider raises passes through.
    """
    outcomes = []
    for item in items_of(backend, (dtype,)):
        started(item.words)
        outcomes.append(check_item(backend, device, item))
    return Outcome(
        sum(outcome.shapes for outcome in outcomes),
        max(outcome.max_relative_error for outcome in outcomes),
    )


def check_item(backend: Backend, device: Device, item: Item) -> Outcome:
    """Run the checks of one item; no shape if the backend's own gates refuse it.

    Raises WrongNumbersError; whatever the provider raises passes through.
    """
    plan = plan_of(backend, device, item)
    if plan is None:
        return Outcome(0, 0.0)
    if item.arrangement is not None:
        return check_experts(backend, plan, item.arrangement)
    _check_quantization(backend, plan)
    _check_exact(backend, plan)
    return Outcome(1, _check_normal(backend, plan))


def plan_of(backend: Backend, device: Device, item: Item) -> LinearPlan | None:
    """A plan with this backend alone, whatever its bounds on M; None if it makes no offer to run.

    Float32 scales where it takes them, else powers of two.
    """
    for fmt in (FP8_128X128_FP32, FP8_128X128_UE8M0):
        request = LinearRequest(
            f"probe {item.n}x{item.k}",
            item.n,
            item.k,
            fmt,
            item.dtype,
            item.dtype,
            PowerOfTwo.YES,
            experts=None if item.arrangement is None else EXPERTS,
        )
        offer = backend.evaluate(request, device)
        if not isinstance(offer, Offer) or offer.readiness is Readiness.PLAN_ONLY:
            continue
        step = conversion_step(request, offer.weight)
        if step.is_lossless:
            choices = (Choice(offer.m_range, offer),)
            return LinearPlan(
                request, choices, offer.weight, step.conversion, step.is_lossless, rejected=()
            )
    return None


def _tokens(plan: LinearPlan) -> list[int]:
    """The numbers of tokens that the backend takes."""
    m_range = plan.choices[0].offer.m_range
    return [m for m in cases.TOKENS if m and m_range.contains(m)]


def _place(plan: LinearPlan) -> tuple[Offer, str]:
    return plan.choices[0].offer, place_of()


def _check_quantization(backend: Backend, plan: LinearPlan) -> None:
    """The backend's own activation quantizer, bit for bit."""
    offer, device = _place(plan)
    if offer.activation is None:
        return
    form = offer.activation
    for m in _tokens(plan):
        values = cases.normal_activation(
            m, plan.request.k, torch_dtype(plan.request.activation_dtype), device
        )
        found = backend.quantize_activation(values, offer)
        wanted = relayout(quantize(values, form.format), form.layout)
        codes = found.data[:m].view(torch.uint8)
        check_same(codes, wanted.data.view(torch.uint8), f"codes of {m} quantized tokens")
        check_same(dequantize(found)[:m], dequantize(wanted), f"values of {m} quantized tokens")


def _check_exact(backend: Backend, plan: LinearPlan) -> None:
    offer, device = _place(plan)
    request = plan.request
    for make in (cases.fingerprint_weight, cases.integer_weight):
        weight = make(request.n, request.k, request.format, device)
        multiply = backend.bind(_prepared(backend, plan, weight), offer)
        for m in _tokens(plan):
            activation = cases.exact_activation(
                m, request.k, offer.activation, torch_dtype(request.activation_dtype), device
            )
            out = _run(multiply, activation, m, plan, device)
            exact = _values(activation).double() @ dequantize(weight).double().T
            wanted = exact.to(out.dtype)
            check_same(out, wanted, f"{make.__name__.replace('_', ' ')}, M={m}")


def _check_normal(backend: Backend, plan: LinearPlan) -> float:
    offer, device = _place(plan)
    request = plan.request
    weight = cases.normal_weight(request.n, request.k, request.format, device)
    prepared = _prepared(backend, plan, weight)
    multiply = backend.bind(prepared, offer)
    worst = 0.0
    for m in _tokens(plan):
        values = cases.normal_activation(
            m, request.k, torch_dtype(request.activation_dtype), device
        )
        activation: BlockScaledTensor | torch.Tensor = values
        if offer.activation is not None:
            activation = backend.quantize_activation(values, offer)
        out = _run(multiply, activation, m, plan, device)
        if hasattr(backend, "bind_steps"):
            _check_step(cast("StepBackend", backend), plan, prepared, values, out)
        exact = _values(activation)[:m].double() @ dequantize(weight).double().T
        error = float((out.double() - exact).norm() / exact.norm())
        if not error <= MAX_RELATIVE_ERROR[request.out_dtype]:
            limit = MAX_RELATIVE_ERROR[request.out_dtype]
            msg = f"relative error {error:.2e} at M={m}, limit {limit:.1e}"
            raise WrongNumbersError(msg)
        worst = max(worst, error)
    return worst


def _check_step(
    backend: StepBackend,
    plan: LinearPlan,
    prepared: BlockScaledTensor,
    values: torch.Tensor,
    wanted: torch.Tensor,
) -> None:
    """What a layer calls: one step, with the bits of the quantizer and the product."""
    request = plan.request
    dtypes = torch_dtype(request.activation_dtype), torch_dtype(request.out_dtype)
    step = backend.bind_steps(prepared, plan.choices[0].offer, dtypes)(len(values))
    out = torch.full_like(wanted, float("nan"))
    step(values, request.k, out, None)
    check_same(out, wanted, f"both launches in one step, M={len(values)}")


def _prepared(backend: Backend, plan: LinearPlan, weight: BlockScaledTensor) -> BlockScaledTensor:
    return prepare_weight(plan, weight, [backend] * len(plan.choices), PlanPolicy())


def _run(
    multiply: Multiply,
    activation: BlockScaledTensor | torch.Tensor,
    m: int,
    plan: LinearPlan,
    device: str,
) -> torch.Tensor:
    out = torch.full(
        (m, plan.request.n), float("nan"), dtype=torch_dtype(plan.request.out_dtype), device=device
    )
    # The union of two calls: which one it is follows from the offer, as the activation does.
    cast("Callable[[object, torch.Tensor, None], None]", multiply)(activation, out, None)
    return out


def _values(activation: BlockScaledTensor | torch.Tensor) -> torch.Tensor:
    return dequantize(activation) if isinstance(activation, BlockScaledTensor) else activation
