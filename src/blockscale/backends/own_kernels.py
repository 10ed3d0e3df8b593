"""What the backends of blockscale's own GPU kernels have in common. No backend of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from blockscale.errors import BackendError
from blockscale.formats import (
    FP8_1X128_FP32,
    FP8_128X128_FP32,
    K_MAJOR,
    MN_MAJOR_TMA_ALIGNED,
    BlockShape,
    DType,
)
from blockscale.planning.decision import Arrangement, GroupedRows, MRange, OperandForm

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch

    from blockscale.backends.gates import Gates
    from blockscale.kernels.step import StepProduct, Steps
    from blockscale.planning.decision import Offer
    from blockscale.tensor import BlockScaledTensor

# TMA: rows of the operands and of the output start on 16 bytes (cuTensorMapEncodeTiled).
TMA_BYTES = 16
# Of an H100 and an H200, where a device does not say.
SM_COUNT = 132
# What both Hopper families read, so that one prepared weight serves both.
HOPPER_WEIGHT = OperandForm(FP8_128X128_FP32, K_MAJOR)
HOPPER_ACTIVATION = OperandForm(FP8_1X128_FP32, MN_MAJOR_TMA_ALIGNED)


def hopper_gates(gates: Gates) -> None:
    """What both Hopper families ask of a layer; of the machine each asks its own."""
    gates.blocks((BlockShape(128, 128),))
    gates.out_dtypes((DType.BFLOAT16, DType.FLOAT16, DType.FLOAT32))
    row = TMA_BYTES // gates.request.out_dtype.bytes
    gates.multiples(row, TMA_BYTES, "TMA rows are 16 bytes")
    gates.whole_blocks()


def row_blocks(
    experts: int, alignments: Iterable[tuple[int, float | None]]
) -> tuple[GroupedRows, ...]:
    """Low row blocks while experts get few rows each.

    ``alignments``: rows of a block, and up to how many tokens an expert; None: for all others.
    """
    found = []
    first = 0
    for alignment, tokens in alignments:
        last = None if tokens is None else int(tokens * experts)
        found.append(GroupedRows(MRange(first, last), Arrangement.CONTIGUOUS, alignment))
        first = 0 if last is None else last + 1
    return tuple(found)


def check_tma_weight(weight: BlockScaledTensor, offer: Offer) -> None:
    """Raises BackendError unless TMA reads the weight's codes and it is in the offered form."""
    if weight.data.stride(-2) % TMA_BYTES or weight.data.data_ptr() % TMA_BYTES:
        msg = f"TMA reads rows that start on {TMA_BYTES} bytes; copy {weight!r} first"
        raise BackendError(msg)
    if (weight.format, weight.layout) != (offer.weight.format, offer.weight.layout):
        msg = f"planned for {offer.weight.format} in {offer.weight.layout}, got {weight!r}"
        raise BackendError(msg)


def own_steps(
    weight: BlockScaledTensor,
    offer: Offer,
    dtypes: tuple[torch.dtype, torch.dtype],
    product: StepProduct,
) -> Steps:
    """``StepBackend.bind_steps`` with blockscale's own quantizer in front of ``product``."""
    from blockscale.kernels.step import device_index, steps
    from blockscale.kernels.triton.quantize import rows_quantizer

    form = offer.activation
    assert form is not None
    quantizer = rows_quantizer(
        form.format, form.layout, dtypes[0], weight.k, device_index(weight.data)
    )
    return steps(quantizer, product, dtypes[1], weight.device)
