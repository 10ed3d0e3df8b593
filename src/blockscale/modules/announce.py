"""What modules tell the log: a weight was prepared, new values were taken."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from blockscale import events
from blockscale.events import Kind

if TYPE_CHECKING:
    from blockscale.planning.plan import LinearPlan
    from blockscale.tensor import BlockScaledTensor


def announce_prepared(plan: LinearPlan, prepared: BlockScaledTensor, seconds: float) -> None:
    """One record for a layer, or for one stack of a set of experts.

    ``seconds`` it took, reading included where the weight was read on the way.
    """
    if events.is_wanted(Kind.PREPARE, logging.DEBUG):
        backends = ", ".join(plan.backends)
        events.emit(
            Kind.PREPARE,
            f"{plan.name}: {plan.conversion.value} conversion for {backends}",
            logging.DEBUG,
            layer=plan.name,
            backends=list(plan.backends),
            conversion=plan.conversion.value,
            lossless=plan.is_lossless,
            format=prepared.format.name,
            scale_layout=prepared.layout.name,
            bytes=prepared.nbytes,
            seconds=round(seconds, 6),
        )


def announce_updated(name: str, updates: int) -> None:
    """One record for a layer that took new values, the ``updates``-th time."""
    message = f"{name}: new weight"
    events.emit(Kind.UPDATE, message, logging.DEBUG, layer=name, updates=updates)


def announce_updated_expert(name: str, expert: int, updates: int) -> None:
    """As ``announce_updated``, for one of the experts called ``name``."""
    events.emit(
        Kind.UPDATE,
        f"{name}: new weights of expert {expert}",
        logging.DEBUG,
        layer=name,
        expert=expert,
        updates=updates,
    )
