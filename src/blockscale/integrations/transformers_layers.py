"""Where a checkpoint's block-FP8 layers go in a transformers model, and back to its tensors.

``slots_of`` finds the module of every stored layer, ``reserve`` takes it out before transformers
loads the other weights, ``fill`` puts the planned layer there, ``stored_tensors`` gives the
checkpoint's own tensors back for ``save_pretrained``.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from blockscale import events
from blockscale.checkpoint.tensors import read_block_scaled, read_tensor, torch_dtype
from blockscale.errors import ModelError
from blockscale.events import Kind, Ranges
from blockscale.modules.linear import BlockScaledLinear
from blockscale.modules.ranges import add_nvtx_ranges
from blockscale.modules.report import report_of
from blockscale.modules.restore import restore_weight
from blockscale.settings import read_settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    import torch
    from transformers import PreTrainedModel

    from blockscale.checkpoint.header import TensorEntry
    from blockscale.checkpoint.read import Checkpoint
    from blockscale.checkpoint.schema import Layers, QuantizedLayer
    from blockscale.planning.plan import LinearPlan, ModelPlan

WEIGHT_SUFFIX = ".weight"


@dataclass(frozen=True, slots=True)
class Slot:
    """One stored layer, its plan, and the module whose place it takes."""

    module: str
    plan: LinearPlan
    stored: QuantizedLayer
    bias: TensorEntry | None


class Reserved(nn.Module):
    """Holds the place of a planned layer while transformers loads the other weights."""

    def forward(self, *_: object) -> None:
        """Refuse: the weight is not there yet."""
        msg = "this layer's weight has not been loaded"
        raise ModelError(msg)


def slots_of(
    model: PreTrainedModel, plan: ModelPlan, checkpoint: Checkpoint, layers: Layers
) -> tuple[Slot, ...]:
    """The module of every planned layer.

    Raises ModelError, naming the layer, if the model class has no such module, or one of another
    shape or with another idea of a bias.
    """
    stored = {layer.name: layer for layer in layers.quantized}
    names = _module_names(model, [stored[layer.name] for layer in plan.layers])
    slots = []
    for layer in plan.layers:
        module = _linear_at(model, names[layer.name], layer)
        bias = checkpoint.tensors.get(layer.name + ".bias")
        if (module.bias is None) != (bias is None):
            has = "lacks" if bias is None else "has"
            msg = f"the checkpoint {has} a bias for {layer.name!r}, unlike the model class"
            raise ModelError(msg)
        slots.append(Slot(names[layer.name], layer, stored[layer.name], bias))
    return tuple(slots)


def reserve(model: PreTrainedModel, slots: Sequence[Slot]) -> None:
    """Take the slots' modules out; transformers then neither loads nor misses their tensors."""
    patterns = set(model._keys_to_ignore_on_load_unexpected or ())  # noqa: SLF001 - the attribute by which a model names tensors that it does not want
    for slot in slots:
        model.set_submodule(slot.module, Reserved())
        for entry in (slot.stored.weight, slot.stored.scale, slot.bias):
            if entry is not None:
                # A model without a head (AutoModel) is told of names as they are stored.
                for name in (_name_in_model(slot, entry), entry.name):
                    # One pattern for all layers: numbers are all that most names differ in.
                    patterns.add(rf"^{re.sub(r'[0-9]+', '[0-9]+', re.escape(name))}$")
    model._keys_to_ignore_on_load_unexpected = patterns  # noqa: SLF001 - as above


