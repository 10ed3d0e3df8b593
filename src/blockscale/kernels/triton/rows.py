"""The steps between the grouped products of a layer of experts, each one kernel (or two).

What ``expert_ops.RowSteps`` asks for, on a GPU: the bits of ``expert_ops.TorchRows``. No step waits
for the device; what is launched depends on the number of tokens alone, so a CUDA graph that was
captured for it serves any routing.
"""

from __future__ import annotations

from math import gcd, prod
from typing import TYPE_CHECKING, NamedTuple

import torch

from blockscale.errors import BackendError
from blockscale.formats import ceil_div
from blockscale.formats.layout import Axes, Packing
from blockscale.kernels.triton.build import TYPES, Variant, launcher
from blockscale.kernels.triton.destination import TILE_COLUMNS, VECTOR_BYTES, QuantizerSpec
from blockscale.kernels.triton.rows_kernel import (
    arrange_kernel,
    combine_kernel,
    count_kernel,
    gather_quantize_kernel,
    silu_multiply_quantize_rows_kernel,
)
from blockscale.reference.experts import ArrangedRows, contiguous_rows, masked_slot
from blockscale.tensor import BlockScaledTensor, as_stored, torch_dtype

if TYPE_CHECKING:
    from collections.abc import Callable

    from blockscale.formats import BlockFormat, ScaleLayout

# As in kernels.triton.quantize: 8 x 512 values by 128 threads.
TILE_ROWS, NUM_WARPS = 8, 4
COMBINED_COLUMNS = 1024
# Ids that a program of the arranging kernels looks through at a time: few for decoding.
CHUNKS = (256, 4096)
CHUNK_WARPS = {256: 4, 4096: 8}
ID_TYPES = {torch.int32: "*i32", torch.int64: "*i64"}


class RowsSpec(NamedTuple):
    """A layer of experts as its steps see it. ``k``: of a token; ``inner``: of w2's input.

    ``format`` and ``layout``: of quantized rows. ``alignment``: of row blocks or of slots.
    ``overlaps``: each kernel may be launched before the one ahead has ended (SM90 and later).
    """

    format: BlockFormat
    layout: ScaleLayout
    alignment: int
    experts: int
    dtype: torch.dtype
    k: int
    inner: int
    device: int
    overlaps: bool = False


