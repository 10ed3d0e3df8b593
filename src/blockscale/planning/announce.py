"""A plan as one log record; see ``blockscale.events``."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from blockscale import events
from blockscale.events import Kind

if TYPE_CHECKING:
    from blockscale.planning.plan import ModelPlan


def announce_plan(plan: ModelPlan) -> None:
    """Log who serves how many layers, and what was given up."""
    if not events.is_wanted(Kind.PLAN):
        return
    served = Counter(name for layer in plan.layers for name in dict.fromkeys(layer.backends))
    unservable = [layer.name for layer in plan.unservable]
    words = ", ".join(f"{name} {count}" for name, count in served.items()) or "none"
    missing = f"; {len(unservable)} without a backend" if unservable else ""
    events.emit(
        Kind.PLAN,
        f"planned {len(plan.layers)} layers for {plan.device.architecture}: {words}{missing}",
        device=plan.device.name,
        architecture=plan.device.architecture,
        layers=len(plan.layers),
        backends=dict(served),
        conversions=dict(Counter(layer.conversion.value for layer in plan.layers)),
        unservable=unservable,
        skipped=len(plan.skipped),
        findings=dict(Counter(finding.code for finding in plan.findings)),
    )
