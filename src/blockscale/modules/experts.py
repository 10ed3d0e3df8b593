"""``BlockScaledExperts``: the planned, prepared weights of all experts of a layer."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from blockscale import expert_ops
from blockscale.backends.registry import runnable_backend_named
from blockscale.errors import ModelError
from blockscale.modules.announce import (
    announce_prepared,
    announce_updated,
    announce_updated_expert,
)
from blockscale.modules.prepare import check_parts, convert_into, prepare_experts, prepare_stack
from blockscale.modules.prepared import PreparedModule
from blockscale.planning.policy import PlanPolicy
from blockscale.reference import expert_of
from blockscale.tensor import BlockScaledTensor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from blockscale.planning.expert_sets import ExpertsPlan
    from blockscale.planning.plan import LinearPlan

# A stack (experts, n, k) in memory, or what reads one expert's parts, rows after rows.
ExpertWeights: TypeAlias = BlockScaledTensor | Callable[[int], Iterable[BlockScaledTensor]]


class BlockScaledExperts(PreparedModule):
    """out[t] = sum over choices of weight x w2[expert] (silu(gate) * up), as planned.

    ``w13``: gate rows, then up rows, (2 n, k) for each expert; ``w2``: (k, n). Each is a stack in
    memory, whose codes are shared where the plan keeps them, or a function that reads one expert
    (``prepare_experts`` says how, and how little memory it takes). ``device`` is where functions'
    weights go.

    ``forward`` takes tokens (..., k) in the planned dtype, and for each token the same number of
    expert ids and routing weights; all it looks up is the range of the number of tokens. An id
    outside the stack adds nothing, so a rank of an expert-parallel group subtracts its first expert
    from the ids and adds up the ranks' results. A token names an expert once.

    Inference only. ``.to(device)`` moves data and scales, to another device of the same kind; dtype
    casts change nothing. ``load_state_dict`` takes what experts with the same prepared form saved,
    always into the same storages.

    Raises PlanError if the plan does not fit the weights, BackendError if a provider fails.
    """

    plan: ExpertsPlan
    w13_data: torch.Tensor
    w13_scales: torch.Tensor
    w2_data: torch.Tensor
    w2_scales: torch.Tensor

    def __init__(
        self,
        plan: ExpertsPlan,
        w13: ExpertWeights,
        w2: ExpertWeights,
        policy: PlanPolicy | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        self.plan = plan
        self._policy = policy or PlanPolicy()
        self._backends = tuple(runnable_backend_named(name) for name in plan.w13.backends)
        self.updates = 0
        prepared = (
            self._prepared(plan.w13, w13, torch.device(device)),
            self._prepared(plan.w2, w2, torch.device(device)),
        )
        self._handle = self._hold(prepared, None)
        weakref.finalize(self, expert_ops.release, self._handle)

    @property
    def w13(self) -> BlockScaledTensor:
        """The prepared stack of gate and up, sharing the module's storages."""
        return self._weights[0]

    @property
    def w2(self) -> BlockScaledTensor:
        """The prepared stack of down, sharing the module's storages."""
        return self._weights[1]

    def forward(
        self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """(..., k), (tokens, choices) integers and (tokens, choices) floats to (..., k).

        Raises ModelError where a gradient is asked for: there is none.
        """
        if torch.is_grad_enabled() and (hidden.requires_grad or weights.requires_grad):
            msg = (
                f"experts {self.plan.name!r} have no gradient; run them under torch.no_grad() or "
                "torch.inference_mode()"
            )
            raise ModelError(msg)
        return expert_ops.experts(hidden, ids, weights, self._handle)

    def update_expert(
        self, expert: int, w13: Sequence[BlockScaledTensor], w2: Sequence[BlockScaledTensor]
    ) -> None:
        """Take one expert's new values from checkpoint layout into the same storages.

        ``w13``: gate and up, or both in one; ``w2``: down. Captured CUDA graphs and compiled code
        then serve them. Raises ModelError if there is no such expert, PlanError if a weight does
        not fit the plan, both with nothing changed.
        """
        if not 0 <= expert < self.plan.experts:
            msg = f"experts {self.plan.name!r}: no expert {expert}, there are {self.plan.experts}"
            raise ModelError(msg)
        check_parts(self.plan.w13, w13)
        check_parts(self.plan.w2, w2)
        for plan, stack, new in ((self.plan.w13, self.w13, w13), (self.plan.w2, self.w2, w2)):
            convert_into(expert_of(stack, expert), plan, new, self._policy)
        self.updates += 1
        announce_updated_expert(self.plan.name, expert, self.updates)

    def take(self, name: str, prepared: BlockScaledTensor) -> None:
        """Copy an already prepared stack, of the plan that is called ``name``, into its storages.

        Raises ModelError, with nothing changed, if there is no such stack, or the new one is not in
        its form and shape.
        """
        stacks = {self.plan.w13.name: self.w13, self.plan.w2.name: self.w2}
        stack = stacks.get(name)
        ours, theirs = (
            None if w is None else (w.mn, w.k, w.format, w.layout, w.leading)
            for w in (stack, prepared)
        )
        if stack is None or ours != theirs:
            msg = f"experts {self.plan.name!r} have {stacks}, not {name!r} as {prepared!r}"
            raise ModelError(msg)
        stack.data.copy_(prepared.data)
        stack.scales.copy_(prepared.scales)
        self.updates += 1
        announce_updated(name, self.updates)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy, or what was unpickled, binds its own weights: a handle names one module's."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # torch's is untyped
        self._handle = self._hold(self._weights, None)
        weakref.finalize(self, expert_ops.release, self._handle)

    def extra_repr(self) -> str:
        """Shapes, formats and backends, for ``print(model)``."""
        up, down = self.plan.w13.request, self.plan.w2.request
        chosen = ", ".join(f"{c.offer.backend} ({c.m_range})" for c in self.plan.w13.choices)
        return f"{up.experts} x ({up.k}, {down.k}, {down.n}), {self.w13.format}, {chosen}"

    def _prepared(
        self, plan: LinearPlan, weights: ExpertWeights, device: torch.device
    ) -> BlockScaledTensor:
        started = time.perf_counter()
        if isinstance(weights, BlockScaledTensor):
            prepared = prepare_stack(plan, weights, self._backends, self._policy)
        else:
            prepared = prepare_experts(plan, weights, self._backends, self._policy, device)
        announce_prepared(plan, prepared, time.perf_counter() - started)
        return prepared

    def _hold(
        self, weights: tuple[BlockScaledTensor, BlockScaledTensor], handle: int | None
    ) -> int:
        self._weights = weights
        for name, weight in zip(("w13", "w2"), weights, strict=True):
            self.register_buffer(f"{name}_data", weight.data)
            self.register_buffer(f"{name}_scales", weight.scales)
        return expert_ops.bind(self.plan, weights, self._backends, handle)

    def _apply(
        self,
        fn: Callable[[torch.Tensor], torch.Tensor],
        recurse: bool = True,  # noqa: FBT001, FBT002, ARG002 - torch.nn.Module's signature
    ) -> BlockScaledExperts:
        device = self._moved(fn, self.w13.device)
        if device != self.w13.device:
            self._hold((self.w13.to(device), self.w2.to(device)), self._handle)
        return self
