"""What FlashInfer's backends share: its package, when blockscale runs it, compiling ahead."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from blockscale.errors import BackendError
from blockscale.planning.decision import Readiness
from blockscale.planning.device import Verdict

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from blockscale.backends.base import Multiply, MultiplyQuantized
    from blockscale.planning.decision import Offer, OperandForm
    from blockscale.planning.device import Device
    from blockscale.planning.request import LinearRequest
    from blockscale.tensor import BlockScaledTensor

PACKAGE = "flashinfer-python"


def readiness_once_proven(request: LinearRequest, device: Device, backend: str) -> Readiness:
    """RUNNABLE where the probe has proven this output dtype on the device."""
    proof = device.proof(backend, request.out_dtype)
    is_proven = proof is not None and proof.verdict is Verdict.PROVEN
    return Readiness.RUNNABLE if is_proven else Readiness.ONCE_PROVEN


def function_named(name: str) -> Callable[..., object]:
    """A function of ``flashinfer.gemm``. Raises BackendError if there is none, or no FlashInfer."""
    try:
        import flashinfer.gemm
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        msg = f"FlashInfer cannot be imported (pip install {PACKAGE}): {error}"
        raise BackendError(msg) from error
    try:
        function: Callable[..., object] = getattr(flashinfer.gemm, name)
    except AttributeError as error:
        msg = f"this FlashInfer has no gemm.{name}; 0.7.2 has (pip install -U {PACKAGE})"
        raise BackendError(msg) from error
    return function


def check_form(weight: BlockScaledTensor, form: OperandForm) -> None:
    """Raise BackendError unless the weight is in that form: FlashInfer takes pointers on trust."""
    if (weight.format, weight.layout) != (form.format, form.layout):
        msg = (
            f"FlashInfer was to get {form.format} scales in {form.layout.name}, not "
            f"{weight.format} in {weight.layout.name}"
        )
        raise BackendError(msg)


def contiguous(weight: BlockScaledTensor) -> BlockScaledTensor:
    """The same weight; codes are copied if their rows do not follow each other, as scales do."""
    from blockscale.tensor import BlockScaledTensor

    if weight.data.is_contiguous():
        return weight
    data = weight.data.contiguous()
    return BlockScaledTensor(data, weight.scales, weight.format, weight.layout)


def run_once(
    bound: Multiply, weight: BlockScaledTensor, offer: Offer, tokens: Iterable[int]
) -> None:
    """Multiply zeros for each number of tokens, and wait: what FlashInfer compiles is compiled.

    Raises BackendError with its first words if that fails.
    """
    import torch

    from blockscale.tensor import BlockScaledTensor, empty_scales

    assert offer.activation is not None
    form, n, k = offer.activation, weight.mn, weight.k
    multiply = cast("MultiplyQuantized", bound)
    try:
        with torch.cuda.device_of(weight.data):
            for m in tokens:
                zeros = torch.zeros((m, k), dtype=torch.uint8, device=weight.device)
                scales = empty_scales(m, k, form.format, form.layout, weight.device)
                codes = zeros.view(torch.float8_e4m3fn)
                activation = BlockScaledTensor(codes, scales, form.format, form.layout)
                out = torch.empty((m, n), dtype=torch.bfloat16, device=weight.device)
                multiply(activation, out, None)
            out.flatten()[:1].cpu()
    except (RuntimeError, ValueError, OSError) as error:
        words = " ".join(str(error).split())[:300]
        msg = f"FlashInfer failed on a {n}x{k} weight: {words}"
        raise BackendError(msg) from error
