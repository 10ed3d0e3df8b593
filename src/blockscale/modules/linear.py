"""``BlockScaledLinear``: a plan, a prepared weight and a bias."""

from __future__ import annotations

import time
import weakref
from typing import TYPE_CHECKING, Any

import torch

from blockscale import ops
from blockscale.backends.registry import runnable_backend_named
from blockscale.errors import ModelError
from blockscale.modules.announce import announce_prepared, announce_updated
from blockscale.modules.prepare import prepare_weight
from blockscale.modules.prepared import PreparedModule
from blockscale.planning.policy import PlanPolicy
from blockscale.reference import dequantize
from blockscale.tensor import BlockScaledTensor, torch_dtype

if TYPE_CHECKING:
    from collections.abc import Callable

    from blockscale.planning.plan import LinearPlan


class _Differentiable(torch.autograd.Function):
    """The planned product, with the gradient of its activation."""

    @staticmethod
    def forward(ctx: Any, activation: torch.Tensor, layer: BlockScaledLinear) -> torch.Tensor:  # noqa: ANN401 - torch's context has no public type
        """As planned."""
        ctx.layer = layer
        return ops.linear(activation, layer.bias, layer._handle)  # noqa: SLF001 - same module

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:  # noqa: ANN401 - as above
        """Gradient x dequantized weight, in the gradient's dtype."""
        (gradient,) = gradients
        weight = dequantize(ctx.layer.weight).to(gradient.dtype)
        return gradient @ weight, None


