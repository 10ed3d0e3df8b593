"""``Device``: the facts about a machine that a plan depends on. Inventable: no GPU is needed."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import Enum
from typing import TYPE_CHECKING

from blockscale.errors import SettingsError

if TYPE_CHECKING:
    from blockscale.formats import DType
    from blockscale.planning.decision import Arrangement


class Installed(Enum):
    """Whether a package is there. ``ASSUMED``: the device was invented, so nobody looked."""

    YES = "yes"
    NO = "no"
    ASSUMED = "assumed"


class Verdict(Enum):
    """What the probe found when it ran a backend against the float64 reference."""

    PROVEN = "proven"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Proof:
    """One backend's numbers were checked on this device, for one output dtype.

    ``detail`` is the measured reason: an error, a crash, a time limit, or the error bound reached.
    ``arrangement``: of the rows of experts whose products were checked, None for dense layers.
    """

    backend: str
    out_dtype: DType
    verdict: Verdict
    detail: str
    arrangement: Arrangement | None = None

    @property
    def words(self) -> str:
        """``triton proven for float16``, ``triton failed for float16, masked experts``."""
        experts = f", {self.arrangement.value} experts" if self.arrangement is not None else ""
        return f"{self.backend} {self.verdict.value} for {self.out_dtype.value}{experts}"


@dataclass(frozen=True, slots=True)
class Measurement:
    """How long one backend took, activations quantized before, on this kind of device.

    ``time_us``: median microseconds of the matrix product alone. ``experts``: of a product over a
    stack of so many, ``m`` being the tokens that came to the layer; None for a dense one.
    """

    backend: str
    n: int
    k: int
    out_dtype: DType
    m: int
    time_us: float
    experts: int | None = None


@dataclass(frozen=True, slots=True)
class Device:
    """What a plan may know about a machine.

    ``capability``: CUDA compute capability, None for a CPU. ``packages``: installed versions by
    distribution name, None if the device was invented and every provider is assumed installed.
    ``proofs``: what the probe measured here; empty if it was never run. ``measurements``: times
    that order the backends; no part of a device's identity: a plan carries what came of them.
    """

    name: str
    capability: tuple[int, int] | None
    sm_count: int | None = None
    memory_bytes: int | None = None
    cuda: tuple[int, int] | None = None
    packages: tuple[tuple[str, str], ...] | None = None
    proofs: tuple[Proof, ...] = ()
    measurements: tuple[Measurement, ...] = field(default=(), compare=False, repr=False)

    @staticmethod
    def named(name: str) -> Device:
        """An invented device: ``cpu``, ``sm_90`` or any other of ``KNOWN_DEVICES``.

        Every provider is assumed installed and nothing is proven. Raises SettingsError for an
        unknown name.
        """
        for device in KNOWN_DEVICES:
            if device.name == name:
                return device
        known = ", ".join(device.name for device in KNOWN_DEVICES)
        msg = f"no device is called {name!r}; known: {known}"
        raise SettingsError(msg)

    @property
    def is_cpu(self) -> bool:
        """Whether this device has no GPU."""
        return self.capability is None

    @property
    def architecture(self) -> str:
        """``sm_90``, or ``cpu``."""
        if self.capability is None:
            return "cpu"
        major, minor = self.capability
        return f"sm_{major}{minor}"

    def installed(self, package: str) -> Installed:
        """Whether a distribution is installed."""
        if self.packages is None:
            return Installed.ASSUMED
        return Installed.YES if any(n == package for n, _ in self.packages) else Installed.NO

    def version(self, package: str) -> str | None:
        """The installed version of a distribution, None if it is missing or assumed."""
        return next((v for n, v in self.packages or () if n == package), None)

    def proof(
        self, backend: str, out_dtype: DType, arrangement: Arrangement | None = None
    ) -> Proof | None:
        """What the probe measured for this backend and output dtype, if it ran.

        With dense layers, or with experts whose rows lie so.
        """
        wanted = (backend, out_dtype, arrangement)
        for proof in self.proofs:
            if (proof.backend, proof.out_dtype, proof.arrangement) == wanted:
                return proof
        return None

    def with_packages(self, *packages: tuple[str, str]) -> Device:
        """The same device with exactly these packages installed."""
        return replace(self, packages=packages)


# SM counts and memory of the usual part of each architecture; CUDA is the first release whose
# compiler targets it and has block-scaled FP8, so that an invented device is never too old.
KNOWN_DEVICES: tuple[Device, ...] = (
    Device("cpu", None),
    Device("sm_80", (8, 0), 108, 80 << 30, (12, 9)),  # A100
    Device("sm_86", (8, 6), 84, 24 << 30, (12, 9)),  # RTX 3090
    Device("sm_89", (8, 9), 142, 48 << 30, (12, 9)),  # L40S
    Device("sm_90", (9, 0), 132, 141 << 30, (13, 0)),  # H200
    Device("sm_100", (10, 0), 148, 180 << 30, (13, 0)),  # B200
    Device("sm_103", (10, 3), 148, 288 << 30, (13, 0)),  # B300
    Device("sm_110", (11, 0), 20, 128 << 30, (13, 0)),  # Thor
    Device("sm_120", (12, 0), 188, 96 << 30, (13, 0)),  # RTX PRO 6000
    Device("sm_121", (12, 1), 48, 128 << 30, (13, 0)),  # GB10
)
