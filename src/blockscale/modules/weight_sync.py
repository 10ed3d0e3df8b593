"""New weights for a model that serves: ``publish`` in the trainer, ``update`` in the engine.

The trainer has float masters and the engine's contract (``ModelPlan.contract()``). ``publish``
quantizes each master straight to the form that the engine multiplies: one rounding. ``update``
checks everything that came and then copies it into the live storages, so that captured CUDA graphs
and compiled code serve it; if anything is wrong, nothing is copied.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

import torch

from blockscale import events
from blockscale.errors import FormatError, ModelError
from blockscale.events import Kind
from blockscale.formats import K_MAJOR
from blockscale.modules.experts import BlockScaledExperts
from blockscale.modules.linear import BlockScaledLinear
from blockscale.planning.contract import Role, wanted_by
from blockscale.reference import quantize, refine, relayout, scale_values
from blockscale.tensor import BlockScaledTensor, as_stored, torch_dtype

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import nn

    from blockscale.planning.contract import Contract, WantedLayer, WantedTensor
    from blockscale.planning.plan import LinearPlan

MASTER_SUFFIX, BIAS_SUFFIX = ".weight", ".bias"
NAN_CODE = 0x7F
SHOWN_REASONS = 3
# Updates of one process take turns; a thread that holds it may call again.
_TURN = threading.RLock()


def publish(contract: Contract, masters: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What to send for these masters, by the contract's tensor names, on the masters' device.

    ``masters``: float weights called ``LAYER.weight`` (and ``LAYER.bias``), a whole state dict or a
    bucket of it. Names that the contract does not know are not FP8 layers and are left out. Every
    tensor is contiguous and a new storage.

    Raises ModelError, naming the layer, for a master of another shape, NaN or infinity in it or in
    its bias, or a layer of which only the bias came.
    """
    wanted = {layer.name: layer for layer in contract.layers}
    found: dict[str, torch.Tensor] = {}
    for name, master in masters.items():
        layer = wanted.get(name.removesuffix(MASTER_SUFFIX))
        if layer is not None and name.endswith(MASTER_SUFFIX):
            bias = masters.get(layer.name + BIAS_SUFFIX)
            found.update(_published(layer, master, bias))
    for name in masters:
        layer_name = name.removesuffix(BIAS_SUFFIX)
        if layer_name in wanted and layer_name + MASTER_SUFFIX not in masters:
            msg = f"layer {layer_name!r}: its bias came without its weight; publish both together"
            raise ModelError(msg)
    return found


def _published(
    layer: WantedLayer, master: torch.Tensor, bias: torch.Tensor | None
) -> Iterator[tuple[str, torch.Tensor]]:
    if tuple(master.shape) != layer.master_shape:
        msg = (
            f"layer {layer.name!r}: the master has shape {tuple(master.shape)}, the engine wants "
            f"{layer.master_shape}"
        )
        raise ModelError(msg)
    tensor = quantize(master.detach(), layer.rounding_format)
    if not bool(torch.isfinite(scale_values(tensor)).all()):
        msg = f"layer {layer.name!r}: the master holds NaN or infinity; nothing was published"
        raise ModelError(msg)
    sent = layer.block_format
    if tensor.format.block != sent.block:
        tensor = refine(tensor, sent.block)
    stored = relayout(tensor, layer.layout, sent.scale)
    for wanted in layer.tensors:
        if wanted.role is Role.CODES:
            yield wanted.name, stored.data
        elif wanted.role is Role.SCALES:
            yield wanted.name, stored.scales.contiguous()
        elif bias is None:
            msg = f"layer {layer.name!r}: the engine wants a bias, and no {wanted.name!r} came"
            raise ModelError(msg)
        elif not bool(torch.isfinite(bias).all()):
            msg = f"layer {layer.name!r}: its bias holds NaN or infinity; nothing was published"
            raise ModelError(msg)
        else:
            dtype = getattr(torch, wanted.dtype)
            yield wanted.name, bias.detach().to(dtype).contiguous().clone()


@dataclass(frozen=True, slots=True)
class Updated:
    """Layers that now serve new weights, and layers that this message did not contain."""

    layers: tuple[str, ...]
    untouched: tuple[str, ...]


