"""``PlanPolicy``: what the user permits. The planner never goes beyond it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from blockscale.errors import SettingsError


class Exactness(Enum):
    """Whether a weight's values may change between checkpoint and kernel."""

    EXACT = "exact"
    """Never. Unverified scales count as not convertible."""
    ALLOW_LOSSY = "allow_lossy"
    """They may, within ``max_relative_error`` measured per layer at ``prepare``."""


class Determinism(Enum):
    """Whether the same input must give the same bits on every run."""

    ANY = "any"
    REQUIRED = "required"


class Proving(Enum):
    """Whether a backend must have passed the numeric probe on this very device."""

    ANY = "any"
    REQUIRED = "required"


class Strictness(Enum):
    """What happens to a layer that no backend can serve."""

    REPORT = "report"
    RAISE = "raise"


# FP8 data rewritten under power-of-two scales moves by 2.65 % (relative Frobenius) on normal
# weights (tests/reference/test_quantization_error.py); 3 % lets that pass and stops anything worse.
DEFAULT_MAX_RELATIVE_ERROR = 0.03


@dataclass(frozen=True, slots=True)
class PlanPolicy:
    """Limits on a plan. The default converts nothing that it cannot prove lossless.

    ``backends``: the only ones allowed, in order of preference; None for all, in the registry's
    order. ``max_relative_error`` applies under ``ALLOW_LOSSY`` only.
    """

    backends: tuple[str, ...] | None = None
    exactness: Exactness = Exactness.EXACT
    max_relative_error: float = DEFAULT_MAX_RELATIVE_ERROR
    determinism: Determinism = Determinism.ANY
    strictness: Strictness = Strictness.REPORT
    proving: Proving = Proving.ANY

    def __post_init__(self) -> None:
        """Refuse one name in place of a tuple of names: it would be read letter by letter."""
        if isinstance(self.backends, str):
            names = f"({self.backends!r},)"  # type: ignore[unreachable]  # for callers that are not type-checked
            msg = f"backends is {self.backends!r}; give a tuple of names, {names}"
            raise SettingsError(msg)
