"""What a checkpoint says of itself: every spelling of ``quantization_config``.

One reader for each ``quant_method``; all give a ``Scheme``. ModelOpt declares in a file of its own,
``hf_quant_config.json``, or in config.json, or in both. What is declared is a claim: the tensors
say what is stored (``checkpoint.schema``), and the difference is a finding.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

from blockscale.checkpoint.read import MODELOPT_NAME
from blockscale.checkpoint.skips import (
    LONGEST_ENTRY,
    MOST_ENTRIES,
    REGEX_PREFIX,
    Patterns,
    Reader,
    SkipList,
)
from blockscale.errors import CheckpointError
from blockscale.formats import BlockShape, ScaleFormat

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from blockscale.checkpoint.read import Checkpoint

_BLOCK_128 = BlockShape(128, 128)
_MX_BLOCK = BlockShape(1, 32)
_BLOCK_WORDS = re.compile(r"([0-9]{1,9})x([0-9]{1,9})")


class SchemeKind(Enum):
    """How weights are stored. ``FP4`` and what follows are recognized, never read."""

    BLOCK_FP8 = "block FP8"
    PER_CHANNEL_FP8 = "per-channel FP8"
    PER_TENSOR_FP8 = "per-tensor FP8"
    FP4 = "packed FP4"
    INT8 = "INT8"
    E5M2 = "E5M2 FP8"
    TABLE = "an FP8 embedding table"
    NONE = "not quantized"
    OTHER = "another quantization"


@dataclass(frozen=True, slots=True)
class Target:
    """Some layers of a checkpoint that are stored in one way.

    ``patterns``: full names, ``re:`` patterns, or class names such as ``Linear``, which headers do
    not hold and which therefore take every layer that no name takes.
    """

    patterns: tuple[str, ...]
    kind: SchemeKind
    block: BlockShape | None = None


@dataclass(frozen=True, slots=True)
class Scheme:
    """What is declared. ``block`` is set for BLOCK_FP8 only.

    ``method``: the ``quant_method`` spelling. ``declared_scale``: the claim about scales, None if
    there is none. ``skips``: modules said to be unquantized. ``targets``: set where layers differ,
    and then ``kind`` and ``block`` are those of the first target in block FP8. ``tables``: modules
    other than linear layers that are said to be quantized. ``experts``: what experts are said to
    be, if that is another format. ``source``: the file that declares.
    """

    kind: SchemeKind
    method: str | None = None
    block: BlockShape | None = None
    declared_scale: ScaleFormat | None = None
    skips: SkipList = field(default_factory=SkipList)
    targets: tuple[Target, ...] = ()
    tables: tuple[str, ...] = ()
    experts: SchemeKind | None = None
    source: Path | None = None

    @property
    def skipped(self) -> tuple[str, ...]:
        """The entries of the skip list."""
        return self.skips.entries


class TargetMatcher:
    """Which kind and block are declared for which layer. Made once for all layers."""

    def __init__(self, scheme: Scheme) -> None:
        self._default = (scheme.kind, scheme.block)
        self._by_name = []
        self._by_class: tuple[SchemeKind, BlockShape | None] | None = None
        for target in scheme.targets:
            answer = (target.kind, target.block)
            exact = {p for p in target.patterns if not p.startswith(REGEX_PREFIX)}
            patterns = Patterns(
                (p.removeprefix(REGEX_PREFIX) for p in target.patterns if p not in exact),
                scheme.source,
            )
            self._by_name.append((exact, patterns, answer))
            if self._by_class is None and any(_is_class(pattern) for pattern in exact):
                self._by_class = answer

    def declared(self, layer: str) -> tuple[SchemeKind, BlockShape | None]:
        """Kind and block declared for a layer; names come before classes."""
        if not self._by_name:
            return self._default
        for exact, patterns, answer in self._by_name:
            if layer in exact or patterns.match(layer):
                return answer
        return self._by_class or (SchemeKind.NONE, None)


def _is_class(pattern: str) -> bool:
    return pattern[:1].isupper() and pattern.isidentifier()


def scheme_of(checkpoint: Checkpoint) -> Scheme:
    """What is declared beside the weights.

    Raises CheckpointError, naming file and key, if it cannot be read.
    """
    declared = declared_config(checkpoint)
    if declared is not None:
        return _scheme(checkpoint.config_path, declared, checkpoint.config)
    return modelopt_scheme(checkpoint) or Scheme(SchemeKind.NONE)


def declared_config(checkpoint: Checkpoint) -> object:
    """The ``quantization_config`` of config.json, as it is written; None if there is none."""
    declared = checkpoint.config.get("quantization_config")
    if declared is None:
        text = checkpoint.config.get("text_config")
        declared = text.get("quantization_config") if isinstance(text, Mapping) else None
    return declared


def modelopt_scheme(checkpoint: Checkpoint) -> Scheme | None:
    """What ``hf_quant_config.json`` declares, None if there is no such file.

    Raises CheckpointError, naming file and key, if it cannot be read.
    """
    if checkpoint.modelopt is None:
        return None
    return _modelopt(checkpoint.config_path.parent / MODELOPT_NAME, checkpoint.modelopt, {})


def _scheme(path: Path, declared: object, config: Mapping[str, Any]) -> Scheme:
    if not isinstance(declared, Mapping):
        raise CheckpointError(path, "quantization_config is not an object")
    method = declared.get("quant_method")
    if method is None and ("quant_algo" in declared or "quantization" in declared):
        method = "modelopt"
    reader = _METHODS.get(method) if isinstance(method, str) else None
    if reader is None:
        known = ", ".join(sorted(_METHODS))
        raise CheckpointError(
            path, f"quantization_config has quant_method {method!r}; this reader knows {known}"
        )
    return reader(path, declared, config)


_FP8_READERS = (Reader.TRANSFORMERS, Reader.VLLM, Reader.SGLANG)


def _fp8(path: Path, declared: Mapping[str, Any], config: Mapping[str, Any]) -> Scheme:
    """DeepSeek's dialect, and what transformers saves: ``FineGrainedFP8Config``."""
    skips = _skips(path, declared, ("modules_to_not_convert", "ignored_layers"), _FP8_READERS)
    tables = _strings(path, declared, "modules_to_convert")
    block = declared.get("weight_block_size")
    if block is None:
        return Scheme(SchemeKind.PER_TENSOR_FP8, "fp8", skips=skips, tables=tables, source=path)
    claimed = ScaleFormat.UE8M0 if declared.get("scale_fmt") == "ue8m0" else ScaleFormat.FP32
    fp4 = "fp4" in (declared.get("expert_dtype"), config.get("expert_dtype"))
    return Scheme(
        SchemeKind.BLOCK_FP8,
        "fp8",
        _block(path, "weight_block_size", block),
        claimed,
        skips,
        tables=tables,
        experts=SchemeKind.FP4 if fp4 else None,
        source=path,
    )


