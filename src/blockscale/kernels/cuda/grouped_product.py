"""A stack of weights ready to multiply: the hot call of the ``cuda`` backend for experts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from blockscale.errors import BackendError
from blockscale.kernels.cuda.driver import Maps
from blockscale.kernels.cuda.grouped_choice import (
    ALIGNMENTS,
    choose_contiguous,
    choose_masked,
)
from blockscale.kernels.cuda.launch import Launch, keep
from blockscale.kernels.cuda.operands import Routing, Rows, arguments
from blockscale.kernels.cuda.product import MAX_LAUNCHES
from blockscale.kernels.cuda.work import MAX_GROUPS
from blockscale.kernels.step import device_index
from blockscale.tensor import dtype_of

if TYPE_CHECKING:
    from blockscale.kernels.cuda.work import Work
    from blockscale.tensor import BlockScaledTensor


class CudaGroupedProduct:
    """out[rows of g] = activation[rows of g] x weight[g]^T, in bfloat16, float16 or float32.

    ``weight``: (groups, n, k) E4M3FN, contiguous, on an SM90 device, one float32 scale a 128x128
    block, K-major and contiguous. Its storages are read on every call. ``overlap``: launches may
    start before the kernel ahead of them in the stream has ended; they read nothing before it has.

    Nothing is read back to the host, and nothing is kept between calls but launches: a CUDA graph
    serves every routing of as many rows, and calls on several streams may run at the same time.
    Every element is the same chain of operations as in ``CudaProduct``: the same bits.

    Raises BackendError for a weight that is not such a stack.
    """

    def __init__(self, weight: BlockScaledTensor, *, overlap: bool = True) -> None:
        is_stack = weight.data.ndim == 3  # noqa: PLR2004 - (groups, n, k)
        if not (is_stack and weight.data.is_contiguous() and weight.scales.is_contiguous()):
            msg = f"grouped products read a contiguous (groups, n, k) weight, not {weight!r}"
            raise BackendError(msg)
        self._weight = weight
        self._groups, self._n, self._k = weight.data.shape
        self._overlap = overlap
        self._device = device_index(weight.data)
        self._processors = torch.cuda.get_device_properties(self._device).multi_processor_count
        self._maps = Maps()
        self._fixed: Work | None = None
        self._launches: dict[tuple[object, ...], Launch] = {}

    def contiguous(
        self, activation: BlockScaledTensor, groups: torch.Tensor, out: torch.Tensor
    ) -> None:
        """Enqueue ``backends.base``'s contiguous product; row blocks of 64 or 128 rows.

        Row blocks of -1 are neither read nor written. Raises BackendError for other row blocks,
        and where TMA cannot reach an operand.
        """
        if out.shape[0]:
            self._call(activation, groups, out, 0)

    def masked(
        self,
        activation: BlockScaledTensor,
        counts: torch.Tensor,
        out: torch.Tensor,
        expected_rows: int,
    ) -> None:
        """Enqueue ``backends.base``'s masked product, for slots of any number of rows.

        Of a slot's rows that do not count, at most those of the last 16 are written. Counts
        below 0 or beyond the slot are taken for 0 and the slot. Raises BackendError where TMA
        cannot reach an operand, or for more than ``MAX_GROUPS`` groups.
        """
        if out.shape[1]:
            self._call(activation, counts, out, expected_rows)

    def use(self, work: Work | None) -> None:
        """Serve every call by this work from now on: for tests and measurements."""
        self._fixed = work
        self._launches.clear()

    def contiguous_work(self, rows: int, blocks: int, out_dtype: torch.dtype) -> Work:
        """What serves so many rows in so many row blocks. Raises BackendError if nothing does."""
        alignment = rows // blocks if blocks else 0
        if alignment not in ALIGNMENTS or blocks * alignment != rows:
            msg = f"{rows} rows in {blocks} blocks; a row block has one of {ALIGNMENTS} rows"
            raise BackendError(msg)
        given = (self._groups, blocks, alignment)
        return self._fixed or choose_contiguous(
            given, (self._n, self._k), dtype_of(out_dtype), self._processors
        )

    def masked_work(self, slot_rows: int, expected_rows: int, out_dtype: torch.dtype) -> Work:
        """What serves slots of so many rows. Raises BackendError if nothing does."""
        if self._groups > MAX_GROUPS:
            msg = f"gemm.cu serves up to {MAX_GROUPS} slots, not {self._groups}"
            raise BackendError(msg)
        given = (self._groups, slot_rows, expected_rows)
        return self._fixed or choose_masked(
            given, (self._n, self._k), dtype_of(out_dtype), self._processors
        )

    def _call(
        self,
        activation: BlockScaledTensor,
        routing: torch.Tensor,
        out: torch.Tensor,
        expected_rows: int,
    ) -> None:
        if torch.cuda.current_device() != self._device:
            with torch.cuda.device(self._device):
                self._enqueue(activation, routing, out, expected_rows)
            return
        self._enqueue(activation, routing, out, expected_rows)

    def _enqueue(
        self,
        activation: BlockScaledTensor,
        routing: torch.Tensor,
        out: torch.Tensor,
        expected_rows: int,
    ) -> None:
        codes = activation.data
        stream = torch._C._cuda_getCurrentRawStream(self._device)  # noqa: SLF001 - as in ``product``
        key = (
            stream,
            out.shape,
            routing.shape[0],
            out.dtype,
            out.data_ptr(),
            codes.data_ptr(),
            codes.stride(-2),
            activation.scales.data_ptr(),
            routing.data_ptr(),
            expected_rows,
        )
        launch = self._launches.get(key)
        if launch is None:
            launch = keep(self._launches, key, self._launch(key), MAX_LAUNCHES)
        launch()

    def _launch(self, key: tuple) -> Launch:
        stream, shape, length, dtype, out, codes, stride, scales, routing, expected_rows = key
        *slots, rows, _ = shape
        if slots:
            work = self.masked_work(rows, expected_rows, dtype)
        else:
            work = self.contiguous_work(rows, length, dtype)
        where = Rows((*slots, rows), codes, stride, scales, out, dtype)
        routed = Routing(0 if slots else rows // length, self._groups, routing)
        made = arguments(self._maps, self._weight, work, where, routing=routed)
        return Launch(work, self._device, stream, made, overlap=self._overlap)
