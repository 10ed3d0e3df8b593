"""Tables of measured times: those that ship with blockscale, and those that ``tune`` kept here.

``tune`` measures dense layers; what is known of experts ships in tables of their own.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from importlib import resources
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from blockscale.errors import SettingsError
from blockscale.formats import DType
from blockscale.planning.device import Measurement

if TYPE_CHECKING:
    from blockscale.planning.device import Device


def kept_path(device: Device) -> Path:
    """Where ``blockscale tune`` keeps this machine's own table."""
    return Path.home() / ".cache" / "blockscale" / f"measured-{_slug(device.name)}.json"


def with_measurements(device: Device) -> Device:
    """``device`` with its own table if ``tune`` kept one, else the shipped one of that GPU.

    Either way with the shipped one of experts. Raises SettingsError, naming the file, if a kept
    table is damaged.
    """
    tables = resources.files("blockscale.probe") / "tables"
    own, shipped = kept_path(device), tables / f"{_slug(device.name)}.json"
    experts = tables / f"{_slug(device.name)}-experts.json"
    found = [table for table in (own if own.is_file() else shipped, experts) if table.is_file()]
    rows = [read_table(table.read_text(encoding="utf-8"), str(table)) for table in found]
    return replace(device, measurements=tuple(chain.from_iterable(rows)))


def read_table(text: str, place: str) -> tuple[Measurement, ...]:
    """The rows of a table: of experts, their number comes last.

    Raises SettingsError, naming ``place``, if it is none.
    """
    try:
        rows = json.loads(text)["rows"]
        return tuple(
            Measurement(str(name), int(n), int(k), DType(dtype), int(m), float(time_us), *experts)
            for name, n, k, dtype, m, time_us, *experts in rows
        )
    except (ValueError, KeyError, TypeError) as error:
        msg = f"{place} is no table of measured times ({error}); delete it or run blockscale tune"
        raise SettingsError(msg) from None


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
