"""Experts of a transformers model: stacks of block-FP8 weights in the place of its own.

transformers keeps gate and up of all experts in one parameter, down in another, whatever the
checkpoint's names are; its table of conversions says where a stored expert belongs. The module that
holds them is called with tokens, expert ids and routing weights, as ``BlockScaledExperts`` is.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from blockscale.checkpoint.experts import stored_experts
from blockscale.checkpoint.requests import Merging, RequestOptions, merged_layers
from blockscale.errors import ModelError
from blockscale.formats import ceil_div
from blockscale.integrations.transformers_layers import Reserved, as_entry
from blockscale.modules.experts import BlockScaledExperts
from blockscale.modules.restore import restore_weight
from blockscale.planning.expert_sets import W2, W13, experts_plan

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import torch
    from torch import nn
    from transformers import PreTrainedModel

    from blockscale.checkpoint.experts import StoredExperts
    from blockscale.checkpoint.read import Checkpoint
    from blockscale.checkpoint.schema import Layers, QuantizedLayer
    from blockscale.planning.expert_sets import ExpertsPlan
    from blockscale.planning.plan import ModelPlan
    from blockscale.tensor import BlockScaledTensor

GATE_UP, DOWN = "gate_up_proj", "down_proj"


@dataclass(frozen=True, slots=True)
class ExpertSlot:
    """One set of experts, its plan, where it is stored and the module whose place it takes."""

    module: str
    plan: ExpertsPlan
    w13: StoredExperts
    w2: StoredExperts


def dense_part(plan: ModelPlan) -> ModelPlan:
    """The plan without its experts."""
    return replace(plan, layers=tuple(p for p in plan.layers if p.request.experts is None))


def expert_slots_of(
    model: PreTrainedModel, plan: ModelPlan, checkpoint: Checkpoint, layers: Layers
) -> tuple[ExpertSlot, ...]:
    """The module of every planned set of experts.

    Raises ModelError, naming the experts, if the model class has none there, or some of another
    shape, or ones that compute something else than down (SiLU(gate) * up).
    """
    names = {p.name.rpartition(".")[0]: None for p in plan.layers if p.request.experts is not None}
    if not names:
        return ()
    options = RequestOptions(plan.layers[0].request.activation_dtype, merging=Merging.MODULE)
    merged = {
        one.whole.request.name: one for one in merged_layers(checkpoint, layers, options).layers
    }
    slots = []
    for name in names:
        try:
            experts = experts_plan(plan, name)
        except KeyError:
            msg = f"the checkpoint's experts {name!r} lack FP8 gate, up or down weights"
            raise ModelError(msg) from None
        w13, w2 = (stored_experts(merged[f"{name}.{leaf}"]) for leaf in (W13, W2))
        module = _module_name(model, w13.members[0][0].weight.name)
        _check(model, module, experts)
        slots.append(ExpertSlot(module, experts, w13, w2))
    return tuple(slots)


def fill_experts(
    model: PreTrainedModel,
    slots: Sequence[ExpertSlot],
    plan: ModelPlan,
    place: torch.device | str,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Read, prepare and insert every slot's experts on ``place``, one expert at a time.

    ``progress`` counts planned layers, two for each set.
    """
    for slot in slots:
        layer = BlockScaledExperts(slot.plan, slot.w13.read, slot.w2.read, plan.policy, place)
        layer.train(model.training)
        model.set_submodule(slot.module, layer)
        if progress is not None:
            progress(2)


def reserve_experts(model: PreTrainedModel, slots: Sequence[ExpertSlot]) -> None:
    """Take the slots' modules out; transformers then neither loads nor misses their tensors."""
    patterns = set(model._keys_to_ignore_on_load_unexpected or ())  # noqa: SLF001 - the attribute by which a model names tensors that it does not want
    for slot in slots:
        model.set_submodule(slot.module, Reserved())
        # Whatever becomes of the stored names in transformers' table, it stays below the module.
        name = re.sub(r"[0-9]+", "[0-9]+", re.escape(slot.module))
        patterns.add(rf"(^|\.){name}\.")
    model._keys_to_ignore_on_load_unexpected = patterns  # noqa: SLF001 - as above


