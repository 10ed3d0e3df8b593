"""Quantized layers of a checkpoint as the planner's requests, merged as engines merge them.

Which projections are merged and how tensor parallelism cuts each is a table of names
(``PROJECTIONS``), taken from SGLang's and vLLM's model classes. A name that is not in it is planned
whole, and a finding says so.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import TYPE_CHECKING

from blockscale.errors import CheckpointError
from blockscale.formats import DType, PowerOfTwo, ScaleFormat
from blockscale.planning.explain import layer_count
from blockscale.planning.plan import Finding, Severity
from blockscale.planning.request import LinearRequest, ShardStyle
from blockscale.planning.sharding import Parallelism, WholeLayer, cut

if TYPE_CHECKING:
    from collections.abc import Collection

    from blockscale.checkpoint.read import Checkpoint
    from blockscale.checkpoint.schema import Layers, QuantizedLayer


class Merging(Enum):
    """Which weights become one layer of the plan."""

    ENGINE = "engine"
    """q, k, v together; gate and up together; experts stacked: as serving engines run them."""
    MODULE = "module"
    """Every stored weight by itself, experts stacked: as transformers' modules have them."""


@dataclass(frozen=True, slots=True)
class Projection:
    """How engines treat a weight of this name."""

    merged: str
    position: int
    style: ShardStyle
    heads_key: str | None = None


_COLUMN, _ROW, _WHOLE = ShardStyle.COLUMN, ShardStyle.ROW, ShardStyle.WHOLE
_HEADS, _KV_HEADS = "num_attention_heads", "num_key_value_heads"

PROJECTIONS: dict[str, Projection] = {
    "q_proj": Projection("qkv_proj", 0, _COLUMN, _HEADS),
    "k_proj": Projection("qkv_proj", 1, _COLUMN, _KV_HEADS),
    "v_proj": Projection("qkv_proj", 2, _COLUMN, _KV_HEADS),
    "o_proj": Projection("o_proj", 0, _ROW),
    "gate_proj": Projection("gate_up_proj", 0, _COLUMN),
    "up_proj": Projection("gate_up_proj", 1, _COLUMN),
    "down_proj": Projection("down_proj", 0, _ROW),
    "gate_up_proj": Projection("gate_up_proj", 0, _COLUMN),
    "qkv_proj": Projection("qkv_proj", 0, _COLUMN),
    "w1": Projection("w13", 0, _COLUMN),
    "w3": Projection("w13", 1, _COLUMN),
    "w2": Projection("w2", 0, _ROW),
    # MLA (DeepSeek, Kimi, GLM-5): the two small down-projections are one replicated GEMM.
    "q_a_proj": Projection("fused_qkv_a_proj", 0, _WHOLE),
    "kv_a_proj_with_mqa": Projection("fused_qkv_a_proj", 1, _WHOLE),
    "q_b_proj": Projection("q_b_proj", 0, _COLUMN, _HEADS),
    "kv_b_proj": Projection("kv_b_proj", 0, _COLUMN, _HEADS),
    "wq_b": Projection("wq_b", 0, _WHOLE),
    "wk": Projection("wk", 0, _WHOLE),
}
# Weights that lie merged on disk already, with one scale grid. Cutting cuts each part by itself.
FUSED = {
    "gate_up_proj": ("gate_proj", "up_proj"),
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
}
# Inside an expert the same roles have the names of the stacked parameters.
EXPERT_MERGED = {"gate_up_proj": "w13", "down_proj": "w2"}

# A number as engines write it: "02" would be another expert's name, and theirs is 2.
_EXPERT = re.compile(r"^(?P<prefix>.*\.experts)\.(?P<index>0|[1-9][0-9]*)\.(?P<leaf>[^.]+)$")
_ALIKE = "one kernel runs all experts of a layer, so quantize them alike"


@dataclass(frozen=True, slots=True)
class Requests:
    """What to plan on one rank, and what is odd about it."""

    requests: tuple[LinearRequest, ...]
    findings: tuple[Finding, ...]


@dataclass(frozen=True, slots=True)
class MergedLayer:
    """An uncut layer and the stored weights that it is made of.

    ``members``: for each expert (one, if the layer is dense or its experts lie in one tensor) the
    weights of its parts, in the order of ``whole.request.parts``.
    """

    whole: WholeLayer
    members: tuple[tuple[QuantizedLayer, ...], ...]


