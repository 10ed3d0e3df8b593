"""A float checkpoint becomes a block-FP8 one, streaming, in bounded memory, resumable.

The result is the HF ``fp8`` dialect, which transformers, vLLM and SGLang read: ``X.weight`` in
F8_E4M3 and ``X.weight_scale_inv`` in F32. UE8M0 scales are stored as float32 powers of two with
``scale_fmt: "ue8m0"`` declared, as DeepSeek-V3.1 does: every engine reads F32, not all read E8M0.
Scales are rounded once, from the float weights.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import TYPE_CHECKING

import torch

from blockscale.checkpoint.output import PlannedTensor, files_beside_weights, plan_shards
from blockscale.checkpoint.read import CONFIG_NAME
from blockscale.checkpoint.schema import (
    FLOAT_DTYPES,
    TABLES,
    WEIGHT_SUFFIX,
    SchemeKind,
    scheme_of,
)
from blockscale.checkpoint.strips import STRIP_BYTES, StripQuantizer, resident_bytes
from blockscale.checkpoint.write import Crew, Output, write_checkpoint
from blockscale.errors import CheckpointError
from blockscale.formats import FP8_128X128_FP32, BlockFormat, ScaleFormat

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from blockscale.checkpoint.header import TensorEntry
    from blockscale.checkpoint.output import PlannedShard, ShardWriter
    from blockscale.checkpoint.read import Checkpoint

SCALE_SUFFIX = "_scale_inv"

# Path components whose weights stay as they are: tables that are looked up, not multiplied;
# routers, whose errors move tokens to other experts; the output head.
KEPT_COMPONENTS = (
    *TABLES, "lm_head", "head", "score", "classifier",
    "gate", "router", "shared_expert_gate", "e_score_correction_bias", "eh_proj",
)  # fmt: skip

MAX_SHARD_BYTES = 5_000_000_000
# What the interpreter and torch may take beside the buffers while a checkpoint is written.
SPARE_MEMORY_BYTES = 96 << 20


@dataclass(frozen=True, slots=True)
class QuantizeOptions:
    """What to quantize to. ``kept`` names further modules (path components) to leave alone."""

    format: BlockFormat = FP8_128X128_FP32
    kept: tuple[str, ...] = ()
    max_shard_bytes: int = MAX_SHARD_BYTES


@dataclass(frozen=True, slots=True)
class QuantizeSummary:
    """What was written: ``shards`` files in all, ``resumed`` of them by an interrupted run."""

    quantized: int
    kept: int
    bytes_before: int
    bytes_after: int
    shards: int
    resumed: int


def quantize_checkpoint(
    source: Checkpoint,
    target: Path,
    options: QuantizeOptions | None = None,
    progress: Callable[[int], None] | None = None,
    crew: Crew | None = None,
) -> QuantizeSummary:
    """Write a block-FP8 copy of ``source`` to the new directory ``target``.

    The result has the same bytes whoever writes it: any number of threads, processes and machines
    (``crew``), interrupted at any moment and called again. ``target`` appears when it is complete.
    ``progress`` is called with bytes of the result that are done (``quantized_bytes`` in all).

    Raises CheckpointError, naming file and tensor, if the source is already quantized, has
    nothing to quantize, or holds NaN or Inf in a weight to quantize, if ``target`` exists, or if
    the disk is too full.
    """
    options, crew = options or QuantizeOptions(), crew or Crew()
    output, chosen = _output(source, target, options)
    crew = crew.needed_for(len(output.shards))
    limit = _buffer_bytes(crew)
    own = threading.local()

    def fill(writer: ShardWriter, shard: PlannedShard) -> None:
        quantizer = getattr(own, "quantizer", None)
        if quantizer is None:
            quantizer = own.quantizer = StripQuantizer(options.format, limit)
        _fill(writer, shard, source, chosen, quantizer)

    with _one_core_each(crew):
        written = write_checkpoint(output, fill, crew, progress)
    return QuantizeSummary(
        len(chosen),
        len(source.tensors) - len(chosen),
        source.tensor_bytes,
        sum(shard.total_bytes for shard in output.shards),
        len(output.shards),
        written.resumed,
    )


def quantized_bytes(source: Checkpoint, options: QuantizeOptions) -> int:
    """Bytes of all tensors of the result."""
    chosen = _chosen(source, options)
    return sum(tensor.length for tensor in _planned(source, chosen, options.format))


def _output(
    source: Checkpoint, target: Path, options: QuantizeOptions
) -> tuple[Output, frozenset[str]]:
    """The planned result, and the weights that will be quantized."""
    if scheme_of(source).kind is not SchemeKind.NONE:
        raise CheckpointError(
            source.config_path, "declares a quantization already; quantize float checkpoints only"
        )
    stored = [entry for entry in source.tensors.values() if entry.dtype.startswith("F8_")]
    if stored:
        raise CheckpointError(
            stored[0].path,
            f"is {stored[0].dtype} already, though no config.json declares a quantization; "
            "quantize float checkpoints only",
            tensor=stored[0].name,
        )
    components = {component for name in source.tensors for component in name.split(".")}
    for kept in options.kept:
        if kept not in components:
            raise CheckpointError(
                source.path, f"has no module {kept!r} to keep; give a component of a tensor's name"
            )
    chosen = _chosen(source, options)
    if not chosen:
        raise CheckpointError(
            source.path,
            "holds no float weight that is quantized: those are matrices named X.weight, but for "
            "embeddings, heads, routers, norms and what --keep names",
        )
    shards = plan_shards(_planned(source, chosen, options.format), options.max_shard_bytes)
    config = {
        **source.config,
        "quantization_config": _declaration(source, chosen, options.format),
    }
    beside = files_beside_weights(source)
    return Output(target, tuple(shards), {CONFIG_NAME: config}, beside, source.files), chosen


def _buffer_bytes(crew: Crew) -> int:
    """Bytes that the buffers of one thread may take."""
    if crew.memory_bytes is None:
        return 8 * STRIP_BYTES
    return max(0, crew.memory_bytes - resident_bytes() - SPARE_MEMORY_BYTES) // crew.threads


@contextmanager
def _one_core_each(crew: Crew) -> Iterator[None]:
    """Several threads of ours need no threads of torch's: they would wait for one another."""
    before = torch.get_num_threads()
    if crew.threads > 1:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _chosen(source: Checkpoint, options: QuantizeOptions) -> frozenset[str]:
    return frozenset(n for n, entry in source.tensors.items() if _is_quantized(entry, options))


