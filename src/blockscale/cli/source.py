"""The checkpoint that a command which needs no data is about: on this disk or on the Hub."""

from __future__ import annotations

from typing import TYPE_CHECKING

from blockscale.cli.output import late_progress
from blockscale.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

    from blockscale.checkpoint.read import Checkpoint


def open_headers(path: Path) -> Checkpoint:
    """Headers and config, with a progress bar where they must be fetched."""
    from blockscale.checkpoint.hub import read_headers

    with late_progress("reading headers", unit="files") as step:
        return read_headers(path, step)


def check_has_data(checkpoint: Checkpoint) -> None:
    """Raises CheckpointError if only headers of the checkpoint are on this disk."""
    if checkpoint.revision is not None:
        raise CheckpointError(
            checkpoint.path,
            "only its headers were fetched from the Hub; to read its scales, download it first "
            f"(`hf download {checkpoint.path} --local-dir DIR`) and plan DIR",
        )
