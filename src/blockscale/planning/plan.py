"""``LinearPlan`` and ``ModelPlan``: the decision, with everything that led to it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from blockscale.planning.contract import Contract
    from blockscale.planning.decision import MRange, Offer, OperandForm, Rejection
    from blockscale.planning.device import Device
    from blockscale.planning.policy import PlanPolicy
    from blockscale.planning.request import LinearRequest


class Conversion(Enum):
    """What ``prepare`` does to the checkpoint's weight, once."""

    NONE = "none"
    RELAYOUT = "relayout"
    """Same values, other memory. Exact."""
    REQUANTIZE = "requantize"
    """Data and scales change. Exact only if every scale already was a power of two."""


class Severity(Enum):
    """How much a finding matters."""

    NOTE = "note"
    WARNING = "warning"
    FAULT = "fault"
    """The model cannot be served as asked."""


@dataclass(frozen=True, slots=True)
class Finding:
    """Something a person should know. ``layer`` None: it concerns the whole checkpoint."""

    severity: Severity
    code: str
    message: str
    layer: str | None = None


@dataclass(frozen=True, slots=True)
class Choice:
    """One backend serves one range of token counts.

    ``reason``: the times that chose it, in words; empty where the order of preference did.
    """

    m_range: MRange
    offer: Offer
    reason: str = ""


@dataclass(frozen=True, slots=True)
class LinearPlan:
    """How one layer runs. ``choices`` cover every M once, in rising order, on one prepared weight.

    ``choices`` is empty if no backend may serve the layer; then ``rejected`` says why for each.
    ``is_lossless`` is None only if that depends on data nobody has read.
    """

    request: LinearRequest
    choices: tuple[Choice, ...]
    weight: OperandForm | None
    conversion: Conversion
    is_lossless: bool | None
    rejected: tuple[Rejection, ...]

    @property
    def name(self) -> str:
        """The layer's name."""
        return self.request.name

    @property
    def is_servable(self) -> bool:
        """Whether some backend runs this layer."""
        return bool(self.choices)

    @property
    def backends(self) -> tuple[str, ...]:
        """The chosen backends, in order of rising M."""
        return tuple(choice.offer.backend for choice in self.choices)

    def choice_for(self, m: int) -> Choice:
        """The choice that serves ``m`` tokens. Raises LookupError if the layer is unservable."""
        for choice in self.choices:
            if choice.m_range.contains(m):
                return choice
        msg = f"layer {self.name!r}: no backend serves M={m}"
        raise LookupError(msg)


@dataclass(frozen=True, slots=True)
class SkippedLayer:
    """A linear layer that stays as it is on disk, and why."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class ModelPlan:
    """The plan of a whole checkpoint on one device, for one rank."""

    device: Device
    policy: PlanPolicy
    layers: tuple[LinearPlan, ...]
    skipped: tuple[SkippedLayer, ...] = ()
    findings: tuple[Finding, ...] = ()

    def layer(self, name: str) -> LinearPlan:
        """The plan of the layer called ``name``. Raises KeyError if there is none."""
        for plan in self.layers:
            if plan.name == name:
                return plan
        raise KeyError(name)

    @property
    def unservable(self) -> tuple[LinearPlan, ...]:
        """Layers that no backend may serve."""
        return tuple(plan for plan in self.layers if not plan.is_servable)

    def contract(self) -> Contract:
        """What this rank wants to receive when weights change; ``.to_json()`` is to be sent.

        Raises PlanError, naming it, if a layer has no backend.
        """
        from blockscale.planning.contract import contract_of  # noqa: PLC0415 - it reads plans

        return contract_of(self)
