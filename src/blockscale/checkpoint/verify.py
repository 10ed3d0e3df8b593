"""Whether a checkpoint's scales and data are what they should be."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import inf, log10, prod, sqrt
from typing import TYPE_CHECKING

from blockscale.checkpoint.scales import ScaleFacts, read_scales, scale_facts
from blockscale.checkpoint.schema import (
    Foreign,
    Layers,
    QuantizedLayer,
    SchemeKind,
    read_layers,
    survey,
)
from blockscale.errors import CheckpointError
from blockscale.formats import K_MAJOR, BlockFormat, PowerOfTwo, ScaleFormat
from blockscale.planning.plan import Finding, Severity

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from numpy.typing import NDArray

    from blockscale.checkpoint.read import Checkpoint

NAN_CODE = 0x7F


@dataclass(frozen=True, slots=True)
class DataError:
    """How far a layer's values are from the float weights they came from.

    ``relative_error``: Frobenius norm of the difference over that of the float weights.
    ``max_error``: largest absolute difference. ``snr_db``: signal to noise, infinite if exact.
    """

    relative_error: float
    max_error: float
    snr_db: float


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
    """Read all scales, and with ``against`` (the float checkpoint) all data, and say what is wrong.

    Memory is bounded by one band of rows, whatever the layers' size. ``progress`` is called with
    the layers done since its last call.

    Raises CheckpointError if a file cannot be read, or ``against`` lacks a layer or has it in
    another shape.
    """
    checks: list[LayerCheck] = []
    findings = list(layers.findings)
    for layer in layers.quantized:
        values = read_scales(layer.scale)
        facts = scale_facts(values)
        findings += _scale_faults(layer, facts)
        error = None
        if against is not None:
            error, nan_codes = _compare(layer, values, against)
            if nan_codes:
                findings.append(_fault("nan_codes", f"{nan_codes} codes are NaN", layer.name))
        checks.append(LayerCheck(layer.name, layer.n, layer.k, layer.format, facts, error))
        if progress is not None:
            progress(1)
    findings += _declaration_findings(layers, checks)
    if against is not None:
        checks.sort(key=_badness, reverse=True)
    return Verification(tuple(checks), tuple(findings))


def _badness(check: LayerCheck) -> float:
    if check.error is None:
        return 0.0
    error = check.error.relative_error
    return inf if error != error else error  # noqa: PLR0124 - NaN is the worst


def _fault(code: str, message: str, layer: str) -> Finding:
    return Finding(Severity.FAULT, code, message, layer)


def _scale_faults(layer: QuantizedLayer, facts: ScaleFacts) -> list[Finding]:
    found = []
    if facts.nonfinite:
        message = f"{facts.nonfinite} of {facts.count} scales in {layer.scale.name} are NaN or Inf"
        found.append(_fault("nonfinite_scale", message, layer.name))
    if facts.negative:
        message = f"{facts.negative} of {facts.count} scales in {layer.scale.name} are negative"
        found.append(_fault("negative_scale", message, layer.name))
    if facts.zero:
        message = (
            f"{facts.zero} of {facts.count} scales in {layer.scale.name} are zero: whatever the "
            "data is, those blocks are zero, and UE8M0 cannot hold them"
        )
        found.append(_fault("zero_scale", message, layer.name))
    return found


def _declaration_findings(layers: Layers, checks: list[LayerCheck]) -> list[Finding]:
    if layers.scheme.kind is not SchemeKind.BLOCK_FP8:
        return []
    if layers.scheme.declared_scale is not ScaleFormat.UE8M0:
        return []
    wrong = [check for check in checks if check.scales.power_of_two is PowerOfTwo.NO]
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


def _compare(
    layer: QuantizedLayer, scales: NDArray[np.float32], against: Checkpoint
) -> tuple[DataError, int]:
    """Error of the data against the float tensor, and how many codes are NaN."""
    import torch

    from blockscale.checkpoint.tensors import read_rows, row_bands
    from blockscale.reference import dequantize
    from blockscale.tensor import BlockScaledTensor

    original = against.tensor(layer.weight.name)
    if original.shape != layer.weight.shape:
        raise CheckpointError(
            original.path,
            f"has shape {original.shape}, but {layer.weight.path} has {layer.weight.shape}",
            tensor=original.name,
        )
    fmt = layer.format.with_scale(ScaleFormat.FP32)
    grid = torch.from_numpy(scales).reshape(prod(layer.weight.shape[:-2]), *scales.shape[-2:])
    difference_squared = signal_squared = largest = 0.0
    nan_codes = 0
    for index in range(grid.shape[0]):
        for first, count in row_bands(layer.n, layer.k, fmt.block.mn):
            data = read_rows(layer.weight, index * layer.n + first, count)
            nan_codes += int(((data.view(torch.uint8) & NAN_CODE) == NAN_CODE).sum())
            block_row = first // fmt.block.mn
            rows = grid[index, block_row : block_row + fmt.block.grid(count, 1)[0]].contiguous()
            wanted = read_rows(original, index * layer.n + first, count).float()
            change = dequantize(BlockScaledTensor(data, rows, fmt, K_MAJOR)) - wanted
            difference_squared += float(change.double().square().sum())
            signal_squared += float(wanted.double().square().sum())
            largest = max(largest, float(change.abs().max()) if count else 0.0)
    return _data_error(difference_squared, signal_squared, largest), nan_codes


def _data_error(difference_squared: float, signal_squared: float, largest: float) -> DataError:
    if difference_squared == 0.0:
        return DataError(0.0, 0.0, inf)
    if signal_squared == 0.0:
        return DataError(inf, largest, -inf)
    ratio = difference_squared / signal_squared
    return DataError(sqrt(ratio), largest, -10.0 * log10(ratio) if ratio == ratio else ratio)  # noqa: PLR0124 - NaN stays NaN
