"""A plan in plain words. Tables and colours are the command line's; the words are these."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from blockscale.planning.decision import Arrangement, Evidence, Readiness
from blockscale.planning.plan import Conversion
from blockscale.planning.request import ShardStyle

if TYPE_CHECKING:
    from collections.abc import Iterable

    from blockscale.planning.decision import GroupedRows, Offer, Rejection
    from blockscale.planning.device import Device
    from blockscale.planning.plan import LinearPlan, ModelPlan
    from blockscale.planning.request import LinearRequest

_KILO = 1000.0
_INDEX = re.compile(r"(?<=\.)\d+(?=\.|$)")

_EVIDENCE = {
    Evidence.PROVEN: "proven on this device",
    Evidence.TESTED: "tested on this architecture",
    Evidence.DOCUMENTED: "documented, unproven here",
}


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """Layers whose plans differ only in the numbers in their names.

    ``pattern`` has ``*`` for those numbers where there are several layers; ``plan`` is the first
    layer's and speaks for all.
    """

    pattern: str
    plan: LinearPlan
    names: tuple[str, ...]


def layer_groups(layers: Iterable[LinearPlan]) -> tuple[LayerGroup, ...]:
    """Layers grouped by name pattern and request, in order of first appearance."""
    groups: dict[tuple[str, LinearRequest], list[LinearPlan]] = {}
    for plan in layers:
        key = (_INDEX.sub("*", plan.name), replace(plan.request, name=""))
        groups.setdefault(key, []).append(plan)
    return tuple(
        LayerGroup(
            pattern if len(plans) > 1 else plans[0].name,
            plans[0],
            tuple(plan.name for plan in plans),
        )
        for (pattern, _), plans in groups.items()
    )


def reasons_by_backend(rejected: Iterable[Rejection]) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Each rejected backend with all its reasons, in the order in which they were asked."""
    reasons: dict[str, list[str]] = {}
    for rejection in rejected:
        reasons.setdefault(rejection.backend, []).append(rejection.reason)
    return tuple((backend, tuple(why)) for backend, why in reasons.items())


def request_words(request: LinearRequest) -> str:
    """Shape, format, dtypes and shard of a layer on one line."""
    experts = f"{request.experts} experts of " if request.experts is not None else ""
    merged = "+".join(map(str, request.parts))
    parts = f" ({merged})" if len(request.parts) > 1 else ""
    words = [
        f"{experts}N={request.n}{parts} K={request.k}",
        str(request.format),
        f"scales powers of two: {request.power_of_two.value}",
        f"{request.activation_dtype.value} to {request.out_dtype.value}",
    ]
    if request.has_bias:
        words.append("bias")
    if request.shard.style is not ShardStyle.WHOLE:
        words.append(f"{request.shard.style.value} shard, 1 of {request.shard.degree}")
    return ", ".join(words)


def conversion_words(plan: LinearPlan) -> str:
    """What ``prepare`` will do to the weight, and whether that loses anything."""
    target = plan.weight
    if target is None:
        return "nothing: no backend"
    if plan.conversion is Conversion.NONE:
        return "none, used as stored"
    where = f"{target.format} in {target.layout}"
    if plan.conversion is Conversion.RELAYOUT:
        return f"relayout, lossless: {where}{_restated(plan)}"
    if plan.is_lossless is None:
        return f"requantize: {where}; lossless only if every scale is a power of two, unread"
    return f"requantize, lossy: {where}"


def offer_words(offer: Offer) -> str:
    """Why the offer is believed, and whether blockscale can run it."""
    words = [_EVIDENCE[offer.evidence]]
    if offer.readiness is Readiness.PLAN_ONLY:
        words.append("blockscale cannot run it yet")
    if offer.readiness is Readiness.ONCE_PROVEN:
        words.append("runs only where doctor --probe has proven it")
    if not offer.is_deterministic:
        words.append("sums depend on timing")
    return ", ".join(words)


