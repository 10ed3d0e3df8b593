"""``blockscale tune``: measure this machine, so that plans choose by time."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from blockscale.cli.options import CheckpointPath, DTypeOption, Json
from blockscale.cli.output import ExitCode, console, print_json, progress, table
from blockscale.errors import SettingsError

if TYPE_CHECKING:
    from blockscale.planning.device import Measurement


def tune(
    path: CheckpointPath,
    dtype: DTypeOption = None,
    tp: Annotated[int, typer.Option(help="Tensor parallel degree.")] = 1,
    tokens: Annotated[
        str, typer.Option(help="Token counts to measure, separated by commas.")
    ] = "1,8,16,32,64,128,256,512,1024,2048,4096",
    out: Annotated[
        Path | None,
        typer.Option(help="Where to write the table; default: kept for this machine's plans."),
    ] = None,
    as_json: Json = False,
) -> int:
    """Measure every backend on a checkpoint's layer shapes; later plans use the times."""
    from blockscale.backends.registry import all_backends
    from blockscale.checkpoint.read import read_checkpoint
    from blockscale.checkpoint.requests import RequestOptions, dtype_of_config, requests_of
    from blockscale.checkpoint.schema import Foreign, read_layers
    from blockscale.planning.sharding import Parallelism
    from blockscale.probe.machine import detect_device
    from blockscale.probe.measured import kept_path
    from blockscale.probe.tuning import make_room, save_measurements
    from blockscale.probe.tuning import tune as measure

    counts = _counts(tokens)
    checkpoint = read_checkpoint(path)
    layers = read_layers(checkpoint, Foreign.REPORT)
    options = RequestOptions(dtype.dtype if dtype else dtype_of_config(checkpoint), Parallelism(tp))
    requests = requests_of(checkpoint, layers, options).requests
    device = detect_device()
    shapes = {(request.n, request.k) for request in requests if request.experts is None}
    place = out or kept_path(device)
    make_room(place)
    with progress(
        "measuring", len(shapes) * len(counts) * len(all_backends()), unit="times"
    ) as advance:
        found = measure(requests, device, all_backends(), counts, lambda _: advance(1))
    save_measurements(place, device, found)
    if as_json:
        print_json(
            {"device": device.name, "path": str(place), "rows": [_row(one) for one in found]}
        )
        return ExitCode.FINE
    _print(found)
    console().print(f"\n{len(found)} times kept in {place}", soft_wrap=True)
    return ExitCode.FINE


def _counts(text: str) -> tuple[int, ...]:
    try:
        counts = tuple(int(part) for part in text.split(","))
    except ValueError:
        counts = ()
    if not counts or min(counts) < 1:
        msg = f"--tokens {text!r} is no list of token counts; write 1,16,256"
        raise SettingsError(msg)
    return counts


def _row(one: Measurement) -> dict[str, object]:
    return {
        "backend": one.backend,
        "n": one.n,
        "k": one.k,
        "out_dtype": one.out_dtype.value,
        "m": one.m,
        "time_us": one.time_us,
    }


def _print(found: tuple[Measurement, ...]) -> None:
    backends = list(dict.fromkeys(one.backend for one in found))
    times: dict[tuple[int, int, int], dict[str, float]] = {}
    for one in found:
        times.setdefault((one.n, one.k, one.m), {})[one.backend] = one.time_us
    rows = table("N", "K", "M", *backends, "fastest", numbers=("N", "K", "M", *backends))
    for (n, k, m), by_backend in times.items():
        cells = [f"{by_backend[b]:.1f} us" if b in by_backend else "" for b in backends]
        rows.add_row(str(n), str(k), str(m), *cells, min(by_backend, key=lambda b: by_backend[b]))
    console().print(rows)
