"""Plans, prepares and runs block-scaled FP8 linear layers.

The main path: checkpoint -> formats/tensor -> planning (asks each backend) -> prepare -> module ->
one custom op -> kernel. Importing this loads neither torch nor Triton: names that need them are
loaded when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from blockscale.errors import BlockscaleError
    from blockscale.formats import BlockFormat, BlockShape, DType, PowerOfTwo, ScaleLayout
    from blockscale.modules.experts import BlockScaledExperts
    from blockscale.modules.linear import BlockScaledLinear
    from blockscale.planning.device import Device
    from blockscale.planning.expert_sets import ExpertsPlan
    from blockscale.planning.plan import LinearPlan, ModelPlan
    from blockscale.planning.planner import plan_experts, plan_linear, plan_model
    from blockscale.planning.policy import PlanPolicy
    from blockscale.planning.request import LinearRequest
    from blockscale.probe import detect_device
    from blockscale.reference import dequantize, quantize, relayout, requantize
    from blockscale.tensor import BlockScaledTensor

__version__ = "0.1.0"

_HOMES = {
    "BlockFormat": "blockscale.formats",
    "BlockScaledExperts": "blockscale.modules.experts",
    "BlockScaledLinear": "blockscale.modules.linear",
    "BlockScaledTensor": "blockscale.tensor",
    "BlockShape": "blockscale.formats",
    "BlockscaleError": "blockscale.errors",
    "DType": "blockscale.formats",
    "Device": "blockscale.planning.device",
    "ExpertsPlan": "blockscale.planning.expert_sets",
    "LinearPlan": "blockscale.planning.plan",
    "LinearRequest": "blockscale.planning.request",
    "ModelPlan": "blockscale.planning.plan",
    "PlanPolicy": "blockscale.planning.policy",
    "PowerOfTwo": "blockscale.formats",
    "ScaleLayout": "blockscale.formats",
    "dequantize": "blockscale.reference",
    "detect_device": "blockscale.probe",
    "plan_experts": "blockscale.planning.planner",
    "plan_linear": "blockscale.planning.planner",
    "plan_model": "blockscale.planning.planner",
    "quantize": "blockscale.reference",
    "relayout": "blockscale.reference",
    "requantize": "blockscale.reference",
}

__all__ = [
    "BlockFormat",
    "BlockScaledExperts",
    "BlockScaledLinear",
    "BlockScaledTensor",
    "BlockShape",
    "BlockscaleError",
    "DType",
    "Device",
    "ExpertsPlan",
    "LinearPlan",
    "LinearRequest",
    "ModelPlan",
    "PlanPolicy",
    "PowerOfTwo",
    "ScaleLayout",
    "__version__",
    "dequantize",
    "detect_device",
    "plan_experts",
    "plan_linear",
    "plan_model",
    "quantize",
    "relayout",
    "requantize",
]


def __getattr__(name: str) -> object:
    """Load the module that holds a public name when it is first used."""
    home = _HOMES.get(name)
    if home is None:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    return getattr(import_module(home), name)


def __dir__() -> list[str]:
    """The public names."""
    return sorted(__all__)
