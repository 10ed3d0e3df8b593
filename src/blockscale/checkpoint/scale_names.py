"""The only place that knows what other systems call the scales of a weight.

All of them are multipliers: ``weight_scale_inv`` too, despite its name.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from blockscale.checkpoint.header import TensorEntry

WEIGHT_SUFFIX = ".weight"
PACKED_SUFFIX = ".weight_packed"

# After the weight's whole name; after its name without ".weight" (DeepSeek-V4, Mistral Large 4).
_SUFFIXES = ("_scale_inv", "_scale")
_STEM_SUFFIXES = (".scale", ".scale_inv", ".qscale_weight")
_ENDINGS = ("weight_scale_inv", "weight_scale", "_proj_scale_inv", ".qscale_weight")

_EXPERT = re.compile(
    r"(?P<prefix>.+\.experts)\.(?P<index>\d{1,9})\.(?P<leaf>gate_proj|up_proj|down_proj|w[123])\.weight"
)
# Name of the stack, this weight's part of its rows, and how many parts there are.
_STACKED_SCALES = {
    "gate_proj": ("gate_up_proj_scale_inv", 0, 2),
    "up_proj": ("gate_up_proj_scale_inv", 1, 2),
    "down_proj": ("down_proj_scale_inv", 0, 1),
    "w1": ("gate_up_proj_scale_inv", 0, 2),
    "w3": ("gate_up_proj_scale_inv", 1, 2),
    "w2": ("down_proj_scale_inv", 0, 1),
}
_STACKED_AXES = 3


def scale_names(weight: str) -> list[str]:
    """Every name that the scales of a weight tensor may have."""
    if weight.endswith(PACKED_SUFFIX):
        weight = weight.removesuffix(PACKED_SUFFIX) + WEIGHT_SUFFIX
    names = [weight + suffix for suffix in _SUFFIXES]
    if weight.endswith(WEIGHT_SUFFIX):
        stem = weight.removesuffix(WEIGHT_SUFFIX)
        names += [stem + suffix for suffix in _STEM_SUFFIXES]
    return names


def stored_scales(weight: str, tensors: Mapping[str, TensorEntry]) -> list[TensorEntry]:
    """The scales of a weight tensor that are there: one if all is well.

    Of a tensor that holds the scales of many experts, the part that belongs to this one.
    """
    found = [tensors[name] for name in scale_names(weight) if name in tensors]
    if not found and (part := _part_of_stack(weight, tensors)) is not None:
        return [part]
    return found


def is_scale(entry: TensorEntry) -> bool:
    """Whether a tensor can be nothing but the scales of a weight, by its name."""
    if entry.name.endswith(_ENDINGS):
        return True
    # A norm's weight may be called "scale" too, but is no E8M0.
    return entry.name.endswith(".scale") and entry.dtype == "F8_E8M0"


def _part_of_stack(weight: str, tensors: Mapping[str, TensorEntry]) -> TensorEntry | None:
    """One expert's scales, out of those that transformers 5.24 saves stacked.

    It splits the stacked experts that it has in memory into a matrix for each when it saves them,
    but leaves their scales as they are: ``experts.gate_up_proj_scale_inv``, (experts, rows of gate
    and up, columns).
    """
    match = _EXPERT.fullmatch(weight)
    if match is None:
        return None
    stack, part, parts = _STACKED_SCALES[match["leaf"]]
    entry = tensors.get(f"{match['prefix']}.{stack}")
    index = int(match["index"])
    if entry is None or len(entry.shape) != _STACKED_AXES or index >= entry.shape[0]:
        return None
    _, rows, columns = entry.shape
    if rows % parts:
        return None
    length = entry.length // entry.shape[0] // parts
    offset = entry.offset + (index * parts + part) * length
    return replace(entry, shape=(rows // parts, columns), offset=offset, length=length)