@dataclass(frozen=True, slots=True)
class MergedLayers:
    """All layers of a checkpoint as they are planned, uncut, and what is odd about them."""

    layers: tuple[MergedLayer, ...]
    findings: tuple[Finding, ...]
    unknown: Mapping[str, int]
    """Leaves that ``PROJECTIONS`` does not know, and how many layers have each."""


@dataclass(frozen=True, slots=True)
class RequestOptions:
    """How requests are made from a checkpoint.

    ``power_of_two`` maps layer names to what reading their scales found; layers that are missing
    count as unknown if their scales are float32.
    """

    activation_dtype: DType
    parallelism: Parallelism = field(default_factory=Parallelism)
    merging: Merging = Merging.ENGINE
    power_of_two: Mapping[str, PowerOfTwo] | None = None


def dtype_of_config(checkpoint: Checkpoint) -> DType:
    """The dtype that config.json declares for the model, bfloat16 if it declares none.

    Raises CheckpointError for a dtype that no layer can run in.
    """
    config = checkpoint.config
    declared = config.get("dtype", config.get("torch_dtype"))
    if declared is None and isinstance(config.get("text_config"), Mapping):
        text = config["text_config"]
        declared = text.get("dtype", text.get("torch_dtype"))
    if declared is None:
        return DType.BFLOAT16
    for known in DType:
        if declared == known.value:
            return known
    names = ", ".join(known.value for known in DType)
    raise CheckpointError(
        checkpoint.config_path,
        f"declares dtype {declared!r}; known: {names}; give one with --dtype",
    )


def requests_of(checkpoint: Checkpoint, layers: Layers, options: RequestOptions) -> Requests:
    """One request for each layer that one rank runs, in checkpoint order.

    Raises CheckpointError, naming the tensors, if experts that should be stacked differ in shape or
    format, or one of them lacks a weight.
    """
    merged = merged_layers(checkpoint, layers, options)
    results = [cut(layer.whole, options.parallelism) for layer in merged.layers]
    return Requests(
        tuple(result for result in results if isinstance(result, LinearRequest)),
        (
            *merged.findings,
            *(result for result in results if isinstance(result, Finding)),
            *unknown_projections(merged, options.parallelism),
        ),
    )


def merged_layers(checkpoint: Checkpoint, layers: Layers, options: RequestOptions) -> MergedLayers:
    """Every layer uncut, in checkpoint order, whatever the degrees. Raises as ``requests_of``."""
    groups, unmerged = _grouped(layers, options.merging)
    _check_whole_stacks(checkpoint, layers)
    findings = tuple(
        Finding(
            Severity.NOTE,
            "not_merged",
            f"engines merge the parts of {leaf}, here those of {layer_count(reasons.total())} are "
            f"planned one by one: {'; '.join(reasons)}",
        )
        for leaf, reasons in unmerged.items()
    )
    unknown: dict[str, int] = defaultdict(int)
    found = []
    for name, members in groups.items():
        found.append(_merged_layer(checkpoint, name, members, options))
        if _leaf(members[0].name) not in PROJECTIONS:
            unknown[_leaf(members[0].name)] += 1
    return MergedLayers(tuple(found), findings, unknown)


def unknown_projections(merged: MergedLayers, parallelism: Parallelism) -> tuple[Finding, ...]:
    """What to say about layers that nobody knows how to cut, where cutting was asked for."""
    if parallelism.tensor == 1:
        return ()
    return tuple(
        Finding(
            Severity.NOTE,
            "unknown_projection",
            f"{count} layers named {leaf!r} are planned whole on every rank: it is not known "
            "how engines cut them",
        )
        for leaf, count in merged.unknown.items()
    )


def _grouped(
    layers: Layers, merging: Merging
) -> tuple[dict[str, list[QuantizedLayer]], dict[str, Counter[str]]]:
    """Layers by the name they are planned under; and which merged leaves fell apart, and why."""
    merged: dict[str, list[QuantizedLayer]] = defaultdict(list)
    for layer in layers.quantized:
        is_alone = merging is Merging.MODULE and not _are_experts([layer])
        merged[layer.name if is_alone else _merged_name(layer)].append(layer)
    if merging is Merging.MODULE:
        return dict(merged), {}
    unquantized = {layer.name for layer in layers.skipped}
    groups: dict[str, list[QuantizedLayer]] = {}
    unmerged: dict[str, Counter[str]] = defaultdict(Counter)
    for name, members in merged.items():
        if _are_experts(members):
            groups[name] = members
            continue
        reason = _cannot_merge(name, members, unquantized)
        if reason is not None:
            unmerged[_leaf(name)][reason] += 1
        if reason is None and len(members) > 1:
            groups[name] = members
        else:
            groups.update((member.name, [member]) for member in members)
    return groups, unmerged


