"""``blockscale quantize``: a float checkpoint becomes a block-FP8 one."""

from __future__ import annotations

import re
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from blockscale.cli.options import Json, Memory, ShardSize, Workers, bytes_from, crew_from
from blockscale.cli.output import ExitCode, console, print_json, progress
from blockscale.errors import SettingsError
from blockscale.planning.explain import human_bytes, layer_count

if TYPE_CHECKING:
    from blockscale.formats import BlockShape


class ScaleFormatName(str, Enum):
    """``--scale-format``."""

    FP32 = "fp32"
    UE8M0 = "ue8m0"


def quantize(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="Float checkpoint directory.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="New directory to write.")],
    scale_format: Annotated[
        ScaleFormatName, typer.Option(help="ue8m0 rounds scales up to powers of two, once.")
    ] = ScaleFormatName.FP32,
    block: Annotated[str, typer.Option(help="Rows x columns that share a scale.")] = "128x128",
    keep: Annotated[
        list[str] | None,
        typer.Option(help="Leave modules with this path component unquantized; repeatable."),
    ] = None,
    workers: Workers = None,
    memory: Memory = None,
    shard_size: ShardSize = "5GB",
    as_json: Json = False,
) -> int:
    """Quantize linear weights to block FP8; the same command goes on after an interruption.

    Under torchrun all processes share the work. DST appears when it is complete.
    """
    shape, largest = _block_shape(block), bytes_from("--shard-size", shard_size)
    crew = crew_from(workers, memory)

    from blockscale.checkpoint.quantize import (
        QuantizeOptions,
        quantize_checkpoint,
        quantized_bytes,
    )
    from blockscale.checkpoint.read import read_checkpoint
    from blockscale.formats import E4M3FN, BlockFormat, ScaleFormat

    checkpoint = read_checkpoint(source)
    options = QuantizeOptions(
        BlockFormat(E4M3FN, ScaleFormat(scale_format.value), shape), tuple(keep or ()), largest
    )
    total = quantized_bytes(checkpoint, options)
    with progress("quantizing", total, unit="bytes") as advance:
        summary = quantize_checkpoint(checkpoint, target, options, advance, crew)
    if as_json:
        print_json(
            {
                "source": str(source),
                "target": str(target),
                "format": options.format.name,
                "quantized": summary.quantized,
                "kept": summary.kept,
                "bytes_before": summary.bytes_before,
                "bytes_after": summary.bytes_after,
                "files": summary.shards,
                "files_resumed": summary.resumed,
            }
        )
        return ExitCode.FINE
    console().print(
        f"{target}: {layer_count(summary.quantized)} in {options.format.name}, {summary.kept} "
        f"tensors as they were; {human_bytes(summary.bytes_before)} became "
        f"{human_bytes(summary.bytes_after)}",
        soft_wrap=True,
    )
    return ExitCode.FINE


def _block_shape(text: str) -> BlockShape:
    from blockscale.formats import BlockShape

    match = re.fullmatch(r"([1-9]\d{0,5})x([1-9]\d{0,5})", text)
    if match is None:
        msg = f"--block {text!r} is no block shape; write rows x columns, like 128x128"
        raise SettingsError(msg)
    return BlockShape(int(match[1]), int(match[2]))
