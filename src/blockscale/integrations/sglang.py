"""SGLang's names for these decisions, on the planner: for people who come from there.

Four functions with the meaning that SGLang documents, and one difference: each
decides once, when a weight is first seen, and what it decided is a plan that can be read. SGLang
itself is not imported; its layers are known by their attributes: ``weight`` (N, K) float8_e4m3fn,
``weight_scale_inv``, ``weight_block_size`` (or the one handed in), ``orig_dtype``, ``bias``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from torch.utils.weak import WeakTensorKeyDictionary

from blockscale.backends.deep_gemm import K_MULTIPLE, N_MULTIPLE, DeepGemm
from blockscale.backends.registry import all_backends
from blockscale.errors import ModelError
from blockscale.formats import (
    E4M3FN,
    BlockFormat,
    BlockShape,
    DType,
    ScaleFormat,
)
from blockscale.integrations.engine import block_scaled, powers_of_two
from blockscale.planning.decision import Offer
from blockscale.planning.plan import LinearPlan, ModelPlan
from blockscale.planning.planner import plan_linear
from blockscale.planning.policy import PlanPolicy
from blockscale.planning.request import LinearRequest
from blockscale.probe import detect_device

if TYPE_CHECKING:
    from collections.abc import MutableMapping, Sequence

    import torch
    from torch import nn

    from blockscale.modules.linear import BlockScaledLinear
    from blockscale.planning.device import Device
    from blockscale.tensor import BlockScaledTensor

# SGLang's order on Blackwell behind `--fp8-gemm-backend flashinfer_trtllm`, then what is left.
FLASHINFER_FIRST = ("flashinfer_trtllm", "flashinfer_cutlass")


@runtime_checkable
class BlockQuantLayer(Protocol):
    """What these functions read from an SGLang linear layer."""

    weight: torch.Tensor
    weight_scale_inv: torch.Tensor


@dataclass(frozen=True, slots=True)
class Processed:
    """A processed layer: the plan and the module that runs it."""

    plan: LinearPlan
    linear: BlockScaledLinear


def should_deepgemm_weight_requant_ue8m0(
    weight_block_size: Sequence[int] | None,
    output_dtype: torch.dtype | None = None,
    weight_shape: Sequence[int] | None = None,
    device: Device | None = None,
) -> bool:
    """Whether a weight's scales should become UE8M0: only if DeepGEMM reads them so and can run it.

    True if and only if ``device`` (this machine by default) is one where DeepGEMM reads UE8M0, it
    is installed, blocks are 128x128, and, where given, ``output_dtype`` is bfloat16 and the (N, K)
    of ``weight_shape`` are multiples of 64 and 128.

    Raises FormatError for a dtype that is no float.
    """
    from blockscale.tensor import dtype_of

    if weight_block_size is None:
        return False
    rows, columns = weight_block_size
    n, k = weight_shape[-2:] if weight_shape is not None else (N_MULTIPLE, K_MULTIPLE)
    out_dtype = DType.BFLOAT16 if output_dtype is None else dtype_of(output_dtype)
    fmt = BlockFormat(E4M3FN, ScaleFormat.FP32, BlockShape(rows, columns))
    request = LinearRequest("weight", n, k, fmt, out_dtype, out_dtype)
    answer = DeepGemm().evaluate(request, device or detect_device())
    return isinstance(answer, Offer) and answer.weight.format.scale is ScaleFormat.UE8M0


def process_weights_after_loading_block_quant(
    layer: nn.Module,
    weight_block_size: Sequence[int] | None = None,
    policy: PlanPolicy | None = None,
    device: Device | None = None,
) -> Processed:
    """Plan a loaded layer on its real shape and dtype, and prepare its weight, once.

    Reads the scales, so powers of two are known. Afterwards ``layer.block_scaled_linear`` runs the
    layer. Calling this again after a second load writes the new values into the same storages,
    under the same plan, so captured graphs serve them. The layer's own parameters keep their
    checkpoint values.

    Raises ModelError if the layer lacks what is needed, PlanError if no backend may serve it or a
    second load does not fit the first one's plan.
    """
    weight = _weight_of(layer, weight_block_size)
    existing: BlockScaledLinear | None = getattr(layer, "block_scaled_linear", None)
    if existing is not None:
        existing.update(weight)
        return Processed(existing.plan, existing)
    request = request_of_layer(layer, weight)
    plan = plan_linear(request, device or detect_device(), policy or PlanPolicy(), all_backends())
    linear = _linear(plan, weight, getattr(layer, "bias", None), policy)
    # Beside torch's registry of submodules: SGLang copies every registered buffer when it frees
    # memory, and these share their storage with the layer's own weight.
    object.__setattr__(layer, "block_scaled_linear", linear)
    return Processed(plan, linear)


def post_load_weights(
    model: nn.Module,
    weight_block_size: Sequence[int] | None = None,
    policy: PlanPolicy | None = None,
    device: Device | None = None,
) -> ModelPlan:
    """Process every block-FP8 layer of a model after its weights were loaded.

    Shape and dtype of each layer count, not the block size alone. Raises as
    ``process_weights_after_loading_block_quant`` does.
    """
    policy, device = policy or PlanPolicy(), device or detect_device()
    plans = [
        process_weights_after_loading_block_quant(layer, weight_block_size, policy, device).plan
        for layer in list(model.modules())
        if isinstance(layer, BlockQuantLayer)
    ]
    return ModelPlan(device, policy, tuple(plans))


def flashinfer_gemm_w8a8_block_fp8_linear_with_fallback(
    input: torch.Tensor,  # noqa: A002 - SGLang's parameter name
    weight: torch.Tensor,
    block_size: Sequence[int],
    weight_scale: torch.Tensor,
    input_scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Input (..., K) x weight^T + bias in the input's dtype, by FlashInfer where it may run.

    The first call for a weight plans and prepares it, FlashInfer's kernels first; later calls only
    run. Other weights, scales or dtypes are other plans. ``input_scale`` must be None: activations
    are quantized here.

    Raises ModelError if ``input_scale`` is given, PlanError if no backend may serve the weight.
    """
    if input_scale is not None:
        msg = "input_scale must be None: activations are quantized per token, with scales of 1x128"
        raise ModelError(msg)
    decided = _DECIDED.get(weight, {}).get((weight_scale.data_ptr(), input.dtype))
    if decided is None:
        decided = _decide(input, weight, block_size, weight_scale)
    result: torch.Tensor = decided.linear(input)
    return result if bias is None else result + bias.to(result.dtype)