def _are_experts(members: list[QuantizedLayer]) -> bool:
    """Whether these are stacked whatever they look like: no kernel runs their parts one by one."""
    return members[0].stacked is not None or _EXPERT.match(members[0].name) is not None


def _cannot_merge(
    name: str, members: list[QuantizedLayer], unquantized: Collection[str]
) -> str | None:
    """Why stored weights cannot become one weight with one scale grid; None if they can."""
    prefix, _, merged = name.rpartition(".")
    siblings = (leaf for leaf, known in PROJECTIONS.items() if known.merged == merged)
    left_out = [leaf for leaf in siblings if f"{prefix}.{leaf}".lstrip(".") in unquantized]
    if left_out:
        return f"{' and '.join(left_out)} stayed unquantized"
    parts = sorted(members, key=lambda part: _position(part.name))
    for part in parts[1:]:
        if (part.k, part.format) != (parts[0].k, parts[0].format):
            return (
                f"{_leaf(part.name)} has K={part.k} and {part.format}, {_leaf(parts[0].name)} has "
                f"K={parts[0].k} and {parts[0].format}"
            )
    for part in parts[:-1]:
        if part.n % part.format.block.mn:
            return (
                f"the {part.n} rows of {_leaf(part.name)} end inside a block of "
                f"{part.format.block.mn} rows, so a merged weight would have no scale grid"
            )
    return None


def _merged_name(layer: QuantizedLayer) -> str:
    expert = _EXPERT.match(layer.name)
    prefix, _, leaf = layer.name.rpartition(".")
    projection = PROJECTIONS.get(leaf)
    merged = projection.merged if projection else leaf
    if expert or (layer.stacked and prefix.endswith("experts")):
        prefix = expert["prefix"] if expert else prefix
        merged = EXPERT_MERGED.get(merged, merged)
    return f"{prefix}.{merged}" if prefix else merged


def _merged_layer(
    checkpoint: Checkpoint, name: str, members: list[QuantizedLayer], options: RequestOptions
) -> MergedLayer:
    parts = _parts(members)
    first = members[0]
    experts = _expert_count(members, parts)
    request = LinearRequest(
        name=name,
        n=sum(part.n for part in parts),
        k=first.k,
        format=first.format,
        activation_dtype=options.activation_dtype,
        out_dtype=options.activation_dtype,
        power_of_two=_power_of_two(members, options),
        parts=tuple(part.n for part in parts),
        has_bias=any(part.name + ".bias" in checkpoint.tensors for part in parts),
        experts=experts,
    )
    whole = _with_style(checkpoint, WholeLayer(request), parts)
    return MergedLayer(whole, _by_expert(members, len(parts)))


def _with_style(
    checkpoint: Checkpoint, whole: WholeLayer, parts: list[QuantizedLayer]
) -> WholeLayer:
    """How engines cut the layer, by the names of its parts; uncut if they are not known."""
    first = parts[0]
    projection = PROJECTIONS.get(_leaf(first.name))
    if projection is None:
        return whole
    labels = tuple(_leaf(part.name) for part in parts)
    fused: tuple[int, ...] = ()
    if len(parts) == 1 and labels[0] in FUSED:
        labels = FUSED[labels[0]]
        fused = _fused_parts(checkpoint, first)
        if len(fused) != len(labels):
            return replace(whole, style=projection.style)
    units = tuple(_heads(checkpoint, label, whole.request.experts) for label in labels)
    shared = tuple(PROJECTIONS[label].heads_key == _KV_HEADS for label in labels)
    return WholeLayer(whole.request, projection.style, labels, units, shared, fused)


def _by_expert(members: list[QuantizedLayer], parts: int) -> tuple[tuple[QuantizedLayer, ...], ...]:
    """Members in the order of their experts' numbers, then of their parts."""

    def order(member: QuantizedLayer) -> tuple[int, int]:
        expert = _EXPERT.match(member.name)
        return int(expert["index"]) if expert else 0, _position(member.name)

    ordered = sorted(members, key=order)
    return tuple(tuple(ordered[first : first + parts]) for first in range(0, len(ordered), parts))


