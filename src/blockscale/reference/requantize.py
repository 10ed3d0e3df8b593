"""Another format for numbers that are already quantized: data and scales change together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from blockscale.errors import FormatError
from blockscale.reference.quantize import dequantize, quantize

if TYPE_CHECKING:
    import torch

    from blockscale.formats import BlockFormat
    from blockscale.tensor import BlockScaledTensor


@dataclass(frozen=True, slots=True, eq=False)
class Requantized:
    """A requantized tensor and what it cost.

    ``relative_error``: Frobenius norm of the change over that of the old values (0 if both are
    zero). ``max_error``: largest absolute change of one value.
    """

    tensor: BlockScaledTensor
    relative_error: float
    max_error: float

    @property
    def is_lossless(self) -> bool:
        """Whether no value changed."""
        return self.max_error == 0.0


def requantize(tensor: BlockScaledTensor, target: BlockFormat) -> Requantized:
    """Express ``tensor`` in ``target``, changing data and scales together.

    Use ``relayout`` when only the memory differs or the scales already are what ``target`` wants:
    it is exact, this is not. FP32 to UE8M0 costs about one more FP8 rounding (2.65 % relative error
    on normal weights). Quantizing the original floats straight to ``target`` costs no more than
    quantizing them to FP32 scales did, so prefer that where the floats are still there.

    Shapes: data (..., mn, k) is kept; scales become (..., ceil(mn / block.mn), ceil(k / block.k)),
    in ``K_MAJOR``.

    Guarantees: every value is within half an FP8 step of its old value under the new scale; a block
    of zeros stays zero; repeating the call changes no value (codes may differ).

    Raises FormatError if ``target`` has another element format or BF16 scales.
    """
    if target.element != tensor.format.element:
        msg = f"cannot requantize {tensor.format} to {target}: the element formats differ"
        raise FormatError(msg)
    old = dequantize(tensor)
    result = quantize(old, target)
    change = dequantize(result) - old
    return Requantized(result, _ratio_of_norms(change, old), _largest(change))


def _ratio_of_norms(change: torch.Tensor, old: torch.Tensor) -> float:
    norm = float(change.double().norm())
    return 0.0 if norm == 0.0 else norm / float(old.double().norm())


def _largest(change: torch.Tensor) -> float:
    return float(change.abs().max()) if change.numel() else 0.0
