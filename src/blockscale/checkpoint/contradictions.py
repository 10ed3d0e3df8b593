"""Where a checkpoint's declaration and its tensors disagree, from headers alone.

Data is trusted; each disagreement becomes a finding, because some reader trusts the declaration.
One finding names the first layer it holds for and counts the others.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from typing import TYPE_CHECKING

from blockscale.checkpoint.completeness import missing_tensors
from blockscale.checkpoint.declared import SchemeKind, declared_config, modelopt_scheme
from blockscale.checkpoint.read import MODELOPT_NAME
from blockscale.checkpoint.scale_names import is_scale
from blockscale.formats import ScaleFormat
from blockscale.planning.plan import Finding, Severity

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator

    from blockscale.checkpoint.read import Checkpoint
    from blockscale.checkpoint.schema import Layers
    from blockscale.checkpoint.skips import Reader

_NUMBER = re.compile(r"\d+")
_ACTIVATION_ENDINGS = (".input_scale", ".activation_scale")


def contradictions(
    checkpoint: Checkpoint,
    layers: Layers,
    skipped_by: Mapping[str, tuple[Reader, ...]],
    used: Collection[str],
) -> tuple[Finding, ...]:
    """All findings on ``layers``. ``skipped_by``: who leaves a layer unquantized by the skip list.

    ``used``: names of the scales that belong to a weight. Raises CheckpointError if a second
    declaration beside config.json cannot be read.
    """
    return (
        *_on_skip_lists(layers, skipped_by),
        *_absent(checkpoint, layers),
        *_on_kinds(layers),
        *_on_experts(layers),
        *_on_scales(layers),
        *_orphans(checkpoint, used),
        *_activation_scales(checkpoint, layers),
        *_biases(checkpoint, layers),
        *_two_declarations(checkpoint, layers),
        *_unheard(checkpoint, layers),
        *missing_tensors(checkpoint),
    )


def _warning(code: str, message: str, layer: str | None = None) -> Finding:
    return Finding(Severity.WARNING, code, message, layer)


def _counted(names: list[str]) -> tuple[str, str | None]:
    """Subject of a sentence about these layers, and the layer to name beside the finding."""
    if len(names) == 1:
        return "", names[0]
    return f"{len(names)} layers (first: {names[0]}): ", None


def _on_skip_lists(
    layers: Layers, skipped_by: Mapping[str, tuple[Reader, ...]]
) -> Iterator[Finding]:
    wrong: dict[tuple[Reader, ...], list[str]] = defaultdict(list)
    for layer in layers.quantized:
        if readers := skipped_by.get(layer.name):
            wrong[readers].append(layer.name)
    for readers, names in wrong.items():
        subject, layer_name = _counted(names)
        yield _warning(
            "skip_list_contradicted",
            f"{subject}stored as FP8 with a scale, but on the skip list as "
            f"{_readers(readers)} it: treated as quantized here, loaded without scales there",
            layer_name,
        )
    if layers.scheme.kind is SchemeKind.NONE:
        return
    shapes = {_NUMBER.sub("*", layer.name) for layer in layers.quantized}
    expected: dict[tuple[Reader, ...], list[str]] = defaultdict(list)
    for skipped in layers.skipped:
        if _NUMBER.sub("*", skipped.name) in shapes:
            missing = _missing(layers, skipped_by.get(skipped.name, ()))
            if missing or not layers.scheme.skips.entries:
                expected[missing].append(skipped.name)
    for readers, names in expected.items():
        subject, layer_name = _counted(names)
        who = f"as {_readers(readers)} it" if readers else "for there is none"
        yield _warning(
            "float_but_not_skipped",
            f"{subject}not quantized, unlike the same layers elsewhere, and not on the skip list "
            f"{who}: engines look for FP8 data and a scale there",
            layer_name,
        )


def _missing(layers: Layers, skipped: tuple[Reader, ...]) -> tuple[Reader, ...]:
    skips = layers.scheme.skips
    return tuple(reader for reader in skips.readers if reader not in skipped) * bool(skips.entries)


def _readers(readers: tuple[Reader, ...]) -> str:
    names = [reader.value for reader in readers]
    if len(names) == 1:
        return f"{names[0]} reads"
    return f"{', '.join(names[:-1])} and {names[-1]} read"


def _absent(checkpoint: Checkpoint, layers: Layers) -> Iterator[Finding]:
    scheme = layers.scheme
    stored = any(entry.dtype == "F8_E4M3" for entry in checkpoint.tensors.values())
    if scheme.kind is SchemeKind.BLOCK_FP8 and not stored:
        yield _warning(
            "declared_but_absent",
            f"config declares {scheme.method} with {scheme.block} blocks, but no tensor is FP8",
        )


def _on_kinds(layers: Layers) -> Iterator[Finding]:
    scheme = layers.scheme
    by_detail: dict[tuple[SchemeKind, str], list[str]] = defaultdict(list)
    for layer in layers.foreign:
        by_detail[layer.kind, layer.detail].append(layer.name)
    claimed = {scheme.kind, scheme.experts, *(target.kind for target in scheme.targets)}
    for (kind, detail), names in by_detail.items():
        subject, layer_name = _counted(names)
        undeclared = "" if kind in claimed or kind is SchemeKind.TABLE else _instead(layers)
        yield _warning(
            "other_than_declared" if undeclared else "other_quantization",
            f"{subject}{detail}{undeclared}; blockscale neither plans, runs nor converts it",
            layer_name,
        )


def _instead(layers: Layers) -> str:
    scheme = layers.scheme
    blocks = f" in {scheme.block} blocks" if scheme.block is not None else ""
    return f", though the checkpoint declares {scheme.kind.value}{blocks}"


def _on_experts(layers: Layers) -> Iterator[Finding]:
    if layers.scheme.experts is not SchemeKind.FP4:
        return
    fp8 = [layer.name for layer in layers.quantized if "experts" in layer.name.split(".")]
    if fp8 and not any(layer.kind is SchemeKind.FP4 for layer in layers.foreign):
        subject, layer_name = _counted(fp8)
        yield _warning(
            "expert_dtype_contradicted",
            f"{subject}experts stored as FP8, though the config declares expert_dtype fp4",
            layer_name,
        )


def _on_scales(layers: Layers) -> Iterator[Finding]:
    if layers.scheme.declared_scale is not ScaleFormat.FP32:
        return
    bits = [layer.name for layer in layers.quantized if layer.format.scale is ScaleFormat.UE8M0]
    if bits:
        subject, layer_name = _counted(bits)
        yield Finding(
            Severity.NOTE,
            "undeclared_ue8m0",
            f"{subject}scales stored as E8M0, which the config does not declare",
            layer_name,
        )


def stored_as_float32(layers: Layers) -> Iterator[Finding]:
    """A note where ue8m0 is declared and float32 stored: headers do not tell if it is true."""
    if layers.scheme.declared_scale is not ScaleFormat.UE8M0:
        return
    names = [
        layer.name for layer in layers.quantized if layer.format.scale is not ScaleFormat.UE8M0
    ]
    if names:
        subject, layer_name = _counted(names)
        yield Finding(
            Severity.NOTE,
            "ue8m0_stored_as_float",
            f"{subject}declared ue8m0 but stored as {layers.quantized[0].scale.dtype}: whether "
            "they are powers of two only reading them tells (blockscale verify)",
            layer_name,
        )


def _orphans(checkpoint: Checkpoint, used: Collection[str]) -> Iterator[Finding]:
    names = [
        entry.name
        for entry in checkpoint.tensors.values()
        if entry.name not in used and is_scale(entry)
    ]
    if names:
        subject, layer_name = _counted(names)
        yield _warning(
            "scale_without_data", f"{subject}scale of no quantized weight".lstrip(), layer_name
        )


def _activation_scales(checkpoint: Checkpoint, layers: Layers) -> Iterator[Finding]:
    quantized = {layer.name for layer in layers.quantized}
    names = [
        layer
        for name in checkpoint.tensors
        if name.endswith(_ACTIVATION_ENDINGS) and (layer := name.rpartition(".")[0]) in quantized
    ]
    if not names:
        return
    declared = declared_config(checkpoint)
    dynamic = isinstance(declared, Mapping) and declared.get("activation_scheme") == "dynamic"
    subject, layer_name = _counted(names)
    though = ", though they are declared dynamic" if dynamic else ""
    yield Finding(
        Severity.WARNING if dynamic else Severity.NOTE,
        "activation_scales",
        f"{subject}a scale for activations is stored{though}; blockscale quantizes activations as "
        "they come and does not read it",
        layer_name,
    )


def _biases(checkpoint: Checkpoint, layers: Layers) -> Iterator[Finding]:
    for layer in layers.quantized:
        bias = checkpoint.tensors.get(f"{layer.name}.bias")
        if bias is not None and layer.stacked is None and bias.shape != (layer.n,):
            yield Finding(
                Severity.FAULT,
                "bias_shape",
                f"its bias in {bias.path.name} has shape {bias.shape}, but the weight {layer.n} "
                "rows; they are of different checkpoints, download both again",
                layer.name,
            )


def _two_declarations(checkpoint: Checkpoint, layers: Layers) -> Iterator[Finding]:
    scheme = layers.scheme
    if scheme.source is None or scheme.source.name == MODELOPT_NAME:
        return
    other = modelopt_scheme(checkpoint)
    if other is None:
        return
    differences = list(
        _differences(
            ("quantization", _kinds(scheme.kind, scheme.block), _kinds(other.kind, other.block)),
            ("skip list", sorted(scheme.skipped), sorted(other.skipped)),
        )
    )
    if differences:
        yield _warning(
            "two_declarations",
            f"{scheme.source.name} and {MODELOPT_NAME} declare different things: "
            f"{'; '.join(differences)}; {scheme.source.name} is taken",
        )


def _unheard(checkpoint: Checkpoint, layers: Layers) -> Iterator[Finding]:
    """What the config claims and no reader here can take at its word."""
    declared = declared_config(checkpoint)
    if not isinstance(declared, Mapping) or declared.get("quant_method") != "fp8":
        return
    fmt, scale_fmt = declared.get("fmt"), declared.get("scale_fmt")
    if fmt not in (None, "e4m3", "float8_e4m3fn") and layers.quantized:
        yield _warning(
            "declared_element", f"config declares fmt {_short(fmt)!r}, but the data is E4M3"
        )
    if scale_fmt not in (None, "ue8m0", "float", "float32", "fp32"):
        yield _warning(
            "declared_scale_format",
            f"config declares scale_fmt {_short(scale_fmt)!r}, which says nothing to blockscale; "
            "known: ue8m0, float",
        )
    stored = any(name.endswith(_ACTIVATION_ENDINGS) for name in checkpoint.tensors)
    if declared.get("activation_scheme") == "static" and layers.quantized and not stored:
        yield _warning(
            "static_without_scales",
            "config declares static activation scales, but none is stored; engines look for them, "
            "blockscale quantizes activations as they come (activation_scheme dynamic)",
        )


def _kinds(kind: SchemeKind, block: object) -> str:
    return kind.value if block is None else f"{kind.value} {block}"


def _differences(*claims: tuple[str, object, object]) -> Iterable[str]:
    for what, first, second in claims:
        if first != second:
            yield f"{what} {_short(first)} and {_short(second)}"


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:60] + "..."  # noqa: PLR2004 - fits a line
