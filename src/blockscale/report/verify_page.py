"""A verification as a page: faults, the error of every layer, and where the scales lie."""

from __future__ import annotations

import re
from math import inf, isfinite
from typing import TYPE_CHECKING

from blockscale.planning.plan import Severity
from blockscale.report.chart import Sample, linear_plot, octave_plot
from blockscale.report.page import COLOURS, MAX_ROWS, finding_rank, page

if TYPE_CHECKING:
    from collections.abc import Sequence

    from blockscale.checkpoint.verify import LayerCheck, Verification

_NUMBER = re.compile(r"(\d+)")


def verify_page(result: Verification, checkpoint: str, against: str | None = None) -> str:
    """The page, as HTML text that needs no other file. ``against``: the float checkpoint's path."""
    findings = sorted(result.findings, key=lambda finding: finding_rank(finding.severity.value))
    errors = [check.error for check in result.layers if check.error is not None]
    finite = [error.relative_error for error in errors if isfinite(error.relative_error)]
    ordered = sorted(result.layers, key=lambda check: _natural(check.name))
    return page(
        "verify.html.j2",
        {
            "result": result,
            "checkpoint": checkpoint,
            "against": against,
            "findings": findings,
            "faults": sum(finding.severity is Severity.FAULT for finding in findings),
            "rows": result.layers[:MAX_ROWS],
            "more_rows": max(0, len(result.layers) - MAX_ROWS),
            "formats": list(dict.fromkeys(check.format.name for check in result.layers)),
            "scales": sum(check.scales.count for check in result.layers),
            "powers_of_two": sum(c.scales.not_power_of_two == 0 for c in result.layers),
            "mean_error": sum(finite) / len(finite) if finite else None,
            "worst_error": max((e.relative_error for e in errors), default=None),
            "least_snr": min((error.snr_db for error in errors), default=None),
            "error_plot": linear_plot(_errors(ordered), COLOURS) if errors else None,
            "scale_plot": octave_plot(_scales(ordered), COLOURS),
            "inf": inf,
        },
    )


def _natural(name: str) -> tuple[tuple[int, int, str], ...]:
    """Layer 10 after layer 9."""
    return tuple(
        (0, int(part), "") if part.isascii() and part.isdigit() and len(part) < 10 else (1, 0, part)  # noqa: PLR2004 - no layer number is longer
        for part in _NUMBER.split(name)
    )


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _errors(checks: Sequence[LayerCheck]) -> list[Sample]:
    samples = []
    for check in checks:
        error = check.error
        value = float("nan") if error is None else error.relative_error
        label = f"{check.name}: {value:.4f}"
        samples.append(Sample(_leaf(check.name), label, value, value))
    return samples


def _scales(checks: Sequence[LayerCheck]) -> list[Sample]:
    samples = []
    for check in checks:
        low, high = check.scales.smallest, check.scales.largest
        label = f"{check.name}: no finite scale"
        if low is not None and high is not None:
            label = f"{check.name}: {low:.3g} to {high:.3g}"
        samples.append(Sample(_leaf(check.name), label, low or 0.0, high or 0.0))
    return samples
