"""The two launches of a planned layer, for one token count: the least host code around them.

A forward pass on a GPU is a quantizer and a product. Called one by one, each allocates its results,
looks at its arguments and asks for the stream. Here all that follows from the token count is
computed when that count is first met, and a call takes one piece of scratch memory for codes,
scales and sums, in which the kernels know their places. What it costs: docs/gpu.md, "Host time of a
call".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeAlias

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    # (activation, row_stride, out, bias): ``activation``: m rows of k elements, ``row_stride``
    # elements apart, of any shape; ``out``: (..., n), contiguous; ``bias``: (n,) in out's dtype.
    Step: TypeAlias = Callable[[torch.Tensor, int, torch.Tensor, torch.Tensor | None], None]
    # What gives the step for a token count, m >= 1: a pure function of it.
    Steps: TypeAlias = Callable[[int], Step]
    # (stream, address of the values, elements from row to row, address of the scratch memory).
    QuantizerStart: TypeAlias = Callable[[int, int, int, int], None]
    # (stream, address of the scratch memory, address of the result, address of the bias or None).
    ProductStart: TypeAlias = Callable[[int, int, int, int | None], None]

# Parts of the scratch memory start on a line of L2; TMA and 16-byte loads ask for less.
PART_ALIGNMENT = 128


@dataclass(frozen=True, slots=True)
class Scratch:
    """Where things lie in a call's scratch memory, in bytes; codes lie at its start."""

    scales: int
    workspace: int
    nbytes: int

    @classmethod
    def of(cls, code_bytes: int, scale_bytes: int, workspace_bytes: int) -> Scratch:
        """One after the other."""
        scales = _aligned(code_bytes)
        workspace = scales + _aligned(scale_bytes)
        return cls(scales, workspace, workspace + workspace_bytes)


class StepQuantizer(Protocol):
    """A quantizer that writes where it is told to."""

    def sizes(self, m: int) -> tuple[int, int]:
        """Bytes of the codes and of the stored scales of m rows."""
        ...

    def start_for(self, m: int, scratch: Scratch) -> QuantizerStart:
        """The launch for m rows. Its caller sees to the current device."""
        ...


class StepProduct(Protocol):
    """A bound weight that reads activations where it is told to."""

    def workspace_bytes(self, m: int, out_dtype: torch.dtype) -> int:
        """Bytes that a call for m tokens needs beside its operands."""
        ...

    def start_for(self, m: int, out_dtype: torch.dtype, scratch: Scratch) -> ProductStart:
        """The launch for m tokens. Its caller sees to the current device."""
        ...


def steps(
    quantizer: StepQuantizer, product: StepProduct, out_dtype: torch.dtype, device: torch.device
) -> Steps:
    """For each token count both launches, on the current stream of ``device``."""
    index = torch.cuda.current_device() if device.index is None else device.index
    current_device, current_stream = device_getters()
    # Half the cost of torch.empty: dtype and device need not be read from Python.
    new_empty = torch.empty(0, dtype=torch.uint8, device=device).new_empty

    def step_for(m: int) -> Step:
        scratch = Scratch.of(*quantizer.sizes(m), product.workspace_bytes(m, out_dtype))
        quantize = quantizer.start_for(m, scratch)
        multiply = product.start_for(m, out_dtype, scratch)
        nbytes = scratch.nbytes

        def step(
            activation: torch.Tensor, row_stride: int, out: torch.Tensor, bias: torch.Tensor | None
        ) -> None:
            # A layer may be on another GPU than the current one: accelerate does not switch.
            if current_device() != index:
                with torch.cuda.device(index):
                    step(activation, row_stride, out, bias)
                return
            stream = current_stream(index)
            memory = new_empty(nbytes)
            base = memory.data_ptr()
            quantize(stream, activation.data_ptr(), row_stride, base)
            multiply(stream, base, out.data_ptr(), None if bias is None else bias.data_ptr())

        return step

    return step_for


def device_index(tensor: torch.Tensor) -> int:
    """The number of a tensor's GPU; the current one where the tensor's device has no number."""
    index = tensor.device.index
    return torch.cuda.current_device() if index is None else index


def device_getters() -> tuple[Callable[[], int], Callable[[int], int]]:
    """The C functions for the current device, and for a device's current stream.

    The public ones look at more: ``torch.cuda.current_stream`` takes ten times as long.
    """
    # CPU builds of torch lack them.
    from torch._C import _cuda_getCurrentRawStream, _cuda_getDevice

    return _cuda_getDevice, _cuda_getCurrentRawStream


def _aligned(nbytes: int) -> int:
    return -(-nbytes // PART_ALIGNMENT) * PART_ALIGNMENT
