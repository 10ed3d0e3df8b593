"""What every command shares: exit codes, JSON on stdout, tables and one-line errors on stderr."""

from __future__ import annotations

import json
import sys
from enum import IntEnum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.console import Console

SCHEMA = 1


class ExitCode(IntEnum):
    """What a command's exit status says."""

    FINE = 0
    FINDING = 1
    """The command worked and found a fault: verify, plan --strict."""
    WRONG_USE = 2
    """Unreadable input or options without meaning."""
    INTERRUPTED = 130
    """Ctrl-C, as shells count it: 128 + SIGINT."""


def console() -> Console:
    """Where tables go: stdout."""
    from rich.console import Console

    return Console()


def error_line(message: str) -> None:
    """One line on stderr."""
    print(f"blockscale: {' '.join(message.split())}", file=sys.stderr)


def print_json(document: Mapping[str, Any]) -> None:
    """The one JSON document of a ``--json`` run, with its schema version first."""
    print(json.dumps({"schema": SCHEMA, **document}, indent=2, allow_nan=False))


def human_bytes(count: float) -> str:
    """``1.5 GB``: decimal units, as disks and model cards count."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < _KILO:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= _KILO
    return f"{count:.1f} TB"


_KILO = 1000.0
