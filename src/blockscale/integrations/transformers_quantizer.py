"""A transformers quantizer: ``from_pretrained(..., quantization_config=BlockScaleConfig())``.

Importing this module registers it with transformers and changes nothing else there: a checkpoint
loads by plan if a ``BlockScaleConfig`` is passed, or after ``serve_block_fp8_by_plan()``. FP8
layers are read from the files by blockscale's own reader, so that no scale passes through
transformers' loader, which rounds float32 scales to powers of two where a config declares
``ue8m0``, and none is dequantized to bfloat16.
"""

from __future__ import annotations

import copy
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.quantizers.auto import (
    AutoHfQuantizer,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from blockscale.checkpoint.read import read_checkpoint
from blockscale.checkpoint.schema import read_layers
from blockscale.errors import ModelError
from blockscale.integrations.transformers import plan_modules
from blockscale.integrations.transformers_experts import (
    dense_part,
    expert_slots_of,
    fill_experts,
    reserve_experts,
    with_stored_experts,
)
from blockscale.integrations.transformers_layers import (
    fill,
    observe,
    reserve,
    slots_of,
    stored_tensors,
)
from blockscale.planning.device import Device
from blockscale.probe import detect_device
from blockscale.probe.machine import installed_packages
from blockscale.settings import read_settings
from blockscale.tensor import dtype_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from transformers import PreTrainedModel

    from blockscale.checkpoint.read import Checkpoint
    from blockscale.integrations.transformers_experts import ExpertSlot
    from blockscale.integrations.transformers_layers import Slot
    from blockscale.planning.plan import ModelPlan
    from blockscale.planning.policy import PlanPolicy

METHOD = "blockscale"


@register_quantization_config(METHOD)
class BlockScaleConfig(QuantizationConfigMixin):
    """Load a block-FP8 checkpoint by plan.

    ``policy``: what the plan may do, by default what the environment allows (``BLOCKSCALE_*``).
    The checkpoint's own declaration is kept: a model that is saved declares what it declared
    before, so that every other engine reads the result.
    """

    def __init__(self, policy: PlanPolicy | None = None, **_: object) -> None:
        self.quant_method = METHOD  # type: ignore[assignment]  # the enum lists built-in methods
        self.policy = policy or read_settings(os.environ).policy
        self.declared: dict[str, Any] | None = None

    def for_checkpoint(self, declared: Mapping[str, Any]) -> BlockScaleConfig:
        """A copy that keeps what the checkpoint declares."""
        result = BlockScaleConfig(self.policy)
        result.declared = copy.deepcopy(dict(declared))
        return result

    def to_dict(self) -> dict[str, Any]:
        """What config.json gets: the checkpoint's own declaration."""
        return copy.deepcopy(self.declared) or {"quant_method": METHOD}


@register_quantizer(METHOD)
class BlockScaleQuantizer(HfQuantizer):
    """Plans before weights are read, reserves the planned layers' places, fills them at the end."""

    requires_calibration = False
    quantization_config: BlockScaleConfig

    def __init__(self, quantization_config: BlockScaleConfig, **kwargs: Any) -> None:  # noqa: ANN401 - the base class's signature
        super().__init__(quantization_config, **kwargs)
        self.plan: ModelPlan | None = None
        self._slots: tuple[Slot, ...] = ()
        self._experts: tuple[ExpertSlot, ...] = ()

    def update_device_map(self, device_map: Any) -> Any:  # noqa: ANN401 - a name, a device or a dict
        """One device, where transformers leaves the choice open: the GPU if there is one.

        ``None`` would load on the CPU, ``auto`` would spread the model over all GPUs.
        """
        if device_map is not None and not isinstance(device_map, str):
            return device_map
        has_gpu = torch.cuda.is_available()
        return {"": f"cuda:{torch.cuda.current_device()}" if has_gpu else "cpu"}

    def _process_model_before_weight_loading(
        self,
        model: PreTrainedModel,
        *,
        dtype: torch.dtype | None = None,
        device_map: Any = None,  # noqa: ANN401 - as above
        checkpoint_files: Sequence[str] | None = None,
        **_: object,
    ) -> None:
        checkpoint = _checkpoint_of(checkpoint_files)
        layers = read_layers(checkpoint)
        if not layers.quantized:
            msg = (
                f"{checkpoint.path} holds no block-FP8 layer; quantize it first "
                f"(blockscale quantize {checkpoint.path} TARGET), or load it without a config"
            )
            raise ModelError(msg)
        config = self.quantization_config
        if config.declared is None:  # A method that transformers does not know.
            config.declared = dict(checkpoint.config.get("quantization_config") or {})
        self.plan = plan_modules(
            checkpoint,
            layers,
            dtype_of(dtype or model.dtype),
            _device_of(device_map),
            config.policy,
        )
        self._experts = expert_slots_of(model, self.plan, checkpoint, layers)
        self._slots = slots_of(model, dense_part(self.plan), checkpoint, layers)
        reserve(model, self._slots)
        reserve_experts(model, self._experts)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: object) -> None:
        assert self.plan is not None
        places = {parameter.device for parameter in model.parameters()}
        if len(places) > 1:
            raise _spread(places)
        started = time.perf_counter()
        fill(model, self._slots, self.plan, model.device)
        fill_experts(model, self._experts, self.plan, model.device)
        observe(model, time.perf_counter() - started)

    def get_state_dict_and_metadata(
        self, model: PreTrainedModel
    ) -> tuple[dict[str, torch.Tensor] | None, dict[str, str]]:
        """The checkpoint's own tensors, or None where only adapters are saved."""
        if getattr(model, "_hf_peft_config_loaded", False):
            return None, {}
        tensors = stored_tensors(model, self._slots)
        return with_stored_experts(model, self._experts, tensors), {}

    def is_serializable(self) -> bool:
        """Whether ``save_pretrained`` works: yes, and gives the same tensors back."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters on top are; the FP8 weights are frozen."""
        return True

    @property
    def is_compileable(self) -> bool:
        """One opaque operator for each layer."""
        return True