def fill(
    model: PreTrainedModel,
    slots: Sequence[Slot],
    plan: ModelPlan,
    place: torch.device | str,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Read, prepare and insert every slot's layer on ``place``; ``progress`` counts them.

    No weight passes through another dtype, and no scale is cast.
    """
    for slot in slots:
        bias = None if slot.bias is None else read_tensor(slot.bias).to(place)
        # Prepared where it will run: providers compile and check on their own device.
        weight = read_block_scaled(slot.stored).to(place)
        layer = BlockScaledLinear(slot.plan, weight, bias, plan.policy)
        layer.train(model.training)
        model.set_submodule(slot.module, layer)
        if progress is not None:
            progress(1)


def observe(model: PreTrainedModel, seconds: float) -> None:
    """Log that every layer was prepared, in ``seconds``, and give the model its report.

    ``model.blockscale_report()`` says what runs; layers mark a profiler's timeline if the
    environment asks for ranges.
    """
    report = report_of(model)
    events.emit(
        Kind.PREPARE,
        f"prepared {len(report.layers)} layers, {report.bytes / 1e6:.1f} MB, in {seconds:.1f} s",
        layers=len(report.layers),
        backends=report.backends,
        bytes=report.bytes,
        seconds=round(seconds, 3),
    )
    # On the class: an attribute of the model would be a cycle, and its copies would report on it.
    type(model).blockscale_report = report_of  # type: ignore[attr-defined]  # a method of our own
    if read_settings(os.environ).ranges is Ranges.NVTX:
        add_nvtx_ranges(model)


def stored_tensors(model: PreTrainedModel, slots: Sequence[Slot]) -> dict[str, torch.Tensor]:
    """Every tensor of the model by its module's name, FP8 layers as the checkpoint stores them.

    Codes and scales have the checkpoint's bytes, dtypes and shapes. Raises ModelError if a layer
    was requantized, or a slot no longer holds a planned layer (an adapter wraps it).
    """
    found: dict[str, torch.Tensor] = dict(model.state_dict())
    for slot in slots:
        layer = model.get_submodule(slot.module)
        if not isinstance(layer, BlockScaledLinear):
            msg = (
                f"{slot.module!r} is a {type(layer).__name__}; unload the adapters before the base "
                "model is saved, or save the adapters alone"
            )
            raise ModelError(msg)
        for own in ("data", "scales", "bias"):
            found.pop(f"{slot.module}.{own}", None)
        weight = restore_weight(slot.plan, layer.weight)
        for entry, tensor in (
            (slot.stored.weight, weight.data),
            (slot.stored.scale, weight.scales),
            (slot.bias, layer.bias),
        ):
            if entry is not None and tensor is not None:
                found[_name_in_model(slot, entry)] = as_entry(tensor, entry)
    return found


def _name_in_model(slot: Slot, entry: TensorEntry) -> str:
    return slot.module + entry.name.removeprefix(slot.stored.name)


def renamed_tensors(model: PreTrainedModel, stored: Iterable[str]) -> dict[str, str]:
    """Tensor name on disk to name in the model, by transformers' own table of renamed weights."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    state = model.state_dict()
    names = {}
    for name in stored:
        renamed, _ = rename_source_key(name, renamings, [], model.base_model_prefix, state)
        names[name] = renamed if renamed in state else name
    return names


def as_entry(tensor: torch.Tensor, entry: TensorEntry) -> torch.Tensor:
    """The dtype and shape that the file has for it; values came from there, so it is exact."""
    wanted = torch_dtype(entry)
    if tensor.dtype is not wanted:
        # Exponent bytes have two names in files; BF16 scales and biases are float32 here, and came
        # from BF16, so they go back to it exactly.
        same_bytes = tensor.dtype.itemsize == wanted.itemsize == 1
        tensor = tensor.view(wanted) if same_bytes else tensor.to(wanted)
    return tensor.contiguous().reshape(entry.shape)


def _module_names(model: PreTrainedModel, stored: Sequence[QuantizedLayer]) -> dict[str, str]:
    """Layer name on disk to module name, through transformers' own table of renamed weights."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    state = model.state_dict()
    names = {}
    for layer in stored:
        key = layer.name + WEIGHT_SUFFIX
        renamed, _ = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
        names[layer.name] = (renamed if renamed in state else key).removesuffix(WEIGHT_SUFFIX)
    return names


def _linear_at(model: PreTrainedModel, name: str, plan: LinearPlan) -> nn.Linear:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        module = None
    if not isinstance(module, nn.Linear):
        found = "nothing" if module is None else type(module).__name__
        msg = (
            f"the checkpoint has an FP8 layer {plan.name!r}, but {type(model).__name__} has "
            f"{found} there; is config.json the checkpoint's own?"
        )
        raise ModelError(msg)
    if (module.out_features, module.in_features) != (plan.request.n, plan.request.k):
        msg = (
            f"module {plan.name!r} is {module.out_features}x{module.in_features}, but the "
            f"checkpoint's weight is {plan.request.n}x{plan.request.k}; config.json is not its own"
        )
        raise ModelError(msg)
    return module
