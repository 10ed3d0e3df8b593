"""vLLM plugin: block-FP8 linear layers run by plan, on GPUs first, on CPUs where vLLM has nothing.

Found through the entry point ``vllm.general_plugins``, so installing blockscale is all it takes;
``VLLM_PLUGINS`` or ``VLLM_DISABLED_KERNELS=BlockscaleBlockFp8Kernel`` turns it off. Each layer is
planned twice: on its shape when vLLM asks who can run it (scales unread; a refusal leaves it to
vLLM's own kernels), and on its loaded scales, which is the plan that runs and that is logged.
Checked against vLLM 0.32.0 (CPU build). vLLM is imported inside functions only.
"""

from __future__ import annotations

import logging
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from functools import wraps
from typing import TYPE_CHECKING, Any

from blockscale.errors import FormatError
from blockscale.integrations.engine import block_format, powers_of_two, situation
from blockscale.planning.plan import LinearPlan, ModelPlan
from blockscale.planning.request import LinearRequest, Shard, ShardStyle

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import nn

    from blockscale.tensor import BlockScaledTensor

LOGGER = logging.getLogger(__name__)

# The layer whose kernel vLLM is choosing: kernels are asked about shapes, without a name.
_LAYER: ContextVar[str | None] = ContextVar("blockscale_vllm_layer", default=None)


def register() -> None:
    """The entry point. vLLM calls it in each of its processes, possibly more than once.

    A vLLM whose kernel lists cannot be found where 0.32 has them is left as it is, with a warning.
    """
    # vLLM's handlers and level hold for this library's loggers too.
    logging.getLogger("blockscale").parent = logging.getLogger("vllm")
    try:
        from vllm.model_executor.kernels.linear import _POSSIBLE_FP8_BLOCK_KERNELS as KERNELS
        from vllm.platforms import PlatformEnum

        from blockscale.integrations.vllm_kernel import BlockscaleBlockFp8Kernel
    except ImportError as error:
        LOGGER.warning("blockscale: this vLLM is not one it knows, left as it is: %s", error)
        return
    cuda = KERNELS.setdefault(PlatformEnum.CUDA, [])
    if BlockscaleBlockFp8Kernel in cuda:
        return
    cuda.insert(0, BlockscaleBlockFp8Kernel)
    # Last on CPUs: vLLM's own kernels there need AMX and use it.
    KERNELS.setdefault(PlatformEnum.CPU, []).append(BlockscaleBlockFp8Kernel)
    _name_layers_while_choosing()


def plan_of(model: nn.Module) -> ModelPlan:
    """The plans of all layers that blockscale serves in a loaded vLLM model, in model order.

    In a worker process: ``llm.apply_model(plan_of)``.
    """
    here = situation()
    plans = (getattr(_kernel_of(module), "plan", None) for module in model.modules())
    layers = tuple(plan for plan in plans if isinstance(plan, LinearPlan))
    return ModelPlan(here.device, here.policy, layers)


def request_of_config(config: Any) -> LinearRequest:  # noqa: ANN401 - vLLM's FP8ScaledMMLinearLayerConfig
    """What vLLM knows when it chooses a kernel: shape, block, dtypes; scales are unread.

    Raises FormatError for a dtype, block or scheme that is none of this library's.
    """
    from blockscale.tensor import dtype_of

    weight, activation = config.weight_quant_key, config.activation_quant_key
    if activation.scale.static:
        msg = "activations have static scales; only dynamic ones are planned"
        raise FormatError(msg)
    n, k = config.weight_shape
    return LinearRequest(
        _LAYER.get() or f"a layer of {n}x{k}",
        n,
        k,
        block_format(weight.scale.group_shape, weight.scale.dtype),
        dtype_of(config.input_dtype),
        dtype_of(config.out_dtype),
    )


def request_of_layer(
    layer: Any,  # noqa: ANN401 - vLLM's LinearBase
    weight: BlockScaledTensor,
    asked: LinearRequest,
) -> LinearRequest:
    """``asked`` completed by what the loaded layer knows: name, parts, shard, bias and scales."""
    degree = getattr(layer, "tp_size", 1)
    style = ShardStyle.WHOLE if degree == 1 else _shard_style(layer)
    return replace(
        asked,
        name=getattr(layer, "prefix", "") or asked.name,
        format=weight.format,
        parts=tuple(getattr(layer, "logical_widths", None) or (asked.n,)),
        power_of_two=powers_of_two(weight),
        has_bias=getattr(layer, "bias", None) is not None,
        shard=Shard(style, degree) if style is not ShardStyle.WHOLE else Shard(),
    )


def _shard_style(layer: object) -> ShardStyle:
    # Both kinds of layer have sharded weights and only this one shards its input.
    return ShardStyle.ROW if hasattr(layer, "input_is_parallel") else ShardStyle.COLUMN


def _kernel_of(module: nn.Module) -> object | None:
    """The kernel that vLLM's method or scheme holds for a linear layer, if any."""
    for holder in (getattr(module, "quant_method", None), getattr(module, "scheme", None)):
        kernel: object | None = getattr(holder, "fp8_linear", None)
        if kernel is not None:
            return kernel
    return None


def _name_layers_while_choosing() -> None:
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
        CompressedTensorsLinearMethod,
    )
    from vllm.model_executor.layers.quantization.fp8 import Fp8LinearMethod

    for method in (Fp8LinearMethod, CompressedTensorsLinearMethod):
        method.create_weights = _naming(method.create_weights)


def _naming(create_weights: Callable[..., None]) -> Callable[..., None]:
    @wraps(create_weights)
    def named(method: object, layer: nn.Module, *args: object, **kwargs: object) -> None:
        with _named(getattr(layer, "prefix", None)):
            create_weights(method, layer, *args, **kwargs)

    return named


@contextmanager
def _named(name: str | None) -> Iterator[None]:
    token = _LAYER.set(name)
    try:
        yield
    finally:
        _LAYER.reset(token)
