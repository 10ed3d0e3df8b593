"""What every command shares: exit codes, JSON and tables on stdout, one-line errors on stderr."""

from __future__ import annotations

import json
import sys
from collections import Counter
from contextlib import ExitStack, contextmanager
from enum import IntEnum
from math import isfinite
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from rich.console import Console
    from rich.table import Table

    from blockscale.checkpoint.compare import DataError
    from blockscale.planning.plan import Finding

SCHEMA = 1
# Wide enough for a plan's table where stdout is a file or a pipe and has no width of its own.
PIPE_WIDTH = 120


class ExitCode(IntEnum):
    """What a command's exit status says."""

    FINE = 0
    FINDING = 1
    """The command worked and found a fault: inspect, verify, plan --strict."""
    WRONG_USE = 2
    """Unreadable input or options without meaning."""
    INTERRUPTED = 130
    """Ctrl-C, as shells count it: 128 + SIGINT."""


def console() -> Console:
    """Where tables go: stdout."""
    from rich.console import Console

    class Quiet(Console):
        """Rich would end the program with 1, which says here that a fault was found."""

        def on_broken_pipe(self) -> None:
            raise BrokenPipeError

    wide = None if sys.stdout.isatty() else PIPE_WIDTH
    return Quiet(width=wide, highlight=False, soft_wrap=False)


def error_line(message: str) -> None:
    """One line on stderr."""
    print(f"blockscale: {' '.join(message.split())}", file=sys.stderr)


def print_json(document: Mapping[str, Any]) -> None:
    """The one JSON document of a ``--json`` run, with its schema version first."""
    print(json.dumps({"schema": SCHEMA, **document}, indent=2, allow_nan=False))


def table(*columns: str, numbers: Iterable[str] = (), unbroken: Iterable[str] = ()) -> Table:
    """An empty table in the house style.

    ``numbers`` names the columns aligned to the right, ``unbroken`` those that never wrap.
    """
    from rich import box
    from rich.table import Table

    right, whole = set(numbers), set(unbroken)
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column in columns:
        made.add_column(
            column,
            justify="right" if column in right else "left",
            overflow="fold",
            no_wrap=column in whole,
        )
    return made


# Findings of one kind that a command prints; a damaged checkpoint may have one for every layer.
SHOWN_FINDINGS = 8


def print_findings(
    out: Console, findings: Iterable[Finding], shown: int | None = SHOWN_FINDINGS
) -> None:
    """One line for each finding, faults in red and first.

    ``shown``: the first so many of each kind, and how many more there are; None for all.
    """
    from rich.text import Text

    from blockscale.planning.plan import Severity

    order = {Severity.FAULT: 0, Severity.WARNING: 1, Severity.NOTE: 2}
    styles = {Severity.FAULT: "bold red", Severity.WARNING: "yellow", Severity.NOTE: "cyan"}
    counts: Counter[str] = Counter()
    for finding in sorted(findings, key=lambda finding: order[finding.severity]):
        counts[finding.code] += 1
        if shown is not None and counts[finding.code] > shown:
            continue
        where = f"{finding.layer}: " if finding.layer else ""
        words = Text(f"{finding.severity.value}: ", style=styles[finding.severity])
        words.append(f"{where}{finding.message}", style="default not bold")
        out.print(words, soft_wrap=True)
    for code, count in counts.items():
        if shown is not None and count > shown:
            out.print(f"and {count - shown} more like {code} (--all shows them)", soft_wrap=True)


def finding_documents(findings: Iterable[Finding]) -> list[dict[str, str | None]]:
    """Findings as JSON values, as plan documents spell them."""
    return [
        {"severity": f.severity.value, "code": f.code, "message": f.message, "layer": f.layer}
        for f in findings
    ]


def error_cells(error: DataError) -> tuple[str, str, str]:
    """Relative error, largest error and signal to noise, as table cells."""
    return f"{error.relative_error:.4f}", f"{error.max_error:.3g}", f"{error.snr_db:.1f}"


def error_document(error: DataError) -> dict[str, float | None]:
    """The same as JSON values. JSON has no infinity: an exact layer has ``snr_db`` null."""
    values = {
        "relative_error": error.relative_error,
        "max_error": error.max_error,
        "snr_db": error.snr_db,
    }
    return {name: value if isfinite(value) else None for name, value in values.items()}


@contextmanager
def progress(description: str, total: int, *, unit: str) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr, gone when done; the function inside takes units since last time.

    ``unit``: ``"bytes"`` is shown as MB and MB/s, anything else as a count.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    amounts: list[ProgressColumn] = (
        [DownloadColumn(), TransferSpeedColumn()]
        if unit == "bytes"
        else [MofNCompleteColumn(), TextColumn(unit)]
    )
    screen = Console(stderr=True)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        *amounts,
        TimeRemainingColumn(),
        console=screen,
        transient=True,
        disable=not screen.is_terminal,
    ) as bar:
        task = bar.add_task(description, total=total)
        yield lambda done: bar.advance(task, done)


@contextmanager
def late_progress(description: str, *, unit: str) -> Iterator[Callable[[int, int], None]]:
    """As ``progress``, for work whose size is found on the way: takes (done, total)."""
    with ExitStack() as stack:
        last = 0
        advance: Callable[[int], None] | None = None

        def step(done: int, total: int) -> None:
            nonlocal advance, last
            if advance is None:
                advance = stack.enter_context(progress(description, total, unit=unit))
            advance(done - last)
            last = done

        yield step
