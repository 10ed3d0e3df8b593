"""``blockscale inspect``: what a checkpoint is, from headers alone."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from blockscale.cli.options import HeadersPath, Json
from blockscale.cli.output import (
    SHOWN_FINDINGS,
    ExitCode,
    console,
    finding_documents,
    print_findings,
    print_json,
    table,
)
from blockscale.cli.source import open_headers
from blockscale.planning.explain import human_bytes, layer_count

if TYPE_CHECKING:
    from rich.table import Table

    from blockscale.checkpoint.inspect import Inspection, ShapeGroup


def inspect(
    path: HeadersPath,
    all_findings: Annotated[bool, typer.Option("--all", help="Show every finding.")] = False,
    as_json: Json = False,
) -> int:
    """Show formats, block shapes, skipped layers, and contradictions of config and data."""
    from blockscale.checkpoint.inspect import inspect_checkpoint
    from blockscale.planning.plan import Severity

    inspection = inspect_checkpoint(open_headers(path))
    if as_json:
        print_json(_document(inspection))
    else:
        _print(inspection, None if all_findings else SHOWN_FINDINGS)
    faulty = any(finding.severity is Severity.FAULT for finding in inspection.findings)
    return ExitCode.FINDING if faulty else ExitCode.FINE


def _skip_reasons(inspection: Inspection) -> Counter[str]:
    return Counter(skipped.reason for skipped in inspection.layers.skipped)


def _scheme_words(inspection: Inspection) -> str:
    scheme = inspection.scheme
    words = [scheme.kind.value] if scheme.method is None else [scheme.method, scheme.kind.value]
    if scheme.block is not None:
        words.append(f"blocks {scheme.block}")
    if scheme.declared_scale is not None:
        words.append(f"declares {scheme.declared_scale.value} scales")
    return ", ".join(words)


def _print(inspection: Inspection, shown: int | None) -> None:
    out = console()
    out.print(
        f"{inspection.path}: {inspection.files} file{'s' * (inspection.files != 1)}, "
        f"{inspection.tensors} tensors, {human_bytes(inspection.tensor_bytes)}",
        soft_wrap=True,
    )
    by_dtype = ", ".join(
        f"{dtype} {human_bytes(size)}" for dtype, size in inspection.bytes_by_dtype
    )
    out.print(f"stored as: {by_dtype}")
    out.print(f"config:    {_scheme_words(inspection)}\n")
    if inspection.groups:
        out.print(_rows(inspection.groups))
    if inspection.foreign:
        out.print("\nin another quantization, which blockscale does not run:")
        out.print(_rows(inspection.foreign))
    reasons = _skip_reasons(inspection)
    if reasons:
        out.print(f"\nnot quantized: {layer_count(sum(reasons.values()))}")
        for reason, count in reasons.most_common():
            out.print(f"  {count} {reason}")
    if inspection.findings:
        out.print()
        print_findings(out, inspection.findings, shown)


def _rows(groups: tuple[ShapeGroup, ...]) -> Table:
    numbers = ("layers", "N", "K")
    rows = table("layers", "N", "K", "format", "scales stored as", "example", numbers=numbers)
    for group in groups:
        rows.add_row(
            str(group.count),
            str(group.n),
            str(group.k),
            group.format,
            group.scale_dtype or "",
            group.example,
        )
    return rows


def _group_documents(groups: tuple[ShapeGroup, ...]) -> list[dict[str, Any]]:
    return [
        {
            "n": group.n,
            "k": group.k,
            "format": group.format,
            "scale_dtype": group.scale_dtype,
            "layers": group.count,
            "example": group.example,
        }
        for group in groups
    ]


def _document(inspection: Inspection) -> dict[str, Any]:
    scheme = inspection.scheme
    return {
        "path": inspection.path,
        "files": inspection.files,
        "tensors": inspection.tensors,
        "tensor_bytes": inspection.tensor_bytes,
        "bytes_by_dtype": dict(inspection.bytes_by_dtype),
        "scheme": {
            "kind": scheme.kind.value,
            "method": scheme.method,
            "block": [scheme.block.mn, scheme.block.k] if scheme.block else None,
            "declared_scale": scheme.declared_scale.value if scheme.declared_scale else None,
        },
        "groups": _group_documents(inspection.groups),
        "foreign": _group_documents(inspection.foreign),
        "skipped": [{"name": s.name, "reason": s.reason} for s in inspection.layers.skipped],
        "findings": finding_documents(inspection.findings),
    }
