"""``PreparedModule``: what modules with a prepared weight have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from blockscale.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from blockscale.planning.expert_sets import ExpertsPlan
    from blockscale.planning.plan import LinearPlan


class PreparedModule(nn.Module):
    """A module whose buffers are the very memory that its operator was bound to."""

    plan: LinearPlan | ExpertsPlan

    def __setattr__(self, name: str, value: torch.Tensor | nn.Module) -> None:
        """Refuse new tensors for codes and scales: the operator would go on reading the old ones.

        Raises ModelError. The bias may be replaced: it is looked up by every call.
        """
        own = self.__dict__.get("_buffers", {}).get(name)
        if name != "bias" and own is not None and value is not own:
            msg = (
                f"{self.plan.name!r}: {name} is the memory that its kernels read and cannot be "
                "replaced; update() or load_state_dict() write new values into it"
            )
            raise ModelError(msg)
        super().__setattr__(name, value)

    def _moved(
        self, fn: Callable[[torch.Tensor], torch.Tensor], device: torch.device
    ) -> torch.device:
        """Where ``fn``, from ``model.to`` or its like, moves what is on ``device``.

        torch's own ``_apply`` would cast FP8 codes and drop the strides of padded layouts.

        Raises ModelError for another kind of device than was planned for.
        """
        wanted = fn(torch.empty(0, device=device)).device
        if wanted.type != device.type:
            msg = (
                f"{self.plan.name!r} was planned for {device.type}, not for {wanted.type}; plan "
                "and load it again for that device"
            )
            raise ModelError(msg)
        return wanted

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, torch.Tensor],
        prefix: str,
        local_metadata: Mapping[str, Any],
        *rest: Any,  # noqa: ANN401 - torch's: strict, three lists of what to tell
    ) -> None:
        """Copy into the same storages, also where ``assign=True`` asks for new ones.

        The operator would go on reading the old ones. Codes and scales of another dtype are refused
        as tensors of another shape are: a copy would round each scale by itself.
        """
        errors = rest[-1]
        others = len(errors)
        for name, own in self._buffers.items():
            new = state_dict.get(prefix + name)
            if name == "bias" or own is None or new is None or new.dtype is own.dtype:
                continue
            errors.append(
                f"dtype mismatch for {prefix}{name}: {new.dtype} in the state dict, {own.dtype} as "
                "prepared here; it is of another plan, load the checkpoint instead"
            )
        if len(errors) == others:
            metadata = {**local_metadata, "assign_to_params_buffers": False}
            super()._load_from_state_dict(state_dict, prefix, metadata, *rest)
