"""A backend's answer to a request: an ``Offer``, or every ``Rejection`` there is."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from blockscale.formats import BlockFormat, ScaleLayout
    from blockscale.planning.device import Device
    from blockscale.planning.request import LinearRequest


# Serves any layer on any device, slowly: the definition of correct, for want of anything else.
LAST_RESORT = "reference"


class Obstacle(Enum):
    """Why a backend may not serve a layer. Each occurs in at least one test."""

    ARCHITECTURE = "architecture"
    NOT_INSTALLED = "not_installed"
    TOOLKIT = "toolkit"
    ACTIVATION_DTYPE = "activation_dtype"
    OUT_DTYPE = "out_dtype"
    BLOCK_SHAPE = "block_shape"
    SCALE_FORMAT = "scale_format"
    ALIGNMENT = "alignment"
    SHARD_SPLITS_BLOCK = "shard_splits_block"
    GROUPING = "grouping"
    EXPERT_SET = "expert_set"
    """It would run one weight of a set of experts, but not the other."""
    FAILED_PROBE = "failed_probe"
    UNVERIFIED_SCALES = "unverified_scales"
    LOSSY_CONVERSION = "lossy_conversion"
    NOT_DETERMINISTIC = "not_deterministic"
    NOT_PROVEN = "not_proven"
    """The policy wants proven backends only, and the probe never ran this one."""
    M_RANGE = "m_range"
    """It serves some token counts only, and nothing serves the others."""
    WEIGHT_FORM = "weight_form"
    """It would need a second prepared copy of the weight."""
    NO_RUN = "no_run"
    """The machine is here, but blockscale cannot run this provider yet."""
    OUTRANKED = "outranked"
    """It would serve the layer; another backend comes earlier in the order of preference."""
    EXCLUDED_BY_POLICY = "excluded_by_policy"


@dataclass(frozen=True, slots=True)
class Rejection:
    """One reason why one backend may not serve the layer, in words a person can act on.

    ``copy_bytes``: what a second prepared copy of the weight would take, where that is the
    obstacle.
    """

    backend: str
    obstacle: Obstacle
    reason: str
    copy_bytes: int | None = None


class Evidence(Enum):
    """Why we believe that a backend computes what its offer says."""

    PROVEN = "proven"
    """The probe compared it with the float64 reference on this very device."""
    TESTED = "tested"
    """This project's tests passed on this architecture."""
    DOCUMENTED = "documented"
    """Its provider says so; nobody here has run it on this architecture."""


class Readiness(Enum):
    """Whether blockscale itself can run the offer today."""

    RUNNABLE = "runnable"
    ONCE_PROVEN = "once_proven"
    """Written by the provider's documentation alone: it runs where the probe has proven it."""
    PLAN_ONLY = "plan_only"
    """The gates and layouts are known, blockscale has no ``run`` for it yet."""


@dataclass(frozen=True, slots=True)
class MRange:
    """Numbers of tokens, both ends included; ``max_m`` None means no limit."""

    min_m: int = 0
    max_m: int | None = None

    def __str__(self) -> str:
        """``M >= 0`` or ``1 <= M <= 31``."""
        if self.max_m is None:
            return f"M >= {self.min_m}"
        return f"{self.min_m} <= M <= {self.max_m}"

    def contains(self, m: int) -> bool:
        """Whether this range serves ``m`` tokens."""
        return self.min_m <= m and (self.max_m is None or m <= self.max_m)

    @property
    def is_unbounded(self) -> bool:
        """Whether it serves every M that launches anything (M = 0 launches nothing)."""
        return self.min_m <= 1 and self.max_m is None


@dataclass(frozen=True, slots=True)
class OperandForm:
    """What an operand must be when the kernel reads it: its format and its scale layout."""

    format: BlockFormat
    layout: ScaleLayout


class Arrangement(Enum):
    """How the rows of a grouped product lie; ``backends.base`` says it exactly."""

    CONTIGUOUS = "contiguous"
    """The rows of each expert follow each other, in whole row blocks that belong to one expert."""
    MASKED = "masked"
    """Every expert has a slot of as many rows; how many of them count is known to the device."""


@dataclass(frozen=True, slots=True)
class GroupedRows:
    """How a grouped kernel wants its rows where ``m_range`` tokens come to the experts.

    ``alignment``: rows in a row block of CONTIGUOUS, of which the rows of a slot of MASKED are a
    multiple.
    """

    m_range: MRange
    arrangement: Arrangement
    alignment: int


@dataclass(frozen=True, slots=True)
class Offer:
    """A backend would serve this layer if its operands come in these forms.

    ``activation`` is None where the backend takes unquantized activations (weight-only, or it
    quantizes inside). The planner compares ``weight`` with the checkpoint to see what would be
    converted; the backend does not hide it. ``notes`` are facts a reader of the plan should know.
    ``rows``: for a grouped layer, how rows must lie, covering ``m_range`` in rising order without
    gaps; empty for a dense one.
    """

    backend: str
    weight: OperandForm
    activation: OperandForm | None
    m_range: MRange = MRange()
    is_deterministic: bool = True
    evidence: Evidence = Evidence.DOCUMENTED
    readiness: Readiness = Readiness.PLAN_ONLY
    notes: tuple[str, ...] = ()
    rows: tuple[GroupedRows, ...] = ()


class PlannableBackend(Protocol):
    """The half of a backend that planning needs: a name and a pure question."""

    @property
    def name(self) -> str:
        """The provider's own name, lower case."""
        ...

    def evaluate(self, request: LinearRequest, device: Device) -> Offer | Sequence[Rejection]:
        """An offer, or all the reasons against one (never an empty sequence)."""
        ...


@runtime_checkable
class EstimatingBackend(PlannableBackend, Protocol):
    """A backend that can say how long it would take, comparably with others that can."""

    def estimate_us(self, request: LinearRequest, device: Device, m: int) -> float | None:
        """Microseconds for ``m`` tokens of a layer, or of a stack of experts, that it would serve.

        A pure function, milliseconds at most; None where it has no estimate.
        """
        ...
