"""Tensors that a checkpoint lacks, by its own numbers and those of its config."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from itertools import count, islice
from typing import TYPE_CHECKING

from blockscale.planning.plan import Finding, Severity

if TYPE_CHECKING:
    from collections.abc import Iterator

    from blockscale.checkpoint.read import Checkpoint

_INDEX = r"(0|[1-9][0-9]{0,8})"  # as engines write it: not "02"
_LAYER = re.compile(rf"((?:.+\.)?layers)\.{_INDEX}\.")
_EXPERT = re.compile(rf"(.+\.experts)\.{_INDEX}\.(.+\.weight)")
_SHARD = re.compile(r"(.*)-([0-9]{1,6})-of-([0-9]{1,6})\.safetensors")
_NUMBER = re.compile(r"\d+")
_LAYER_COUNTS = ("num_hidden_layers",)
_EXPERT_COUNTS = ("num_experts", "n_routed_experts", "num_local_experts")
_SHOWN = 3
_MOST = 10**9  # a config that counts more than that says nothing
_CURE = "; a file is missing or of another version, download all of them again"


def missing_tensors(checkpoint: Checkpoint) -> Iterator[Finding]:
    """What is missing, each kind once: it names the first place and counts the others.

    A FAULT for a gap in the numbers of layers (from the first one there) or of experts, and for a
    gate without the up projection that others of its kind have, or the reverse, or one of another
    shape. A WARNING where the numbers have no gap, but config.json counts more or, of experts,
    fewer; where gate and up have no down projection; where files call themselves parts of more
    than are there.
    """
    layers: dict[str, set[int]] = defaultdict(set)
    experts: dict[tuple[str, str], set[int]] = defaultdict(set)
    for name in checkpoint.tensors:
        if (found := _LAYER.match(name)) is not None:
            layers[found[1]].add(int(found[2]))
        if (found := _EXPERT.fullmatch(name)) is not None:
            experts[found[1], found[3]].add(int(found[2]))
    # A file alone is no checkpoint: nobody knows what lies beside it.
    if checkpoint.path.suffix != ".safetensors":
        yield from _layers(checkpoint, layers)
        yield from _experts(checkpoint, experts)
        yield from _halves(checkpoint)
        yield from _unequal_halves(checkpoint)
        yield from _without_down(checkpoint)
        yield from _shards(checkpoint)


def _layers(checkpoint: Checkpoint, stacks: Mapping[str, set[int]]) -> Iterator[Finding]:
    for stack, numbers in stacks.items():
        if words := _gap(numbers, min(numbers), max(numbers) + 1):
            message = f"{stack} has {len(numbers)} layers, but {words} missing"
            yield Finding(Severity.FAULT, "missing_layer", message + _CURE)
    largest = max(stacks, key=lambda stack: len(stacks[stack]), default=None)
    expected = _count(checkpoint, _LAYER_COUNTS)
    if largest is not None and expected is not None and max(stacks[largest]) + 1 < expected:
        held = len(stacks[largest])
        message = f"{largest} has {held} layers, but config.json says {expected}"
        yield Finding(Severity.WARNING, "missing_layer", message + _CURE)


def _experts(
    checkpoint: Checkpoint, stacks: Mapping[tuple[str, str], set[int]]
) -> Iterator[Finding]:
    expected = _count(checkpoint, _EXPERT_COUNTS)
    held: dict[str, int] = defaultdict(int)
    for (stack, _), numbers in stacks.items():
        held[stack] = max(held[stack], max(numbers) + 1)
    lacking: dict[tuple[str, str], list[str]] = defaultdict(list)
    for (stack, leaf), numbers in stacks.items():
        if words := _gap(numbers, 0, held[stack]):
            lacking[stack, words].append(leaf.removesuffix(".weight"))
    gaps: dict[str, list[str]] = defaultdict(list)
    for (stack, words), leaves in lacking.items():
        gaps[f"expert {words} missing ({', '.join(sorted(leaves))})"].append(stack)
    for message, where in gaps.items():
        yield Finding(Severity.FAULT, "missing_expert", message + _others(where) + _CURE, where[0])
    differing: dict[int, list[str]] = defaultdict(list)
    for stack, number in held.items():
        if expected is not None and number != expected:
            differing[number].append(stack)
    for number, where in differing.items():
        message = f"holds {number} experts, but config.json says {expected}{_others(where)}"
        yield Finding(Severity.WARNING, "expert_count", message + _CURE, where[0])


def _halves(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Gate and up are multiplied with each other: one alone is of no use."""
    halves: dict[str, set[str]] = defaultdict(set)
    for name in checkpoint.tensors:
        for half in ("gate_proj", "up_proj"):
            if name.endswith(f".{half}.weight") and ".experts." not in name:
                halves[name.removesuffix(f".{half}.weight")].add(half)
    whole = {_NUMBER.sub("*", stem) for stem, held in halves.items() if len(held) > 1}
    lonely: dict[str, list[str]] = defaultdict(list)
    for stem, held in halves.items():
        if len(held) == 1 and _NUMBER.sub("*", stem) in whole:
            (has,) = held
            lonely["up_proj" if has == "gate_proj" else "gate_proj"].append(stem)
    for half, where in lonely.items():
        message = f"has no {half}, unlike others of its kind{_others(where)}"
        yield Finding(Severity.FAULT, "missing_half", message + _CURE, where[0])


