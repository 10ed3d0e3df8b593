"""One rank's share of a transformers model, loaded by plan: tensor parallelism over all layers.

Every process of a torchrun calls ``load_model_shard`` with the same checkpoint; each reads its own
bytes of the FP8 layers, and all bytes of what is not cut (embeddings, norms). All ranks are given
the same tokens and compute the same logits.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from blockscale.backends.registry import all_backends
from blockscale.checkpoint.rank_plan import RankPlan, plan_rank
from blockscale.checkpoint.read import read_checkpoint
from blockscale.checkpoint.requests import Merging, RequestOptions, dtype_of_config
from blockscale.checkpoint.schema import read_layers
from blockscale.checkpoint.shards import expert_reader
from blockscale.errors import ModelError
from blockscale.integrations.transformers import empty_model, load_rest, plan_modules
from blockscale.integrations.transformers_experts import dense_part, expert_slots_of
from blockscale.integrations.transformers_layers import slots_of
from blockscale.modules.experts import BlockScaledExperts
from blockscale.parallel.experts import SummedExperts
from blockscale.parallel.linear import ColumnParallelLinear, RowParallelLinear, parallel_linear
from blockscale.planning.expert_sets import experts_plan
from blockscale.planning.plan import Severity
from blockscale.planning.policy import PlanPolicy, Strictness
from blockscale.planning.sharded import Target
from blockscale.planning.sharding import Parallelism
from blockscale.probe import detect_device

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

    from blockscale.checkpoint.read import Checkpoint
    from blockscale.checkpoint.requests import MergedLayer
    from blockscale.checkpoint.schema import Layers
    from blockscale.formats import DType
    from blockscale.integrations.transformers_experts import ExpertSlot
    from blockscale.parallel.ranks import Ranks
    from blockscale.planning.device import Device
    from blockscale.planning.plan import ModelPlan

# Projections that must be cut together or not at all: what one writes, another reads.
_TOGETHER = (
    frozenset({"q_proj", "k_proj", "v_proj", "o_proj"}),
    frozenset({"gate_proj", "up_proj", "down_proj"}),
)
HEAD = "lm_head"
# Attention classes of transformers keep this number, and count heads by what the layers give.
GROUPS = "num_key_value_groups"


@dataclass(frozen=True, slots=True)
class ModelShard:
    """A transformers model of which this process holds one rank's share."""

    model: PreTrainedModel
    plan: RankPlan


class GatheredLinear(nn.Module):
    """Rows of an unquantized output head: each rank computes its part, all get the whole."""

    def __init__(self, weight: torch.Tensor, ranks: Ranks) -> None:
        super().__init__()
        share = weight.shape[0] // ranks.size
        self.ranks = ranks
        self.register_buffer("weight", weight[ranks.rank * share :][:share].clone())

    def forward(self, activation: torch.Tensor) -> torch.Tensor:
        """(..., k) to (..., n), the same on every rank."""
        weight = self.get_buffer("weight")
        return self.ranks.side_by_side(nn.functional.linear(activation, weight))


def load_model_shard(
    path: Path | str,
    ranks: Ranks,
    *,
    dtype: DType | None = None,
    device: Device | None = None,
    policy: PlanPolicy | None = None,
    expert_parallel: int = 1,
) -> ModelShard:
    """A causal language model with every block-FP8 layer cut over ``ranks``.

    ``device``: what to plan for, this machine by default; weights go to the process's current GPU
    if it has one. ``expert_parallel``: a divisor of the number of ranks, into so many groups the
    experts of a mixture go; 1 cuts each of them. Other arguments as in ``load_model``. The output
    head is cut by rows too, unless
    its weight is the embedding's or its rows do not divide.

    Raises CheckpointError for unreadable files, PlanError if a layer has no backend, ModelError if
    the model cannot be cut this way or its class does not have the checkpoint's layers.
    """
    checkpoint = read_checkpoint(path)
    layers = read_layers(checkpoint)
    dtype = dtype or dtype_of_config(checkpoint)
    device = device or detect_device()
    parallelism = Parallelism(ranks.size, expert_parallel)
    options = RequestOptions(dtype, parallelism, Merging.MODULE)
    strict = replace(policy or PlanPolicy(), strictness=Strictness.RAISE)
    uncut = plan_modules(checkpoint, layers, dtype, device, strict)
    plan = plan_rank(
        checkpoint, layers, options, Target(device, strict, all_backends()), ranks.rank
    )
    _check_divides(plan)
    place = torch.device("cpu" if device.is_cpu else f"cuda:{torch.cuda.current_device()}")
    model = empty_model(checkpoint, dtype)
    _replace_layers(model, uncut, _Source(checkpoint, plan, ranks, place), layers)
    load_rest(model, checkpoint, layers, dtype)
    _cut_head(model, ranks)
    nn.Module.to(model, place)
    return ModelShard(model, plan)


