"""Whether a checkpoint's scales and data are what they should be."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from blockscale.checkpoint.compare import DataError, compare
from blockscale.checkpoint.scales import ScaleFacts, read_scale_facts
from blockscale.checkpoint.schema import (
    Foreign,
    Layers,
    QuantizedLayer,
    SchemeKind,
    read_layers,
    survey,
)
from blockscale.formats import BlockFormat, PowerOfTwo, ScaleFormat
from blockscale.planning.plan import Finding, Severity

if TYPE_CHECKING:
    from collections.abc import Callable

    from blockscale.checkpoint.header import TensorEntry
    from blockscale.checkpoint.read import Checkpoint

# A block's largest weight is 448 scales: here 3584, where real weights stay below a hundred, and
# the inverse of a real scale, 448 / amax, is above this for every amax below 56.
LEAST_IMPLAUSIBLE_SCALE = 8.0
# E4M3 has three bits of mantissa: rounding to it changes a value by at most a sixteenth, and of two
# FP8 versions each was rounded once. A scale rounded alone is off by up to a factor of two.
LARGEST_ROUNDING = 0.125
_AGAIN = "download that file again, or quantize the float checkpoint again"
_FLOAT32_MAX = (2 - 2**-23) * 2.0**127


@dataclass(frozen=True, slots=True)
class LayerCheck:
    """One layer: its scales, and its data where they were compared."""

    name: str
    n: int
    k: int
    format: BlockFormat
    scales: ScaleFacts
    error: DataError | None


@dataclass(frozen=True, slots=True)
class Verification:
    """The answer of ``blockscale verify``; layers with the largest error first if compared."""

    layers: tuple[LayerCheck, ...]
    findings: tuple[Finding, ...]

    @property
    def has_fault(self) -> bool:
        """Whether anything is wrong rather than merely worth knowing."""
        return any(finding.severity is Severity.FAULT for finding in self.findings)


def verify_checkpoint(
    checkpoint: Checkpoint,
    against: Checkpoint | None = None,
    progress: Callable[[int], None] | None = None,
) -> Verification:
    """``verify_layers`` of all layers that can be read; a FAULT finding for each that cannot.

    Raises CheckpointError as ``verify_layers`` does, or if layers are FP8 but none in blocks.
    """
    found = survey(checkpoint)
    if not found.layers.quantized and not found.problems:
        read_layers(checkpoint, Foreign.REPORT)
    result = verify_layers(found.layers, against, progress)
    faults = (Finding(Severity.FAULT, "unreadable_layer", str(e)) for e in found.problems)
    return replace(result, findings=(*faults, *result.findings))


def verify_layers(
    layers: Layers,
    against: Checkpoint | None = None,
    progress: Callable[[int], None] | None = None,
) -> Verification:
    """Read all scales, and with ``against`` all data, and say what is wrong.

    ``against`` is the float checkpoint, or another block-FP8 version of this one.

    Memory is bounded by one band of rows, whatever the layers' size. ``progress`` is called with
    the layers done since its last call.

    Raises CheckpointError if a file cannot be read, or ``against`` lacks a layer or has it in
    another shape.
    """
    checks: list[LayerCheck] = []
    findings = list(layers.findings)
    counterparts = {} if against is None else _counterparts(layers, against)
    for layer in layers.quantized:
        facts = read_scale_facts(layer.scale)
        findings += _scale_faults(layer, facts)
        error = None
        if against is not None:
            compared = compare(layer, counterparts[layer.name])
            error = compared.error
            if compared.nan_codes:
                message = f"{compared.nan_codes} codes are NaN"
                findings.append(_fault("nan_codes", message, layer.name))
        checks.append(LayerCheck(layer.name, layer.n, layer.k, layer.format, facts, error))
        if progress is not None:
            progress(1)
    findings += _declaration_findings(layers, checks)
    findings += _implausible(checks)
    if against is not None:
        checks.sort(key=_badness, reverse=True)
        findings += _unlike(checks, against)
    return Verification(tuple(checks), tuple(findings))


def _badness(check: LayerCheck) -> float:
    return 0.0 if check.error is None else check.error.badness


def _fault(code: str, message: str, layer: str) -> Finding:
    return Finding(Severity.FAULT, code, message, layer)


def _scale_faults(layer: QuantizedLayer, facts: ScaleFacts) -> list[Finding]:
    found = []
    where = f"scales in {layer.scale.name} ({layer.scale.path.name})"
    if facts.nonfinite:
        message = f"{facts.nonfinite} of {facts.count} {where} are NaN or Inf; {_AGAIN}"
        found.append(_fault("nonfinite_scale", message, layer.name))
    if facts.negative:
        message = f"{facts.negative} of {facts.count} {where} are negative; {_AGAIN}"
        found.append(_fault("negative_scale", message, layer.name))
    if facts.zero:
        message = (
            f"{facts.zero} of {facts.count} {where} are zero: whatever the data is, those blocks "
            f"are zero, and UE8M0 cannot hold them; {_AGAIN}"
        )
        found.append(_fault("zero_scale", message, layer.name))
    if facts.largest is not None and facts.largest * layer.format.element.max > _FLOAT32_MAX:
        message = (
            f"the largest of the {where} is {facts.largest:.3g}: its block reaches beyond "
            f"float32, and becomes infinite; {_AGAIN}"
        )
        found.append(_fault("overflowing_scale", message, layer.name))
    if facts.subnormal:
        message = (
            f"{facts.subnormal} of {facts.count} {where} are below 2**-126: GPU kernels may take "
            "them for zero; quantize the float checkpoint with blockscale, which makes none"
        )
        found.append(Finding(Severity.WARNING, "subnormal_scale", message, layer.name))
    return found


def _declaration_findings(layers: Layers, checks: list[LayerCheck]) -> list[Finding]:
    if layers.scheme.kind is not SchemeKind.BLOCK_FP8:
        return []
    if layers.scheme.declared_scale is not ScaleFormat.UE8M0:
        return []
    # What is stored as E8M0 is a power of two or NaN, which is a fault of its own.
    wrong = [
        check
        for check in checks
        if check.scales.power_of_two is PowerOfTwo.NO
        and check.format.scale is not ScaleFormat.UE8M0
    ]
    if not wrong:
        return []
    scales = sum(check.scales.not_power_of_two for check in wrong)
    return [
        Finding(
            Severity.WARNING,
            "declared_ue8m0",
            f"config declares ue8m0, but {scales} scales of {len(wrong)} layers are not powers of "
            f"two (first: {wrong[0].name}); a loader that rounds them changes the weights",
        )
    ]


def _implausible(checks: list[LayerCheck]) -> list[Finding]:
    large = [
        (check, check.scales.smallest)
        for check in checks
        if check.scales.smallest is not None and check.scales.smallest >= LEAST_IMPLAUSIBLE_SCALE
    ]
    if not large:
        return []
    first, smallest = large[0]
    message = (
        f"every scale of {len(large)} of {len(checks)} layers is implausibly large (first: "
        f"{first.name}, {smallest:.3g} or more, so each of its blocks has weights near "
        f"{smallest * first.format.element.max:.2g}): if they are stored as 1 / scale, invert them;"
        " the stored number multiplies"
    )
    return [Finding(Severity.WARNING, "implausible_scale", message)]


def _unlike(checks: list[LayerCheck], against: Checkpoint) -> list[Finding]:
    """A fault where rounding explains no difference that large; ``checks``: the worst first."""
    wrong = [
        check
        for check in checks
        if check.error is not None and check.error.relative_error > LARGEST_ROUNDING
    ]
    if not wrong:
        return []
    first = wrong[0]
    message = (
        f"{len(wrong)} of {len(checks)} layers differ from {against.path} by more than rounding to "
        f"E4M3 explains (worst: {first.name}, relative error {_badness(first):.3g}, above "
        f"{LARGEST_ROUNDING}): other weights, or scales that were rounded or inverted; convert or "
        "quantize the float checkpoint again"
    )
    return [_fault("unlike_original", message, first.name)]


def _counterparts(layers: Layers, against: Checkpoint) -> dict[str, TensorEntry | QuantizedLayer]:
    """By layer, what it is compared with: a float tensor, or a block-FP8 layer of ``against``."""
    quantized = {layer.weight.name: layer for layer in survey(against).layers.quantized}
    return {
        layer.name: quantized.get(layer.weight.name) or against.tensor(layer.weight.name)
        for layer in layers.quantized
    }
