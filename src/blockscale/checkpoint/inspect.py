"""What a checkpoint is, from headers alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from blockscale.checkpoint.schema import Layers, Scheme, read_layers, scheme_of
from blockscale.errors import CheckpointError
from blockscale.planning.plan import Finding, Severity

if TYPE_CHECKING:
    from blockscale.checkpoint.read import Checkpoint


@dataclass(frozen=True, slots=True)
class ShapeGroup:
    """Quantized layers that share shape, format and storage of scales."""

    n: int
    k: int
    format: str
    scale_dtype: str
    count: int
    example: str


@dataclass(frozen=True, slots=True)
class Inspection:
    """The answer of ``blockscale inspect``. ``layers`` is None where a fault stopped reading."""

    path: str
    files: int
    tensors: int
    tensor_bytes: int
    bytes_by_dtype: tuple[tuple[str, int], ...]
    scheme: Scheme
    groups: tuple[ShapeGroup, ...]
    layers: Layers | None
    findings: tuple[Finding, ...]


def inspect_checkpoint(checkpoint: Checkpoint) -> Inspection:
    """Formats, block shapes, quantized and skipped layers, contradictions.

    A layer that cannot be read becomes a FAULT finding here, so that the rest is still shown.
    Raises CheckpointError only if config.json itself cannot be understood.
    """
    scheme = scheme_of(checkpoint)
    try:
        layers = read_layers(checkpoint)
        findings = layers.findings
    except CheckpointError as error:
        layers = None
        findings = (Finding(Severity.FAULT, "unreadable_layer", str(error)),)
    by_dtype: Counter[str] = Counter()
    for entry in checkpoint.tensors.values():
        by_dtype[entry.dtype] += entry.length
    return Inspection(
        str(checkpoint.path),
        len(checkpoint.files),
        len(checkpoint.tensors),
        checkpoint.tensor_bytes,
        tuple(by_dtype.most_common()),
        scheme,
        _groups(layers) if layers else (),
        layers,
        findings,
    )


def _groups(layers: Layers) -> tuple[ShapeGroup, ...]:
    counts: Counter[tuple[int, int, str, str]] = Counter()
    examples: dict[tuple[int, int, str, str], str] = {}
    for layer in layers.quantized:
        key = (layer.n, layer.k, layer.format.name, layer.scale.dtype)
        counts[key] += layer.stacked or 1
        examples.setdefault(key, layer.name)
    return tuple(ShapeGroup(*key, count, examples[key]) for key, count in counts.items())