def rows_words(rows: GroupedRows) -> str:
    """How the experts' rows lie for some numbers of tokens."""
    what = {
        Arrangement.CONTIGUOUS: "expert after expert, in row blocks of",
        Arrangement.MASKED: "in a slot for each expert, a multiple of",
    }[rows.arrangement]
    return f"rows for {rows.m_range}: {what} {rows.alignment}"


def human_bytes(count: float) -> str:
    """``1.5 GB``: decimal units, as disks and model cards count."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < _KILO:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= _KILO
    return f"{count:.1f} TB"


def layer_count(count: int) -> str:
    """``1 layer``, ``2 layers``."""
    return "1 layer" if count == 1 else f"{count} layers"


def explain_linear(plan: LinearPlan) -> str:
    """The decision for one layer, every rejected backend and its reasons, as lines of text."""
    return "\n".join([plan.name, *_decision_lines(plan)])


def explain_model(plan: ModelPlan) -> str:
    """The plan of a checkpoint: findings first, then identical layers together, then the rest."""
    device = plan.device
    where = device.name if device.name == device.architecture else f"{device.name}, "
    if device.name != device.architecture:
        where += device.architecture
    lines = [
        f"plan for {where}: {layer_count(len(plan.layers))}, {len(plan.unservable)} unservable"
    ]
    for finding in plan.findings:
        layer = f"{finding.layer}: " if finding.layer else ""
        lines.append(f"{finding.severity.value}: {layer}{finding.message}")
    for group in layer_groups(plan.layers):
        count = len(group.names)
        title = group.pattern if count == 1 else f"{group.pattern} ({count} layers)"
        lines += ["", title, *_decision_lines(group.plan)]
    if plan.skipped:
        lines += ["", f"not quantized ({layer_count(len(plan.skipped))})"]
        reasons: dict[str, int] = {}
        for skipped in plan.skipped:
            reasons[skipped.reason] = reasons.get(skipped.reason, 0) + 1
        lines += [f"  {layer_count(count)}: {reason}" for reason, count in reasons.items()]
    return "\n".join(lines)


def unservable_message(plan: LinearPlan, device: Device) -> str:
    """Why no backend serves a layer: what was asked, then every backend with every reason."""
    reasons = "; ".join(
        f"{backend}: {', '.join(why)}" for backend, why in reasons_by_backend(plan.rejected)
    )
    return (
        f"no backend may serve layer {plan.name!r} ({request_words(plan.request)}) on "
        f"{device.name}: {reasons}"
    )


def _decision_lines(plan: LinearPlan) -> list[str]:
    lines = [f"  {request_words(plan.request)}"]
    if not plan.is_servable:
        lines.append("  no backend may serve it")
    for choice in plan.choices:
        offer = choice.offer
        lines.append(f"  {choice.m_range}: {offer.backend} ({offer_words(offer)})")
        lines += [f"    {choice.reason}"] * bool(choice.reason)
        form = offer.activation
        activation = f"{form.format} in {form.layout}" if form else "not quantized beforehand"
        lines.append(f"    activation: {activation}")
        lines += [f"    {rows_words(rows)}" for rows in offer.rows]
        lines += [f"    {note}" for note in offer.notes]
    if plan.is_servable:
        lines.append(f"  weight: {conversion_words(plan)}")
    for backend, reasons in reasons_by_backend(plan.rejected):
        lines.append(f"  not {backend}: {'; '.join(reasons)}")
    return lines


def _restated(plan: LinearPlan) -> str:
    """What happens to the numbers of the scales in an exact relayout, if anything."""
    assert plan.weight is not None
    source, target = plan.request.format, plan.weight.format
    words = ""
    if source.scale is not target.scale:
        words += f"; {source.scale.value} scales restated as {target.scale.value}"
    if source.block != target.block:
        rows, columns = source.block.mn // target.block.mn, source.block.k // target.block.k
        words += f"; each scale repeated for {rows}x{columns} smaller blocks"
    return words