class TritonRows:
    """``RowSteps`` by Triton kernels, compiled when this is made, but for unusual inputs.

    Which rows there are is what the two kinds below differ in. Raises BackendError for a form or an
    alignment that has no kernel.
    """

    is_masked: bool

    def __init__(self, spec: RowsSpec) -> None:
        self._spec = spec
        device = spec.device
        self._gathered = _Quantized(spec, spec.k)
        self._activated = _Quantized(spec, spec.inner)
        self._gather = launcher(_gathering(self._gathered.spec, VECTOR_BYTES), device)
        self._activate = launcher(_activating(self._activated.spec), device)
        self._combine = launcher(_combining(spec, torch.float32), device)
        for chunk in CHUNKS:
            self._arranging(torch.int64, chunk)

    def arrange(self, ids: torch.Tensor) -> ArrangedRows:
        """As ``RowSteps``."""
        raise NotImplementedError

    def _arrange(self, ids: torch.Tensor, rows: int, groups: int, slot: int | None) -> ArrangedRows:
        """By two kernels: ``rows`` in all, and as many ``groups`` as the product wants."""
        if ids.dtype not in ID_TYPES or not ids.is_contiguous():
            ids = ids.to(torch.int64).contiguous()
        experts, choices = self._spec.experts, ids.numel()
        # One allocation for all that the kernels write: counts, groups, places and sources.
        sizes = (experts, groups, choices, rows)
        memory = torch.empty(sum(sizes), dtype=torch.int32, device=ids.device)
        counts, group, place, source = memory.split(sizes)
        chunk = CHUNKS[0] if choices <= CHUNKS[0] else CHUNKS[1]
        count, arrange = self._arranging(ids.dtype, chunk)
        count(experts, ids.data_ptr(), counts.data_ptr(), choices)
        arrange(
            experts + 1,
            ids.data_ptr(),
            counts.data_ptr(),
            source.data_ptr(),
            place.data_ptr(),
            group.data_ptr(),
            choices,
            experts,
            rows,
            slot or rows,
        )
        return ArrangedRows(source, place.view(ids.shape), group, slot)

    def gather(self, hidden: torch.Tensor, rows: ArrangedRows) -> BlockScaledTensor:
        """As ``RowSteps``: one kernel, which quantizes."""
        result, codes, scales, places = self._gathered.new(rows, hidden.device)
        launch = self._gather
        if (hidden.data_ptr() | hidden.stride(0) * hidden.itemsize) % VECTOR_BYTES:
            launch = launcher(_gathering(self._gathered.spec, 1), self._spec.device)
        launch(
            ceil_div(rows.rows, TILE_ROWS) * ceil_div(self._spec.k, TILE_COLUMNS),
            hidden.data_ptr(),
            rows.source.data_ptr(),
            codes,
            scales,
            rows.rows,
            self._spec.k,
            hidden.stride(0),
            rows.choices,
            *places,
        )
        return result

    def activate(self, gate_up: torch.Tensor, rows: ArrangedRows) -> BlockScaledTensor:
        """As ``RowSteps``: one kernel, which quantizes."""
        result, codes, scales, places = self._activated.new(rows, gate_up.device)
        self._activate(
            ceil_div(rows.rows, TILE_ROWS) * ceil_div(self._spec.inner, TILE_COLUMNS),
            gate_up.data_ptr(),
            rows.source.data_ptr(),
            codes,
            scales,
            rows.rows,
            self._spec.inner,
            *places,
        )
        return result

    def combine(
        self, products: torch.Tensor, rows: ArrangedRows, weights: torch.Tensor, out: torch.Tensor
    ) -> None:
        """As ``RowSteps``: one kernel."""
        weights = weights.contiguous()
        launch = self._combine
        if weights.dtype is not torch.float32:
            launch = launcher(_combining(self._spec, weights.dtype), self._spec.device)
        tokens, columns = out.shape
        launch(
            tokens * ceil_div(columns, COMBINED_COLUMNS),
            products.data_ptr(),
            rows.place.data_ptr(),
            weights.data_ptr(),
            out.data_ptr(),
            columns,
            rows.choices,
        )

    def _arranging(
        self, ids: torch.dtype, chunk: int
    ) -> tuple[Callable[..., None], Callable[..., None]]:
        overlaps = self._spec.overlaps
        count = Variant(
            count_kernel,
            (("ids", ID_TYPES[ids], 8), ("counts", "*i32", 4), ("choices", "i32", 1)),
            (("CHUNK", chunk), ("OVERLAP", overlaps)),
            CHUNK_WARPS[chunk],
            overlaps=overlaps,
        )
        pointers = ("counts", "source", "place", "groups")
        numbers = ("choices", "experts", "rows", "slot")
        arrange = Variant(
            arrange_kernel,
            (
                ("ids", ID_TYPES[ids], 8),
                *((name, "*i32", 4) for name in pointers),
                *((name, "i32", 1) for name in numbers),
            ),
            (
                ("IS_MASKED", self.is_masked),
                ("ALIGNMENT", self._spec.alignment),
                ("EXPERTS", 1 << (self._spec.experts - 1).bit_length()),
                ("CHUNK", chunk),
                ("OVERLAP", overlaps),
            ),
            CHUNK_WARPS[chunk],
            overlaps=overlaps,
        )
        return launcher(count, self._spec.device), launcher(arrange, self._spec.device)


