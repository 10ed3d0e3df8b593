"""``blockscale convert``: another spelling of the same checkpoint, without loss."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from blockscale.cli.options import Json, Memory, Workers, crew_from
from blockscale.cli.output import ExitCode, console, human_bytes, print_json, progress


class DialectName(str, Enum):
    """``--to``."""

    HF_FP8 = "hf-fp8"
    COMPRESSED_TENSORS = "compressed-tensors"


class StorageName(str, Enum):
    """``--scales``."""

    KEEP = "keep"
    FP32 = "fp32"
    E8M0 = "e8m0"


def convert(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="Block-FP8 checkpoint.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="New directory to write.")],
    to: Annotated[DialectName, typer.Option(help="Names and config keys.")] = DialectName.HF_FP8,
    scales: Annotated[
        StorageName, typer.Option(help="e8m0 needs scales that are powers of two.")
    ] = StorageName.KEEP,
    workers: Workers = None,
    memory: Memory = None,
    as_json: Json = False,
) -> int:
    """Rewrite names, config and storage of scales; no value changes, or nothing is written.

    The same command goes on after an interruption; under torchrun all processes share the work.
    """
    crew = crew_from(workers, memory)
    from blockscale.checkpoint.convert import (
        ConvertOptions,
        Dialect,
        ScaleStorage,
        convert_checkpoint,
    )
    from blockscale.checkpoint.read import read_checkpoint

    checkpoint = read_checkpoint(source)
    options = ConvertOptions(Dialect(to.value), ScaleStorage(scales.value))
    with progress("converting", checkpoint.tensor_bytes, unit="bytes") as advance:
        summary = convert_checkpoint(checkpoint, target, options, advance, crew)
    if as_json:
        print_json(
            {
                "source": str(source),
                "target": str(target),
                "dialect": to.value,
                "layers": summary.layers,
                "rewritten": summary.rewritten,
                "bytes_after": summary.bytes_after,
                "files": summary.shards,
            }
        )
        return ExitCode.FINE
    console().print(
        f"{target}: {summary.layers} layers as {to.value}, scales of {summary.rewritten} in "
        f"another dtype; {human_bytes(summary.bytes_after)}; no value changed"
    )
    return ExitCode.FINE
