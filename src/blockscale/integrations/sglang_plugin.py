"""SGLang plugin: its block-FP8 linear method loads and runs each layer by plan.

Found through the entry point ``sglang.srt.plugins`` and applied by SGLang's own hook registry;
``SGLANG_PLUGINS`` restricts which plugins load. Layers stay SGLang's where it was told what to use
(``--fp8-gemm-backend``, Marlin), where other code reads the scales raw, and where no backend may
serve. Checked against the sources of SGLang 0.5.12 and 0.5.13, not run on a GPU. SGLang is imported
inside functions only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from blockscale import ops
from blockscale.errors import FormatError
from blockscale.integrations.engine import block_scaled, log_plan, log_refusal, situation, take
from blockscale.integrations.sglang import (
    process_weights_after_loading_block_quant,
    request_of_layer,
)
from blockscale.planning.plan import ModelPlan

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from torch import nn

MODULE = "sglang.srt.layers.quantization.fp8"


def register() -> None:
    """The entry point. SGLang calls it in each of its processes and then applies the hooks."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    hooks = (
        ("Fp8Config.get_quant_method", name_layer, HookType.AFTER),
        ("Fp8LinearMethod.process_weights_after_loading", process_weights, HookType.AROUND),
        ("Fp8LinearMethod.apply", apply, HookType.AROUND),
    )
    for target, hook, kind in hooks:
        HookRegistry.register(f"{MODULE}.{target}", hook, kind)


def plan_of(model: nn.Module) -> ModelPlan:
    """The plans of all layers that blockscale serves in a loaded SGLang model, in model order."""
    here = situation()
    served = (getattr(module, "block_scaled_linear", None) for module in model.modules())
    return ModelPlan(here.device, here.policy, tuple(s.plan for s in served if s is not None))


def name_layer(
    result: object,  # noqa: ARG001 - what the hooked method returned stays as it is
    config: object,  # noqa: ARG001 - the hooked method's own argument
    layer: nn.Module,
    prefix: str = "",
) -> None:
    """After SGLang chose a layer's method: keep the layer's name, which SGLang drops."""
    if not hasattr(layer, "prefix"):
        layer.prefix = prefix  # type: ignore[assignment]  # a plain attribute, not a tensor


def process_weights(
    original: Callable[[Any, nn.Module], None],
    method: Any,  # noqa: ANN401 - SGLang's Fp8LinearMethod
    layer: nn.Module,
) -> None:
    """Instead of SGLang's processing after loading: plan, prepare and log, or leave it to SGLang.

    A second load of a layer that was planned goes into the same storages.
    """
    if not method.block_quant:
        original(method, layer)
        return
    here = situation()
    block_size = method.quant_config.weight_block_size
    is_first = getattr(layer, "block_scaled_linear", None) is None
    reason = _why_not(method, layer) if is_first else None
    if reason is not None:
        log_refusal(str(getattr(layer, "prefix", "") or type(layer).__name__), reason)
        original(method, layer)
        return
    done = process_weights_after_loading_block_quant(layer, block_size, here.policy, here.device)
    if is_first:
        log_plan(done.plan)


def apply(
    original: Callable[..., torch.Tensor],
    method: object,
    layer: Any,  # noqa: ANN401 - SGLang's LinearBase
    x: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Instead of SGLang's apply: (..., k) to (..., n) as planned, for layers that were."""
    linear = getattr(layer, "block_scaled_linear", None)
    if linear is None:
        return original(method, layer, x, bias)
    return ops.linear(x, bias, linear.handle)


def _why_not(method: Any, layer: Any) -> str | None:  # noqa: ANN401 - SGLang's objects
    """Why a layer stays with SGLang, or None if blockscale will run it."""
    if method.use_mxfp8 or not method.is_checkpoint_fp8_serialized:
        return "its scales are MXFP8, or its weights were not FP8 on disk"
    if method.use_marlin:
        return "SGLang runs it with Marlin"
    if getattr(layer.weight_scale_inv, "format_ue8m0", False):
        return "its scales are marked as UE8M0, for code that reads them raw"
    from sglang.srt.layers.quantization.fp8_utils import get_fp8_gemm_runner_backend

    backend = get_fp8_gemm_runner_backend()
    if not backend.is_auto():
        return f"SGLang was told to use {backend.value}"
    block_size = method.quant_config.weight_block_size
    try:
        weight = block_scaled(layer.weight, layer.weight_scale_inv, block_size)
    except FormatError as error:
        return str(error)
    answer = take(request_of_layer(layer, weight))
    return answer if isinstance(answer, str) else None