class ContiguousRows(TritonRows):
    """Expert after expert, each padded to whole row blocks."""

    is_masked = False

    def arrange(self, ids: torch.Tensor) -> ArrangedRows:
        """As ``reference.arrange_contiguous``."""
        alignment = self._spec.alignment
        rows = contiguous_rows(ids.numel(), self._spec.experts, alignment)
        return self._arrange(ids, rows, rows // alignment, None)


class MaskedRows(TritonRows):
    """A slot for each expert."""

    is_masked = True

    def __init__(self, spec: RowsSpec) -> None:
        if spec.alignment % TILE_ROWS:
            msg = f"slots are multiples of {TILE_ROWS} rows here, not of {spec.alignment}"
            raise BackendError(msg)
        super().__init__(spec)

    def arrange(self, ids: torch.Tensor) -> ArrangedRows:
        """As ``reference.arrange_masked``."""
        slot = masked_slot(ids.shape[0], self._spec.alignment)
        return self._arrange(ids, self._spec.experts * slot, self._spec.experts, slot)


class _Quantized:
    """Where the codes and scales of (rows, k) go, slot by slot; contiguous rows are one slot."""

    def __init__(self, layer: RowsSpec, k: int) -> None:
        spec = QuantizerSpec(
            layer.format,
            layer.layout,
            layer.dtype,
            k,
            layer.device,
            overlaps=layer.overlaps,
        )
        layout = spec.layout
        if layout.packing not in {Packing.NONE, Packing.FOUR_IN_INT32} or (
            layout.axes is not Axes.MN_K
        ):
            msg = f"the kernels for rows of experts write no scales in {layout}"
            raise BackendError(msg)
        self.spec = spec
        self._experts = layer.experts
        self._codes = torch_dtype(spec.format.element)
        self._stored = torch_dtype(layout.storage_type(spec.format.scale))

    def new(
        self, rows: ArrangedRows, device: torch.device
    ) -> tuple[BlockScaledTensor, int, int, tuple[int, ...]]:
        """The operand, its two addresses, and the kernels' arguments from ``slot`` on."""
        spec = self.spec
        leading = () if rows.slot is None else (self._experts,)
        slot = rows.rows if rows.slot is None else rows.slot
        stored = spec.layout.stored(slot, spec.k, spec.format)
        codes = torch.empty((*leading, slot, spec.k), dtype=self._codes, device=device)
        flat = torch.empty(prod(leading) * stored.elements, dtype=self._stored, device=device)
        scales = as_stored(flat, stored, leading)
        result = BlockScaledTensor(codes, scales, spec.format, spec.layout)
        places = (max(1, slot), stored.shape[1], *stored.strides, stored.elements)
        return result, codes.data_ptr(), scales.data_ptr(), places


def _quantizing(
    spec: QuantizerSpec, kernel: object, first: tuple[tuple[str, str, int], ...]
) -> Variant:
    stored = TYPES[torch_dtype(spec.layout.storage_type(spec.format.scale))]
    arguments = [
        *first[:1],
        ("source", "*i32", 4),
        ("codes", "*fp8e4nv", VECTOR_BYTES // spec.dtype.itemsize),
        ("scales", "*" + stored, 4 if stored != "u8" else 1),
        ("rows", "i32", 1),
        ("columns", "i32", gcd(spec.k, VECTOR_BYTES)),
        *first[1:],
    ]
    places = ("slot", "stored_blocks", "scale_row_stride", "scale_block_stride")
    arguments += [(name, "i32", 1) for name in (*places, "scale_slot_stride")]
    constants = (
        ("TILE_ROWS", TILE_ROWS),
        ("TILE_COLUMNS", TILE_COLUMNS),
        *spec.constants(),
        ("OVERLAP", spec.overlaps),
    )
    return Variant(kernel, tuple(arguments), constants, NUM_WARPS, overlaps=spec.overlaps)


def _gathering(spec: QuantizerSpec, alignment: int) -> Variant:
    """For tokens whose rows start on multiples of ``alignment`` bytes."""
    stride = max(1, alignment // spec.dtype.itemsize)
    first = (
        ("values", "*" + TYPES[spec.dtype], alignment),
        ("values_stride", "i32", stride),
        ("choices", "i32", 1),
    )
    return _quantizing(spec, gather_quantize_kernel, first)


def _activating(spec: QuantizerSpec) -> Variant:
    first = (("gate_up", "*" + TYPES[spec.dtype], VECTOR_BYTES),)
    return _quantizing(spec, silu_multiply_quantize_rows_kernel, first)


def _combining(spec: RowsSpec, weights: torch.dtype) -> Variant:
    pointer = "*" + TYPES[spec.dtype]
    arguments = (
        ("products", pointer, VECTOR_BYTES),
        ("place", "*i32", 4),
        ("weights", "*" + TYPES[weights], weights.itemsize),
        ("out", pointer, VECTOR_BYTES),
        ("columns", "i32", 1),
        ("choices", "i32", 1),
    )
    constants = (("TILE_COLUMNS", COMBINED_COLUMNS), ("OVERLAP", spec.overlaps))
    return Variant(combine_kernel, arguments, constants, NUM_WARPS, overlaps=spec.overlaps)
