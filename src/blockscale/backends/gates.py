"""Collecting every reason against a backend, and the gates that many providers share."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from blockscale.planning.decision import Arrangement, GroupedRows, MRange, Obstacle, Rejection
from blockscale.planning.device import Installed, Verdict

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from blockscale.formats import BlockShape, DType
    from blockscale.planning.device import Device
    from blockscale.planning.request import LinearRequest


# Rows of experts as a CPU has them: each block is one row, nothing is padded.
UNPADDED = GroupedRows(MRange(), Arrangement.CONTIGUOUS, 1)


@dataclass(slots=True)
class Gates:
    """The rejections of one backend for one request, gathered without stopping at the first."""

    backend: str
    request: LinearRequest
    device: Device
    rejections: list[Rejection] = field(default_factory=list)

    def unless(self, holds: object, obstacle: Obstacle, reason: str) -> None:
        """Record ``reason`` if the condition does not hold."""
        if not holds:
            self.rejections.append(Rejection(self.backend, obstacle, reason))

    def architectures(
        self,
        supported: Collection[tuple[int, int]],
        why_not: Mapping[tuple[int, int], str] | None = None,
    ) -> None:
        """The device must have one of these compute capabilities.

        ``why_not``: what is known about some that are missing, for the reason.
        """
        names = ", ".join(f"sm_{major}{minor}" for major, minor in supported)
        capability = self.device.capability
        why = (why_not or {}).get(capability) if capability is not None else None
        self.unless(
            capability in supported,
            Obstacle.ARCHITECTURE,
            f"runs on {names}, not on {self.device.architecture}" + (f": {why}" if why else ""),
        )

    def package(self, distribution: str) -> None:
        """A distribution must be installed (or assumed, on an invented device)."""
        self.unless(
            self.device.installed(distribution) is not Installed.NO,
            Obstacle.NOT_INSTALLED,
            f"package {distribution} is not installed (pip install {distribution})",
        )

    def package_at_least(self, distribution: str, major: int, minor: int) -> None:
        """An installed distribution must be new enough, where its version is known."""
        version = self.device.version(distribution)
        if version is not None:
            self.unless(
                _release(version) >= (major, minor),
                Obstacle.TOOLKIT,
                f"needs {distribution} {major}.{minor} or newer, found {version}",
            )

    def cuda_at_least(self, major: int, minor: int) -> None:
        """The CUDA release must be new enough, where it is known."""
        cuda = self.device.cuda
        if cuda is not None:
            self.unless(
                cuda >= (major, minor),
                Obstacle.TOOLKIT,
                f"needs CUDA {major}.{minor} or newer, found {cuda[0]}.{cuda[1]}",
            )

    def blocks(self, supported: Collection[BlockShape]) -> None:
        """The checkpoint's blocks must be among these."""
        names = ", ".join(str(block) for block in supported)
        self.unless(
            self.request.format.block in supported,
            Obstacle.BLOCK_SHAPE,
            f"takes {names} weight blocks, not {self.request.format.block}",
        )

    def out_dtypes(self, supported: Sequence[DType], why: str = "") -> None:
        """The output dtype must be among these."""
        names = ", ".join(dtype.value for dtype in supported)
        self.unless(
            self.request.out_dtype in supported,
            Obstacle.OUT_DTYPE,
            f"writes {names}, not {self.request.out_dtype.value}{'; ' + why if why else ''}",
        )

    def activation_dtypes(self, supported: Sequence[DType], why: str = "") -> None:
        """The activation dtype must be among these, where the provider quantizes itself."""
        names = ", ".join(dtype.value for dtype in supported)
        self.unless(
            self.request.activation_dtype in supported,
            Obstacle.ACTIVATION_DTYPE,
            f"reads {names}, not {self.request.activation_dtype.value}{'; ' + why if why else ''}",
        )

    def multiples(self, n: int, k: int, why: str = "") -> None:
        """N and K of the shard must be multiples of these."""
        request = self.request
        wrong = [
            f"{axis}={size} is not a multiple of {step}"
            for axis, size, step in (("N", request.n, n), ("K", request.k, k))
            if size % step
        ]
        self.unless(
            not wrong, Obstacle.ALIGNMENT, " and ".join(wrong) + (f"; {why}" if why else "")
        )

    def whole_blocks(self) -> None:
        """Neither a shard's cut nor a merged part may end inside a scale block.

        Whatever the kernel could do: the checkpoint has no scales for such a weight.
        """
        request = self.request
        split, block = request.shard.split_blocks, request.format.block
        self.unless(
            not split,
            Obstacle.SHARD_SPLITS_BLOCK,
            "the shard's scales are no slice of the checkpoint's: " + "; ".join(split),
        )
        ragged = [str(rows) for rows in request.parts[:-1] if rows % block.mn]
        self.unless(
            split or not ragged,
            Obstacle.ALIGNMENT,
            f"merged parts of {', '.join(ragged)} rows end inside a block of {block.mn} rows "
            "and another part follows",
        )

    def no_bias_of_experts(self) -> None:
        """A stack of experts must not have a bias: grouped products take none."""
        request = self.request
        self.unless(
            request.experts is None or not request.has_bias,
            Obstacle.GROUPING,
            "adds no bias to the products of experts",
        )

    def dense(self) -> None:
        """The layer must not be a stack of experts."""
        self.unless(
            self.request.experts is None,
            Obstacle.GROUPING,
            f"has no grouped kernel for a stack of {self.request.experts} experts",
        )


def _release(version: str) -> tuple[int, int]:
    """Major and minor of ``3.6.0+cu130``; zeros where there are no digits."""
    major, minor = [*(int(text) for text in re.findall(r"\d+", version)[:2]), 0, 0][:2]
    return major, minor


def dispute_notes(gates: Gates, dispute: str) -> tuple[str, ...]:
    """What a plan says where sources disagree about a provider, until the probe has settled it."""
    proof = gates.device.proof(gates.backend, gates.request.out_dtype)
    if proof is not None and proof.verdict is Verdict.PROVEN:
        return ()
    return (f"unproven here: {dispute}",)


def bias_notes(request: LinearRequest) -> tuple[str, ...]:
    """What a plan says where the provider's kernel takes no bias."""
    return ("the bias is added by a second kernel",) if request.has_bias else ()
