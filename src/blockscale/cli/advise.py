"""``blockscale advise``: which tensor and expert parallel degrees a checkpoint's blocks allow."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from blockscale.cli.options import (
    AllowLossy,
    DTypeOption,
    HeadersPath,
    Json,
    device_from,
    policy_from,
)
from blockscale.cli.output import ExitCode, console, human_bytes, print_json, table
from blockscale.cli.source import open_headers

if TYPE_CHECKING:
    from blockscale.checkpoint.advice import Advice


def advise(
    path: HeadersPath,
    device: Annotated[
        str | None,
        typer.Option(help="cpu, sm_80 ... sm_121; default: this machine.", show_default=False),
    ] = None,
    dtype: DTypeOption = None,
    allow_lossy: AllowLossy = False,
    as_json: Json = False,
) -> int:
    """Plan every usual parallel degree: which work, what a rank holds, what stands in the way."""
    from blockscale.backends.registry import BACKENDS
    from blockscale.checkpoint.advice import Target
    from blockscale.checkpoint.advice import advise as plan_degrees
    from blockscale.checkpoint.requests import dtype_of_config
    from blockscale.checkpoint.schema import read_layers

    policy = policy_from(None, allow_lossy=allow_lossy)
    where = device_from(device)
    checkpoint = open_headers(path)
    layers = read_layers(checkpoint)
    activation = dtype.dtype if dtype else dtype_of_config(checkpoint)
    found = plan_degrees(checkpoint, layers, Target(activation, where, policy, BACKENDS))
    if as_json:
        print_json({"device": where.name, "degrees": [_document(one) for one in found]})
        return ExitCode.FINE
    out = console()
    out.print(f"{where.name}, {activation.value} activations, {checkpoint.path}\n")
    rows = table(
        "tp",
        "ep",
        "works",
        "a rank's FP8 weights",
        "what stands in the way",
        numbers=("tp", "ep", "a rank's FP8 weights"),
        unbroken=("tp", "ep", "works", "a rank's FP8 weights"),
    )
    for one in found:
        rows.add_row(
            str(one.parallelism.tensor),
            str(one.parallelism.expert),
            "yes" if one.works else "no",
            human_bytes(one.weight_bytes),
            "" if one.works else one.reason or "",
        )
    out.print(rows)
    return ExitCode.FINE


def _document(one: Advice) -> dict[str, object]:
    return {
        "tp": one.parallelism.tensor,
        "ep": one.parallelism.expert,
        "works": one.works,
        "layers": one.layers,
        "weight_bytes": one.weight_bytes,
        "unservable": one.unservable,
        "split": one.split,
        "indivisible": one.indivisible,
        "reason": one.reason,
    }