def _mxfp8(path: Path, declared: Mapping[str, Any], _: Mapping[str, Any]) -> Scheme:
    block = _block(path, "weight_block_size", declared.get("weight_block_size", [1, 32]))
    skips = _skips(path, declared, ("ignored_layers", "modules_to_not_convert"), _FP8_READERS)
    return Scheme(SchemeKind.BLOCK_FP8, "mxfp8", block, ScaleFormat.UE8M0, skips, source=path)


def _compressed_tensors(path: Path, declared: Mapping[str, Any], _: Mapping[str, Any]) -> Scheme:
    groups = declared.get("config_groups")
    values = groups.values() if isinstance(groups, Mapping) else ()
    found = [group for group in values if isinstance(group, Mapping)]
    weights = [group.get("weights") for group in found]
    if not any(isinstance(of, Mapping) for of in weights):
        raise CheckpointError(
            path,
            "quantization_config has no config_groups.*.weights, where compressed-tensors declares "
            "blocks; take the config.json that came with these weights",
        )
    targets = [
        _target(path, group, of)
        for group, of in zip(found, weights, strict=True)
        if isinstance(of, Mapping)
    ]
    skips = _skips(path, declared, ("ignore",), (Reader.COMPRESSED_TENSORS,))
    return _of_targets(targets, "compressed-tensors", skips, path)


def _target(path: Path, group: Mapping[str, Any], weights: Mapping[str, Any]) -> Target:
    patterns = _strings(path, group, "targets") or ("Linear",)
    bits, kind, strategy = (weights.get(key) for key in ("num_bits", "type", "strategy"))
    if (bits, kind) != (8, "float"):
        named = {(4, "float"): SchemeKind.FP4, (8, "int"): SchemeKind.INT8}
        known = [name for declared, name in named.items() if declared == (bits, kind)]
        return Target(patterns, known[0] if known else SchemeKind.OTHER)
    if strategy == "block":
        block = _block(path, "block_structure", _block_sizes(weights.get("block_structure")))
        return Target(patterns, SchemeKind.BLOCK_FP8, block)
    if strategy in ("group", "tensor_group"):
        block = _block(path, "group_size", [1, weights.get("group_size")])
        return Target(patterns, SchemeKind.BLOCK_FP8, block)
    per_channel = SchemeKind.PER_CHANNEL_FP8 if strategy == "channel" else SchemeKind.PER_TENSOR_FP8
    return Target(patterns, per_channel)


def _block_sizes(structure: object) -> object:
    """``"128x128"`` as the list that it means: compressed-tensors reads both spellings."""
    sizes = _BLOCK_WORDS.fullmatch(structure) if isinstance(structure, str) else None
    return structure if sizes is None else [int(size) for size in sizes.groups()]


