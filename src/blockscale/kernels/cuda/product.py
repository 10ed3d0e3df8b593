"""A weight ready to multiply: the hot call of the ``cuda`` backend."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from blockscale.kernels.cuda.choice import choose
from blockscale.kernels.cuda.driver import Maps
from blockscale.kernels.cuda.launch import Launch, keep
from blockscale.kernels.cuda.operands import Rows, arguments
from blockscale.kernels.step import device_index
from blockscale.tensor import dtype_of

if TYPE_CHECKING:
    from blockscale.kernels.cuda.work import Work
    from blockscale.kernels.step import ProductStart, Scratch
    from blockscale.tensor import BlockScaledTensor

# Launches that one product keeps ready, about 3 KB each, before it starts again.
MAX_LAUNCHES = 2048
# Launches that one token count of a layer keeps ready: an allocator repeats its addresses.
MAX_PLACES = 64


class CudaProduct:
    """out = activation x weight^T (+ bias), in bfloat16, float16 or float32.

    ``weight``: (n, k) E4M3FN, on an SM90 device, one float32 scale a 128x128 block, K-major. Its
    storages are read on every call. ``overlap``: launches may start before the kernel ahead of them
    in the stream has ended (programmatic dependent launch). For few tokens they may read weights at
    once; they wait before they read anything else: whoever writes weights must have another kernel
    run between that and the product, as quantizing the activation is one.

    Needs no workspace: calls on different streams may run at the same time. Deterministic: the same
    bits on every run, and whatever tile serves a shape.
    """

    def __init__(self, weight: BlockScaledTensor, *, overlap: bool = True) -> None:
        self._weight = weight
        self._n, self._k = weight.data.shape
        self._overlap = overlap
        self._device = device_index(weight.data)
        self._processors = torch.cuda.get_device_properties(self._device).multi_processor_count
        self._works: dict[tuple[int, torch.dtype], Work] = {}
        self._maps = Maps()
        self._launches: dict[tuple[object, ...], Launch] = {}

    def __call__(
        self, activation: BlockScaledTensor, out: torch.Tensor, bias: torch.Tensor | None
    ) -> None:
        """``multiply`` with the halves of ``activation``."""
        self.multiply(activation.data, activation.scales, out, bias)

    def multiply(
        self,
        codes: torch.Tensor,
        scales: torch.Tensor,
        out: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> None:
        """Enqueue the product on the current stream of the weight's device.

        ``codes``: (m, k) E4M3FN, stride 1 along k, m >= 1. ``scales``: float32, one for each row
        and 128 columns, MN-major and TMA-aligned. ``out``: a contiguous (m, n) matrix. ``bias``:
        (n,) in out's dtype. Raises BackendError if TMA cannot reach an operand.
        """
        if torch.cuda.current_device() != self._device:
            with torch.cuda.device(self._device):
                self._enqueue(codes, scales, out, bias)
            return
        self._enqueue(codes, scales, out, bias)

    def work(self, m: int, out_dtype: torch.dtype) -> Work:
        """What serves ``m`` tokens."""
        found = self._works.get((m, out_dtype))
        if found is None:
            found = choose(m, self._n, self._k, dtype_of(out_dtype), self._processors)
        return found

    def use(self, work: Work, m: int, out_dtype: torch.dtype) -> None:
        """Serve ``m`` tokens by this work from now on: for tests and measurements."""
        self._works[m, out_dtype] = work
        self._launches.clear()

    def workspace_bytes(self, m: int, out_dtype: torch.dtype) -> int:  # noqa: ARG002 - as ``step.StepProduct``
        """None."""
        return 0

    def start_for(self, m: int, out_dtype: torch.dtype, scratch: Scratch) -> ProductStart:
        """The launch for m tokens as ``step.StepProduct`` has it."""
        scales, k = scratch.scales, self._k
        known: dict[tuple[int, int, int, int | None], Launch] = {}

        def start(stream: int, base: int, out: int, bias: int | None) -> None:
            key = (stream, base, out, bias)
            launch = known.get(key)
            if launch is None:
                whole = (stream, m, out_dtype, out, base, k, base + scales, bias or 0)
                launch = keep(known, key, self._launch(whole), MAX_PLACES)
            launch()

        return start

    def _enqueue(
        self,
        codes: torch.Tensor,
        scales: torch.Tensor,
        out: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> None:
        stream = torch._C._cuda_getCurrentRawStream(self._device)  # noqa: SLF001 - the public one takes 10 times as long
        key = (
            stream,
            out.shape[0],
            out.dtype,
            out.data_ptr(),
            codes.data_ptr(),
            codes.stride(0),
            scales.data_ptr(),
            0 if bias is None else bias.data_ptr(),
        )
        launch = self._launches.get(key)
        if launch is None:
            launch = keep(self._launches, key, self._launch(key), MAX_LAUNCHES)
        launch()

    def _launch(self, key: tuple) -> Launch:
        stream, m, dtype, out, codes, stride, scales, bias = key
        work = self.work(m, dtype)
        where = Rows((m,), codes, self._k if m == 1 else stride, scales, out, dtype)
        made = arguments(self._maps, self._weight, work, where, bias=bias)
        return Launch(work, self._device, stream, made, overlap=self._overlap)
