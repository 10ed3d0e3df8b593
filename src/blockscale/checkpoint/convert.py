"""Another spelling of the same checkpoint: dialect and storage of scales, codes untouched.

Names and config keys change between the dialects of Hugging Face (``fp8``) and compressed-tensors;
scales may be stored as float32 or, where every one is a power of two, as E8M0. Nothing that would
change a value is done unless it is permitted, and then what it cost is measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from blockscale.checkpoint.output import PlannedTensor, files_beside_weights, plan_shards
from blockscale.checkpoint.read import CONFIG_NAME
from blockscale.checkpoint.scales import read_scales, scale_facts
from blockscale.checkpoint.schema import SchemeKind, read_layers
from blockscale.checkpoint.write import Crew, Output, write_checkpoint
from blockscale.errors import CheckpointError
from blockscale.formats import PowerOfTwo, ScaleFormat
from blockscale.formats.scale import FLOAT32_MANTISSA_BITS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from blockscale.checkpoint.output import PlannedShard, ShardWriter
    from blockscale.checkpoint.read import Checkpoint
    from blockscale.checkpoint.schema import Layers, QuantizedLayer

MAX_SHARD_BYTES = 5_000_000_000


class Dialect(Enum):
    """How tensors are called and what config.json says."""

    HF_FP8 = "hf-fp8"
    COMPRESSED_TENSORS = "compressed-tensors"


class ScaleStorage(Enum):
    """The dtype that scales are stored in."""

    KEEP = "keep"
    FP32 = "fp32"
    E8M0 = "e8m0"


@dataclass(frozen=True, slots=True)
class ConvertOptions:
    """What to convert to."""

    dialect: Dialect = Dialect.HF_FP8
    storage: ScaleStorage = ScaleStorage.KEEP


@dataclass(frozen=True, slots=True)
class ConvertSummary:
    """What was written. ``rewritten``: layers whose scales got another dtype, exactly."""

    layers: int
    rewritten: int
    bytes_after: int
    shards: int


def convert_checkpoint(
    source: Checkpoint,
    target: Path,
    options: ConvertOptions,
    progress: Callable[[int], None] | None = None,
    crew: Crew | None = None,
) -> ConvertSummary:
    """Write ``source`` in another spelling to the new directory ``target``; no value changes.

    ``target`` appears when it is complete; an interrupted run is resumed by the same call, with the
    same bytes. Tensors keep their order, so converting back gives the same tensor bytes.
    ``progress`` is called with bytes of tensors that are done.

    Raises CheckpointError, naming file and tensor, if a scale could not be stored exactly (before
    anything is written), if ``source`` is no block-FP8 checkpoint, or if ``target`` exists.
    """
    layers = read_layers(source)
    if layers.scheme.kind is not SchemeKind.BLOCK_FP8:
        raise CheckpointError(
            source.config_path, f"declares {layers.scheme.kind.value}; convert takes block FP8"
        )
    _check_exact(layers, options.storage)
    by_scale = {layer.scale.name: layer for layer in layers.quantized}
    shards = plan_shards(_planned(source, by_scale, options), MAX_SHARD_BYTES)
    original = {
        _new_name(by_scale.get(name), name, options.dialect): name for name in source.tensors
    }

    def fill(writer: ShardWriter, shard: PlannedShard) -> None:
        for planned in shard.tensors:
            name = original[planned.name]
            _write(writer, source, name, planned, by_scale.get(name))

    documents = {
        CONFIG_NAME: {**source.config, "quantization_config": _declaration(source, layers, options)}
    }
    beside = files_beside_weights(source)
    write_checkpoint(
        Output(target, tuple(shards), documents, beside, source.files), fill, crew, progress
    )
    rewritten = sum(
        _dtype(layer, options.storage) != layer.scale.dtype for layer in layers.quantized
    )
    total = sum(shard.total_bytes for shard in shards)
    return ConvertSummary(len(layers.quantized), rewritten, total, len(shards))


def _check_exact(layers: Layers, storage: ScaleStorage) -> None:
    """Read every scale that would change its dtype, before a byte is written."""
    if storage is not ScaleStorage.E8M0:
        return
    for layer in layers.quantized:
        if layer.format.scale is ScaleFormat.UE8M0:
            continue
        facts = scale_facts(read_scales(layer.scale))
        if facts.power_of_two is not PowerOfTwo.YES:
            raise CheckpointError(
                layer.scale.path,
                f"{facts.not_power_of_two} of {facts.count} scales are no powers of two, so E8M0 "
                "cannot hold them; keep float32, or quantize the float checkpoint to ue8m0",
                tensor=layer.scale.name,
            )


def _dtype(layer: QuantizedLayer, storage: ScaleStorage) -> str:
    if storage is ScaleStorage.KEEP:
        return layer.scale.dtype
    return "F32" if storage is ScaleStorage.FP32 else "F8_E8M0"


def _new_name(layer: QuantizedLayer | None, name: str, dialect: Dialect) -> str:
    if layer is None:
        return name
    suffix = "_scale_inv" if dialect is Dialect.HF_FP8 else "_scale"
    return layer.weight.name + suffix


def _planned(
    source: Checkpoint, by_scale: dict[str, QuantizedLayer], options: ConvertOptions
) -> Iterator[PlannedTensor]:
    sizes = {"F32": 4, "F8_E8M0": 1}
    for name, entry in source.tensors.items():
        layer = by_scale.get(name)
        if layer is None or _dtype(layer, options.storage) == entry.dtype:
            new = _new_name(layer, name, options.dialect)
            yield PlannedTensor(new, entry.dtype, entry.shape, entry.length)
            continue
        dtype = _dtype(layer, options.storage)
        length = sizes[dtype] * prod(entry.shape)
        yield PlannedTensor(_new_name(layer, name, options.dialect), dtype, entry.shape, length)


def _write(
    writer: ShardWriter,
    source: Checkpoint,
    name: str,
    planned: PlannedTensor,
    layer: QuantizedLayer | None,
) -> None:
    entry = source.tensors[name]
    if layer is None or planned.dtype == entry.dtype:
        writer.copy(entry, planned.name)
        return
    values = read_scales(entry)
    if planned.dtype == "F8_E8M0":
        exponents = (values.view(np.uint32) >> FLOAT32_MANTISSA_BITS).astype(np.uint8)
        writer.write(exponents.tobytes(), planned.name)
    else:
        writer.write(values.astype("<f4").tobytes(), planned.name)


def _declaration(source: Checkpoint, layers: Layers, options: ConvertOptions) -> dict[str, Any]:
    block = layers.scheme.block
    assert block is not None
    skipped = list(layers.scheme.skipped)
    if options.dialect is Dialect.COMPRESSED_TENSORS:
        return _compressed_tensors([block.mn, block.k], skipped)
    declared: dict[str, Any] = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "weight_block_size": [block.mn, block.k],
        "modules_to_not_convert": skipped,
    }
    claimed = layers.scheme.declared_scale is ScaleFormat.UE8M0
    if claimed or options.storage is ScaleStorage.E8M0:
        declared["scale_fmt"] = "ue8m0"
    old = source.config.get("quantization_config")
    if isinstance(old, dict) and old.get("quant_method") == "fp8":
        return {**old, **{k: v for k, v in declared.items() if k == "scale_fmt"}}
    return declared


def _compressed_tensors(block: list[int], skipped: list[str]) -> dict[str, Any]:
    """The dialect of llm-compressor's FP8_BLOCK scheme (facts/peers.md 3.1)."""
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {
                    "num_bits": 8,
                    "type": "float",
                    "strategy": "block",
                    "block_structure": block,
                    "symmetric": True,
                    "dynamic": False,
                },
                "input_activations": {
                    "num_bits": 8,
                    "type": "float",
                    "strategy": "group",
                    "group_size": 128,
                    "symmetric": True,
                    "dynamic": True,
                },
            }
        },
        "ignore": skipped,
    }
