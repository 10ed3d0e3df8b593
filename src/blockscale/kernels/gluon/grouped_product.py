"""A stack of weights ready to multiply: the hot calls of the ``gluon`` backend for experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from blockscale.errors import BackendError
from blockscale.kernels.gluon.build import Form
from blockscale.kernels.gluon.grouped_choice import (
    ALIGNMENTS,
    choose_contiguous,
    choose_masked,
    programs,
)
from blockscale.kernels.gluon.grouped_work import MAX_GROUPS, GroupedVariant
from blockscale.kernels.gluon.launch import TMA_BYTES, launcher
from blockscale.kernels.gluon.work import K_BLOCK, aligned_scale_stride
from blockscale.kernels.step import device_index

if TYPE_CHECKING:
    from blockscale.kernels.gluon.grouped_work import AnyGroupedVariant
    from blockscale.kernels.gluon.launch import Launcher
    from blockscale.tensor import BlockScaledTensor

# Launches that one product keeps ready, one for each variant and shape that it has met.
MAX_STEPS = 8192
MAX_INT32 = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Step:
    """All of a launch that follows from the variant and the rows."""

    launch: Launcher
    grid: tuple[int, int]
    weight: tuple[Any, ...]
    integers: tuple[int, ...]
    is_wide: bool


class GroupedProduct:
    """out[rows of g] = activation[rows of g] x weight[g]^T, in bfloat16, float16 or float32.

    ``weight``: (groups, n, k) E4M3FN, contiguous, on an SM90 device, one float32 scale a 128x128
    block, K-major. Its storages are read on every call. ``overlap``: as in ``GluonProduct``.

    Nothing is read back to the host, and nothing is kept between calls: a CUDA graph serves every
    routing of as many rows, and calls on several streams may run at the same time. Every element
    is the same chain of operations in every kernel and tile: the same bits.

    Raises BackendError for a weight that TMA cannot read, or of more than ``MAX_GROUPS`` groups.
    """

    def __init__(self, weight: BlockScaledTensor, *, overlap: bool = True) -> None:
        if weight.data.ndim != 3 or not weight.data.is_contiguous():  # noqa: PLR2004 - (groups, n, k)
            msg = f"grouped products read a contiguous (groups, n, k) weight, not {weight!r}"
            raise BackendError(msg)
        self._data, self._scales = weight.data, weight.scales
        self._groups, self._n, self._k = weight.data.shape
        if self._groups > MAX_GROUPS:
            msg = f"the Gluon kernels serve up to {MAX_GROUPS} experts on one GPU, not {weight!r}"
            raise BackendError(msg)
        self._k_blocks = (self._k + K_BLOCK - 1) // K_BLOCK
        self._overlap = overlap
        self._device = device_index(weight.data)
        self._processors = torch.cuda.get_device_properties(self._device).multi_processor_count
        self._steps: dict[tuple[Any, ...], Step] = {}
        self._fixed: AnyGroupedVariant | None = None

    def contiguous(
        self, activation: BlockScaledTensor, groups: torch.Tensor, out: torch.Tensor
    ) -> None:
        """Enqueue ``backends.base``'s contiguous product; row blocks of 8, 16, 32, 64 or 128 rows.

        Row blocks of -1 are neither read nor written. Raises BackendError for other row blocks,
        and where TMA cannot reach an operand.
        """
        rows, blocks = out.shape[0], groups.shape[0]
        if rows == 0:
            return
        alignment = rows // blocks if blocks else 0
        if alignment not in ALIGNMENTS or blocks * alignment != rows:
            msg = f"{rows} rows in {blocks} blocks; a row block has one of {ALIGNMENTS} rows"
            raise BackendError(msg)
        variant = self._fixed or choose_contiguous(
            self._groups, blocks, alignment, self._n, out.element_size(), self._processors
        )
        self._call(variant, activation, groups, out, (1, rows))

    def masked(
        self,
        activation: BlockScaledTensor,
        counts: torch.Tensor,
        out: torch.Tensor,
        expected_rows: int,
    ) -> None:
        """Enqueue ``backends.base``'s masked product, for slots of any number of rows.

        Of a slot's rows that do not count, at most those of the last 64 are written. Counts
        below 0 or beyond the slot are taken for 0 and the slot. Raises BackendError where TMA
        cannot reach an operand.
        """
        slot_rows = out.shape[1]
        if slot_rows == 0:
            return
        variant = self._fixed or choose_masked(
            self._groups, slot_rows, expected_rows, out.element_size()
        )
        self._call(variant, activation, counts, out, (self._groups, slot_rows))

    def use(self, variant: AnyGroupedVariant | None) -> None:
        """Serve every call by this variant from now on: for tests and measurements."""
        self._fixed = variant

    def _call(
        self,
        variant: AnyGroupedVariant,
        activation: BlockScaledTensor,
        routing: torch.Tensor,
        out: torch.Tensor,
        shape: tuple[int, int],
    ) -> None:
        if torch.cuda.current_device() != self._device:
            with torch.cuda.device(self._device):
                self._enqueue(variant, activation, routing, out, shape)
            return
        self._enqueue(variant, activation, routing, out, shape)

    def _enqueue(
        self,
        variant: AnyGroupedVariant,
        activation: BlockScaledTensor,
        routing: torch.Tensor,
        out: torch.Tensor,
        shape: tuple[int, int],
    ) -> None:
        key = (variant, shape, out.dtype)
        step = self._steps.get(key)
        if step is None:
            if len(self._steps) >= MAX_STEPS:
                self._steps.clear()
            step = self._steps[key] = self._new_step(variant, shape, out.dtype)
        slots, rows = shape
        launch = step.launch
        codes, out_address = activation.data, out.data_ptr()
        stride = self._k if slots * rows == 1 else codes.stride(-2)
        operands = (
            *launch.box(0, codes.data_ptr(), slots * rows, self._k, stride),
            *step.weight,
            *launch.box(
                2,
                activation.scales.data_ptr(),
                slots * self._k_blocks,
                rows,
                aligned_scale_stride(rows),
            ),
        )
        if step.is_wide:
            target = launch.stack(3, out_address, slots, rows, self._n)
        elif out_address % TMA_BYTES:
            msg = f"the output must start on {TMA_BYTES} bytes, not at {out_address:#x}"
            raise BackendError(msg)
        else:
            target = (out_address,)
        addresses = (self._scales.data_ptr(), routing.data_ptr())
        stream = torch._C._cuda_getCurrentRawStream(self._device)  # noqa: SLF001 - as in ``product``
        launch(step.grid, stream, (*operands, *target, *addresses, *step.integers))

    def _new_step(
        self, variant: AnyGroupedVariant, shape: tuple[int, int], out_dtype: torch.dtype
    ) -> Step:
        slots, rows = shape
        is_wide = isinstance(variant, GroupedVariant)
        if not is_wide and rows * self._n > MAX_INT32:
            msg = f"slots of {rows} x {self._n} results are beyond the kernel for few rows"
            raise BackendError(msg)
        launch = launcher(Form(variant, out_dtype, self._overlap), self._device)
        values = {
            "slot_stride": rows * self._n,
            "n": self._n,
            "slot_rows": rows,
            "groups": self._groups,
            "all_blocks": self._k_blocks,
        }
        grid = (programs(variant, slots, rows, self._n, self._processors), 1)
        flat = self._groups * self._n
        weight = launch.box(1, self._data.data_ptr(), flat, self._k, self._k)
        return Step(launch, grid, weight, launch.integers(values, 0), is_wide)
