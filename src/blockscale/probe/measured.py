"""Tables of measured times: those that ship with blockscale, and those that ``tune`` kept here."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from importlib import resources
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

    Raises SettingsError, naming the file, if a kept table is damaged.
    """
    kept = kept_path(device)
    if kept.is_file():
        return replace(device, measurements=read_table(kept.read_text(encoding="utf-8"), str(kept)))
    shipped = resources.files("blockscale.probe") / "tables" / f"{_slug(device.name)}.json"
    if shipped.is_file():
        text = shipped.read_text(encoding="utf-8")
        return replace(device, measurements=read_table(text, str(shipped)))
    return device


def read_table(text: str, place: str) -> tuple[Measurement, ...]:
    """The rows of a table. Raises SettingsError, naming ``place``, if it is none."""
    try:
        rows = json.loads(text)["rows"]
        return tuple(
            Measurement(str(name), int(n), int(k), DType(dtype), int(m), float(time_us))
            for name, n, k, dtype, m, time_us in rows
        )
    except (ValueError, KeyError, TypeError) as error:
        msg = f"{place} is no table of measured times ({error}); delete it or run blockscale tune"
        raise SettingsError(msg) from None


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