def _unequal_halves(checkpoint: Checkpoint) -> Iterator[Finding]:
    unequal: dict[str, list[str]] = defaultdict(list)
    for name, gate in checkpoint.tensors.items():
        stem = name.removesuffix(".gate_proj.weight")
        up = checkpoint.tensors.get(f"{stem}.up_proj.weight") if stem != name else None
        if up is not None and up.dtype == gate.dtype and up.shape != gate.shape:
            unequal[f"{gate.shape}, but up_proj {up.shape}"].append(stem)
    for shapes, where in unequal.items():
        message = f"gate_proj has shape {shapes}: they are multiplied with each other"
        yield Finding(Severity.FAULT, "unequal_halves", message + _others(where) + _CURE, where[0])


def _without_down(checkpoint: Checkpoint) -> Iterator[Finding]:
    stems = {name.rpartition(".down_proj.")[0] for name in checkpoint.tensors}
    where = [
        stem
        for name in checkpoint.tensors
        if (stem := name.removesuffix(".gate_proj.weight")) != name
        and f"{stem}.up_proj.weight" in checkpoint.tensors
        and stem not in stems
    ]
    if where:
        message = f"has gate_proj and up_proj, but no down_proj{_others(where)}"
        yield Finding(Severity.WARNING, "missing_down", message + _CURE, where[0])


def _shards(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Files named 00001-of-00003 say how many there are; the index may have lost one of them."""
    held: dict[tuple[str, int], set[int]] = defaultdict(set)
    for path in checkpoint.files:
        if (found := _SHARD.fullmatch(path.name)) is not None:
            held[found[1], int(found[3])].add(int(found[2]))
    for (stem, total), numbers in held.items():
        if 0 < max(numbers) <= total and (words := _gap(numbers, 1, total + 1)):
            message = f"the index names {len(numbers)} of {total} files {stem}-*: {words} missing"
            yield Finding(Severity.WARNING, "missing_file", message + _CURE)


def _count(checkpoint: Checkpoint, keys: tuple[str, ...]) -> int | None:
    text = checkpoint.config.get("text_config")
    for config in (checkpoint.config, text if isinstance(text, Mapping) else {}):
        for key in keys:
            value = config.get(key)
            if isinstance(value, int) and not isinstance(value, bool) and 0 < value < _MOST:
                return value
    return None


def _gap(numbers: set[int], begin: int, end: int) -> str:
    """``3 is`` or ``3, 4, 5 and 9 more are``: what is missing in [begin, end), if anything is."""
    missing = end - begin - len(numbers)
    if not missing:
        return ""
    first = islice((n for n in count(begin) if n not in numbers), min(missing, _SHOWN))
    more = f" and {missing - _SHOWN} more" if missing > _SHOWN else ""
    return f"{', '.join(map(str, first))}{more} {'is' if missing == 1 else 'are'}"


def _others(where: list[str]) -> str:
    return f" (and in {len(where) - 1} more)" if len(where) > 1 else ""