class BlockScaledLinear(PreparedModule):
    """out = activation x weight^T + bias, run as planned.

    ``weight`` is the checkpoint's, (n, k) with scales in ``K_MAJOR``; it is prepared here, once.
    ``bias`` is an (n,) tensor on the same device or None. ``forward`` takes (..., k) in the planned
    activation dtype and gives (..., n) in the planned output dtype; all it looks up is the M range.

    The weight is frozen: where autograd records, the activation gets the gradient of the product
    with the dequantized weight (quantizing activations counts as the identity), so that adapters
    before and beside this layer can be trained. Autocast casts nothing here: activations come in
    the planned dtype. ``.to(device)`` moves data and scales, to another device of the same kind: a
    plan for a CPU says nothing about a GPU. Dtype casts (``.half()``)
    touch the bias alone, because FP8 codes have no other dtype. ``load_state_dict`` takes what a
    layer with the same prepared form saved, always into the same storages.

    Raises PlanError if the plan does not fit the weight, ModelError if the bias does not,
    BackendError if a provider fails.
    """

    plan: LinearPlan
    data: torch.Tensor
    scales: torch.Tensor
    bias: torch.Tensor | None

    def __init__(
        self,
        plan: LinearPlan,
        weight: BlockScaledTensor,
        bias: torch.Tensor | None = None,
        policy: PlanPolicy | None = None,
    ) -> None:
        super().__init__()
        self.plan = plan
        self._policy = policy or PlanPolicy()
        self.updates = 0
        self._backends = tuple(runnable_backend_named(name) for name in plan.backends)
        started = time.perf_counter()
        prepared = prepare_weight(plan, weight, self._backends, self._policy)
        announce_prepared(plan, prepared, time.perf_counter() - started)
        self._out_dtype = torch_dtype(plan.request.out_dtype)
        if bias is not None:
            if bias.device != weight.device:
                msg = (
                    f"layer {plan.name!r}: its bias is on {bias.device}, its weight on "
                    f"{weight.device}; move one of them"
                )
                raise ModelError(msg)
            bias = self._checked_bias(bias)
        self.register_buffer("bias", bias)
        self._handle = self._hold(prepared, None)
        weakref.finalize(self, ops.release, self._handle)

    @property
    def weight(self) -> BlockScaledTensor:
        """The prepared weight, sharing the module's storages."""
        return self._weight

    @property
    def handle(self) -> int:
        """The operator's name for this layer: ``ops.linear(activation, bias, handle)``."""
        return self._handle

    @property
    def in_features(self) -> int:
        """K."""
        return self.plan.request.k

    @property
    def out_features(self) -> int:
        """N."""
        return self.plan.request.n

    def forward(self, activation: torch.Tensor) -> torch.Tensor:
        """(..., k) to (..., n)."""
        if activation.requires_grad and torch.is_grad_enabled():
            result: torch.Tensor = _Differentiable.apply(activation, self)  # type: ignore[no-untyped-call]  # torch's decorator is untyped
            return result
        # Past nn.Module.__getattr__, which takes 0.9 us (AMD EPYC, Python 3.11, 2026-11-25).
        return ops.linear(activation, self._buffers["bias"], self._handle)

    def update(self, weight: BlockScaledTensor) -> None:
        """Take new values from checkpoint layout into the same storages.

        Captured CUDA graphs and compiled code then serve the new weight. Raises ModelError, with
        nothing changed, if the new weight is on another device; PlanError if it does not fit the
        plan.
        """
        if weight.device != self._weight.device:
            msg = (
                f"layer {self.plan.name!r} is on {self._weight.device}, its new weight on "
                f"{weight.device}; move the weight first"
            )
            raise ModelError(msg)
        self.take(prepare_weight(self.plan, weight, self._backends, self._policy))

    def take(self, prepared: BlockScaledTensor, bias: torch.Tensor | None = None) -> None:
        """Copy an already prepared weight, from any device, into the same storages.

        ``bias``: a new one, None to keep the old. Raises ModelError, with nothing changed, if the
        weight is not in the prepared form and shape, or there is no bias to replace.
        """
        ours, theirs = (
            (w.mn, w.k, w.format, w.layout, w.leading) for w in (self._weight, prepared)
        )
        if ours != theirs:
            msg = f"layer {self.plan.name!r} is prepared as {self._weight!r}, not as {prepared!r}"
            raise ModelError(msg)
        if bias is not None:
            if self.bias is None:
                msg = f"layer {self.plan.name!r} has no bias, but a new one came"
                raise ModelError(msg)
            self.bias.copy_(self._checked_bias(bias))
        self._weight.data.copy_(prepared.data)
        self._weight.scales.copy_(prepared.scales)
        self.updates += 1
        announce_updated(self.plan.name, self.updates)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy, or what was unpickled, binds its own weight: a handle names one module's."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # torch's is untyped
        self._handle = self._hold(self._weight, None)
        weakref.finalize(self, ops.release, self._handle)

    def extra_repr(self) -> str:
        """Shape, format and backends, for ``print(model)``."""
        chosen = ", ".join(f"{c.offer.backend} ({c.m_range})" for c in self.plan.choices)
        return f"{self.in_features}, {self.out_features}, {self._weight.format}, {chosen}"

    def _hold(self, weight: BlockScaledTensor, handle: int | None) -> int:
        self._weight = weight
        self.register_buffer("data", weight.data)
        self.register_buffer("scales", weight.scales)
        return ops.bind(self.plan, weight, self._backends, handle)

    def _apply(
        self,
        fn: Callable[[torch.Tensor], torch.Tensor],
        recurse: bool = True,  # noqa: FBT001, FBT002, ARG002 - torch.nn.Module's signature
    ) -> BlockScaledLinear:
        device = self._moved(fn, self._weight.device)
        if device != self._weight.device:
            self._hold(self._weight.to(device), self._handle)
        if self.bias is not None:
            # Kernels read the bias in the planned output dtype, whatever model.half() meant.
            self.bias = fn(self.bias).to(self._out_dtype)
        return self

    def _checked_bias(self, bias: torch.Tensor) -> torch.Tensor:
        if bias.shape != (self.out_features,):
            msg = (
                f"layer {self.plan.name!r}: bias has shape {tuple(bias.shape)}, expected "
                f"({self.out_features},)"
            )
            raise ModelError(msg)
        return bias.detach().to(self._out_dtype).contiguous()