def _is_quantized(entry: TensorEntry, options: QuantizeOptions) -> bool:
    if entry.dtype not in FLOAT_DTYPES or not entry.name.endswith(WEIGHT_SUFFIX):
        return False
    if len(entry.shape) != 2 or 0 in entry.shape:  # noqa: PLR2004 - a matrix
        return False
    components = set(entry.name.removesuffix(WEIGHT_SUFFIX).split("."))
    kept = components.intersection((*KEPT_COMPONENTS, *options.kept))
    return not kept and not any("norm" in component for component in components)


def _planned(
    source: Checkpoint, chosen: frozenset[str], fmt: BlockFormat
) -> Iterator[PlannedTensor]:
    for name, entry in source.tensors.items():
        if name not in chosen:
            yield PlannedTensor(name, entry.dtype, entry.shape, entry.length)
            continue
        grid = fmt.block.grid(*entry.shape)
        yield PlannedTensor(name, "F8_E4M3", entry.shape, prod(entry.shape))
        yield PlannedTensor(name + SCALE_SUFFIX, "F32", grid, 4 * prod(grid))


def _fill(
    writer: ShardWriter,
    shard: PlannedShard,
    source: Checkpoint,
    chosen: frozenset[str],
    quantizer: StripQuantizer,
) -> None:
    """Write the tensors of one shard; a weight's scales, known last, follow it."""
    for planned in shard.tensors:
        name = planned.name
        if name in chosen:
            emit = partial(writer.write, name=name)
            scales = quantizer.quantize(source.tensors[name], emit)
            writer.write(scales, name + SCALE_SUFFIX)
        elif name in source.tensors:
            writer.copy(source.tensors[name], name)


def _declaration(source: Checkpoint, chosen: frozenset[str], fmt: BlockFormat) -> dict[str, object]:
    kept = [
        name.removesuffix(WEIGHT_SUFFIX)
        for name, entry in source.tensors.items()
        if name not in chosen and name.endswith(WEIGHT_SUFFIX) and len(entry.shape) > 1
    ]
    if not any(name.endswith("lm_head") for name in kept):
        kept.append("lm_head")  # A tied head has no tensor, and loaders ask for it by name.
    declared: dict[str, object] = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "weight_block_size": [fmt.block.mn, fmt.block.k],
        "modules_to_not_convert": kept,
    }
    if fmt.scale is ScaleFormat.UE8M0:
        declared["scale_fmt"] = "ue8m0"
    return declared
