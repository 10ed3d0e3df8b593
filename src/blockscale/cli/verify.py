"""``blockscale verify``: whether scales and data are what they should be."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from blockscale.cli.options import CheckpointPath, Json
from blockscale.cli.output import (
    ExitCode,
    console,
    error_cells,
    error_document,
    finding_documents,
    print_findings,
    print_json,
    progress,
    table,
)
from blockscale.planning.explain import layer_count

if TYPE_CHECKING:
    from blockscale.checkpoint.verify import LayerCheck, Verification

SHOWN_LAYERS = 8


def verify(
    path: CheckpointPath,
    against: Annotated[
        Path | None,
        typer.Option(
            metavar="FLOAT_PATH", help="The float checkpoint it came from: compare every weight."
        ),
    ] = None,
    all_layers: Annotated[
        bool, typer.Option("--all", help="Show every layer and finding.")
    ] = False,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a report, one page for a browser.")
    ] = None,
    as_json: Json = False,
) -> int:
    """Read the data: scale faults, powers of two, and the error of each layer."""
    from blockscale.checkpoint.read import read_checkpoint
    from blockscale.checkpoint.schema import survey
    from blockscale.checkpoint.verify import verify_checkpoint

    checkpoint = read_checkpoint(path)
    original = read_checkpoint(against) if against is not None else None
    count = len(survey(checkpoint).layers.quantized)
    with progress("verifying", count, unit="layers") as advance:
        result = verify_checkpoint(checkpoint, original, advance)
    if html is not None:
        from blockscale.checkpoint.plan_file import write_text
        from blockscale.report.verify_page import verify_page

        write_text(html, verify_page(result, str(path), str(against) if against else None))
    if as_json:
        print_json(_document(path, result))
    else:
        everything = max(len(result.layers), len(result.findings))
        _print(result, everything if all_layers else SHOWN_LAYERS)
    return ExitCode.FINDING if result.has_fault else ExitCode.FINE


def _print(result: Verification, shown: int) -> None:
    out = console()
    compared = [check.error for check in result.layers if check.error is not None]
    exact = sum(check.scales.not_power_of_two == 0 for check in result.layers)
    if not result.layers and not result.findings:
        out.print("no layer is in block FP8: there is nothing to verify")
        return
    out.print(f"{layer_count(len(result.layers))}; in {exact} all scales are powers of two")
    if compared:
        worst = max(error.relative_error for error in compared)
        mean = sum(error.relative_error for error in compared) / len(compared)
        least = min(error.snr_db for error in compared)
        out.print(
            f"relative error against the other checkpoint: mean {mean:.4f}, worst {worst:.4f}; "
            f"least signal to noise {least:.1f} dB",
            soft_wrap=True,
        )
    if result.layers:
        out.print()
        out.print(_rows(result.layers[:shown]))
        hidden = len(result.layers) - shown
        if hidden > 0:
            order = "in order of error" if compared else "in checkpoint order"
            out.print(f"and {hidden} more, {order} (--all shows them)")
    if result.findings:
        out.print()
        print_findings(out, result.findings, shown)
    if not result.has_fault:
        unread = "" if compared else " in headers and scales; --against reads all data"
        out.print(f"\nno fault found{unread}")


def _rows(checks: tuple[LayerCheck, ...]) -> Any:  # noqa: ANN401 - a rich table, imported late
    names = ("N", "K", "scales", "not 2^n", "smallest", "largest", "rel. error", "max", "SNR dB")
    rows = table("layer", *names, numbers=names)
    for check in checks:
        scales, error = check.scales, check.error
        cells = ("", "", "") if error is None else error_cells(error)
        rows.add_row(
            check.name,
            str(check.n),
            str(check.k),
            str(scales.count),
            str(scales.not_power_of_two),
            "" if scales.smallest is None else f"{scales.smallest:.3g}",
            "" if scales.largest is None else f"{scales.largest:.3g}",
            *cells,
        )
    return rows


def _document(path: Path, result: Verification) -> dict[str, Any]:
    return {
        "path": str(path),
        "layers": [_layer_document(check) for check in result.layers],
        "findings": finding_documents(result.findings),
    }


def _layer_document(check: LayerCheck) -> dict[str, Any]:
    scales, error = check.scales, check.error
    return {
        "name": check.name,
        "n": check.n,
        "k": check.k,
        "format": check.format.name,
        "power_of_two": scales.power_of_two.value,
        "scales": {
            "count": scales.count,
            "not_power_of_two": scales.not_power_of_two,
            "nonfinite": scales.nonfinite,
            "zero": scales.zero,
            "negative": scales.negative,
            "subnormal": scales.subnormal,
            "smallest": scales.smallest,
            "largest": scales.largest,
        },
        "error": None if error is None else error_document(error),
    }
