"""A plan that travels: with the checkpoint it is for, the versions it holds for, and a check.

Pure values, as all planning: reading the file and the checkpoint is done elsewhere
(``checkpoint.plan_file``).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from blockscale.errors import FormatError, PlanMismatchError
from blockscale.formats import PowerOfTwo
from blockscale.planning.decision import Offer
from blockscale.planning.explain import layer_count, request_words
from blockscale.planning.planner import answer_of
from blockscale.planning.serialize import PlanDocument, plan_document, plan_of_document

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from blockscale.planning.decision import PlannableBackend
    from blockscale.planning.device import Device
    from blockscale.planning.plan import Choice, LinearPlan, ModelPlan
    from blockscale.planning.request import LinearRequest

KIND = "blockscale plan"


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What identifies a checkpoint to its plan.

    ``tensors``: SHA-256 over name, dtype and shape of every tensor, sorted by name. ``config``:
    SHA-256 over config.json as a value (order of keys and spacing do not count). Not covered: the
    tensors' data, and which file a tensor lies in.
    """

    tensors: str
    config: str
    tensor_count: int


@dataclass(frozen=True, slots=True)
class SavedPlan:
    """A plan with what it was made from.

    ``merging``: ``engine`` or ``module``, how weights became layers. ``versions``: of blockscale
    and, where a real machine was planned for, of its packages. ``checkpoint``: where the plan's
    author had it; for people only.
    """

    plan: ModelPlan
    fingerprint: Fingerprint
    merging: str
    tensor_parallel: int
    expert_parallel: int
    versions: tuple[tuple[str, str], ...]
    checkpoint: str


@dataclass(frozen=True, slots=True)
class Situation:
    """What a saved plan meets where it is to run."""

    fingerprint: Fingerprint
    requests: tuple[LinearRequest, ...]
    device: Device
    versions: tuple[tuple[str, str], ...]


class FingerprintDocument(msgspec.Struct, forbid_unknown_fields=True):
    """``Fingerprint``."""

    tensors: str
    config: str
    tensor_count: int


class CheckpointDocument(msgspec.Struct, forbid_unknown_fields=True):
    """Which checkpoint, and how its weights became layers of one rank."""

    path: str
    fingerprint: FingerprintDocument
    merging: Literal["engine", "module"]
    tp: int
    ep: int


class SavedPlanDocument(msgspec.Struct, forbid_unknown_fields=True):
    """A plan file."""

    schema: Literal[1]
    kind: Literal["blockscale plan"]
    versions: dict[str, str]
    checkpoint: CheckpointDocument
    plan: PlanDocument


def saved_document(saved: SavedPlan) -> dict[str, Any]:
    """The plan file as builtin values; the inverse is ``saved_of_document``."""
    fingerprint = saved.fingerprint
    return {
        "schema": 1,
        "kind": KIND,
        "versions": dict(saved.versions),
        "checkpoint": {
            "path": saved.checkpoint,
            "fingerprint": {
                "tensors": fingerprint.tensors,
                "config": fingerprint.config,
                "tensor_count": fingerprint.tensor_count,
            },
            "merging": saved.merging,
            "tp": saved.tensor_parallel,
            "ep": saved.expert_parallel,
        },
        "plan": plan_document(saved.plan),
    }


def saved_of_document(document: Mapping[str, Any] | bytes) -> SavedPlan:
    """The saved plan that a document describes. Raises FormatError, saying where, if it is none."""
    try:
        if isinstance(document, bytes):
            parsed = msgspec.json.decode(document, type=SavedPlanDocument)
        else:
            parsed = msgspec.convert(document, SavedPlanDocument)
    except (msgspec.ValidationError, msgspec.DecodeError, RecursionError) as error:
        msg = f"not a plan file: {error}; write one with `blockscale plan PATH --save FILE`"
        raise FormatError(msg) from None
    about = parsed.checkpoint
    return SavedPlan(
        plan_of_document(msgspec.to_builtins(parsed.plan)),
        Fingerprint(
            about.fingerprint.tensors, about.fingerprint.config, about.fingerprint.tensor_count
        ),
        about.merging,
        about.tp,
        about.ep,
        tuple(parsed.versions.items()),
        about.path,
    )


def fitting_plan(
    source: str,
    saved: SavedPlan,
    here: Situation,
    backends: Sequence[PlannableBackend],
    packages_of: Callable[[str], Sequence[str]],
) -> ModelPlan:
    """The saved plan, to be run on the device that is here; ``source`` names it in errors.

    Raises PlanMismatchError with every one of ``mismatches``.
    """
    reasons = mismatches(saved, here, backends, packages_of)
    if reasons:
        raise PlanMismatchError(source, reasons)
    return replace(saved.plan, device=here.device)


