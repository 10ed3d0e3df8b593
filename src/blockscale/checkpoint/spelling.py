"""The three spellings of block FP8 that ``convert`` writes: tensors' names and shapes, config keys.

What a spelling cannot say is an obstacle, collected before anything is written. What was declared
before is kept in config.json under ``blockscale_converted_from``, which no other system reads, so
that converting back restores it to the letter.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

from blockscale.checkpoint.read import CONFIG_NAME, MODELOPT_NAME
from blockscale.checkpoint.scale_names import WEIGHT_SUFFIX
from blockscale.checkpoint.skips import Reader, SkipList, SkipMatcher
from blockscale.formats import BlockShape, ScaleFormat

if TYPE_CHECKING:
    from blockscale.checkpoint.read import Checkpoint
    from blockscale.checkpoint.schema import Layers, QuantizedLayer, Scheme

CONVERTED_FROM = "blockscale_converted_from"

_BLOCK_128 = BlockShape(128, 128)
_MX_BLOCK = BlockShape(1, 32)
_HEAD = "lm_head"
_PRODUCER = {"name": "blockscale"}
_EXPONENTS = {"U8", "F8_E8M0"}
_SUFFIXES = {
    ".weight_scale_inv", ".weight_scale", "_scale_inv", "_scale", ".scale", ".scale_inv",
    ".qscale_weight",
}  # fmt: skip
# Pattern characters of any reader: such an entry means other modules elsewhere.
_PATTERN = frozenset("*?[]()|+^$\\:")


class Dialect(Enum):
    """How tensors are called and what config.json says."""

    HF_FP8 = "hf-fp8"
    COMPRESSED_TENSORS = "compressed-tensors"
    MODELOPT = "modelopt"


class ScaleStorage(Enum):
    """The dtype that scales are stored in."""

    KEEP = "keep"
    FP32 = "fp32"
    E8M0 = "e8m0"


_METHODS = {
    "fp8": Dialect.HF_FP8,
    "mxfp8": Dialect.HF_FP8,
    "compressed-tensors": Dialect.COMPRESSED_TENSORS,
    "modelopt": Dialect.MODELOPT,
}


def dialect_of(scheme: Scheme) -> Dialect | None:
    """The spelling of what is declared, None if nothing is."""
    return _METHODS.get(scheme.method or "")


@dataclass(frozen=True, slots=True)
class Spelling:
    """A dialect and a storage of scales, for the layers of one checkpoint.

    ``is_respelled``: names and declaration change; otherwise at most the storage does. ``suffix``,
    ``axes`` and ``exponents`` are how scales were called, shaped and typed before the checkpoint
    was converted from this very dialect; None for the dialect's usual way.
    """

    dialect: Dialect
    storage: ScaleStorage
    is_respelled: bool
    suffix: str | None = None
    axes: int | None = None
    exponents: str | None = None

    def scale_name(self, layer: QuantizedLayer) -> str:
        """What the scale tensor is called."""
        if not (self.is_respelled or layer.is_scale_shared):
            return layer.scale.name
        if self.suffix is not None:
            return layer.weight.name.removesuffix(WEIGHT_SUFFIX) + self.suffix
        return layer.weight.name + ("_scale_inv" if self.dialect is Dialect.HF_FP8 else "_scale")

    def scale_dtype(self, layer: QuantizedLayer) -> str:
        """The safetensors dtype of its scales."""
        is_stored_so = layer.format.scale is ScaleFormat.UE8M0
        if self.storage is ScaleStorage.FP32:
            return "F32"
        if self.storage is ScaleStorage.KEEP and not is_stored_so:
            return layer.scale.dtype
        if is_stored_so and not self.is_respelled:
            return layer.scale.dtype
        return self.exponents or ("U8" if layer.format.block == _MX_BLOCK else "F8_E8M0")

    def scale_shape(self, layer: QuantizedLayer, stored: tuple[int, ...]) -> tuple[int, ...]:
        """The scale tensor's shape; ``stored`` is the one it has."""
        if layer.is_scale_shared:
            stored = layer.scale.shape
        if not self.is_respelled:
            return stored
        is_modelopt = self.dialect is Dialect.MODELOPT and layer.format.block != _MX_BLOCK
        if is_modelopt and self.axes != len(layer.scale.shape):
            rows, columns = layer.scale.shape
            return (rows, 1, columns, 1)
        return layer.scale.shape


def spelling(
    source: Checkpoint, layers: Layers, dialect: Dialect, storage: ScaleStorage
) -> Spelling:
    """How ``layers`` of ``source`` would be spelled."""
    before = _before(source.config, dialect)
    suffix, axes, exponents = (before.get(k) for k in ("suffix", "axes", "exponents"))
    return Spelling(
        dialect,
        storage,
        dialect_of(layers.scheme) is not dialect,
        suffix if suffix in _SUFFIXES else None,
        axes if isinstance(axes, int) else None,
        exponents if exponents in _EXPONENTS else None,
    )


def _before(config: Mapping[str, Any], dialect: Dialect) -> Mapping[str, Any]:
    """What was kept when the checkpoint was converted from ``dialect``; empty if it was not."""
    before = config.get(CONVERTED_FROM)
    if isinstance(before, Mapping) and before.get("dialect") == dialect.value:
        return before
    return {}