@dataclass(frozen=True, slots=True)
class _Decided:
    """A planned weight. ``scales``: kept, so that no other tensor comes to lie at their address."""

    linear: BlockScaledLinear
    scales: torch.Tensor


# One plan for each weight that is alive; a weight that is freed takes its plan along.
# (Not weakref's own dictionary: it compares keys with ==, which tensors answer by element.)
_DECIDED: MutableMapping[torch.Tensor, dict[tuple[int, torch.dtype], _Decided]] = (
    WeakTensorKeyDictionary()
)


def _decide(
    activation: torch.Tensor,
    weight: torch.Tensor,
    block_size: Sequence[int],
    weight_scale: torch.Tensor,
) -> _Decided:
    tensor = block_scaled(weight, weight_scale, block_size)
    order = (*FLASHINFER_FIRST, *(b.name for b in all_backends() if b.name not in FLASHINFER_FIRST))
    policy = PlanPolicy(backends=order)
    request = _request("weight", tensor, activation.dtype)
    plan = plan_linear(request, detect_device(), policy, all_backends())
    decided = _Decided(_linear(plan, tensor, None, policy), tensor.scales)
    _DECIDED.setdefault(weight, {})[weight_scale.data_ptr(), activation.dtype] = decided
    return decided


def _weight_of(layer: nn.Module, weight_block_size: Sequence[int] | None) -> BlockScaledTensor:
    block = weight_block_size or getattr(layer, "weight_block_size", None)
    if not isinstance(layer, BlockQuantLayer) or block is None:
        msg = (
            f"{type(layer).__name__} is no block-FP8 layer: it needs weight, weight_scale_inv and "
            "weight_block_size"
        )
        raise ModelError(msg)
    return block_scaled(layer.weight, layer.weight_scale_inv, block)


def request_of_layer(layer: nn.Module, weight: BlockScaledTensor) -> LinearRequest:
    """The loaded layer as a request: its name, shard, dtype and bias, and what its scales are.

    Raises ModelError if the layer does not say which dtype its activations have.
    """
    dtype = getattr(layer, "orig_dtype", None)
    if dtype is None:
        msg = f"{type(layer).__name__} has no orig_dtype: the dtype of activations is not known"
        raise ModelError(msg)
    name = getattr(layer, "prefix", "") or type(layer).__name__
    has_bias = getattr(layer, "bias", None) is not None
    parts = tuple(getattr(layer, "logical_widths", ()))
    return replace(_request(name, weight, dtype), has_bias=has_bias, parts=parts or (weight.mn,))


def _request(name: str, weight: BlockScaledTensor, dtype: torch.dtype) -> LinearRequest:
    from blockscale.tensor import dtype_of

    known = dtype_of(dtype)
    return LinearRequest(
        name, weight.mn, weight.k, weight.format, known, known, powers_of_two(weight)
    )


def _linear(
    plan: LinearPlan,
    weight: BlockScaledTensor,
    bias: torch.Tensor | None,
    policy: PlanPolicy | None,
) -> BlockScaledLinear:
    from blockscale.modules.linear import BlockScaledLinear

    return BlockScaledLinear(plan, weight, bias, policy)