def mismatches(
    saved: SavedPlan,
    here: Situation,
    backends: Sequence[PlannableBackend],
    packages_of: Callable[[str], Sequence[str]],
) -> tuple[str, ...]:
    """Every reason why the plan must not run here; empty if it fits.

    The checkpoint must be the one that was planned; the architecture the same; each chosen backend
    must still offer exactly what was planned, for the planned token counts; and what its numbers
    depend on (``packages_of`` a backend) must have the versions that were planned with, where the
    plan knows them. Scales that the plan took for powers of two are checked when they are prepared.
    """
    found = [*_checkpoint_reasons(saved, here)]
    planned_for, device = saved.plan.device, here.device
    if planned_for.architecture != device.architecture:
        found.append(f"planned for {planned_for.architecture}, this is {device.architecture}")
    else:
        found += _version_reasons(saved, here, packages_of)
        found += _offer_reasons(saved.plan, device, backends)
    return tuple(found)


def _checkpoint_reasons(saved: SavedPlan, here: Situation) -> Iterable[str]:
    planned, found = saved.fingerprint, here.fingerprint
    if planned.config != found.config:
        yield f"config.json is not the one of {saved.checkpoint} that was planned"
    if planned.tensors != found.tensors:
        counts = f"{planned.tensor_count} were planned, {found.tensor_count} are here"
        same = planned.tensor_count == found.tensor_count
        yield f"tensors have changed ({'name, dtype or shape of some' if same else counts})"
    asked = {plan.name: plan.request for plan in saved.plan.layers}
    differing = [r for r in here.requests if _comparable(asked.get(r.name)) != _comparable(r)]
    names = {request.name for request in here.requests}
    missing = [name for name in asked if name not in names]
    if differing:
        first = differing[0]
        before = asked.get(first.name)
        was = "not planned" if before is None else f"planned as {request_words(before)}"
        yield (
            f"{layer_count(len(differing))} differ, first {first.name!r}: {was}, "
            f"here it is {request_words(first)}"
        )
    if missing:
        yield f"{layer_count(len(missing))} of the plan are not here, first {missing[0]!r}"


def _comparable(request: LinearRequest | None) -> LinearRequest | None:
    """Without what reading the scales found, which headers cannot confirm."""
    return None if request is None else replace(request, power_of_two=PowerOfTwo.UNKNOWN)


def _version_reasons(
    saved: SavedPlan, here: Situation, packages_of: Callable[[str], Sequence[str]]
) -> Iterable[str]:
    planned, found = dict(saved.versions), dict(here.versions)
    used = dict.fromkeys(name for layer in saved.plan.layers for name in layer.backends)
    for backend in used:
        for package in packages_of(backend):
            before, now = planned.get(package), found.get(package)
            if before is not None and before != now:
                yield f"{backend} was planned with {package} {before}, here is {now or 'none'}"


def _offer_reasons(
    plan: ModelPlan, device: Device, backends: Sequence[PlannableBackend]
) -> list[str]:
    by_name = {backend.name: backend for backend in backends}
    reasons: Counter[str] = Counter()
    first: dict[str, str] = {}
    for layer in plan.layers:
        for choice in layer.choices:
            reason = _offer_reason(layer, choice, plan, device, by_name)
            if reason is not None:
                reasons[reason] += 1
                first.setdefault(reason, layer.name)
    return [
        f"{reason} ({layer_count(count)}, first {first[reason]!r})"
        for reason, count in reasons.items()
    ]


def _offer_reason(
    layer: LinearPlan,
    choice: Choice,
    plan: ModelPlan,
    device: Device,
    backends: Mapping[str, PlannableBackend],
) -> str | None:
    planned = choice.offer
    backend = backends.get(planned.backend)
    if backend is None:
        return f"no backend is called {planned.backend}"
    answer = answer_of(backend, layer.request, device, plan.policy)
    if not isinstance(answer, Offer):
        return f"{planned.backend} would not serve it here: {answer[0].reason}"
    forms = (planned.weight, planned.activation, planned.rows)
    if (answer.weight, answer.activation, answer.rows) != forms:
        return f"{planned.backend} wants its operands in another form here"
    wanted, offered = choice.m_range, answer.m_range
    ends = wanted.max_m is not None and offered.contains(wanted.max_m)
    if not offered.contains(max(1, wanted.min_m)) or not (ends or offered.max_m is None):
        return f"{planned.backend} offers {offered} here, not {wanted}"
    return None
