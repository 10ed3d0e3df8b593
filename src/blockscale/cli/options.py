"""Options that several commands take, and what they turn into."""

from __future__ import annotations

import os
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from blockscale.formats import DType

if TYPE_CHECKING:
    from blockscale.planning.device import Device
    from blockscale.planning.policy import PlanPolicy


class DTypeName(str, Enum):
    """``--dtype``: what activations are."""

    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"

    @property
    def dtype(self) -> DType:
        """The library's value."""
        return DType(self.value)


CheckpointPath = Annotated[
    Path,
    typer.Argument(
        metavar="PATH", help="Checkpoint directory or .safetensors file.", show_default=False
    ),
]
HeadersPath = Annotated[
    Path,
    typer.Argument(
        metavar="PATH",
        help="Checkpoint directory, .safetensors file or Hub id (org/name, org/name@revision).",
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
DTypeOption = Annotated[
    DTypeName | None,
    typer.Option("--dtype", help="Activation dtype; default: the one config.json declares."),
]
Backends = Annotated[
    list[str] | None,
    typer.Option("--backend", help="Allow only this backend; repeat in order of preference."),
]
AllowLossy = Annotated[
    bool,
    typer.Option("--allow-lossy", help="Permit requantizing weights where a backend needs it."),
]


def policy_from(backends: list[str] | None, *, allow_lossy: bool) -> PlanPolicy:
    """The policy of the environment (BLOCKSCALE_*), narrowed by a command's options."""
    from blockscale.planning.policy import Exactness
    from blockscale.settings import read_settings

    policy = read_settings(os.environ).policy
    if backends:
        policy = replace(policy, backends=tuple(backends))
    if allow_lossy:
        policy = replace(policy, exactness=Exactness.ALLOW_LOSSY)
    return policy


def device_from(name: str | None) -> Device:
    """The invented device of that name, or this machine."""
    from blockscale.planning.device import Device

    if name is not None:
        return Device.named(name)
    from blockscale.probe import detect_device

    return detect_device()
