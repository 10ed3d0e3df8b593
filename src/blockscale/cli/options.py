"""Options that several commands take, and what they turn into."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from blockscale.errors import SettingsError
from blockscale.formats import DType

if TYPE_CHECKING:
    from blockscale.checkpoint.requests import Merging
    from blockscale.checkpoint.write import Crew
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


class LayersOf(str, Enum):
    """``--layers``: what one layer of a plan is."""

    ENGINE = "engine"
    MODULE = "module"

    @property
    def merging(self) -> Merging:
        """The library's value."""
        from blockscale.checkpoint.requests import Merging

        return Merging(self.value)


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
Workers = Annotated[
    int | None,
    typer.Option(min=1, help="Files written at once; default: one for each CPU.", metavar="N"),
]
Memory = Annotated[
    str | None,
    typer.Option(help="Most memory that this process may take, like 2GB.", metavar="SIZE"),
]
ShardSize = Annotated[str, typer.Option(help="Largest file to write, like 5GB.", metavar="SIZE")]


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


def crew_from(workers: int | None, memory: str | None) -> Crew:
    """Who writes: threads and memory of this process, and its place among torchrun's processes."""
    from blockscale.checkpoint.write import Crew
    from blockscale.settings import read_process

    process = read_process(os.environ)
    threads = workers or len(os.sched_getaffinity(0))
    limit = None if memory is None else bytes_from("--memory", memory)
    return Crew(threads, process.rank, process.ranks, limit)


def bytes_from(option: str, text: str) -> int:
    """``2GB`` as bytes; decimal units, as disks count."""
    match = re.fullmatch(r"(\d{1,12})(?:\.(\d{1,3}))? ?(kB|KB|MB|GB|TB)", text)
    if match is None:
        msg = f"{option} {text!r} is no size; write a number and a unit, like 500MB or 2.5GB"
        raise SettingsError(msg)
    thousandths = int(match[1]) * 1000 + int((match[2] or "").ljust(3, "0"))
    return thousandths * {"KB": 1, "MB": 10**3, "GB": 10**6, "TB": 10**9}[match[3].upper()]
