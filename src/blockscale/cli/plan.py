"""``blockscale plan``: which backend serves which layer, and why no other does."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from blockscale.cli.advise import print_advice
from blockscale.cli.options import (
    AllowLossy,
    Backends,
    DTypeOption,
    HeadersPath,
    Json,
    LayersOf,
    device_from,
    policy_from,
)
from blockscale.cli.output import ExitCode, console, print_findings, print_json, progress, table
from blockscale.cli.source import check_has_data, open_headers

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.console import Console

    from blockscale.checkpoint.read import Checkpoint
    from blockscale.checkpoint.requests import RequestOptions
    from blockscale.checkpoint.schema import Layers
    from blockscale.formats import PowerOfTwo
    from blockscale.planning.plan import LinearPlan, ModelPlan
    from blockscale.planning.sharded import Target

# Reasons that the summary leaves out: --explain gives them, and findings name every split block.
_OBVIOUS = ("excluded_by_policy", "outranked", "shard_splits_block")
SHOWN_REASONS = 2


def plan(
    path: HeadersPath,
    device: Annotated[
        str | None,
        typer.Option(help="cpu, sm_80 ... sm_121; default: this machine.", show_default=False),
    ] = None,
    dtype: DTypeOption = None,
    tp: Annotated[int, typer.Option(help="Tensor parallel degree.")] = 1,
    ep: Annotated[int, typer.Option(help="Expert parallel degree, a divisor of --tp.")] = 1,
    backend: Backends = None,
    allow_lossy: AllowLossy = False,
    read_scales: Annotated[
        bool, typer.Option("--read-scales", help="Read all scales: are they powers of two?")
    ] = False,
    explain: Annotated[
        bool, typer.Option("--explain", help="Every backend's reasons for every kind of layer.")
    ] = False,
    layers_of: Annotated[
        LayersOf,
        typer.Option("--layers", help="engine: merged as engines do; module: as transformers has."),
    ] = LayersOf.ENGINE,
    save: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the plan to run it elsewhere.")
    ] = None,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a report, one page for a browser.")
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit with 1 if a layer has no backend.")
    ] = False,
    advise: Annotated[
        bool, typer.Option("--advise", help="Which --tp and --ep work, and what each costs.")
    ] = False,
    as_json: Json = False,
) -> int:
    """Decide which backend serves each layer, from headers alone."""
    from blockscale.backends.registry import all_backends
    from blockscale.checkpoint.rank_plan import plan_rank
    from blockscale.checkpoint.requests import RequestOptions, dtype_of_config
    from blockscale.checkpoint.schema import Foreign, read_layers
    from blockscale.planning.explain import explain_model
    from blockscale.planning.sharded import Target
    from blockscale.planning.sharding import Parallelism

    parallelism = Parallelism(tp, ep)
    policy = policy_from(backend, allow_lossy=allow_lossy)
    target = Target(device_from(device), policy, all_backends())
    checkpoint = open_headers(path)
    activation = dtype.dtype if dtype else dtype_of_config(checkpoint)
    if advise:
        print_advice(checkpoint, activation, target, as_json=as_json)
        return ExitCode.FINE
    if read_scales:
        check_has_data(checkpoint)
    layers = read_layers(checkpoint, Foreign.REPORT)
    options = RequestOptions(
        activation,
        parallelism,
        layers_of.merging,
        power_of_two=_read_scales(layers) if read_scales else None,
    )
    planned = plan_rank(checkpoint, layers, options, target).plan
    if save is not None:
        from blockscale.checkpoint.plan_file import saved_plan, write_plan

        write_plan(save, saved_plan(planned, checkpoint, options))
    if html is not None:
        _write_report(html, planned, checkpoint, options, target)
    if as_json:
        from blockscale.planning.serialize import plan_document

        print_json(plan_document(planned))
    elif explain:
        print(explain_model(planned))
    else:
        _print_plan(planned, options)
    return ExitCode.FINDING if strict and _is_unservable(planned) else ExitCode.FINE


def _write_report(
    file: Path,
    planned: ModelPlan,
    checkpoint: Checkpoint,
    options: RequestOptions,
    target: Target,
) -> None:
    from blockscale.checkpoint.advice import advise as plan_degrees
    from blockscale.checkpoint.plan_file import write_text
    from blockscale.checkpoint.schema import read_layers
    from blockscale.report.plan_page import Subject, plan_page

    parallel = options.parallelism
    dtype = options.activation_dtype
    advice = plan_degrees(checkpoint, read_layers(checkpoint), dtype, target)
    subject = Subject(str(checkpoint.path), dtype.value, parallel.tensor, parallel.expert)
    write_text(file, plan_page(planned, subject, advice))


def _is_unservable(planned: ModelPlan) -> bool:
    from blockscale.planning.plan import Severity

    return any(finding.severity is Severity.FAULT for finding in planned.findings)


def _read_scales(layers: Layers) -> Mapping[str, PowerOfTwo]:
    from blockscale.checkpoint.scales import read_power_of_two

    with progress("reading scales", len(layers.quantized), unit="layers") as advance:
        return read_power_of_two(layers.quantized, advance)


def _print_plan(planned: ModelPlan, options: object) -> None:
    from blockscale.checkpoint.requests import RequestOptions
    from blockscale.planning.explain import layer_count, layer_groups

    assert isinstance(options, RequestOptions)
    out = console()
    parallel = options.parallelism
    shards = f", one rank of tp={parallel.tensor} ep={parallel.expert}"
    out.print(
        f"{_device_words(planned)}, {options.activation_dtype.value} activations"
        f"{shards if parallel.tensor > 1 else ''}: {layer_count(len(planned.layers))}, "
        f"{len(planned.skipped)} left unquantized\n"
    )
    if planned.layers:
        rows = table(
            "layers",
            "name",
            "N",
            "K",
            "backend",
            "weight",
            numbers=("layers", "N", "K"),
            unbroken=("layers", "name", "N", "K", "backend"),
        )
        for group in layer_groups(planned.layers):
            request = group.plan.request
            shape = f"{request.experts} x {request.n}" if request.experts else str(request.n)
            rows.add_row(
                str(len(group.names)),
                group.pattern,
                shape,
                str(request.k),
                _backend_words(group.plan),
                _weight_words(group.plan),
            )
        out.print(rows)
        if any(len(layer.choices) > 1 for layer in planned.layers):
            out.print("M: tokens in one forward pass")
        _print_rejections(out, planned)
    if planned.findings:
        out.print()
        print_findings(out, planned.findings, None)


def _device_words(planned: ModelPlan) -> str:
    device = planned.device
    if device.name == device.architecture:
        return device.name
    return device.name if device.is_cpu else f"{device.name} ({device.architecture})"


def _backend_words(layer: LinearPlan) -> str:
    if not layer.is_servable:
        return "none"
    if len(layer.choices) == 1:
        return layer.choices[0].offer.backend
    return "\n".join(f"{choice.offer.backend} ({choice.m_range})" for choice in layer.choices)


def _weight_words(layer: LinearPlan) -> str:
    """``as stored``, or what prepare does to it and where the scales then lie."""
    if layer.weight is None:
        return ""
    if layer.conversion.value == "none":
        return _held_words(layer)
    loss = {True: "lossless", False: "lossy", None: "lossless only if powers of two"}
    scale, layout = layer.weight.format.scale.value, layer.weight.layout
    return f"{layer.conversion.value} to {scale} {layout} ({loss[layer.is_lossless]})"


def _held_words(layer: LinearPlan) -> str:
    """How the shard differs from a slice of the checkpoint, if it does."""
    remedy = layer.request.shard.remedy
    if remedy is None:
        return "as stored"
    if remedy.value == "refine":
        return f"scales repeated for {layer.request.format.block} (lossless)"
    return {"uneven": "whole blocks, uneven shares", "pad": "zeros to the next block"}[remedy.value]


def _print_rejections(out: Console, planned: ModelPlan) -> None:
    """Each rejected backend with its commonest reasons and for how many layers they hold."""
    reasons: dict[str, Counter[str]] = {}
    elsewhere = {
        rejection.backend
        for rejection in planned.layers[0].rejected
        if rejection.obstacle.value == "architecture"
    }
    for layer in planned.layers:
        for rejection in layer.rejected:
            if rejection.backend not in elsewhere and rejection.obstacle.value not in _OBVIOUS:
                reasons.setdefault(rejection.backend, Counter())[rejection.reason] += 1
    out.print()
    if elsewhere:
        names = ", ".join(sorted(elsewhere))
        out.print(f"not for {planned.device.architecture}: {names}", soft_wrap=True)
    if not reasons:
        return
    out.print()
    rows = table("not chosen", "layers", "why", numbers=("layers",))
    for backend, counts in reasons.items():
        for reason, count in counts.most_common(SHOWN_REASONS):
            rows.add_row(backend, str(count), reason)
        hidden = len(counts) - SHOWN_REASONS
        if hidden > 0:
            rows.add_row(backend, "", f"and {hidden} more; see --explain")
    out.print(rows)