def _checkpoint_of(files: Sequence[str] | None) -> Checkpoint:
    """The checkpoint that transformers is about to load. Raises ModelError if it is another."""
    if not files:
        msg = "BlockScaleConfig loads from safetensors files, not from a state dict"
        raise ModelError(msg)
    folder = Path(files[0]).parent
    checkpoint = read_checkpoint(folder)
    unknown = {Path(file).name for file in files} - {path.name for path in checkpoint.files}
    if unknown:
        msg = f"{folder} is loaded from {min(unknown)}, which is not one of its safetensors files"
        raise ModelError(msg)
    return checkpoint


def _device_of(device_map: Any) -> Device:  # noqa: ANN401 - a device, or a dict of them
    """What to plan for. Raises ModelError if the model would be spread over several devices."""
    places = set(device_map.values()) if isinstance(device_map, dict) else {device_map}
    if len(places) != 1:
        raise _spread(places)
    if str(places.pop()) == "cpu" and torch.cuda.is_available():
        return Device("cpu", None, packages=installed_packages())
    return detect_device()


def _spread(places: Iterable[object]) -> ModelError:
    return ModelError(
        f"device_map spreads the model over {', '.join(sorted(map(str, places)))}; blockscale "
        "plans for one device, pass device_map='cuda' or 'cpu'"
    )


_transformers_merge = AutoHfQuantizer.merge_quantization_configs
_by_default: set[str] = set()


def plan_by_default() -> None:
    """From now on, every block-FP8 checkpoint that is loaded in this process is loaded by plan.

    For programs that call ``from_pretrained`` themselves, such as ``transformers serve``. Without
    this call only those are for which a ``BlockScaleConfig`` is passed.
    """
    _by_default.update(("fp8", "mxfp8"))


def _is_planned_by_default(declared: Mapping[str, Any]) -> bool:
    method = declared.get("quant_method")
    blocks = method == "mxfp8" or declared.get("weight_block_size") is not None
    return method in _by_default and blocks


def _merge_quantization_configs(declared: Any, passed: Any) -> Any:  # noqa: ANN401 - dicts or config objects
    """The rule of transformers, except that a ``BlockScaleConfig`` goes with any declaration.

    transformers refuses a config of another class than the declared method's, although reading
    ``fp8`` files is what ours is for.
    """
    as_dict = declared if isinstance(declared, dict) else declared.to_dict()
    if passed is None and _is_planned_by_default(as_dict):
        passed = BlockScaleConfig()
    if isinstance(passed, BlockScaleConfig):
        return passed.for_checkpoint(as_dict)
    return _transformers_merge(declared, passed)


AutoHfQuantizer.merge_quantization_configs = staticmethod(  # type: ignore[method-assign, assignment]  # no hook exists for this
    _merge_quantization_configs
)
