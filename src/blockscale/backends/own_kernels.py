"""What the backends of blockscale's own GPU kernels have in common. No backend of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from blockscale.errors import BackendError

if TYPE_CHECKING:
    import torch

    from blockscale.kernels.step import StepProduct, Steps
    from blockscale.planning.decision import Offer
    from blockscale.tensor import BlockScaledTensor

# TMA: rows of the operands and of the output start on 16 bytes (cuTensorMapEncodeTiled).
TMA_BYTES = 16
# Of an H100 and an H200, where a device does not say.
SM_COUNT = 132


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