def _modelopt(path: Path, declared: Mapping[str, Any], _: Mapping[str, Any]) -> Scheme:
    """ModelOpt: the algorithm says what the blocks are; its exporter writes no block size."""
    nested = declared.get("quantization")
    body = nested if isinstance(nested, Mapping) else declared
    skips = _skips(path, body, ("exclude_modules", "ignore"), (Reader.MODELOPT,))
    algorithm = body.get("quant_algo")
    layers = body.get("quantized_layers")
    if isinstance(layers, Mapping) and layers:
        by_answer: dict[Target, list[str]] = {}
        for name, one in layers.items():
            of_layer = one.get("quant_algo") if isinstance(one, Mapping) else None
            by_answer.setdefault(_algorithm(path, of_layer), []).append(name)
        targets = [Target(tuple(n), t.kind, t.block) for t, n in by_answer.items()]
        return _of_targets(targets, "modelopt", skips, path)
    if algorithm is None:
        return Scheme(SchemeKind.NONE, "modelopt", skips=skips, source=path)
    return _of_targets([_algorithm(path, algorithm)], "modelopt", skips, path)


def _algorithm(path: Path, algorithm: object) -> Target:
    if not isinstance(algorithm, str):
        raise CheckpointError(path, f"quant_algo is {algorithm!r}; expected a name")
    # The exporter spells formats without an entry in its table in lower case ("fp8_pb_wo").
    kind, block = _ALGORITHMS.get(algorithm.upper(), (SchemeKind.OTHER, None))
    if kind is SchemeKind.OTHER and "FP4" in algorithm.upper():
        kind = SchemeKind.FP4
    return Target((), kind, block)


# nvidia-modelopt 0.47, modelopt/torch/export/quant_utils.py. FP8_PB_* have 128x128 blocks: vLLM's
# and TensorRT-LLM's readers know no other.
_ALGORITHMS: dict[str, tuple[SchemeKind, BlockShape | None]] = {
    "FP8_PB_WO": (SchemeKind.BLOCK_FP8, _BLOCK_128),
    "FP8_PB_REAL": (SchemeKind.BLOCK_FP8, _BLOCK_128),
    "FP8_PB": (SchemeKind.BLOCK_FP8, _BLOCK_128),
    "MXFP8": (SchemeKind.BLOCK_FP8, _MX_BLOCK),
    "FP8": (SchemeKind.PER_TENSOR_FP8, None),
    "FP8_PER_CHANNEL_PER_TOKEN": (SchemeKind.PER_CHANNEL_FP8, None),
}


def _of_targets(targets: list[Target], method: str, skips: SkipList, path: Path) -> Scheme:
    blocks = [target for target in targets if target.kind is SchemeKind.BLOCK_FP8]
    first = (blocks or targets)[0]
    claimed = None
    if first.block is not None:
        claimed = ScaleFormat.UE8M0 if first.block == _MX_BLOCK else ScaleFormat.FP32
    # One way for all layers: whatever is FP8 is stored so, whoever it is called.
    differ = len({(target.kind, target.block) for target in targets}) > 1
    return Scheme(
        first.kind,
        method,
        first.block,
        claimed,
        skips,
        targets=tuple(targets) if differ else (),
        source=path,
    )


_METHODS: dict[str, Callable[[Path, Mapping[str, Any], Mapping[str, Any]], Scheme]] = {
    "fp8": _fp8,
    "compressed-tensors": _compressed_tensors,
    "mxfp8": _mxfp8,
    "modelopt": _modelopt,
}


def _block(path: Path, key: str, value: object) -> BlockShape:
    if (
        isinstance(value, list)
        and len(value) == 2  # noqa: PLR2004 - rows and columns
        and all(isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in value)
    ):
        return BlockShape(value[0], value[1])
    raise CheckpointError(path, f"{key} is {value!r}; expected two positive integers")


def _skips(
    path: Path, declared: Mapping[str, Any], keys: tuple[str, ...], readers: tuple[Reader, ...]
) -> SkipList:
    entries = tuple(entry for key in keys for entry in _strings(path, declared, key))
    return SkipList(entries, readers, path)


def _strings(path: Path, declared: Mapping[str, Any], key: str) -> tuple[str, ...]:
    value = declared.get(key)
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise CheckpointError(path, f"quantization_config.{key} must be a list of strings")
    longest = max(map(len, value), default=0)
    if len(value) > MOST_ENTRIES or longest > LONGEST_ENTRY:
        raise CheckpointError(
            path,
            f"quantization_config.{key} has {len(value)} entries of up to {longest} characters, "
            f"above the limits of {MOST_ENTRIES} and {LONGEST_ENTRY}",
        )
    return tuple(value)
