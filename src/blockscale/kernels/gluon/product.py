"""A weight ready to multiply: the hot call of the ``gluon`` backend."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch

from blockscale.errors import BackendError
from blockscale.kernels.gluon.build import Form
from blockscale.kernels.gluon.choice import MAX_SMALL_M, TOKEN_TILES, WEIGHT_TILES, choose
from blockscale.kernels.gluon.launch import TMA_BYTES, launcher
from blockscale.kernels.gluon.work import (
    CONSUMERS,
    FLOAT_BYTES,
    K_BLOCK,
    DenseWork,
    aligned_scale_stride,
)
from blockscale.kernels.step import device_index

if TYPE_CHECKING:
    from blockscale.kernels.gluon.launch import Launcher
    from blockscale.kernels.gluon.work import Work
    from blockscale.kernels.step import ProductStart, Scratch
    from blockscale.tensor import BlockScaledTensor

# Launches that one product keeps ready, one for each M and output dtype it has met.
MAX_STEPS = 8192
# Streams that have tickets from the start; later ones get theirs when they come.
STREAMS = 8
# Places of operands in memory that a launch for one M keeps ready: an allocator repeats itself.
MAX_PLACES = 64


@dataclass(frozen=True, slots=True)
class Step:
    """All of a launch that follows from M and the output dtype."""

    launch: Launcher
    grid: tuple[int, int]
    weight: tuple[Any, ...]
    scale_box: int
    """The number of the scales' descriptor."""
    integers: tuple[tuple[int, ...], tuple[int, ...]]
    """Without and with a bias."""
    workspace_elements: int
    is_dense: bool


