"""The only place that knows foreign tensor names and config keys.

A *scheme* is what config.json declares; a *layer* is what the tensors are. Data is trusted over
declarations: a layer is quantized if and only if it has FP8 data and a scale. Where the two
disagree there is a finding, never a guess. Block sizes come from the config, never from the ratio
of two shapes (576 rows and 5 scales fit many blocks).

``weight_scale_inv`` on disk is the multiplier that dequantizes, despite its name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

from blockscale.errors import CheckpointError
from blockscale.formats import E4M3FN, BlockFormat, BlockShape, ScaleFormat
from blockscale.planning.plan import Finding, Severity, SkippedLayer

if TYPE_CHECKING:
    from blockscale.checkpoint.header import TensorEntry
    from blockscale.checkpoint.read import Checkpoint

WEIGHT_SUFFIX = ".weight"
FP8_DATA = "F8_E4M3"
FLOAT_DTYPES = frozenset({"BF16", "F16", "F32"})
# U8 holds E8M0 exponents in MXFP8 checkpoints (facts/peers.md 3.2).
SCALE_DTYPES = {
    "F32": ScaleFormat.FP32,
    "BF16": ScaleFormat.BF16,
    "F8_E8M0": ScaleFormat.UE8M0,
    "U8": ScaleFormat.UE8M0,
}


class SchemeKind(Enum):
    """How a checkpoint says its weights are stored."""

    BLOCK_FP8 = "block FP8"
    PER_CHANNEL_FP8 = "per-channel FP8"
    PER_TENSOR_FP8 = "per-tensor FP8"
    NONE = "not quantized"
    OTHER = "another quantization"


@dataclass(frozen=True, slots=True)
class Scheme:
    """What config.json declares. ``block`` is set for BLOCK_FP8 only.

    ``declared_scale`` is the ``scale_fmt`` claim, which data may contradict; ``skipped`` the list
    of modules said to be unquantized; ``method`` the ``quant_method`` spelling.
    """

    kind: SchemeKind
    method: str | None = None
    block: BlockShape | None = None
    declared_scale: ScaleFormat | None = None
    skipped: tuple[str, ...] = ()

    def skips(self, layer: str) -> bool:
        """Whether the skip list names this layer: by full path, path component or ``re:`` pattern.

        Whole components, not substrings: MiniMax's ``gate`` must not match ``gate_proj``.
        """
        return any(_names(entry, layer) for entry in self.skipped)


@dataclass(frozen=True, slots=True)
class QuantizedLayer:
    """A block-FP8 weight as it lies on disk. ``format.scale`` is what the stored scales are."""

    name: str
    weight: TensorEntry
    scale: TensorEntry
    format: BlockFormat

    @property
    def n(self) -> int:
        """Rows of the weight."""
        return self.weight.shape[-2]

    @property
    def k(self) -> int:
        """Columns of the weight."""
        return self.weight.shape[-1]

    @property
    def stacked(self) -> int | None:
        """Experts stacked in one tensor, None for a plain matrix."""
        return self.weight.shape[0] if len(self.weight.shape) > _MATRIX_AXES else None


@dataclass(frozen=True, slots=True)
class Layers:
    """Every linear layer of a checkpoint, quantized or not, and what is wrong with it."""

    scheme: Scheme
    quantized: tuple[QuantizedLayer, ...]
    skipped: tuple[SkippedLayer, ...]
    findings: tuple[Finding, ...]


_MATRIX_AXES = 2
_STACKED_AXES = 3


def scheme_of(checkpoint: Checkpoint) -> Scheme:
    """What config.json declares. Raises CheckpointError, naming the key, if it cannot be read."""
    declared = checkpoint.config.get("quantization_config")
    if declared is None:
        text = checkpoint.config.get("text_config")
        declared = text.get("quantization_config") if isinstance(text, Mapping) else None
    if declared is None:
        return Scheme(SchemeKind.NONE)
    path = checkpoint.config_path
    if not isinstance(declared, Mapping):
        raise CheckpointError(path, "quantization_config is not an object")
    method = declared.get("quant_method")
    reader = _METHODS.get(method) if isinstance(method, str) else None
    if reader is None:
        known = ", ".join(sorted(_METHODS))
        raise CheckpointError(
            path, f"quantization_config has quant_method {method!r}; this reader knows {known}"
        )
    return reader(checkpoint, declared)


def read_layers(checkpoint: Checkpoint) -> Layers:
    """Every linear layer, with findings where data and declaration disagree.

    Raises CheckpointError, naming file and tensor, where a quantized layer cannot be read at all:
    no scale, a scale of the wrong shape or dtype, an unknown quantization.
    """
    scheme = scheme_of(checkpoint)
    quantized: list[QuantizedLayer] = []
    skipped: list[SkippedLayer] = []
    findings: list[Finding] = []
    used: set[str] = set()
    for entry in checkpoint.tensors.values():
        if entry.dtype == FP8_DATA:
            layer = _quantized_layer(checkpoint, scheme, entry)
            used.add(layer.scale.name)
            quantized.append(layer)
            if scheme.skips(layer.name):
                findings.append(_contradiction(layer.name))
        elif entry.dtype == "F8_E5M2":
            raise CheckpointError(
                entry.path, "is E5M2; block FP8 weights are E4M3 (F8_E4M3)", tensor=entry.name
            )
        elif _is_float_linear(entry):
            skipped.append(_skipped_layer(scheme, entry))
    findings += _orphan_scales(checkpoint, used)
    if scheme.kind is SchemeKind.BLOCK_FP8 and not quantized:
        findings.append(
            Finding(
                Severity.WARNING,
                "declared_but_absent",
                f"config declares {scheme.method} with {scheme.block} blocks, but no tensor is FP8",
            )
        )
    return Layers(scheme, tuple(quantized), tuple(skipped), tuple(findings))


def _quantized_layer(checkpoint: Checkpoint, scheme: Scheme, weight: TensorEntry) -> QuantizedLayer:
    name = weight.name.removesuffix(WEIGHT_SUFFIX)
    if scheme.kind in (SchemeKind.PER_CHANNEL_FP8, SchemeKind.PER_TENSOR_FP8):
        raise CheckpointError(
            checkpoint.config_path,
            f"declares {scheme.kind.value} ({scheme.method}), not block FP8; blockscale plans "
            "block-scaled layers only, serve this checkpoint with a per-channel FP8 path",
        )
    if scheme.block is None:
        raise CheckpointError(
            weight.path,
            "is FP8, but no config.json beside it declares weight_block_size; block sizes are "
            "never guessed from shapes",
            tensor=weight.name,
        )
    if len(weight.shape) not in (_MATRIX_AXES, _STACKED_AXES):
        raise CheckpointError(
            weight.path, f"has shape {weight.shape}; a weight has 2 or 3 axes", tensor=weight.name
        )
    scale = _scale_of(checkpoint, weight)
    scale_format = SCALE_DTYPES.get(scale.dtype)
    if scale_format is None:
        raise CheckpointError(
            scale.path,
            f"is {scale.dtype}; scales are {', '.join(SCALE_DTYPES)}",
            tensor=scale.name,
        )
    _check_scale_shape(weight, scale, scheme.block)
    return QuantizedLayer(name, weight, scale, BlockFormat(E4M3FN, scale_format, scheme.block))


def _scale_of(checkpoint: Checkpoint, weight: TensorEntry) -> TensorEntry:
    candidates = [weight.name + "_scale_inv", weight.name + "_scale"]
    if weight.name.endswith(WEIGHT_SUFFIX):
        candidates.append(weight.name.removesuffix(WEIGHT_SUFFIX) + ".scale")
    found = [checkpoint.tensors[name] for name in candidates if name in checkpoint.tensors]
    if len(found) != 1:
        problem = "has two scales" if found else "is FP8 but has no scale"
        raise CheckpointError(
            weight.path, f"{problem}; looked for {', '.join(candidates)}", tensor=weight.name
        )
    return found[0]


def _check_scale_shape(weight: TensorEntry, scale: TensorEntry, block: BlockShape) -> None:
    *leading, n, k = weight.shape
    expected = (*leading, *block.grid(n, k))
    if scale.shape == expected:
        return
    hint = ""
    if scale.shape in ((n,), (n, 1)):
        hint = "; one scale a row is per-channel FP8, not block FP8"
    elif scale.shape in ((), (1,)):
        hint = "; one scale is per-tensor FP8, not block FP8"
    raise CheckpointError(
        scale.path,
        f"has shape {scale.shape}, but {weight.name} of shape {weight.shape} in {block} blocks "
        f"needs {expected}{hint}",
        tensor=scale.name,
    )


def _is_float_linear(entry: TensorEntry) -> bool:
    return (
        entry.dtype in FLOAT_DTYPES
        and len(entry.shape) == _MATRIX_AXES
        and entry.name.endswith(WEIGHT_SUFFIX)
    )


def _skipped_layer(scheme: Scheme, entry: TensorEntry) -> SkippedLayer:
    name = entry.name.removesuffix(WEIGHT_SUFFIX)
    if scheme.kind is SchemeKind.NONE:
        reason = f"{entry.dtype}: the checkpoint is not quantized"
    elif scheme.skips(name):
        reason = f"{entry.dtype}: on the checkpoint's skip list"
    else:
        reason = f"{entry.dtype}: has no scale on disk"
    return SkippedLayer(name, reason)


def _contradiction(name: str) -> Finding:
    return Finding(
        Severity.WARNING,
        "skip_list_contradicted",
        "is on the skip list but is stored as FP8 with a scale; it is treated as quantized",
        name,
    )


def _orphan_scales(checkpoint: Checkpoint, used: set[str]) -> list[Finding]:
    return [
        Finding(
            Severity.WARNING,
            "scale_without_data",
            f"scale {entry.name} belongs to no FP8 weight",
            entry.name,
        )
        for entry in checkpoint.tensors.values()
        if entry.name.endswith(("weight_scale_inv", "weight_scale")) and entry.name not in used
    ]


def _names(entry: str, layer: str) -> bool:
    if entry.startswith("re:"):
        try:
            return re.match(entry.removeprefix("re:"), layer) is not None
        except re.error:
            return False
    if layer == entry or layer.startswith(entry + ".") or layer.endswith("." + entry):
        return True
    return f".{entry}." in layer


def _fp8(checkpoint: Checkpoint, declared: Mapping[str, Any]) -> Scheme:
    path = checkpoint.config_path
    skipped = _strings(path, declared, "modules_to_not_convert") + _strings(
        path, declared, "ignored_layers"
    )
    block = declared.get("weight_block_size")
    if block is None:
        return Scheme(SchemeKind.PER_TENSOR_FP8, "fp8", skipped=skipped)
    shape = _block(path, "weight_block_size", block)
    declared_scale = declared.get("scale_fmt")
    scale = ScaleFormat.UE8M0 if declared_scale == "ue8m0" else ScaleFormat.FP32
    return Scheme(SchemeKind.BLOCK_FP8, "fp8", shape, scale, skipped)


def _compressed_tensors(checkpoint: Checkpoint, declared: Mapping[str, Any]) -> Scheme:
    path = checkpoint.config_path
    groups = declared.get("config_groups")
    group = next(iter(groups.values()), None) if isinstance(groups, Mapping) else None
    weights = group.get("weights") if isinstance(group, Mapping) else None
    if not isinstance(weights, Mapping):
        raise CheckpointError(path, "compressed-tensors without config_groups.*.weights")
    skipped = _strings(path, declared, "ignore")
    bits, kind, strategy = (weights.get(key) for key in ("num_bits", "type", "strategy"))
    if (bits, kind) != (8, "float"):
        return Scheme(SchemeKind.OTHER, "compressed-tensors", skipped=skipped)
    if strategy == "block":
        block = _block(path, "block_structure", weights.get("block_structure"))
        return Scheme(SchemeKind.BLOCK_FP8, "compressed-tensors", block, ScaleFormat.FP32, skipped)
    per_channel = SchemeKind.PER_CHANNEL_FP8 if strategy == "channel" else SchemeKind.PER_TENSOR_FP8
    return Scheme(per_channel, "compressed-tensors", skipped=skipped)


def _mxfp8(checkpoint: Checkpoint, declared: Mapping[str, Any]) -> Scheme:
    path = checkpoint.config_path
    block = _block(path, "weight_block_size", declared.get("weight_block_size", [1, 32]))
    skipped = _strings(path, declared, "ignored_layers")
    return Scheme(SchemeKind.BLOCK_FP8, "mxfp8", block, ScaleFormat.UE8M0, skipped)


_METHODS = {"fp8": _fp8, "compressed-tensors": _compressed_tensors, "mxfp8": _mxfp8}


def _block(path: object, key: str, value: object) -> BlockShape:
    if (
        isinstance(value, list)
        and len(value) == _MATRIX_AXES
        and all(isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in value)
    ):
        return BlockShape(value[0], value[1])
    raise CheckpointError(str(path), f"{key} is {value!r}; expected two positive integers")


def _strings(path: object, declared: Mapping[str, Any], key: str) -> tuple[str, ...]:
    value = declared.get(key)
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise CheckpointError(str(path), f"quantization_config.{key} must be a list of strings")
    return tuple(value)
