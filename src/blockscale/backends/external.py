"""Backends of other packages: those that a distribution registers as an entry point.

A package adds ``[project.entry-points."blockscale.backends"]`` with ``name = "module:Class"`` to
its pyproject.toml. Its module is imported whenever backends are listed, so it must import its
provider inside ``prepare`` and ``bind`` only, as the backends here do.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING

from blockscale.errors import BackendError

if TYPE_CHECKING:
    from collections.abc import Collection

    from blockscale.planning.decision import PlannableBackend

GROUP = "blockscale.backends"
_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")


@dataclass(frozen=True, slots=True)
class ExternalBackend:
    """A backend and the distributions whose versions its numbers depend on, its own first."""

    backend: PlannableBackend
    packages: tuple[str, ...]


def external_backends(taken: Collection[str]) -> tuple[ExternalBackend, ...]:
    """Every backend that an installed package registers, by name.

    ``taken``: names that are in use. Raises BackendError, naming the package, if a backend cannot
    be imported or made, is none, or has a name that is taken: a backend that silently went missing
    would change plans.
    """
    found: dict[str, ExternalBackend] = {}
    for point in metadata.entry_points(group=GROUP):
        one = _loaded(point)
        name = one.backend.name
        if name in taken or name in found:
            raise _error(point, f"is called {name!r}, as another backend is; rename it")
        found[name] = one
    return tuple(found[name] for name in sorted(found))


def _loaded(point: metadata.EntryPoint) -> ExternalBackend:
    try:
        backend = point.load()()
    except Exception as error:
        first = (str(error).strip().splitlines() or ["no message"])[0]
        raise _error(point, f"cannot be made: {type(error).__name__}: {first}") from error
    name = getattr(backend, "name", None)
    if not isinstance(name, str) or _NAME.fullmatch(name) is None:
        raise _error(point, f"has the name {name!r}; lower case letters, digits and _ make one")
    if not callable(getattr(backend, "evaluate", None)):
        raise _error(point, "has no evaluate; blockscale.backends.base says what a backend is")
    needed = ("prepare", "quantize_activation", "bind")
    missing = [method for method in needed if not callable(getattr(backend, method, None))]
    if 0 < len(missing) < len(needed):
        raise _error(point, f"has no {' and no '.join(missing)}; to be run it needs all three")
    own = (point.dist.name,) if point.dist is not None else ()
    return ExternalBackend(backend, (*own, *getattr(backend, "packages", ())))


def _error(point: metadata.EntryPoint, problem: str) -> BackendError:
    package = point.dist.name if point.dist is not None else "an unknown package"
    return BackendError(
        f"the backend {point.value} of package {package} {problem} "
        f"(pip uninstall {package} leaves it out)"
    )