class GluonProduct:
    """out = activation x weight^T (+ bias), in bfloat16, float16 or float32.

    ``weight``: (n, k) E4M3FN, on an SM90 device, one float32 scale a 128x128 block, K-major. Its
    storages are read on every call. ``overlap``: launches may start before the kernel ahead of them
    in the stream has ended (programmatic dependent launch). They read weights at once and wait
    before they read anything else: whoever writes weights must have another kernel run between that
    and the product, as quantizing the activation is one.

    Calls on different streams may run at the same time: each stream has its own tickets, each call
    its own workspace. A CUDA graph keeps those of the stream it was captured on, so two graphs of
    one layer captured on one stream must not run at the same time.

    Deterministic: for one (M, N, K) the same bits on every run.
    """

    def __init__(self, weight: BlockScaledTensor, *, overlap: bool = True) -> None:
        self._data = weight.data
        self._scales = weight.scales
        self._n, self._k = weight.data.shape
        self._k_blocks = (self._k + K_BLOCK - 1) // K_BLOCK
        self._overlap = overlap
        self._device = device_index(weight.data)
        self._processors = torch.cuda.get_device_properties(self._device).multi_processor_count
        self._steps: dict[tuple[int, torch.dtype], Step] = {}
        # Small M: one a tile of weights. Dense: fewer split tiles than multiprocessors.
        self._tickets_each = max(
            -(-self._n // min(WEIGHT_TILES)) * (MAX_SMALL_M // max(TOKEN_TILES)),
            CONSUMERS * self._processors,
        )
        self._ticket_memory: list[torch.Tensor] = []
        self._free_tickets: list[int] = []
        # By stream, the address.
        self._tickets: dict[int, int] = {}
        self._add_tickets()

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
        return choose(m, self._n, self._k, out_dtype.itemsize, self._processors)

    def use(self, work: Work, m: int, out_dtype: torch.dtype) -> None:
        """Serve ``m`` tokens by this work from now on: for tests and measurements."""
        self._steps[m, out_dtype] = self._step(work, m, out_dtype)

    def workspace_bytes(self, m: int, out_dtype: torch.dtype) -> int:
        """Bytes of the sums of split tiles, 0 if nothing is split."""
        return FLOAT_BYTES * self.work(m, out_dtype).workspace_elements

    def start_for(self, m: int, out_dtype: torch.dtype, scratch: Scratch) -> ProductStart:
        """The launch for m tokens as ``step.StepProduct`` has it."""
        step = self._step(self.work(m, out_dtype), m, out_dtype)
        launch, static, grid = step.launch.start, step.launch.static, (*step.grid, 1)
        plain, biased = ((*integers, *step.launch.constants) for integers in step.integers)
        weight_scales, scales, workspace = (
            self._scales.data_ptr(),
            scratch.scales,
            scratch.workspace,
        )
        all_tickets, is_split = self._tickets, step.workspace_elements > 0
        operands_at: dict[int, tuple[Any, ...]] = {}
        targets_at: dict[int, tuple[Any, ...]] = {}

        def start(stream: int, base: int, out: int, bias: int | None) -> None:
            tickets = all_tickets.get(stream)
            if tickets is None:
                tickets = self._new_tickets(stream)
            operands = operands_at.get(base)
            if operands is None:
                operands = self._operands(step, m, self._k, base, base + scales)
                _keep(operands_at, base, operands)
            target = targets_at.get(out)
            if target is None:
                target = self._target(step, m, out)
                _keep(targets_at, out, target)
            # A pointer that is not read may be any.
            added, integers = (base, plain) if bias is None else (bias, biased)
            sums = base + workspace if is_split else tickets
            addresses = (weight_scales, added, sums, tickets)
            launch(*grid, stream, *static, *operands, *target, *addresses, *integers)

        return start

    def launcher_for(self, m: int, out_dtype: torch.dtype) -> Launcher:
        """What ``start_for`` launches."""
        return self._step(self.work(m, out_dtype), m, out_dtype).launch

    def _enqueue(
        self,
        codes: torch.Tensor,
        scales: torch.Tensor,
        out: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> None:
        m = out.shape[0]
        step = self._steps.get((m, out.dtype))
        if step is None:
            step = self._new_step(m, out.dtype)
        stream = torch._C._cuda_getCurrentRawStream(self._device)  # noqa: SLF001 - what Triton calls; the public one takes 10 times as long
        tickets = self._tickets.get(stream)
        if tickets is None:
            tickets = self._new_tickets(stream)
        workspace, sums = tickets, None
        if step.workspace_elements:
            sums = torch.empty(
                step.workspace_elements, dtype=torch.float32, device=self._data.device
            )
            workspace = sums.data_ptr()
        stride = self._k if m == 1 else codes.stride(0)
        scales_address = scales.data_ptr()
        arguments = (
            *self._operands(step, m, stride, codes.data_ptr(), scales_address),
            *self._target(step, m, out.data_ptr()),
            self._scales.data_ptr(),
            scales_address if bias is None else bias.data_ptr(),
            workspace,
            tickets,
            *step.integers[bias is not None],
        )
        step.launch(step.grid, stream, arguments)

    def _operands(
        self, step: Step, m: int, stride: int, codes: int, scales: int
    ) -> tuple[Any, ...]:
        """The arguments for activation, weight and activation scales at these addresses."""
        box = step.launch.box
        return (
            *box(0, codes, m, self._k, stride),
            *step.weight,
            *box(step.scale_box, scales, self._k_blocks, m, aligned_scale_stride(m)),
        )

    def _target(self, step: Step, m: int, out: int) -> tuple[Any, ...]:
        """The arguments for the result at this address."""
        if step.is_dense:
            found: tuple[Any, ...] = step.launch.box(step.scale_box + 1, out, m, self._n, self._n)
            return found
        if out % TMA_BYTES:
            msg = f"the output must start on {TMA_BYTES} bytes, not at {out:#x}"
            raise BackendError(msg)
        return (out,)

    def _new_step(self, m: int, out_dtype: torch.dtype) -> Step:
        if len(self._steps) >= MAX_STEPS:
            self._steps.clear()
        step = self._step(self.work(m, out_dtype), m, out_dtype)
        self._steps[m, out_dtype] = step
        return step

    def _step(self, work: Work, m: int, out_dtype: torch.dtype) -> Step:
        launch = launcher(Form(work.variant, out_dtype, self._overlap), self._device)
        arguments = work.arguments(m, self._n, self._scales.stride(0))
        # Descriptors: of the activation, of the weight's one or two parts, of the scales.
        scale_box = 3 if isinstance(work, DenseWork) else 2
        weight = (self._data.data_ptr(), self._n, self._k, self._data.stride(0))
        return Step(
            launch,
            work.grid,
            tuple(chain.from_iterable(launch.box(part, *weight) for part in range(1, scale_box))),
            scale_box,
            (launch.integers(arguments, 0), launch.integers(arguments, 1)),
            work.workspace_elements,
            isinstance(work, DenseWork),
        )

    def _new_tickets(self, stream: int) -> int:
        if not self._free_tickets:
            self._add_tickets()
        tickets = self._tickets[stream] = self._free_tickets.pop()
        # Keep some for a stream that is met for the first time while it captures.
        if not self._free_tickets and not torch.cuda.is_current_stream_capturing():
            self._add_tickets()
        return tickets

    def _add_tickets(self) -> None:
        if torch.cuda.is_current_stream_capturing():
            msg = f"more than {STREAMS} streams: run the layer once on this one before capturing"
            raise BackendError(msg)
        # A pool that a graph warms up in serves its own thread only, and would hold them as if they
        # were results (torch/_inductor/cudagraph_trees.py).
        with ThreadPoolExecutor(1) as elsewhere:
            zeros = elsewhere.submit(self._zeroed_tickets).result()
        self._ticket_memory.append(zeros)
        self._free_tickets.extend(row.data_ptr() for row in zeros)

    def _zeroed_tickets(self) -> torch.Tensor:
        shape = (STREAMS, self._tickets_each)
        zeros = torch.zeros(shape, dtype=torch.int32, device=self._data.device)
        # Other streams read them: have them written before anyone can.
        torch.cuda.synchronize(self._device)
        return zeros


def _keep(known: dict[int, tuple[Any, ...]], address: int, arguments: tuple[Any, ...]) -> None:
    if len(known) >= MAX_PLACES:
        known.clear()
    known[address] = arguments