def _kept(source: Checkpoint, layers: Layers) -> dict[str, object]:
    """What the new spelling does not say, for the way back."""
    kept: dict[str, object] = {
        "dialect": (dialect_of(layers.scheme) or Dialect.HF_FP8).value,
        "config": {
            key: source.config[key]
            for key in ("quantization_config", "text_config")
            if _declares(source.config, key)
        },
    }
    if source.modelopt is not None:
        kept[MODELOPT_NAME] = source.modelopt
    traits: dict[str, set[str] | set[int]] = {
        "suffix": {
            layer.scale.name.removeprefix(layer.weight.name.removesuffix(WEIGHT_SUFFIX))
            for layer in layers.quantized
        },
        "axes": {len(source.tensors[layer.scale.name].shape) for layer in layers.quantized},
        "exponents": {layer.scale.dtype for layer in layers.quantized} & _EXPONENTS,
    }
    return kept | {key: one for key, values in traits.items() for one in values if len(values) == 1}


def obstacles(layers: Layers, wanted: Spelling) -> list[str]:
    """Everything that keeps these layers from being spelled so, in words."""
    found = []
    blocks = Counter(layer.format.block for layer in layers.quantized)
    name = wanted.dialect.value
    if wanted.is_respelled and len(blocks) > 1:
        shown = " and ".join(f"{count} in {block}" for block, count in blocks.items())
        found.append(f"its layers differ in blocks ({shown}), {name} would declare one")
    if wanted.is_respelled and wanted.dialect is not Dialect.HF_FP8:
        fused = [x.name for x in layers.quantized if not x.weight.name.endswith(WEIGHT_SUFFIX)]
        fused += [x.name for x in layers.quantized if x.stacked is not None and x.name not in fused]
        if fused:
            found.append(
                f"{len(fused)} layers are stacked experts (first: {fused[0]}), and {name} has a "
                "name for one matrix only"
            )
    if wanted.is_respelled and any(f.code == "activation_scales" for f in layers.findings):
        found.append(f"it stores scales for activations, which {name} with blocks does not declare")
    for block in blocks:
        dtypes = {wanted.scale_dtype(x) for x in layers.quantized if x.format.block == block}
        is_mxfp8 = wanted.is_respelled or layers.scheme.method == "mxfp8"
        found += _block_obstacles(wanted.dialect, block, dtypes, is_mxfp8=is_mxfp8)
    return found


def _block_obstacles(
    dialect: Dialect, block: BlockShape, dtypes: set[str], *, is_mxfp8: bool
) -> list[str]:
    """``is_mxfp8``: 1x32 blocks would be declared as MXFP8, not as blocks of any size."""
    if dialect is Dialect.HF_FP8 and not (block == _MX_BLOCK and is_mxfp8):
        return []
    if block == _MX_BLOCK:
        problem = f"{dialect.value} stores the scales of 1x32 blocks as E8M0 (--scales e8m0)"
        return [problem] if dtypes - _EXPONENTS else []
    found = []
    if dialect is Dialect.MODELOPT and block != _BLOCK_128:
        found.append(f"modelopt declares 128x128 and 1x32 blocks only, not {block}")
    # compressed-tensors 0.20 decompresses into the dtype of the scales, without complaint: of E8M0
    # ones no sign is left (tests/peers/test_compressed_tensors.py).
    allowed = {"F32"} if dialect is Dialect.MODELOPT else {"F32", "F16", "BF16"}
    if other := dtypes - allowed:
        stored = ", ".join(sorted(other))
        found.append(f"{dialect.value} does not read {block} scales in {stored} (--scales fp32)")
    return found


def documents(
    source: Checkpoint, layers: Layers, wanted: Spelling
) -> dict[str, Mapping[str, object]]:
    """config.json and, for ModelOpt, hf_quant_config.json, as they will be written."""
    if not wanted.is_respelled:
        return _same_dialect(source, layers, wanted)
    config = {key: value for key, value in source.config.items() if key != CONVERTED_FROM}
    before = _before(source.config, wanted.dialect)
    if before:
        return _restored(config, before, layers, wanted)
    block = layers.quantized[0].format.block
    names = unquantized_modules(source, layers)
    algorithm = "MXFP8" if block == _MX_BLOCK else "FP8_PB_WO"
    declared = {
        Dialect.HF_FP8: lambda: _hf_fp8(layers, wanted, block, names),
        Dialect.COMPRESSED_TENSORS: lambda: _compressed_tensors(block, names),
        Dialect.MODELOPT: lambda: _modelopt(algorithm, names),
    }[wanted.dialect]()
    config = {**_without_declaration(config), "quantization_config": declared}
    found: dict[str, Mapping[str, object]] = {
        CONFIG_NAME: {**config, CONVERTED_FROM: _kept(source, layers)}
    }
    if wanted.dialect is Dialect.MODELOPT:
        body = {"quant_algo": algorithm, "kv_cache_quant_algo": None, "exclude_modules": names}
        found[MODELOPT_NAME] = {"producer": _PRODUCER, "quantization": body}
    return found


