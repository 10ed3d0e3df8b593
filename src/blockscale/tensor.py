"""``BlockScaledTensor``: data and scales that cannot part, checked when made.

Not a torch.Tensor subclass: arithmetic on FP8 codes without their scales means nothing, so there is
nothing to dispatch (docs/adr/0001).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

import torch

from blockscale.errors import FormatError
from blockscale.formats import DType, ElementFormat, StorageType

if TYPE_CHECKING:
    from blockscale.formats import BlockFormat, ScaleLayout, StoredScales


def torch_dtype(dtype: DType | StorageType | ElementFormat) -> torch.dtype:
    """The torch dtype that holds this type."""
    name = dtype.torch_name if isinstance(dtype, ElementFormat) else dtype.value
    found = getattr(torch, name)
    if not isinstance(found, torch.dtype):
        msg = f"this torch ({torch.__version__}) has no dtype {name}"
        raise FormatError(msg)
    return found


def dtype_of(dtype: torch.dtype) -> DType:
    """Our name for a torch dtype. Raises FormatError unless it is bfloat16, float16 or float32."""
    for known in DType:
        if torch_dtype(known) is dtype:
            return known
    msg = f"{dtype} is not bfloat16, float16 or float32"
    raise FormatError(msg)


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class BlockScaledTensor:
    """An (..., mn, k) matrix of small floats with one scale per block of the last two axes.

    ``data``: element dtype, stride 1 along k. ``scales``: exactly the memory that
    ``layout.stored(mn, k, format)`` describes, with the leading axes of ``data`` in front.

    Raises FormatError, naming both tensors' facts, if any of this does not hold. Values are not
    read: a NaN or a scale that is no power of two is found by ``blockscale verify``.
    """

    data: torch.Tensor
    scales: torch.Tensor
    format: BlockFormat
    layout: ScaleLayout

    def __post_init__(self) -> None:
        """Check dtype, device, shape, strides and size of the storage."""
        self._check_data()
        self._check_scales()

    @property
    def mn(self) -> int:
        """Rows: M of an activation, N of a weight."""
        return self.data.shape[-2]

    @property
    def k(self) -> int:
        """Columns, the axis that a GEMM sums over."""
        return self.data.shape[-1]

    @property
    def leading(self) -> tuple[int, ...]:
        """Axes before (mn, k): experts of a stacked weight, usually none."""
        return tuple(self.data.shape[:-2])

    @property
    def device(self) -> torch.device:
        """Where data and scales are."""
        return self.data.device

    @property
    def nbytes(self) -> int:
        """Bytes of data and scales, padding included."""
        stored = self.layout.stored(self.mn, self.k, self.format)
        return self.data.nbytes + prod(self.leading) * stored.bytes

    def to(self, device: torch.device | str) -> BlockScaledTensor:
        """The same tensor on another device, strides and padding kept."""
        stored = self.layout.stored(self.mn, self.k, self.format)
        flat = self.scales.as_strided((prod(self.leading) * stored.elements,), (1,)).to(device)
        return BlockScaledTensor(
            self.data.to(device), as_stored(flat, stored, self.leading), self.format, self.layout
        )

    def __repr__(self) -> str:
        """Metadata only; printing never synchronizes with a device."""
        shape = "x".join(map(str, self.data.shape))
        return f"BlockScaledTensor({shape}, {self.format}, {self.layout}, {self.device})"

    def _check_data(self) -> None:
        expected = torch_dtype(self.format.element)
        data = self.data
        if data.dtype is not expected:
            msg = f"data is {data.dtype}, but format {self.format} needs {expected}"
            raise FormatError(msg)
        if data.ndim < 2:  # noqa: PLR2004 - a matrix has two axes
            msg = f"data has shape {tuple(data.shape)}; at least two axes (mn, k) are needed"
            raise FormatError(msg)
        if data.numel() > 0 and data.shape[-1] > 1 and data.stride(-1) != 1:
            msg = f"data has strides {data.stride()}; neighbours along k must be adjacent"
            raise FormatError(msg)
        if self.scales.device != data.device:
            msg = f"data is on {data.device} but scales are on {self.scales.device}"
            raise FormatError(msg)

    def _check_scales(self) -> None:
        stored = self.layout.stored(self.mn, self.k, self.format)
        scales = self.scales
        shape = (*self.leading, *stored.shape)
        what = f"scales of a {self.mn}x{self.k} {self.format} tensor in layout {self.layout}"
        if scales.dtype is not torch_dtype(stored.dtype):
            msg = f"{what} must be {stored.dtype.value}, not {scales.dtype}"
            raise FormatError(msg)
        if tuple(scales.shape) != shape:
            msg = f"{what} must have shape {shape}, not {tuple(scales.shape)}"
            raise FormatError(msg)
        expected = _strides(stored, self.leading)
        # An axis of one element may carry any stride, except where a provider reads the padded
        # stride itself (DeepGEMM check_sf_layout wants it even for a single column).
        loose = self.layout.leading_align_bytes == 1
        wrong = any(
            have != want and not (loose and size == 1)
            for have, want, size in zip(scales.stride(), expected, shape, strict=True)
        )
        if scales.numel() > 0 and wrong:
            msg = f"{what} must have strides {expected}, not {scales.stride()}"
            raise FormatError(msg)
        available = scales.untyped_storage().nbytes() - scales.storage_offset() * scales.itemsize
        needed = prod(self.leading) * stored.bytes
        if available < needed:
            msg = f"{what} need {needed} bytes with padding; the storage holds {available}"
            raise FormatError(msg)


def as_stored(
    flat: torch.Tensor, stored: StoredScales, leading: tuple[int, ...] = ()
) -> torch.Tensor:
    """A view of a flat buffer with the shape and strides that a layout asks for.

    ``flat`` holds ``prod(leading) * stored.elements`` elements.
    """
    return flat.as_strided((*leading, *stored.shape), _strides(stored, leading))


def empty_scales(
    mn: int, k: int, fmt: BlockFormat, layout: ScaleLayout, device: torch.device | str
) -> torch.Tensor:
    """Zero-filled stored scales for one (mn, k) matrix, padding included."""
    stored = layout.stored(mn, k, fmt)
    flat = torch.zeros(stored.bytes, dtype=torch.uint8, device=device).view(
        torch_dtype(stored.dtype)
    )
    return as_stored(flat, stored)


def _strides(stored: StoredScales, leading: tuple[int, ...]) -> tuple[int, ...]:
    outer: list[int] = []
    step = stored.elements
    for size in reversed(leading):
        outer.append(step)
        step *= size
    return (*reversed(outer), *stored.strides)
