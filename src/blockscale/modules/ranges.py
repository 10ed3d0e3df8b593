"""NVTX ranges around layers, for a profiler's timeline. Nothing is added until this is called."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from blockscale.modules.experts import BlockScaledExperts
from blockscale.modules.linear import BlockScaledLinear

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn
    from torch.utils.hooks import RemovableHandle


def add_nvtx_ranges(model: nn.Module) -> tuple[RemovableHandle, ...]:
    """Each planned layer or set of experts of ``model`` marks its calls: name and backends.

    Gives handles whose ``remove()`` ends it. Needs a torch built with CUDA when a layer runs.
    """
    handles: list[RemovableHandle] = []
    for module in model.modules():
        if isinstance(module, BlockScaledLinear | BlockScaledExperts):
            plan = module.plan if isinstance(module, BlockScaledLinear) else module.plan.w13
            label = f"blockscale {module.plan.name} ({'+'.join(plan.backends)})"
            handles += (
                module.register_forward_pre_hook(_push(label)),
                # Also if the layer raises: a range that stays open swallows all later ones.
                module.register_forward_hook(_pop, always_call=True),
            )
    return tuple(handles)


def _push(label: str) -> Callable[..., None]:
    def push(*_: object) -> None:
        torch.cuda.nvtx.range_push(label)

    return push


def _pop(*_: object) -> None:
    torch.cuda.nvtx.range_pop()
