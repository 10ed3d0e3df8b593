"""The environment, read in one place and turned into a policy.

===============================  ==============================  ==============================
variable                         values                          meaning
===============================  ==============================  ==============================
``BLOCKSCALE_BACKENDS``          names, separated by commas      the only backends, in order
``BLOCKSCALE_EXACTNESS``         ``exact``, ``allow_lossy``      may weights be requantized
``BLOCKSCALE_MAX_RELATIVE_ERROR``  a number from 0 to 1            limit under ``allow_lossy``
``BLOCKSCALE_DETERMINISM``       ``any``, ``required``           same bits on every run
``BLOCKSCALE_PROVING``           ``any``, ``required``           only backends the probe proved
``BLOCKSCALE_STRICTNESS``        ``report``, ``raise``           what an unservable layer does
``BLOCKSCALE_RANGES``            ``none``, ``nvtx``              do layers mark a timeline
===============================  ==============================  ==============================

``RANK`` and ``WORLD_SIZE``, as torchrun sets them, are read by ``read_process``: which of several
processes that share one output this is.

A ``BLOCKSCALE_`` variable that is not in this table is an error: a misspelt setting must not be
silently without effect.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from blockscale.errors import SettingsError
from blockscale.events import Ranges
from blockscale.planning.policy import PlanPolicy

if TYPE_CHECKING:
    from collections.abc import Mapping
    from enum import Enum

    _E = TypeVar("_E", bound=Enum)

PREFIX = "BLOCKSCALE_"
BACKENDS = "BLOCKSCALE_BACKENDS"
EXACTNESS = "BLOCKSCALE_EXACTNESS"
MAX_RELATIVE_ERROR = "BLOCKSCALE_MAX_RELATIVE_ERROR"
DETERMINISM = "BLOCKSCALE_DETERMINISM"
PROVING = "BLOCKSCALE_PROVING"
STRICTNESS = "BLOCKSCALE_STRICTNESS"
RANGES = "BLOCKSCALE_RANGES"
RANK, WORLD_SIZE = "RANK", "WORLD_SIZE"
KNOWN = (BACKENDS, EXACTNESS, MAX_RELATIVE_ERROR, DETERMINISM, PROVING, STRICTNESS, RANGES)


@dataclass(frozen=True, slots=True)
class Settings:
    """What the environment asks for.

    Names of backends are checked when something is planned.
    """

    policy: PlanPolicy = field(default_factory=PlanPolicy)
    ranges: Ranges = Ranges.NONE


def read_settings(environ: Mapping[str, str]) -> Settings:
    """The settings in ``environ`` (usually ``os.environ``); an empty value counts as unset.

    Raises SettingsError, naming variable and value, for a value without meaning or an unknown name.
    """
    unknown = sorted(name for name in environ if name.startswith(PREFIX) and name not in KNOWN)
    if unknown:
        msg = f"{unknown[0]} is no setting of blockscale; known: {', '.join(KNOWN)}"
        raise SettingsError(msg)
    default = PlanPolicy()
    return Settings(
        PlanPolicy(
            backends=_names(environ.get(BACKENDS, "")),
            exactness=_member(environ, EXACTNESS, default.exactness),
            max_relative_error=_ratio(environ, default.max_relative_error),
            determinism=_member(environ, DETERMINISM, default.determinism),
            strictness=_member(environ, STRICTNESS, default.strictness),
            proving=_member(environ, PROVING, default.proving),
        ),
        _member(environ, RANGES, Ranges.NONE),
    )


@dataclass(frozen=True, slots=True)
class Process:
    """Process number ``rank`` of ``ranks`` that were started together."""

    rank: int = 0
    ranks: int = 1


def read_process(environ: Mapping[str, str]) -> Process:
    """This process among those that torchrun started; the only one if it did not.

    Raises SettingsError, naming variable and value, if only one of RANK and WORLD_SIZE is set or
    they are no rank and number of processes.
    """
    rank, ranks = (environ.get(name, "") for name in (RANK, WORLD_SIZE))
    if not rank and not ranks:
        return Process()
    if not (rank.isdecimal() and ranks.isdecimal() and int(rank) < int(ranks)):
        msg = (
            f"{RANK} is {rank!r} and {WORLD_SIZE} is {ranks!r}; torchrun sets both, a rank from 0 "
            "to the number of processes less one; unset both to work alone"
        )
        raise SettingsError(msg)
    return Process(int(rank), int(ranks))


def _names(text: str) -> tuple[str, ...] | None:
    if not text:
        return None
    names = tuple(name.strip() for name in text.split(","))
    if not all(names):
        msg = f"{BACKENDS} is {text!r}; allowed: names of backends, separated by commas"
        raise SettingsError(msg)
    return names


def _member(environ: Mapping[str, str], name: str, default: _E) -> _E:
    text = environ.get(name, "")
    if not text:
        return default
    kind = type(default)
    try:
        return kind(text)
    except ValueError:
        allowed = ", ".join(str(member.value) for member in kind)
        msg = f"{name} is {text!r}; allowed: {allowed}"
        raise SettingsError(msg) from None


def _ratio(environ: Mapping[str, str], default: float) -> float:
    text = environ.get(MAX_RELATIVE_ERROR, "")
    if not text:
        return default
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value <= 1.0:
        msg = f"{MAX_RELATIVE_ERROR} is {text!r}; allowed: a number from 0 to 1"
        raise SettingsError(msg)
    return value
