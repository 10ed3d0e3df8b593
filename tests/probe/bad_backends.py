"""Backends that misbehave on purpose; the probe must exclude each and live."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from blockscale.backends.reference import Reference

if TYPE_CHECKING:
    import torch

    from blockscale.backends.base import Multiply
    from blockscale.kernels.step import Steps
    from blockscale.planning.decision import Offer
    from blockscale.tensor import BlockScaledTensor


class Lies(Reference):
    """Right but for the last element of the output."""

    name = "lies"

    def bind(self, weight: BlockScaledTensor, offer: Offer) -> Multiply:
        honest = super().bind(weight, offer)

        def multiply(
            activation: BlockScaledTensor, out: torch.Tensor, bias: torch.Tensor | None
        ) -> None:
            honest(activation, out, bias)
            out[-1, -1] += 1

        return multiply


class OtherSteps(Reference):
    """Right by two calls, wrong by the one that layers make."""

    name = "other_steps"

    def bind_steps(self, *_: object) -> Steps:
        def step(*arguments: Any) -> None:
            _, _, out, _ = arguments
            out.zero_()

        return lambda _: step


class Forgets(Reference):
    """Leaves the last row unwritten."""

    name = "forgets"

    def bind(self, weight: BlockScaledTensor, offer: Offer) -> Multiply:
        honest = super().bind(weight, offer)

        def multiply(
            activation: BlockScaledTensor, out: torch.Tensor, bias: torch.Tensor | None
        ) -> None:
            last = out[-1].clone()
            honest(activation, out, bias)
            out[-1] = last

        return multiply


class MisreadsScales(Reference):
    """Reads the weight's scales in the wrong order along K."""

    name = "misreads_scales"

    def bind(self, weight: BlockScaledTensor, offer: Offer) -> Multiply:
        turned = weight.scales.flip(-1).contiguous()
        return super().bind(replace(weight, scales=turned), offer)


class Crashes(Reference):
    """Kills its process with a segmentation fault."""

    name = "crashes"

    def prepare(self, weight: BlockScaledTensor, offer: Offer) -> BlockScaledTensor:
        os.kill(os.getpid(), signal.SIGSEGV)
        return super().prepare(weight, offer)


class Hangs(Reference):
    """Never answers."""

    name = "hangs"

    def prepare(self, weight: BlockScaledTensor, offer: Offer) -> BlockScaledTensor:
        time.sleep(3600)
        return super().prepare(weight, offer)


class Raises(Reference):
    """Raises, as a provider does that lacks a library."""

    name = "raises"

    def prepare(self, weight: BlockScaledTensor, offer: Offer) -> BlockScaledTensor:  # noqa: ARG002 - the protocol's signature
        msg = "libnothing.so: cannot open shared object file"
        raise OSError(msg)
