"""``blockscale convert``: another spelling of the same checkpoint, without loss unless allowed."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from blockscale.cli.options import Json, Memory, ShardSize, Workers, bytes_from, crew_from
from blockscale.cli.output import (
    ExitCode,
    console,
    error_cells,
    error_document,
    print_json,
    progress,
    table,
)
from blockscale.planning.explain import human_bytes, layer_count

if TYPE_CHECKING:
    from rich.table import Table

    from blockscale.checkpoint.convert import Loss


SHOWN_LAYERS = 8


class DialectName(str, Enum):
    """``--to``."""

    HF_FP8 = "hf-fp8"
    COMPRESSED_TENSORS = "compressed-tensors"
    MODELOPT = "modelopt"


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
    allow_lossy: Annotated[
        bool,
        typer.Option(
            "--allow-lossy", help="Requantize layers whose scales E8M0 cannot hold; measure it."
        ),
    ] = False,
    workers: Workers = None,
    memory: Memory = None,
    shard_size: ShardSize = "5GB",
    as_json: Json = False,
) -> int:
    """Rewrite names, config and storage of scales; what would change a value is refused.

    The same command goes on after an interruption; under torchrun all processes share the work.
    """
    crew, largest = crew_from(workers, memory), bytes_from("--shard-size", shard_size)
    from blockscale.checkpoint.convert import (
        ConvertOptions,
        Dialect,
        ScaleStorage,
        convert_checkpoint,
    )
    from blockscale.checkpoint.read import read_checkpoint
    from blockscale.planning.policy import Exactness

    checkpoint = read_checkpoint(source)
    exactness = Exactness.ALLOW_LOSSY if allow_lossy else Exactness.EXACT
    options = ConvertOptions(Dialect(to.value), ScaleStorage(scales.value), exactness, largest)
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
                "lossless": not summary.losses,
                "losses": [
                    {"layer": loss.layer, **error_document(loss.error)} for loss in summary.losses
                ],
            }
        )
        return ExitCode.FINE
    out = console()
    outcome = "no value changed" if not summary.losses else _loss_words(summary.losses)
    out.print(
        f"{target}: {layer_count(summary.layers)} as {to.value}, scales of {summary.rewritten} in "
        f"another dtype; {human_bytes(summary.bytes_after)}; {outcome}",
        soft_wrap=True,
    )
    if summary.losses:
        out.print()
        out.print(_loss_rows(summary.losses))
    return ExitCode.FINE


def _loss_words(losses: tuple[Loss, ...]) -> str:
    errors = [loss.error.relative_error for loss in losses]
    return (
        f"{layer_count(len(losses))} requantized, and their values changed: relative error mean "
        f"{sum(errors) / len(errors):.4f}, worst {max(errors):.4f}"
    )


def _loss_rows(losses: tuple[Loss, ...]) -> Table:
    numbers = ("rel. error", "max", "SNR dB")
    rows = table("layer", *numbers, numbers=numbers)
    for loss in losses[:SHOWN_LAYERS]:
        rows.add_row(loss.layer, *error_cells(loss.error))
    if len(losses) > SHOWN_LAYERS:
        rows.caption = f"and {len(losses) - SHOWN_LAYERS} more, less changed (--json lists them)"
    return rows
