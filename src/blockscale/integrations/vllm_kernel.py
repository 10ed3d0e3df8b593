"""The kernel class that vLLM's block-FP8 list gets. Imported by the plugin alone: it needs vLLM."""

from __future__ import annotations

import hashlib
import logging
from typing import TYPE_CHECKING, Any, ClassVar

from vllm import envs
from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.kernels.linear.scaled_mm.BlockScaledMMLinearKernel import (
    Fp8BlockScaledMMLinearKernel,
)
from vllm.platforms import current_platform

from blockscale.backends.registry import all_backends
from blockscale.errors import FormatError
from blockscale.integrations import vllm as plugin
from blockscale.integrations.engine import block_scaled, log_plan, log_refusal, situation, take
from blockscale.integrations.weight_operator import linear_of, name_by_weight
from blockscale.modules.linear import BlockScaledLinear
from blockscale.planning.planner import plan_linear

if TYPE_CHECKING:
    import torch

    from blockscale.planning.plan import LinearPlan


BATCH_INVARIANCE = (
    "a plan may run other kernels for other batch sizes, and VLLM_BATCH_INVARIANT is set"
)
OFFLOADING = "vLLM offloads weights, and a prepared weight must stay where it is"


class BlockscaleBlockFp8Kernel(Fp8BlockScaledMMLinearKernel):  # type: ignore[misc]  # vLLM is not installed where types are checked
    """One layer of vLLM, run by its plan. vLLM makes one instance for each layer.

    The layer's own ``weight`` and scales keep their checkpoint values, so whoever else reads them
    (MLA's absorbed projections, weight reloading) finds what it expects.
    """

    # Activations come as they are; the plan's backend quantizes them, if it does.
    apply_input_quant: ClassVar[bool] = False

    def __init__(self, config: Any) -> None:  # noqa: ANN401 - vLLM's FP8ScaledMMLinearLayerConfig
        super().__init__(config)
        self._asked = plugin.request_of_config(config)
        self._linear: BlockScaledLinear | None = None
        _tell_compile_cache(self._asked.name)

    @property
    def plan(self) -> LinearPlan | None:
        """The plan that runs, None before the weights are loaded."""
        return None if self._linear is None else self._linear.plan

    @classmethod
    def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:  # noqa: ARG003 - vLLM's signature; the plan asks the device itself
        """GPUs of NVIDIA and CPUs."""
        if current_platform.is_cuda() or current_platform.is_cpu():
            return True, None
        return False, "runs on CUDA and CPU platforms"

    @classmethod
    def can_implement(cls, config: Any) -> tuple[bool, str | None]:  # noqa: ANN401 - as above
        """Whether a plan exists for the shape; a refusal is logged with the layer's name."""
        try:
            request = plugin.request_of_config(config)
        except FormatError as error:
            return False, str(error)
        answer = _why_never() or take(request)
        if not isinstance(answer, str):
            return True, None
        log_refusal(request.name, answer)
        return False, answer

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Plan on the loaded scales and prepare, once; later loads go into the same storages."""
        params = self._get_layer_params(layer)
        scales = params.weight_scale if params.weight_scale_inv is None else params.weight_scale_inv
        weight = block_scaled(params.weight, scales, self.weight_group_shape)
        if self._linear is not None:
            self._linear.update(weight)
            return
        here = situation()
        request = plugin.request_of_layer(layer, weight, self._asked)
        plan = plan_linear(request, here.device, here.policy, all_backends())
        # The bias stays the layer's: vLLM decides at each call whether it is added here.
        self._linear = BlockScaledLinear(plan, weight, None, here.policy)
        name_by_weight(params.weight, self._linear)
        first_rank = getattr(layer, "tp_rank", 0) == 0
        log_plan(plan, logging.INFO if first_rank else logging.DEBUG)

    def apply_weights(
        self,
        layer: Any,  # noqa: ANN401 - vLLM's LinearBase
        x: torch.Tensor,
        bias: torch.Tensor | None = None,
        **kwargs: object,  # noqa: ARG002 - vLLM's signature
    ) -> torch.Tensor:
        """(..., k) to (..., n)."""
        return linear_of(x, layer.weight, bias, self.config.out_dtype)

    def apply_block_scaled_mm(self, *_: object, **__: object) -> torch.Tensor:
        """Never called: ``apply_weights`` is overridden."""
        raise NotImplementedError


def _why_never() -> str | None:
    """What in vLLM's configuration keeps every layer away from here, if anything."""
    if envs.VLLM_BATCH_INVARIANT:
        return BATCH_INVARIANCE
    offload = getattr(get_current_vllm_config_or_none(), "offload_config", None)
    if offload is None:
        return None
    is_offloading = offload.uva.cpu_offload_gb > 0 or offload.prefetch.offload_group_size > 0
    return OFFLOADING if is_offloading else None


def _tell_compile_cache(name: str) -> None:
    """Make the layers that run here part of the key of vLLM's cache of compiled graphs.

    vLLM's key has no entry for the kernel that was chosen: a graph compiled for its own DeepGEMM
    would be replayed on weights that were never prepared for it.
    """
    config = get_current_vllm_config_or_none()
    extra = getattr(config, "additional_config", None)
    if isinstance(extra, dict):
        seen = f"{extra.get('blockscale', '')}/{name}"
        extra["blockscale"] = hashlib.sha256(seen.encode()).hexdigest()