def _fused_parts(checkpoint: Checkpoint, layer: QuantizedLayer) -> tuple[int, ...]:
    """Rows of each weight that was merged before it was stored; all rows if they cannot be told."""
    leaves = FUSED[_leaf(layer.name)]
    shares = [_heads(checkpoint, leaf, layer.stacked) for leaf in leaves]
    if all(PROJECTIONS[leaf].heads_key is None for leaf in leaves):
        shares = [1] * len(leaves)
    known = [share for share in shares if share is not None]
    if len(known) < len(leaves) or layer.n % sum(known):
        return (layer.n,)
    return tuple(layer.n // sum(known) * share for share in known)


def _parts(members: list[QuantizedLayer]) -> list[QuantizedLayer]:
    """One member for each merged part, in engine order; all must agree in K and format."""
    by_leaf: dict[str, QuantizedLayer] = {}
    for member in members:
        other = by_leaf.setdefault(_leaf(member.name), member)
        if (member.n, member.k, member.format) != (other.n, other.k, other.format):
            raise CheckpointError(
                member.weight.path,
                f"is {member.n}x{member.k} {member.format}, unlike {other.weight.name} "
                f"({other.n}x{other.k} {other.format}) with which it is stacked; {_ALIKE}",
                tensor=member.weight.name,
            )
    parts = sorted(by_leaf.values(), key=lambda part: _position(part.name))
    for part in parts[1:]:
        if (part.k, part.format) != (parts[0].k, parts[0].format):
            raise CheckpointError(
                part.weight.path,
                f"has K={part.k} and {part.format}, unlike {parts[0].weight.name} "
                f"(K={parts[0].k}, {parts[0].format}) with which engines merge it",
                tensor=part.weight.name,
            )
    return parts


def _expert_count(members: list[QuantizedLayer], parts: list[QuantizedLayer]) -> int | None:
    """Stacked experts, or None for a dense layer. Raises if an expert lacks a part."""
    if members[0].stacked is not None:
        return members[0].stacked
    if _EXPERT.match(members[0].name) is None:
        return None
    leaves = {_leaf(part.name) for part in parts}
    found: dict[str, set[str]] = defaultdict(set)
    for member in members:
        found[member.name.rpartition(".")[0]].add(_leaf(member.name))
    for expert, has in found.items():
        if has != leaves:
            raise CheckpointError(
                members[0].weight.path.parent,
                f"lacks FP8 {' and '.join(sorted(leaves - has))}, which the experts beside it "
                f"have; {_ALIKE}, or download the files again",
                tensor=expert,
            )
    return len(found)


def _check_whole_stacks(checkpoint: Checkpoint, layers: Layers) -> None:
    """Raises if an expert is not in block FP8, but others of its stack are.

    Without it the stack would be planned one expert short, and those behind it under wrong numbers.
    """
    stacks = {stack for layer in layers.quantized if (stack := _stack_of(layer.name)) is not None}
    others = [(layer.name, layer.reason) for layer in layers.skipped]
    others += [(layer.name, layer.detail) for layer in layers.foreign]
    for name, what in others:
        if _stack_of(name) in stacks:
            raise CheckpointError(
                checkpoint.path,
                f"is {what}; experts beside it are block FP8: {_ALIKE}",
                tensor=name,
            )


def _stack_of(name: str) -> str | None:
    """The stack that an expert's weight is part of, None if it is no expert's."""
    expert = _EXPERT.match(name)
    if expert is None:
        return None
    projection = PROJECTIONS.get(expert["leaf"])
    merged = projection.merged if projection else expert["leaf"]
    return f"{expert['prefix']}.{EXPERT_MERGED.get(merged, merged)}"


def _power_of_two(members: list[QuantizedLayer], options: RequestOptions) -> PowerOfTwo:
    if members[0].format.scale is ScaleFormat.UE8M0:
        return PowerOfTwo.YES
    known = options.power_of_two or {}
    found = {known.get(member.name, PowerOfTwo.UNKNOWN) for member in members}
    if PowerOfTwo.NO in found:
        return PowerOfTwo.NO
    return PowerOfTwo.UNKNOWN if PowerOfTwo.UNKNOWN in found else PowerOfTwo.YES


def _heads(checkpoint: Checkpoint, leaf: str, experts: int | None) -> int | None:
    projection = PROJECTIONS.get(leaf)
    if projection is None or projection.heads_key is None or experts is not None:
        return None
    config = checkpoint.config
    text = config.get("text_config")
    for source in (config, text):
        if isinstance(source, Mapping):
            heads = source.get(projection.heads_key, source.get(_HEADS))
            if isinstance(heads, int) and heads > 0:
                return heads
    return None


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _position(name: str) -> int:
    projection = PROJECTIONS.get(_leaf(name))
    return projection.position if projection else 0
