"""Plan files: written where a checkpoint is planned, checked where it is to run.

The file is one JSON document (``planning.saved``); the same file lists the kernels to build before
the first request (``planning.warm_up``).
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from blockscale.checkpoint.requests import Merging, RequestOptions, merged_layers
from blockscale.errors import CheckpointError, FormatError
from blockscale.formats import DType
from blockscale.planning.saved import (
    Fingerprint,
    SavedPlan,
    Situation,
    saved_document,
    saved_of_document,
)
from blockscale.planning.sharded import shards_of
from blockscale.planning.sharding import Parallelism

if TYPE_CHECKING:
    from blockscale.checkpoint.read import Checkpoint
    from blockscale.checkpoint.schema import Layers
    from blockscale.planning.device import Device
    from blockscale.planning.plan import ModelPlan
    from blockscale.planning.sharded import Target

# DeepSeek-V3's plan takes 2 MB.
MAX_FILE_BYTES = 200_000_000


def fingerprint_of(checkpoint: Checkpoint) -> Fingerprint:
    """What identifies a checkpoint to its plan: headers and config, no data (``Fingerprint``)."""
    tensors = hashlib.sha256()
    for name in sorted(checkpoint.tensors):
        entry = checkpoint.tensors[name]
        tensors.update(json.dumps([name, entry.dtype, entry.shape]).encode())
    config = json.dumps(checkpoint.config, sort_keys=True, separators=(",", ":")).encode()
    return Fingerprint(
        tensors.hexdigest(), hashlib.sha256(config).hexdigest(), len(checkpoint.tensors)
    )


def saved_plan(plan: ModelPlan, checkpoint: Checkpoint, options: RequestOptions) -> SavedPlan:
    """The plan with what it holds for. ``options``: those that its requests were made with."""
    parallelism = options.parallelism
    return SavedPlan(
        plan,
        fingerprint_of(checkpoint),
        options.merging.value,
        parallelism.tensor,
        parallelism.expert,
        _versions(plan.device),
        str(checkpoint.path),
    )


def write_plan(path: Path, saved: SavedPlan) -> None:
    """Write a plan file, whole or not at all. Raises CheckpointError if it cannot be written."""
    text = json.dumps(saved_document(saved), indent=2, allow_nan=False) + "\n"
    write_text(path, text)


def write_text(path: Path, text: str) -> None:
    """Write a file beside its place and rename it. Raises CheckpointError if that fails.

    What UTF-8 cannot say (a path of other bytes) is written as an escape.
    """
    try:
        descriptor, scratch = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.absolute().parent)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text)
            Path(scratch).chmod(0o644)
            Path(scratch).replace(path)
        except BaseException:
            Path(scratch).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise CheckpointError(path, f"cannot be written: {error.strerror or error}") from error


def read_plan(path: Path | str) -> SavedPlan:
    """The plan file at ``path``. Raises CheckpointError if it is none or cannot be read."""
    path = Path(path)
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise CheckpointError(path, f"holds {size} bytes; no plan file is that large")
        raw = path.read_bytes()
    except OSError as error:
        raise CheckpointError(path, f"cannot be read: {error.strerror or error}") from error
    try:
        return saved_of_document(raw)
    except FormatError as error:
        raise CheckpointError(path, str(error)) from error


def situation_of(
    saved: SavedPlan, checkpoint: Checkpoint, layers: Layers, target: Target
) -> Situation:
    """What the saved plan meets here, for ``planning.saved.fitting_plan`` to judge.

    ``target``: the device that is here; policy and backends are those to cut shards for.
    """
    options = RequestOptions(
        _activation_dtype(saved),
        Parallelism(saved.tensor_parallel, saved.expert_parallel),
        Merging(saved.merging),
    )
    merged = merged_layers(checkpoint, layers, options)
    shards = shards_of([layer.whole for layer in merged.layers], options.parallelism, target)
    return Situation(
        fingerprint_of(checkpoint), shards.requests, target.device, _versions(target.device)
    )


def _activation_dtype(saved: SavedPlan) -> DType:
    layers = saved.plan.layers
    return layers[0].request.activation_dtype if layers else DType.BFLOAT16


def _versions(device: Device) -> tuple[tuple[str, str], ...]:
    """Of blockscale, and of the packages of a device that was really looked at."""
    # The compiler is listed with its path: where it lies changes no number.
    packages = [(name, version) for name, version in device.packages or () if name != "c++"]
    return (("blockscale", metadata.version("blockscale")), *packages)
