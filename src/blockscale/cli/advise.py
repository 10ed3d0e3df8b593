"""``blockscale advise``: which tensor and expert parallel degrees a checkpoint's blocks allow."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from blockscale.cli.options import (
    AllowLossy,
    Backends,
    DTypeOption,
    HeadersPath,
    Json,
    device_from,
    policy_from,
)
from blockscale.cli.output import ExitCode, console, print_json, table
from blockscale.cli.source import open_headers
from blockscale.planning.explain import human_bytes

if TYPE_CHECKING:
    from rich.table import Table

    from blockscale.checkpoint.advice import Advice, RemedyAdvice
    from blockscale.checkpoint.read import Checkpoint
    from blockscale.formats import DType
    from blockscale.planning.sharded import Target


def advise(
    path: HeadersPath,
    device: Annotated[
        str | None,
        typer.Option(help="cpu, sm_80 ... sm_121; default: this machine.", show_default=False),
    ] = None,
    dtype: DTypeOption = None,
    backend: Backends = None,
    allow_lossy: AllowLossy = False,
    as_json: Json = False,
) -> int:
    """Plan every usual parallel degree: which work, what a rank holds, what remedies cost."""
    from blockscale.backends.registry import all_backends
    from blockscale.checkpoint.requests import dtype_of_config
    from blockscale.planning.sharded import Target

    policy = policy_from(backend, allow_lossy=allow_lossy)
    target = Target(device_from(device), policy, all_backends())
    checkpoint = open_headers(path)
    activation = dtype.dtype if dtype else dtype_of_config(checkpoint)
    print_advice(checkpoint, activation, target, as_json=as_json)
    return ExitCode.FINE


def print_advice(checkpoint: Checkpoint, dtype: DType, target: Target, *, as_json: bool) -> None:
    """What ``blockscale advise`` and ``blockscale plan --advise`` print."""
    from blockscale.checkpoint.advice import advise as plan_degrees
    from blockscale.checkpoint.schema import read_layers

    found = plan_degrees(checkpoint, read_layers(checkpoint), dtype, target)
    if as_json:
        print_json({"device": target.device.name, "degrees": [_document(one) for one in found]})
        return
    out = console()
    out.print(f"{target.device.name}, {dtype.value} activations, {checkpoint.path}")
    out.print("one rank's FP8 codes; what a remedy adds to an even share of the layers it is for\n")
    rows = table(
        "tp",
        "ep",
        "works",
        "codes",
        "+ codes",
        "+ scales",
        "work",
        "",
        numbers=("tp", "ep", "codes", "+ codes", "+ scales", "work"),
        unbroken=("tp", "ep", "works", "codes", "+ codes", "+ scales", "work"),
    )
    for one in found:
        _add_degree(rows, one)
    out.print(rows)


def _add_degree(rows: Table, one: Advice) -> None:
    """A row for the degrees, and one for each remedy where an even cut splits blocks."""
    degrees = (str(one.parallelism.tensor), str(one.parallelism.expert))
    codes = human_bytes(one.weight_bytes)
    if one.works and not one.remedies:
        rows.add_row(*degrees, "yes", codes, "", "", "", "")
        return
    works = f"by {', '.join(kind.value for kind in one.chosen)}" if one.works else "no"
    rows.add_row(*degrees, works, codes, "", "", "", one.reason or "")
    for remedy in one.remedies:
        rows.add_row("", "", _name(remedy), "", *_price_cells(remedy), _last_cell(remedy))


def _name(remedy: RemedyAdvice) -> str:
    return f"  --ep {remedy.expert}" if remedy.expert else f"  {remedy.kind.value}"


def _last_cell(remedy: RemedyAdvice) -> str:
    return remedy.reason or f"run by {' and '.join(remedy.backends)}"


def _price_cells(remedy: RemedyAdvice) -> tuple[str, str, str]:
    price = remedy.price
    if price is None:
        return "-", "-", "-"
    work = f"{price.work:.2f}x"
    return human_bytes(price.extra_weight_bytes), human_bytes(price.extra_scale_bytes), work


def _document(one: Advice) -> dict[str, object]:
    return {
        "tp": one.parallelism.tensor,
        "ep": one.parallelism.expert,
        "works": one.works,
        "layers": one.layers,
        "weight_bytes": one.weight_bytes,
        "scale_bytes": one.price.scale_bytes,
        "work": one.price.work,
        "unservable": one.unservable,
        "split": one.split,
        "indivisible": one.indivisible,
        "reason": one.reason,
        "chosen": [kind.value for kind in one.chosen],
        "remedies": [_remedy_document(remedy) for remedy in one.remedies],
    }


def _remedy_document(remedy: RemedyAdvice) -> dict[str, object]:
    price = remedy.price
    return {
        "remedy": remedy.kind.value,
        "works": price is not None,
        "ep": remedy.expert,
        "backends": list(remedy.backends),
        "extra_weight_bytes": price.extra_weight_bytes if price else None,
        "extra_scale_bytes": price.extra_scale_bytes if price else None,
        "work": price.work if price else None,
        "reason": remedy.reason,
    }
