"""A plan as a page: who serves which layers, who does not and why, what is converted, advice."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from blockscale.planning.explain import (
    conversion_words,
    layer_groups,
    offer_words,
    reasons_by_backend,
    request_words,
)
from blockscale.planning.plan import Conversion, Severity
from blockscale.report.page import COLOURS, MAX_ROWS, finding_rank, page

if TYPE_CHECKING:
    from collections.abc import Sequence

    from blockscale.checkpoint.advice import Advice
    from blockscale.planning.explain import LayerGroup
    from blockscale.planning.plan import LinearPlan, ModelPlan

# Names, or ranges of names, that one row unfolds to.
MAX_NAMES = 200
_NUMBER = re.compile(r"(?<=\.)\d{1,9}(?=\.|$)", re.ASCII)
_QUIET = {"excluded_by_policy", "outranked"}


@dataclass(frozen=True, slots=True)
class Subject:
    """What was planned: where it lies, activations, one rank of which degrees."""

    checkpoint: str
    dtype: str
    tensor_parallel: int = 1
    expert_parallel: int = 1


@dataclass(frozen=True, slots=True)
class Served:
    """What one set of backends serves. ``share``: of all weight bytes, 0 to 1."""

    backends: str
    layers: int
    weight_bytes: int
    share: float
    colour: int


@dataclass(frozen=True, slots=True)
class Row:
    """Equal layers. ``colour`` is their backends' in the bar."""

    group: LayerGroup
    backends: str
    colour: int
    weight_bytes: int
    weight: str
    request: str
    choices: tuple[tuple[str, str, str, tuple[str, ...]], ...]
    rejected: tuple[tuple[str, tuple[str, ...]], ...]
    names: str


@dataclass(frozen=True, slots=True)
class Refused:
    """One reason of one backend. ``is_quiet``: it lost to another, or is for other devices."""

    backend: str
    obstacle: str
    reason: str
    layers: int
    is_quiet: bool


@dataclass(frozen=True, slots=True)
class Converted:
    """What ``prepare`` will do to some layers' weights."""

    kind: str
    words: str
    layers: int
    weight_bytes: int
    loss: str


def plan_page(planned: ModelPlan, subject: Subject, advice: Sequence[Advice] = ()) -> str:
    """The page, as HTML text that needs no other file. ``advice``: of ``checkpoint.advice``."""
    served = _served(planned.layers)
    colours = {one.backends: one.colour for one in served}
    groups = layer_groups(planned.layers)
    findings = sorted(planned.findings, key=lambda finding: finding_rank(finding.severity.value))
    return page(
        "plan.html.j2",
        {
            "plan": planned,
            "subject": subject,
            "served": served,
            "rows": [_row(group, colours) for group in groups[:MAX_ROWS]],
            "more_rows": max(0, len(groups) - MAX_ROWS),
            "refused": _refused(planned.layers),
            "converted": _converted(planned.layers),
            "findings": findings,
            "faults": sum(finding.severity is Severity.FAULT for finding in findings),
            "skipped": _skipped(planned),
            "advice": advice,
            "weight_bytes": sum(layer.request.weight_bytes for layer in planned.layers),
        },
    )


def _backends(layer: LinearPlan) -> str:
    return " + ".join(dict.fromkeys(layer.backends)) if layer.is_servable else "none"


def _served(layers: Sequence[LinearPlan]) -> list[Served]:
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for layer in layers:
        counts[_backends(layer)] += 1
        sizes[_backends(layer)] += layer.request.weight_bytes
    total = max(1, sum(sizes.values()))
    return [
        Served(name, counts[name], size, size / total, index % COLOURS)
        for index, (name, size) in enumerate(sizes.most_common())
    ]


def _row(group: LayerGroup, colours: dict[str, int]) -> Row:
    plan = group.plan
    choices = []
    for choice in plan.choices:
        form = choice.offer.activation
        activation = f"{form.format} in {form.layout}" if form else "not quantized beforehand"
        because = ", ".join(filter(None, (offer_words(choice.offer), choice.reason)))
        words = (choice.offer.backend, str(choice.m_range), because)
        choices.append((*words, (f"activation: {activation}", *choice.offer.notes)))
    return Row(
        group,
        _backends(plan),
        colours[_backends(plan)],
        plan.request.weight_bytes * len(group.names),
        conversion_words(plan),
        request_words(plan.request),
        tuple(choices),
        reasons_by_backend(plan.rejected),
        names_words(group.names),
    )


def _refused(layers: Sequence[LinearPlan]) -> list[Refused]:
    counts: Counter[tuple[str, str, str]] = Counter()
    for layer in layers:
        counts.update({(r.backend, r.obstacle.value, r.reason) for r in layer.rejected})
    elsewhere = {backend for backend, obstacle, _ in counts if obstacle == "architecture"}
    found = [
        Refused(
            backend,
            obstacle.replace("_", " "),
            reason,
            count,
            obstacle in _QUIET or backend in elsewhere,
        )
        for (backend, obstacle, reason), count in counts.items()
    ]
    found.sort(key=lambda one: (one.is_quiet, one.backend, -one.layers, one.reason))
    return found


def _converted(layers: Sequence[LinearPlan]) -> list[Converted]:
    counts: Counter[tuple[str, str, str]] = Counter()
    sizes: Counter[tuple[str, str, str]] = Counter()
    for layer in layers:
        if layer.weight is None:
            continue
        loss = {True: "lossless", False: "lossy", None: "lossless if powers of two"}
        words = "used as stored"
        if layer.conversion is not Conversion.NONE:
            words = f"to {layer.weight.format} in {layer.weight.layout}"
        key = (layer.conversion.value, words, loss[layer.is_lossless])
        counts[key] += 1
        sizes[key] += layer.request.weight_bytes
    return [
        Converted(kind, words, count, sizes[kind, words, loss], loss)
        for (kind, words, loss), count in counts.most_common()
    ]


def names_words(names: Sequence[str]) -> str:
    """Names with the numbers that vary as ranges: ``model.layers.{0-61}.mlp.gate``.

    Names that differ in more than one number are written out, the first ``MAX_NAMES`` of them.
    """
    numbers: dict[tuple[str, str], list[int]] = {}
    for name in names:
        before, number, after = _first_number(name)
        numbers.setdefault((before, after), []).append(number)
    words = [
        before + (after if values == [-1] else f"{{{_ranges(values)}}}{after}")
        for (before, after), values in numbers.items()
    ]
    hidden = len(words) - MAX_NAMES
    return ", ".join(words[:MAX_NAMES]) + (f" and {hidden} more" if hidden > 0 else "")


def _first_number(name: str) -> tuple[str, int, str]:
    """The name around its first whole number; -1 if there is none."""
    match = _NUMBER.search(name)
    if match is None:
        return name, -1, ""
    return name[: match.start()], int(match[0]), name[match.end() :]


def _ranges(values: Sequence[int]) -> str:
    spans: list[list[int]] = []
    for value in sorted(set(values)):
        if spans and value == spans[-1][1] + 1:
            spans[-1][1] = value
        else:
            spans.append([value, value])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)


def _skipped(planned: ModelPlan) -> list[tuple[str, int, str]]:
    names: dict[str, list[str]] = {}
    for skipped in planned.skipped:
        names.setdefault(skipped.reason, []).append(skipped.name)
    return [(reason, len(some), names_words(some)) for reason, some in names.items()]
