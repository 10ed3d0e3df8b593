"""What a checkpoint is, from headers alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from blockscale.checkpoint.contradictions import stored_as_float32
from blockscale.checkpoint.schema import Layers, Scheme, survey
from blockscale.planning.plan import Finding, Severity

if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import TypeAlias

    from blockscale.checkpoint.read import Checkpoint

    _Key: TypeAlias = tuple[int, int, str, str | None]


@dataclass(frozen=True, slots=True)
class ShapeGroup:
    """Quantized layers that share shape, format and storage of scales.

    ``format`` is in words for layers that are not block FP8. ``scale_dtype`` None: no scale.
    """

    n: int
    k: int
    format: str
    scale_dtype: str | None
    count: int
    example: str


@dataclass(frozen=True, slots=True)
class Inspection:
    """The answer of ``blockscale inspect``. ``foreign``: groups of layers not in block FP8."""

    path: str
    files: int
    tensors: int
    tensor_bytes: int
    bytes_by_dtype: tuple[tuple[str, int], ...]
    scheme: Scheme
    groups: tuple[ShapeGroup, ...]
    foreign: tuple[ShapeGroup, ...]
    layers: Layers
    findings: tuple[Finding, ...]


def inspect_checkpoint(checkpoint: Checkpoint) -> Inspection:
    """Formats, block shapes, quantized and skipped layers, contradictions.

    Each layer that cannot be read becomes a FAULT finding; the rest is still shown. Raises
    CheckpointError only if the declaration itself cannot be understood.
    """
    found = survey(checkpoint)
    layers = found.layers
    faults = (Finding(Severity.FAULT, "unreadable_layer", str(e)) for e in found.problems)
    findings = (*faults, *layers.findings, *stored_as_float32(layers))
    by_dtype: Counter[str] = Counter()
    for entry in checkpoint.tensors.values():
        by_dtype[entry.dtype] += entry.length
    return Inspection(
        str(checkpoint.path),
        len(checkpoint.files),
        len(checkpoint.tensors),
        checkpoint.tensor_bytes,
        tuple(by_dtype.most_common()),
        layers.scheme,
        _groups(
            ((layer.n, layer.k, layer.format.name, layer.scale.dtype), layer.stacked, layer.name)
            for layer in layers.quantized
        ),
        _groups(
            (
                (layer.n, layer.k, layer.detail, layer.scale.dtype if layer.scale else None),
                prod(layer.weight.shape[:-2]),
                layer.name,
            )
            for layer in layers.foreign
        ),
        layers,
        findings,
    )


def _groups(layers: Iterable[tuple[_Key, int | None, str]]) -> tuple[ShapeGroup, ...]:
    counts: Counter[_Key] = Counter()
    examples: dict[_Key, str] = {}
    for key, stacked, name in layers:
        counts[key] += stacked or 1
        examples.setdefault(key, name)
    return tuple(ShapeGroup(*key, count, examples[key]) for key, count in counts.items())