@dataclass(frozen=True, slots=True)
class _Source:
    checkpoint: Checkpoint
    plan: RankPlan
    ranks: Ranks
    place: torch.device

    @property
    def layers(self) -> dict[str, MergedLayer]:
        """Every uncut layer by its name."""
        return {layer.whole.request.name: layer for layer in self.plan.merged.layers}

    def experts(self, slot: ExpertSlot) -> SummedExperts:
        """This rank's share of a set of experts: some of them, or some of each."""
        layers = self.layers
        planned = experts_plan(self.plan.plan, slot.plan.name)
        w13, w2 = (layers[part.name] for part in (slot.plan.w13, slot.plan.w2))
        held = self.plan.piece(w13).experts
        assert held is not None
        experts = BlockScaledExperts(
            planned,
            expert_reader(w13, self.plan.piece(w13)),
            expert_reader(w2, self.plan.piece(w2)),
            self.plan.plan.policy,
            self.place,
        )
        return SummedExperts(experts, held.first, held.count, self.ranks)


def _check_divides(plan: RankPlan) -> None:
    for finding in plan.plan.findings:
        if finding.severity is Severity.FAULT:
            msg = f"{finding.layer}: {finding.message}"
            raise ModelError(msg)


def _replace_layers(
    model: PreTrainedModel, uncut: ModelPlan, source: _Source, layers: Layers
) -> None:
    """``uncut``: the plan of one process, by which modules are found and compared."""
    experts = expert_slots_of(model, uncut, source.checkpoint, layers)
    slots = slots_of(model, dense_part(uncut), source.checkpoint, layers)
    if source.ranks.size > 1:
        _check_cut_together(model, {slot.module for slot in slots})
    merged = source.layers
    for slot in slots:
        layer = merged[slot.plan.name]
        model.set_submodule(
            slot.module,
            parallel_linear(source.checkpoint, source.plan, layer, source.ranks, source.place),
        )
    for expert_slot in experts:
        model.set_submodule(expert_slot.module, source.experts(expert_slot))
    for name, module in model.named_modules():
        if hasattr(module, GROUPS):
            _share_heads(name, module)


def _check_cut_together(model: PreTrainedModel, cut: set[str]) -> None:
    """Refuse a model of which some layer around an activation would stay whole."""
    siblings: dict[str, set[str]] = defaultdict(set)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            parent, _, leaf = name.rpartition(".")
            siblings[parent].add(leaf)
    for name in cut:
        parent, _, leaf = name.rpartition(".")
        for together in _TOGETHER:
            if leaf not in together:
                continue
            left = [
                other for other in siblings[parent] & together if f"{parent}.{other}" not in cut
            ]
            if left:
                msg = (
                    f"{parent}.{min(left)} is not block FP8, but {name} is; they are cut together "
                    "or not at all, so this model runs on one rank only"
                )
                raise ModelError(msg)
        if leaf not in {one for together in _TOGETHER for one in together}:
            msg = f"it is not known how to cut {name} in a transformers model; use one rank"
            raise ModelError(msg)


def _share_heads(name: str, attention: nn.Module) -> None:
    """Query heads for each key head of this rank; fewer where ranks share a key head."""
    query, key = getattr(attention, "q_proj", None), getattr(attention, "k_proj", None)
    if not (isinstance(query, ColumnParallelLinear) and isinstance(key, ColumnParallelLinear)):
        return
    if not isinstance(getattr(attention, "o_proj", None), RowParallelLinear):
        msg = f"{name}: {type(attention).__name__} has no o_proj that could be cut"
        raise ModelError(msg)
    setattr(attention, GROUPS, query.part_sizes[0] // key.part_sizes[0])


def _cut_head(model: PreTrainedModel, ranks: Ranks) -> None:
    head = getattr(model, HEAD, None)
    if not isinstance(head, nn.Linear) or getattr(head, "bias", None) is not None:
        return
    embedding = model.get_input_embeddings().weight
    if head.weight is embedding or head.out_features % ranks.size or ranks.size == 1:
        return
    setattr(model, HEAD, GatheredLinear(head.weight.detach(), ranks))