def with_stored_experts(
    model: PreTrainedModel, slots: Sequence[ExpertSlot], tensors: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """``tensors`` of the model, its planned experts as the checkpoint stores them.

    Names are the checkpoint's below the experts' module. Raises ModelError if they were
    requantized.
    """
    for slot in slots:
        layer = model.get_submodule(slot.module)
        assert isinstance(layer, BlockScaledExperts)  # PEFT has no class that wraps experts.
        for name in list(tensors):
            if name.startswith(slot.module + "."):
                del tensors[name]
        for stored, plan, stack in (
            (slot.w13, slot.plan.w13, layer.w13),
            (slot.w2, slot.plan.w2, layer.w2),
        ):
            for part, codes, scales in _parts(stored, restore_weight(plan, stack)):
                # Copies in host memory: tensors that share a storage are taken for tied weights.
                tensors[part.weight.name] = as_entry(codes, part.weight).to("cpu", copy=True)
                tensors[part.scale.name] = as_entry(scales, part.scale).to("cpu", copy=True)
    return tensors


def _parts(
    stored: StoredExperts, whole: BlockScaledTensor
) -> Iterator[tuple[QuantizedLayer, torch.Tensor, torch.Tensor]]:
    """Every stored weight with its rows of codes and of scales."""
    block = whole.format.block.mn
    for number, parts in enumerate(stored.members):
        codes, scales = whole.data, whole.scales
        if not stored.stacked:
            codes, scales = codes[number], scales[number]
        first = 0
        for part in parts:
            begin, end = first // block, ceil_div(first + part.n, block)
            yield part, codes[..., first : first + part.n, :], scales[..., begin:end, :]
            first += part.n


def _module_name(model: PreTrainedModel, stored: str) -> str:
    """The module that a stored expert's weight is converted into."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    state = model.state_dict()
    renamed, _ = rename_source_key(stored, renamings, converters, model.base_model_prefix, state)
    return renamed.rpartition(".")[0]


def _check(model: PreTrainedModel, name: str, plan: ExpertsPlan) -> None:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        module = None
    weights = [getattr(module, leaf, None) for leaf in (GATE_UP, DOWN)]
    if module is None or any(weight is None for weight in weights):
        found = "nothing" if module is None else type(module).__name__
        msg = (
            f"the checkpoint has FP8 experts {plan.name!r}, but {type(model).__name__} has {found} "
            f"at {name!r}, without {GATE_UP} and {DOWN}"
        )
        raise ModelError(msg)
    shapes = [tuple(weight.shape) for weight in weights if weight is not None]
    wanted = [(plan.experts, p.request.n, p.request.k) for p in (plan.w13, plan.w2)]
    if shapes != wanted:
        msg = (
            f"experts {name!r} are {shapes[0]} and {shapes[1]}, but the checkpoint's are "
            f"{wanted[0]} and {wanted[1]}; config.json is not its own"
        )
        raise ModelError(msg)
    odd = _oddities(module)
    if odd:
        msg = (
            f"experts {name!r} ({type(module).__name__}) {' and '.join(odd)}; blockscale computes "
            "down (SiLU(gate) * up) with gate rows before up rows"
        )
        raise ModelError(msg)


def _oddities(module: nn.Module) -> list[str]:
    """What keeps a module of transformers from being what ``BlockScaledExperts`` computes."""
    from torch import nn

    odd = []
    act = getattr(module, "act_fn", None)
    if not isinstance(act, nn.SiLU) and type(act).__name__ != "SiLUActivation":
        odd.append(f"have the activation function {type(act).__name__}")
    flags = (
        ("has_gate", True, "have no gate"),
        ("has_bias", False, "have biases"),
        ("is_transposed", False, "are stored transposed"),
        ("is_concatenated", True, "interleave gate and up"),
        ("has_post_expert_norm", False, "normalize each expert's result"),
    )
    odd += [words for flag, usual, words in flags if getattr(module, flag, usual) is not usual]
    gate = getattr(type(module), "_apply_gate", None)
    if gate is not None and gate.__name__ != "_default_apply_gate":
        odd.append("have a gate of their own")
    return odd