def unquantized_modules(source: Checkpoint, layers: Layers) -> list[str]:
    """The modules to declare unquantized, by full name: what every reader takes alike.

    The layers that are not quantized on disk; entries of the old list that are plain names of
    modules without a weight here; and the output head if it is tied to the embedding.
    """
    stored = {name.rpartition(".")[0] for name in source.tensors}
    named = [
        entry
        for entry in layers.scheme.skipped
        if "." in entry and not _PATTERN.intersection(entry) and entry not in stored
    ]
    # A list that some other reader would take to mean a quantized layer is worse than none.
    matcher = SkipMatcher(SkipList(tuple(named), tuple(Reader)))
    if any(matcher.skipped_by(layer.name) for layer in layers.quantized):
        named = []
    head = [_HEAD] if _HEAD + WEIGHT_SUFFIX not in source.tensors else []
    return list(dict.fromkeys([*(layer.name for layer in layers.skipped), *named, *head]))


def _same_dialect(
    source: Checkpoint, layers: Layers, wanted: Spelling
) -> dict[str, Mapping[str, object]]:
    declared = source.config.get("quantization_config")
    config = dict(source.config)
    if isinstance(declared, Mapping):
        config["quantization_config"] = _with_scale_fmt(declared, layers, wanted)
    found: dict[str, Mapping[str, object]] = {CONFIG_NAME: config}
    if source.modelopt is not None:
        found[MODELOPT_NAME] = source.modelopt
    return found


def _restored(
    config: dict[str, Any], before: Mapping[str, Any], layers: Layers, wanted: Spelling
) -> dict[str, Mapping[str, object]]:
    """What was declared before the checkpoint was converted, at the place where it was."""
    old = before.get("config")
    old = dict(old) if isinstance(old, Mapping) else {}
    declared = old.get("quantization_config")
    if isinstance(declared, Mapping):
        old["quantization_config"] = _with_scale_fmt(declared, layers, wanted)
    else:
        config = {key: value for key, value in config.items() if key != "quantization_config"}
    found: dict[str, Mapping[str, object]] = {CONFIG_NAME: {**config, **old}}
    modelopt = before.get(MODELOPT_NAME)
    if isinstance(modelopt, Mapping):
        found[MODELOPT_NAME] = modelopt
    return found


def _with_scale_fmt(
    declared: Mapping[str, object], layers: Layers, wanted: Spelling
) -> Mapping[str, object]:
    """The old declaration, which must say ue8m0 where E8M0 is stored."""
    if declared.get("quant_method") != "fp8" or declared.get("scale_fmt") == "ue8m0":
        return declared
    stored = {wanted.scale_dtype(layer) for layer in layers.quantized}
    return {**declared, "scale_fmt": "ue8m0"} if stored & _EXPONENTS else declared


def _declares(config: Mapping[str, Any], key: str) -> bool:
    value = config.get(key)
    if key == "text_config":
        return isinstance(value, Mapping) and "quantization_config" in value
    return value is not None


def _without_declaration(config: dict[str, Any]) -> dict[str, Any]:
    """The config without a declaration inside text_config: the new one stands at the top."""
    if not _declares(config, "text_config"):
        return config
    text = {k: v for k, v in config["text_config"].items() if k != "quantization_config"}
    return {**config, "text_config": text}


def _hf_fp8(
    layers: Layers, wanted: Spelling, block: BlockShape, names: list[str]
) -> dict[str, Any]:
    if block == _MX_BLOCK:
        size = [block.mn, block.k]
        return {"quant_method": "mxfp8", "weight_block_size": size, "ignored_layers": names}
    declared: dict[str, Any] = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "weight_block_size": [block.mn, block.k],
        "modules_to_not_convert": names,
    }
    return dict(_with_scale_fmt(declared, layers, wanted))


def _compressed_tensors(block: BlockShape, names: list[str]) -> dict[str, Any]:
    """The dialect of llm-compressor's FP8_BLOCK and MXFP8 schemes."""
    is_mx = block == _MX_BLOCK
    number = {"num_bits": 8, "type": "float", "symmetric": True}
    weights: dict[str, Any] = {**number, "dynamic": False}
    activations: dict[str, Any] = {**number, "dynamic": True, "strategy": "group"}
    if block.mn == 1:
        weights |= {"strategy": "group", "group_size": block.k}
        activations["group_size"] = block.k
    else:
        weights |= {"strategy": "block", "block_structure": [block.mn, block.k]}
        activations["group_size"] = block.k
    if is_mx:
        weights["scale_dtype"] = activations["scale_dtype"] = "torch.uint8"
    return {
        "quant_method": "compressed-tensors",
        "format": "mxfp8-quantized" if is_mx else "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": weights,
                "input_activations": activations,
            }
        },
        "ignore": names,
    }


def _modelopt(algorithm: str, names: list[str]) -> dict[str, Any]:
    """What ModelOpt's exporter puts into config.json beside its own file."""
    return {
        "quant_method": "modelopt",
        "quant_algo": algorithm,
        "ignore": names,
        "producer": _PRODUCER,
    }
