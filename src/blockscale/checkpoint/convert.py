"""Another spelling of the same checkpoint: dialect and storage of scales, codes untouched.

Names and config keys change between the dialects of Hugging Face (``fp8``), compressed-tensors and
ModelOpt (``checkpoint.spelling``); scales may be stored as float32 or, where every one is a power
of two, as E8M0. Layers whose scales E8M0 cannot hold are requantized only if loss is permitted:
codes and scales change together, and the error is measured on what was written.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from enum import Enum
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from blockscale.checkpoint.compare import DataError, bands, compare
from blockscale.checkpoint.output import PlannedTensor, files_beside_weights, plan_shards
from blockscale.checkpoint.read import MODELOPT_NAME, read_checkpoint
from blockscale.checkpoint.scales import read_scale_facts, read_scales
from blockscale.checkpoint.schema import SchemeKind, read_layers
from blockscale.checkpoint.spelling import (
    Dialect,
    ScaleStorage,
    Spelling,
    documents,
    obstacles,
    spelling,
)
from blockscale.checkpoint.write import Crew, Output, write_checkpoint
from blockscale.errors import CheckpointError
from blockscale.formats import PowerOfTwo, ScaleFormat
from blockscale.formats.scale import FLOAT32_MANTISSA_BITS
from blockscale.planning.policy import Exactness

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator
    from pathlib import Path

    from blockscale.checkpoint.header import TensorEntry
    from blockscale.checkpoint.output import PlannedShard, ShardWriter
    from blockscale.checkpoint.read import Checkpoint
    from blockscale.checkpoint.schema import Layers, QuantizedLayer

__all__ = [
    "ConvertOptions",
    "ConvertSummary",
    "Dialect",
    "Loss",
    "ScaleStorage",
    "convert_checkpoint",
]

MAX_SHARD_BYTES = 5_000_000_000
_SIZES = {"F32": 4, "F16": 2, "BF16": 2, "F8_E8M0": 1, "U8": 1}


@dataclass(frozen=True, slots=True)
class ConvertOptions:
    """What to convert to, whether values may change for it, and in files of what size."""

    dialect: Dialect = Dialect.HF_FP8
    storage: ScaleStorage = ScaleStorage.KEEP
    exactness: Exactness = Exactness.EXACT
    max_shard_bytes: int = MAX_SHARD_BYTES


@dataclass(frozen=True, slots=True)
class Loss:
    """A layer whose values changed, and how far those written are from those read."""

    layer: str
    error: DataError


@dataclass(frozen=True, slots=True)
class ConvertSummary:
    """What was written.

    ``rewritten``: layers whose scales got another dtype, exactly. ``losses``: layers that were
    requantized, the worst first.
    """

    layers: int
    rewritten: int
    bytes_after: int
    shards: int
    losses: tuple[Loss, ...] = ()


def convert_checkpoint(
    source: Checkpoint,
    target: Path,
    options: ConvertOptions,
    progress: Callable[[int], None] | None = None,
    crew: Crew | None = None,
) -> ConvertSummary:
    """Write ``source`` in another spelling to the new directory ``target``.

    No value changes unless ``options`` permit it. ``target`` appears when it is complete; an
    interrupted run is resumed by the same call, with the same bytes. Tensors keep their order, and
    config.json keeps what the new spelling does not say, so converting back gives the same bytes.
    ``progress`` is called with bytes of tensors that are done.

    Raises CheckpointError, with every reason and before anything is written, if the new spelling
    cannot say what the old one does or a scale could not be stored exactly, if ``source`` is no
    block-FP8 checkpoint, or if ``target`` exists.
    """
    layers = read_layers(source)
    if layers.scheme.kind is not SchemeKind.BLOCK_FP8 or not layers.quantized:
        stored = "" if layers.quantized else ", and no tensor is in it"
        raise CheckpointError(
            source.config_path,
            f"declares {layers.scheme.kind.value}{stored}; convert takes block FP8, quantize makes "
            "it of a float checkpoint",
        )
    wanted = spelling(source, layers, options.dialect, options.storage)
    if reasons := obstacles(layers, wanted):
        raise CheckpointError(
            source.path, f"cannot become {options.dialect.value}: {'; '.join(reasons)}"
        )
    inexact = _inexact(layers, wanted)
    if inexact and options.exactness is Exactness.EXACT:
        raise _would_lose(inexact)
    _write_all(
        _Job(
            source,
            layers,
            wanted,
            {layer.name for layer in inexact},
            options.max_shard_bytes,
        ),
        target,
        progress,
        crew,
    )
    written = read_checkpoint(target)
    after = {layer.name: layer for layer in read_layers(written).quantized} if inexact else {}
    losses = [Loss(layer.name, compare(after[layer.name], layer).error) for layer in inexact]
    losses.sort(key=lambda loss: loss.error.badness, reverse=True)
    rewritten = sum(wanted.scale_dtype(layer) != layer.scale.dtype for layer in layers.quantized)
    return ConvertSummary(
        len(layers.quantized),
        rewritten - len(losses),
        written.tensor_bytes,
        len(written.files),
        tuple(losses),
    )


def _inexact(layers: Layers, wanted: Spelling) -> list[QuantizedLayer]:
    """Layers whose scales would not survive their new dtype; reads all that would change."""
    return [
        layer
        for layer in layers.quantized
        if wanted.scale_dtype(layer) in {"F8_E8M0", "U8"}
        and layer.format.scale is not ScaleFormat.UE8M0
        and read_scale_facts(layer.scale).power_of_two is not PowerOfTwo.YES
    ]


def _would_lose(inexact: list[QuantizedLayer]) -> CheckpointError:
    first = inexact[0]
    facts = read_scale_facts(first.scale)
    others = f", and so in {len(inexact) - 1} other layers" if len(inexact) > 1 else ""
    return CheckpointError(
        first.scale.path,
        f"{facts.not_power_of_two} of {facts.count} scales are no powers of two{others}, so E8M0 "
        "cannot hold them; keep float32, quantize the float checkpoint to ue8m0, or requantize "
        "with --allow-lossy, which measures the error",
        tensor=first.scale.name,
    )


@dataclass(frozen=True, slots=True)
class _Job:
    source: Checkpoint
    layers: Layers
    wanted: Spelling
    requantized: Collection[str]
    max_shard_bytes: int


def _write_all(
    job: _Job, target: Path, progress: Callable[[int], None] | None, crew: Crew | None
) -> None:
    items = {item.planned.name: item for item in _items(job)}
    shards = plan_shards((item.planned for item in items.values()), job.max_shard_bytes)

    def fill(writer: ShardWriter, shard: PlannedShard) -> None:
        for planned in shard.tensors:
            _write(writer, items[planned.name])

    source, wanted = job.source, job.wanted
    texts = documents(source, job.layers, wanted)
    beside = tuple(
        path
        for path in files_beside_weights(source)
        if path.name != MODELOPT_NAME and path.name not in texts
    )
    output = Output(target, tuple(shards), texts, beside, source.files)
    write_checkpoint(output, fill, crew, progress)


class _Part(Enum):
    OTHER = "copied as it is"
    SCALE = "scales"
    NEW_SCALE = "scales of a requantized layer"
    NEW_DATA = "codes of a requantized layer"


@dataclass(frozen=True, slots=True)
class _Item:
    """A tensor to write, from the stored ``entry``; ``layer`` is set for all parts but OTHER."""

    planned: PlannedTensor
    part: _Part
    entry: TensorEntry
    layer: QuantizedLayer | None = None


def _items(job: _Job) -> Iterator[_Item]:
    """What is written, in the order of the source; a shared scale tensor gives one for each."""
    by_weight = {layer.weight.name: layer for layer in job.layers.quantized}
    by_scale: dict[str, list[QuantizedLayer]] = defaultdict(list)
    for layer in job.layers.quantized:
        by_scale[layer.scale.name].append(layer)
    for name, entry in job.source.tensors.items():
        for layer in by_scale.get(name, ()):
            dtype = job.wanted.scale_dtype(layer)
            shape = job.wanted.scale_shape(layer, entry.shape)
            planned = PlannedTensor(
                job.wanted.scale_name(layer), dtype, shape, _SIZES[dtype] * prod(shape)
            )
            part = _Part.NEW_SCALE if layer.name in job.requantized else _Part.SCALE
            yield _Item(planned, part, layer.scale, layer)
        if name not in by_scale:
            planned = PlannedTensor(name, entry.dtype, entry.shape, entry.length)
            of = by_weight.get(name)
            is_new = of is not None and of.name in job.requantized
            yield _Item(planned, _Part.NEW_DATA if is_new else _Part.OTHER, entry, of)


def _write(writer: ShardWriter, item: _Item) -> None:
    if item.layer is None or item.part is _Part.OTHER:
        writer.copy(item.entry, item.planned.name)
    elif item.part is _Part.SCALE:
        _write_scale(writer, item.planned, item.layer)
    else:
        _write_requantized(writer, item.planned, item.layer, item.part)


def _write_scale(writer: ShardWriter, planned: PlannedTensor, layer: QuantizedLayer) -> None:
    exponents = {"F8_E8M0", "U8"}
    if planned.dtype == layer.scale.dtype or {planned.dtype, layer.scale.dtype} == exponents:
        writer.copy(layer.scale, planned.name)
        return
    values = read_scales(layer.scale)
    if planned.dtype in exponents:
        stored = (values.view(np.uint32) >> FLOAT32_MANTISSA_BITS).astype(np.uint8)
        writer.write(stored.tobytes(), planned.name)
    else:
        writer.write(values.astype("<f4").tobytes(), planned.name)


def _write_requantized(
    writer: ShardWriter, planned: PlannedTensor, layer: QuantizedLayer, part: _Part
) -> None:
    """Codes, or scales, of a layer in UE8M0. Each is computed anew: a file may hold only one."""
    import torch

    from blockscale.reference import requantize

    for _, band in bands(layer):
        result = requantize(band, band.format.with_scale(ScaleFormat.UE8M0)).tensor
        written = result.scales if part is _Part.NEW_SCALE else result.data
        writer.write(written.view(torch.uint8).numpy().tobytes(), planned.name)
