"""LoRA on block-scaled layers: ``get_peft_model(model, on_block_scaled(LoraConfig(...)))``.

PEFT looks for the layer class that wraps a module in a table of its own; ``on_block_scaled`` adds
``BlockScaledLinear`` to the table of one config. The FP8 weights stay frozen and planned; adapters
are trained in their own dtype beside them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from blockscale.errors import ModelError
from blockscale.modules.linear import BlockScaledLinear
from blockscale.tensor import torch_dtype

if TYPE_CHECKING:
    from peft import LoraConfig

# Variants that compute with the base layer's weight matrix, which is not a matrix of floats here.
NEED_A_FLOAT_WEIGHT = ("use_dora", "velora_config")


def on_block_scaled(config: LoraConfig) -> LoraConfig:
    """The same config, which now also wraps block-scaled layers.

    Raises ModelError for variants that read the base weight (DoRA, VeLoRA).
    """
    wanted = [name for name in NEED_A_FLOAT_WEIGHT if getattr(config, name, None)]
    if wanted:
        msg = f"{' and '.join(wanted)} computes with a float base weight; use plain LoRA on FP8"
        raise ModelError(msg)
    config._register_custom_module({BlockScaledLinear: LoraBlockScaledLinear})  # noqa: SLF001 - PEFT's documented hook for layers of other libraries
    return config


class LoraBlockScaledLinear(nn.Module, LoraLayer):
    """base(x) + scaling x B(A(dropout(x))), the base as planned."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, **options: Any) -> None:  # noqa: ANN401 - PEFT's signature
        super().__init__()
        LoraLayer.__init__(self, base_layer)
        rank, alpha = options.pop("r"), options.pop("lora_alpha")
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, rank, lora_alpha=alpha, config=options["config"])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The base layer's answer plus that of every active adapter."""
        base = self.get_base_layer()
        result: torch.Tensor = base(x)
        if self.disable_adapters:
            return result
        for name in self.active_adapters:
            if name in self.lora_A:
                down, up = self.lora_A[name], self.lora_B[name]
                change = up(down(self.lora_dropout[name](x.to(_dtype(down)))))
                result = result + (change * self.scaling[name]).to(result.dtype)
        return result

    def merge(self, *_: object, **__: object) -> None:
        """Refuse: adding floats to FP8 codes would round every weight of the layer once more."""
        msg = (
            "adapters are not merged into block-FP8 weights: each would be rounded again. Serve "
            "them beside the model, or merge into the float checkpoint and `blockscale quantize` it"
        )
        raise ModelError(msg)

    def unmerge(self) -> None:
        """Nothing was merged."""

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        """K and N, without PEFT's warning about classes that it does not know."""
        assert isinstance(module, BlockScaledLinear)
        return module.in_features, module.out_features

    def _get_base_layer_device_and_dtype(
        self, base_layer: BlockScaledLinear
    ) -> tuple[torch.device, torch.dtype]:
        """Where adapters go, and their dtype before PEFT raises it: those of the activations."""
        return base_layer.data.device, torch_dtype(base_layer.plan.request.activation_dtype)


def _dtype(adapter: nn.Module) -> torch.dtype:
    return next(adapter.parameters()).dtype
