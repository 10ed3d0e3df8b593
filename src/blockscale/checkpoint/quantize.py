"""A float checkpoint becomes a block-FP8 one, streaming, in bounded memory.

The result is the HF ``fp8`` dialect, which transformers, vLLM and SGLang read: ``X.weight`` in
F8_E4M3 and ``X.weight_scale_inv`` in F32. UE8M0 scales are stored as float32 powers of two with
``scale_fmt: "ue8m0"`` declared, as DeepSeek-V3.1 does: every engine reads F32, not all read E8M0.
Scales are rounded once, from the float weights.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

import torch

from blockscale.checkpoint.output import (
    PlannedShard,
    PlannedTensor,
    ShardWriter,
    plan_shards,
    staged_directory,
    write_json,
)
from blockscale.checkpoint.read import CONFIG_NAME, INDEX_NAME, SINGLE_NAME, read_bytes
from blockscale.checkpoint.schema import FLOAT_DTYPES, WEIGHT_SUFFIX, SchemeKind, scheme_of
from blockscale.checkpoint.tensors import read_rows, row_bands
from blockscale.errors import CheckpointError
from blockscale.formats import FP8_128X128_FP32, BlockFormat, ScaleFormat
from blockscale.reference import quantize, scale_values

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from blockscale.checkpoint.header import TensorEntry
    from blockscale.checkpoint.read import Checkpoint

SCALE_SUFFIX = "_scale_inv"

# Path components whose weights stay as they are: tables that are looked up, not multiplied;
# routers, whose errors move tokens to other experts; the output head.
KEPT_COMPONENTS = (
    "embed_tokens", "embeddings", "wte", "wpe", "embed", "lm_head", "head", "score", "classifier",
    "gate", "router", "shared_expert_gate", "e_score_correction_bias", "eh_proj",
)  # fmt: skip

MAX_SHARD_BYTES = 5_000_000_000
COPY_BYTES = 16 << 20
# Files beside the weights that are copied; other weight files would contradict the result.
WEIGHT_LIKE = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".gguf",
    ".h5",
    ".msgpack",
    ".onnx",
    INDEX_NAME,
)


@dataclass(frozen=True, slots=True)
class QuantizeOptions:
    """What to quantize to. ``kept`` names further modules (path components) to leave alone."""

    format: BlockFormat = FP8_128X128_FP32
    kept: tuple[str, ...] = ()
    max_shard_bytes: int = MAX_SHARD_BYTES


@dataclass(frozen=True, slots=True)
class QuantizeSummary:
    """What was written."""

    quantized: int
    kept: int
    bytes_before: int
    bytes_after: int
    shards: int


def quantize_checkpoint(
    source: Checkpoint,
    target: Path,
    options: QuantizeOptions | None = None,
    progress: Callable[[int], None] | None = None,
) -> QuantizeSummary:
    """Write a block-FP8 copy of ``source`` to the new directory ``target``.

    Everything is written to a directory beside ``target`` that takes its name at the end: on any
    error or Ctrl-C nothing is left behind. ``progress`` is called with source bytes done.

    Raises CheckpointError, naming file and tensor, if the source is already quantized or holds NaN
    or Inf in a weight to quantize, if ``target`` exists, or if the disk is too full.
    """
    options = options or QuantizeOptions()
    if scheme_of(source).kind is not SchemeKind.NONE:
        raise CheckpointError(
            source.config_path, "declares a quantization already; quantize float checkpoints only"
        )
    report = progress or _ignore
    chosen = {name for name, entry in source.tensors.items() if _is_quantized(entry, options)}
    shards = plan_shards(_planned(source, chosen, options.format), options.max_shard_bytes)
    with staged_directory(target, sum(shard.total_bytes for shard in shards)) as folder:
        for shard in shards:
            with ShardWriter(folder / shard.file_name, shard.tensors) as writer:
                for planned in shard.tensors:
                    _write(writer, source, planned.name, chosen, options.format, report)
        _write_json_files(source, folder, shards, chosen, options)
    return QuantizeSummary(
        len(chosen),
        len(source.tensors) - len(chosen),
        source.tensor_bytes,
        sum(shard.total_bytes for shard in shards),
        len(shards),
    )


def _ignore(_: int) -> None:
    return


def _is_quantized(entry: TensorEntry, options: QuantizeOptions) -> bool:
    if entry.dtype not in FLOAT_DTYPES or not entry.name.endswith(WEIGHT_SUFFIX):
        return False
    if len(entry.shape) != 2 or 0 in entry.shape:  # noqa: PLR2004 - a matrix
        return False
    components = set(entry.name.removesuffix(WEIGHT_SUFFIX).split("."))
    kept = components.intersection((*KEPT_COMPONENTS, *options.kept))
    return not kept and not any("norm" in component for component in components)


def _planned(source: Checkpoint, chosen: set[str], fmt: BlockFormat) -> Iterator[PlannedTensor]:
    for name, entry in source.tensors.items():
        if name not in chosen:
            yield PlannedTensor(name, entry.dtype, entry.shape, entry.length)
            continue
        grid = fmt.block.grid(*entry.shape)
        yield PlannedTensor(name, "F8_E4M3", entry.shape, prod(entry.shape))
        yield PlannedTensor(name + SCALE_SUFFIX, "F32", grid, 4 * prod(grid))


def _write(
    writer: ShardWriter,
    source: Checkpoint,
    name: str,
    chosen: set[str],
    fmt: BlockFormat,
    report: Callable[[int], None],
) -> None:
    if name in chosen:
        entry = source.tensors[name]
        writer.write(_scales_after_data(writer, entry, fmt, report), name + SCALE_SUFFIX)
    elif name in source.tensors:
        entry = source.tensors[name]
        for begin in range(0, entry.length, COPY_BYTES):
            end = min(begin + COPY_BYTES, entry.length)
            writer.write(read_bytes(entry, begin, end), name)
            report(end - begin)


def _scales_after_data(
    writer: ShardWriter, entry: TensorEntry, fmt: BlockFormat, report: Callable[[int], None]
) -> bytes:
    """Write the codes band by band; give back the scales, which follow them in the file."""
    rows, columns = entry.shape
    # Made before the first band: a small tensor kept for each band would pin the heap between the
    # large temporaries, and glibc gave none of it back (2.3 GB after 950 bands).
    scales = torch.empty(fmt.block.grid(rows, columns))
    for first, count in row_bands(rows, columns, fmt.block.mn):
        band = read_rows(entry, first, count)
        quantized = quantize(band, fmt)
        values = scale_values(quantized)
        if not bool(torch.isfinite(values).all()):
            raise CheckpointError(
                entry.path,
                f"holds NaN or Inf in rows {first} to {first + count - 1}; repair it, or keep the "
                "layer unquantized with --keep",
                tensor=entry.name,
            )
        writer.write(quantized.data.view(torch.uint8).numpy().tobytes(), entry.name)
        block_row = first // fmt.block.mn
        scales[block_row : block_row + values.shape[0]] = values
        report(band.nbytes)
    return scales.numpy().tobytes()


def _write_json_files(
    source: Checkpoint,
    folder: Path,
    shards: list[PlannedShard],
    chosen: set[str],
    options: QuantizeOptions,
) -> None:
    if source.path.is_dir():
        for file in sorted(source.path.iterdir()):
            if file.is_file() and not file.name.endswith(WEIGHT_LIKE):
                shutil.copyfile(file, folder / file.name)
    config = {**source.config, "quantization_config": _declaration(source, chosen, options.format)}
    write_json(folder / CONFIG_NAME, config)
    if len(shards) > 1:
        weight_map = {t.name: shard.file_name for shard in shards for t in shard.tensors}
        total = sum(shard.total_bytes for shard in shards)
        write_json(
            folder / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": weight_map}
        )
    else:
        assert shards[0].file_name == SINGLE_NAME


def _declaration(source: Checkpoint, chosen: set[str], fmt: BlockFormat) -> dict[str, object]:
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
