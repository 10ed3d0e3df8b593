"""Backends that misbehave on purpose; the probe must exclude each and live."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from blockscale.backends.reference import Reference
from blockscale.planning.decision import Obstacle, Rejection

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from blockscale.backends.base import Multiply, MultiplyContiguous, MultiplyMasked
    from blockscale.kernels.step import Steps
    from blockscale.planning.decision import Offer
    from blockscale.planning.device import Device
    from blockscale.planning.request import LinearRequest
    from blockscale.tensor import BlockScaledTensor


class DenseOnly(Reference):
    """No experts: their proofs would take most of a test's time."""

    def evaluate(self, request: LinearRequest, device: Device) -> Offer | Sequence[Rejection]:
        if request.experts is not None:
            return [Rejection(self.name, Obstacle.GROUPING, "for dense layers")]
        return super().evaluate(request, device)


class Lies(DenseOnly):
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


class OtherSteps(DenseOnly):
    """Right by two calls, wrong by the one that layers make."""

    name = "other_steps"

    def bind_steps(self, *_: object) -> Steps:
        def step(*arguments: Any) -> None:
            _, _, out, _ = arguments
            out.zero_()

        return lambda _: step


class Forgets(DenseOnly):
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


class MisreadsScales(DenseOnly):
    """Reads the weight's scales in the wrong order along K."""

    name = "misreads_scales"

    def bind(self, weight: BlockScaledTensor, offer: Offer) -> Multiply:
        turned = weight.scales.flip(-1).contiguous()
        return super().bind(replace(weight, scales=turned), offer)


class Crashes(DenseOnly):
    """Kills its process with a segmentation fault."""

    name = "crashes"

    def prepare(self, weight: BlockScaledTensor, offer: Offer) -> BlockScaledTensor:
        os.kill(os.getpid(), signal.SIGSEGV)
        return super().prepare(weight, offer)


class Hangs(DenseOnly):
    """Never answers."""

    name = "hangs"

    def prepare(self, weight: BlockScaledTensor, offer: Offer) -> BlockScaledTensor:
        time.sleep(3600)
        return super().prepare(weight, offer)


class Raises(DenseOnly):
    """Raises, as a provider does that lacks a library."""

    name = "raises"

    def prepare(self, weight: BlockScaledTensor, offer: Offer) -> BlockScaledTensor:  # noqa: ARG002 - the protocol's signature
        msg = "libnothing.so: cannot open shared object file"
        raise OSError(msg)


class SwapsExperts(Reference):
    """Multiplies the first row block that has an expert with the next one's weight."""

    name = "swaps_experts"

    def bind_contiguous(self, weight: BlockScaledTensor, offer: Offer) -> MultiplyContiguous:
        honest = super().bind_contiguous(weight, offer)

        def multiply(
            activation: BlockScaledTensor, groups: torch.Tensor, out: torch.Tensor
        ) -> None:
            wrong = groups.clone()
            wrong[:1] = (wrong[:1] + 1).clamp(max=weight.leading[0] - 1)
            honest(activation, wrong, out)

        return multiply


class LetsIdleRowsIn(Reference):
    """A NaN anywhere reaches every result, as where a kernel sums what it should skip."""

    name = "lets_idle_rows_in"

    def bind_contiguous(self, weight: BlockScaledTensor, offer: Offer) -> MultiplyContiguous:
        honest = super().bind_contiguous(weight, offer)

        def multiply(
            activation: BlockScaledTensor, groups: torch.Tensor, out: torch.Tensor
        ) -> None:
            honest(activation, groups, out)
            out += activation.scales.sum() * 0

        return multiply


class StoresBeyondItsSlot(Reference):
    """Whole tiles of 64 rows, over the first rows of the next slot."""

    name = "stores_beyond_its_slot"

    def bind_masked(self, weight: BlockScaledTensor, offer: Offer) -> MultiplyMasked:
        honest = super().bind_masked(weight, offer)

        def multiply(
            activation: BlockScaledTensor,
            counts: torch.Tensor,
            out: torch.Tensor,
            expected_rows: int,
        ) -> None:
            honest(activation, counts, out, expected_rows)
            full = (counts[:-1] > 0).nonzero().flatten()
            out[full + 1, 0] = out[full, -1]

        return multiply


class CrashesOnExperts(Reference):
    """Right with dense layers, kills its process with experts in row blocks."""

    name = "crashes_on_experts"

    def bind_contiguous(self, weight: BlockScaledTensor, offer: Offer) -> MultiplyContiguous:
        os.kill(os.getpid(), signal.SIGSEGV)
        return super().bind_contiguous(weight, offer)
