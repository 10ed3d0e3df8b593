"""Plans as JSON documents, ``"schema": 1``, and back. ``plan.schema.json`` is generated from here.

The structs are the document: field names and order are what a reader of the JSON sees. Values that
have names (formats, layouts, obstacles) are written by name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import msgspec

from blockscale.errors import FormatError
from blockscale.formats import BlockShape, DType, PowerOfTwo, block_format_named, scale_layout_named
from blockscale.planning.decision import (
    Arrangement,
    Evidence,
    GroupedRows,
    MRange,
    Obstacle,
    Offer,
    OperandForm,
    Readiness,
    Rejection,
)
from blockscale.planning.device import Device, Proof, Verdict
from blockscale.planning.plan import (
    Choice,
    Conversion,
    Finding,
    LinearPlan,
    ModelPlan,
    Severity,
    SkippedLayer,
)
from blockscale.planning.policy import Determinism, Exactness, PlanPolicy, Proving, Strictness
from blockscale.planning.request import LinearRequest, RemedyKind, Shard, ShardStyle

if TYPE_CHECKING:
    from collections.abc import Mapping

SCHEMA_VERSION = 1


class ProofDocument(msgspec.Struct, forbid_unknown_fields=True):
    """What the probe measured for one backend and output dtype.

    ``arrangement``: of the rows of experts whose products were tested; null: dense layers.
    """

    backend: str
    out_dtype: DType
    verdict: Verdict
    detail: str
    arrangement: Arrangement | None = None


class DeviceDocument(msgspec.Struct, forbid_unknown_fields=True):
    """The machine that was planned for. ``packages`` null: invented, every provider assumed."""

    name: str
    architecture: str
    capability: tuple[int, int] | None
    sm_count: int | None
    memory_bytes: int | None
    cuda: tuple[int, int] | None
    packages: dict[str, str] | None
    proofs: list[ProofDocument]


class PolicyDocument(msgspec.Struct, forbid_unknown_fields=True):
    """What the plan was permitted to do. ``backends`` null: all of them."""

    backends: list[str] | None
    exactness: Exactness
    max_relative_error: float
    determinism: Determinism
    strictness: Strictness
    proving: Proving


class ShardDocument(msgspec.Struct, forbid_unknown_fields=True):
    """The piece that one rank holds, and the scale blocks that the cut goes through, in words.

    ``remedy`` is absent unless the shard is held otherwise, so that no block is split.
    """

    style: ShardStyle
    degree: int
    split_blocks: list[str]
    unsplit_block: tuple[int, int] | None
    remedy: RemedyKind | msgspec.UnsetType = msgspec.UNSET


class RowsDocument(msgspec.Struct, forbid_unknown_fields=True):
    """How a grouped kernel wants its rows for min_m to max_m tokens; null: no limit."""

    min_m: int
    max_m: int | None
    arrangement: Arrangement
    alignment: int


class ChoiceDocument(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """One backend serves min_m to max_m tokens; ``max_m`` null: no limit.

    ``offered_min_m`` and ``offered_max_m`` are what it could serve. Activation fields null: it
    takes unquantized activations. ``rows``: of a grouped layer only. ``reason``: absent where the
    order of preference chose.
    """

    backend: str
    min_m: int
    max_m: int | None
    offered_min_m: int
    offered_max_m: int | None
    activation_format: str | None
    activation_scale_layout: str | None
    deterministic: bool
    evidence: Evidence
    readiness: Readiness
    notes: list[str]
    rows: list[RowsDocument] = []
    reason: str = ""


class RejectionDocument(msgspec.Struct, forbid_unknown_fields=True):
    """One reason why one backend does not serve the layer.

    ``copy_bytes`` is absent unless it would need a second prepared copy of the weight.
    """

    backend: str
    obstacle: Obstacle
    reason: str
    copy_bytes: int | msgspec.UnsetType = msgspec.UNSET


class LayerDocument(msgspec.Struct, forbid_unknown_fields=True):
    """One layer as one rank runs it. ``backends`` empty: unservable.

    ``activation_scale_layout`` is that of the backend with the largest M; ``lossless`` null:
    it depends on scales that nobody has read.
    """

    name: str
    n: int
    k: int
    backends: list[ChoiceDocument]
    weight_format: str | None
    weight_scale_layout: str | None
    activation_scale_layout: str | None
    conversion: Conversion
    lossless: bool | None
    rejected: list[RejectionDocument]
    format: str
    activation_dtype: DType
    out_dtype: DType
    power_of_two: PowerOfTwo
    parts: list[int]
    bias: bool
    shard: ShardDocument
    experts: int | None


class SkippedDocument(msgspec.Struct, forbid_unknown_fields=True):
    """A linear layer that stays as it is on disk."""

    name: str
    reason: str


class FindingDocument(msgspec.Struct, forbid_unknown_fields=True):
    """Something a person should know; ``layer`` null: about several layers or the checkpoint."""

    severity: Severity
    code: str
    message: str
    layer: str | None


class PlanDocument(msgspec.Struct, forbid_unknown_fields=True):
    """The plan of a checkpoint on one device, for one rank."""

    schema: Literal[1]
    device: DeviceDocument
    policy: PolicyDocument
    layers: list[LayerDocument]
    skipped: list[SkippedDocument]
    findings: list[FindingDocument]


def plan_document(plan: ModelPlan) -> dict[str, Any]:
    """The plan as builtin values, ready for ``json.dumps``; the inverse is ``plan_of_document``."""
    document = PlanDocument(
        1,
        _device_document(plan.device),
        _policy_document(plan.policy),
        [_layer_document(layer) for layer in plan.layers],
        [SkippedDocument(skipped.name, skipped.reason) for skipped in plan.skipped],
        [FindingDocument(f.severity, f.code, f.message, f.layer) for f in plan.findings],
    )
    built: dict[str, Any] = msgspec.to_builtins(document)
    return built


def plan_of_document(document: Mapping[str, Any] | bytes | str) -> ModelPlan:
    """The plan that a document (builtin values or JSON text) describes.

    Raises FormatError, saying where, if it is no plan document of schema 1.
    """
    try:
        if isinstance(document, (bytes, str)):
            parsed = msgspec.json.decode(document, type=PlanDocument)
        else:
            parsed = msgspec.convert(document, PlanDocument)
    except (msgspec.ValidationError, msgspec.DecodeError) as error:
        msg = f"not a plan document of schema {SCHEMA_VERSION}: {error}"
        raise FormatError(msg) from None
    return ModelPlan(
        _device(parsed.device),
        _policy(parsed.policy),
        tuple(_layer(layer) for layer in parsed.layers),
        tuple(SkippedLayer(skipped.name, skipped.reason) for skipped in parsed.skipped),
        tuple(Finding(f.severity, f.code, f.message, f.layer) for f in parsed.findings),
    )


def plan_schema() -> dict[str, Any]:
    """The JSON schema of plan documents; ``plan.schema.json`` beside this file is a copy."""
    schema = msgspec.json.schema(PlanDocument)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "blockscale plan",
        **schema,
    }


def _device_document(device: Device) -> DeviceDocument:
    return DeviceDocument(
        device.name,
        device.architecture,
        device.capability,
        device.sm_count,
        device.memory_bytes,
        device.cuda,
        None if device.packages is None else dict(device.packages),
        [
            ProofDocument(p.backend, p.out_dtype, p.verdict, p.detail, p.arrangement)
            for p in device.proofs
        ],
    )


def _device(document: DeviceDocument) -> Device:
    packages = document.packages
    return Device(
        document.name,
        document.capability,
        document.sm_count,
        document.memory_bytes,
        document.cuda,
        None if packages is None else tuple(packages.items()),
        tuple(
            Proof(p.backend, p.out_dtype, p.verdict, p.detail, p.arrangement)
            for p in document.proofs
        ),
    )


def _policy_document(policy: PlanPolicy) -> PolicyDocument:
    return PolicyDocument(
        None if policy.backends is None else list(policy.backends),
        policy.exactness,
        policy.max_relative_error,
        policy.determinism,
        policy.strictness,
        policy.proving,
    )


def _policy(document: PolicyDocument) -> PlanPolicy:
    return PlanPolicy(
        None if document.backends is None else tuple(document.backends),
        document.exactness,
        document.max_relative_error,
        document.determinism,
        document.strictness,
        document.proving,
    )


def _layer_document(plan: LinearPlan) -> LayerDocument:
    request = plan.request
    last = plan.choices[-1].offer.activation if plan.choices else None
    unsplit = request.shard.unsplit_block
    return LayerDocument(
        name=request.name,
        n=request.n,
        k=request.k,
        backends=[_choice_document(choice) for choice in plan.choices],
        weight_format=plan.weight.format.name if plan.weight else None,
        weight_scale_layout=plan.weight.layout.name if plan.weight else None,
        activation_scale_layout=last.layout.name if last else None,
        conversion=plan.conversion,
        lossless=plan.is_lossless,
        rejected=[_rejection_document(r) for r in plan.rejected],
        format=request.format.name,
        activation_dtype=request.activation_dtype,
        out_dtype=request.out_dtype,
        power_of_two=request.power_of_two,
        parts=list(request.parts),
        bias=request.has_bias,
        shard=ShardDocument(
            request.shard.style,
            request.shard.degree,
            list(request.shard.split_blocks),
            (unsplit.mn, unsplit.k) if unsplit else None,
            request.shard.remedy or msgspec.UNSET,
        ),
        experts=request.experts,
    )


def _rejection_document(rejection: Rejection) -> RejectionDocument:
    extra = msgspec.UNSET if rejection.copy_bytes is None else rejection.copy_bytes
    return RejectionDocument(rejection.backend, rejection.obstacle, rejection.reason, extra)


def _rejection(document: RejectionDocument) -> Rejection:
    extra = document.copy_bytes
    return Rejection(
        document.backend,
        document.obstacle,
        document.reason,
        None if isinstance(extra, msgspec.UnsetType) else extra,
    )


def _choice_document(choice: Choice) -> ChoiceDocument:
    offer = choice.offer
    return ChoiceDocument(
        backend=offer.backend,
        min_m=choice.m_range.min_m,
        max_m=choice.m_range.max_m,
        offered_min_m=offer.m_range.min_m,
        offered_max_m=offer.m_range.max_m,
        activation_format=offer.activation.format.name if offer.activation else None,
        activation_scale_layout=offer.activation.layout.name if offer.activation else None,
        deterministic=offer.is_deterministic,
        evidence=offer.evidence,
        readiness=offer.readiness,
        notes=list(offer.notes),
        rows=[
            RowsDocument(r.m_range.min_m, r.m_range.max_m, r.arrangement, r.alignment)
            for r in offer.rows
        ],
        reason=choice.reason,
    )


def _layer(document: LayerDocument) -> LinearPlan:
    shard = document.shard
    unsplit = BlockShape(*shard.unsplit_block) if shard.unsplit_block else None
    request = LinearRequest(
        document.name,
        document.n,
        document.k,
        block_format_named(document.format),
        document.activation_dtype,
        document.out_dtype,
        document.power_of_two,
        tuple(document.parts),
        document.bias,
        Shard(shard.style, shard.degree, tuple(shard.split_blocks), unsplit, shard.remedy or None),
        document.experts,
    )
    weight = _form(document.weight_format, document.weight_scale_layout)
    if (weight is None) != (not document.backends):
        msg = f"layer {document.name!r}: a plan has a weight format if and only if it has backends"
        raise FormatError(msg)
    return LinearPlan(
        request,
        tuple(_choice(choice, weight) for choice in document.backends if weight is not None),
        weight,
        document.conversion,
        document.lossless,
        tuple(_rejection(r) for r in document.rejected),
    )


def _choice(document: ChoiceDocument, weight: OperandForm) -> Choice:
    offer = Offer(
        document.backend,
        weight,
        _form(document.activation_format, document.activation_scale_layout),
        MRange(document.offered_min_m, document.offered_max_m),
        document.deterministic,
        document.evidence,
        document.readiness,
        tuple(document.notes),
        tuple(
            GroupedRows(MRange(r.min_m, r.max_m), r.arrangement, r.alignment) for r in document.rows
        ),
    )
    return Choice(MRange(document.min_m, document.max_m), offer, document.reason)


def _form(fmt: str | None, layout: str | None) -> OperandForm | None:
    if fmt is None or layout is None:
        return None
    return OperandForm(block_format_named(fmt), scale_layout_named(layout))