def update(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> Updated:
    """Take published tensors into the live storages of ``model``'s planned layers.

    ``tensors``: whole layers, all of them or a bucket, on any device. May be called again and
    again, and from several threads, which take turns; forward passes of other threads must pause.

    Raises ModelError with the reasons, every old weight still whole, if a name is unknown, part of
    a layer is missing, a shape, dtype or value is not what the contract says, or two layers of the
    model have one name.
    """
    with _TURN:
        live = _live(model)
        reasons: list[str] = []
        received = _received(live, tensors, reasons)
        if reasons:
            _refuse(reasons)
        for name, (weight, bias) in received.items():
            live[name].take(weight, bias)
        result = Updated(tuple(received), tuple(name for name in live if name not in received))
        events.emit(
            Kind.UPDATE,
            f"{len(result.layers)} layers took new weights, {len(result.untouched)} keep theirs",
            layers=len(result.layers),
            untouched=len(result.untouched),
            bytes=sum(tensor.nbytes for tensor in tensors.values()),
        )
        return result


@dataclass(frozen=True, slots=True)
class _Stack:
    """One of the two stacks of an experts module, as something that takes new weights."""

    plan: LinearPlan
    experts: BlockScaledExperts

    def take(self, prepared: BlockScaledTensor, bias: torch.Tensor | None) -> None:
        assert bias is None  # No planned experts have one.
        self.experts.take(self.plan.name, prepared)


def _live(model: nn.Module) -> dict[str, BlockScaledLinear | _Stack]:
    live: dict[str, BlockScaledLinear | _Stack] = {}
    for name, module in _named(model):
        if name in live:
            msg = (
                f"two layers of the model are planned as {name!r}: a message could not say which it"
                " means; plan each under its own name"
            )
            raise ModelError(msg)
        live[name] = module
    return live


def _named(model: nn.Module) -> Iterator[tuple[str, BlockScaledLinear | _Stack]]:
    for module in model.modules():
        if isinstance(module, BlockScaledLinear):
            yield module.plan.name, module
        elif isinstance(module, BlockScaledExperts):
            for plan in (module.plan.w13, module.plan.w2):
                yield plan.name, _Stack(plan, module)


def _received(
    live: Mapping[str, BlockScaledLinear | _Stack],
    tensors: Mapping[str, torch.Tensor],
    reasons: list[str],
) -> dict[str, tuple[BlockScaledTensor, torch.Tensor | None]]:
    left = dict(tensors)
    received: dict[str, tuple[BlockScaledTensor, torch.Tensor | None]] = {}
    for name, module in live.items():
        layer = wanted_by(module.plan)
        came = {w.role: left.pop(w.name) for w in layer.tensors if w.name in left}
        if not came:
            continue
        found = len(reasons)
        for wanted in layer.tensors:
            reasons += _against(wanted, came.get(wanted.role))
        if len(reasons) == found:
            try:
                weight = _checked(layer, came[Role.CODES], came[Role.SCALES])
            except FormatError as error:
                reasons.append(f"{name}: {error}")
            else:
                bias = came.get(Role.BIAS)
                if bias is not None and not bool(torch.isfinite(bias).all()):
                    reasons.append(f"{name}: its bias holds NaN or infinity")
                received[name] = (weight, bias)
    reasons += [f"{name}: no planned layer wants it" for name in left]
    return received


def _against(wanted: WantedTensor, came: torch.Tensor | None) -> list[str]:
    """What is wrong with one tensor, before its values are read."""
    if came is None:
        return [f"{wanted.name}: missing, though the rest of its layer came"]
    dtype = getattr(torch, wanted.dtype)
    if came.dtype is not dtype:
        return [f"{wanted.name}: is {came.dtype}, wanted {dtype}"]
    if tuple(came.shape) != wanted.shape:
        return [f"{wanted.name}: has shape {tuple(came.shape)}, wanted {wanted.shape}"]
    return []


def _checked(layer: WantedLayer, codes: torch.Tensor, scales: torch.Tensor) -> BlockScaledTensor:
    """Codes and scales as the layout stores them. Raises FormatError for values that mean NaN."""
    fmt, layout = layer.block_format, layer.layout
    leading = tuple(codes.shape[:-2])
    stored = layout.stored(layer.n, layer.k, fmt)
    size = prod(leading) * stored.bytes
    flat = torch.zeros(size, dtype=torch.uint8, device=codes.device).view(torch_dtype(stored.dtype))
    buffer = as_stored(flat, stored, leading)
    buffer.copy_(scales)
    weight = BlockScaledTensor(codes.contiguous(), buffer, fmt, layout)
    if bool(((codes.view(torch.uint8) & NAN_CODE) == NAN_CODE).any()):
        msg = "the codes hold NaN"
        raise FormatError(msg)
    if not bool(torch.isfinite(scale_values(weight)).all()):
        msg = "the scales hold NaN or infinity"
        raise FormatError(msg)
    # Refuses scales that the checkpoint's format could not hold: the model could not be saved.
    relayout(weight, K_MAJOR, layer.rounding_format.scale)
    return weight


def _refuse(reasons: list[str]) -> None:
    shown = "; ".join(reasons[:SHOWN_REASONS])
    more = f"; and {len(reasons) - SHOWN_REASONS} more" if len(reasons) > SHOWN_REASONS else ""
    msg = f"the update was refused and every old weight kept: {shown}{more}"
    events.emit(Kind.UPDATE, msg, logging.WARNING, refused=reasons)
    raise ModelError(msg)
