"""Measuring how long each backend takes for given layers on this machine.

The matrix product alone is timed, activations quantized before, weights rotated through more memory
than the last-level cache holds. On a GPU by replaying CUDA graphs, on a CPU by the clock. Backends
take turns, so that a machine that slows down slows them all.
"""

from __future__ import annotations

import errno
import json
import os
import statistics
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

import torch

from blockscale.errors import SettingsError
from blockscale.modules.prepare import prepare_weight
from blockscale.planning.decision import Offer, Readiness
from blockscale.planning.device import Measurement, Verdict
from blockscale.planning.planner import plan_linear
from blockscale.planning.policy import PlanPolicy
from blockscale.probe import cases
from blockscale.tensor import torch_dtype

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    from blockscale.backends.base import Backend
    from blockscale.formats import DType
    from blockscale.planning.decision import PlannableBackend
    from blockscale.planning.device import Device
    from blockscale.planning.request import LinearRequest
    from blockscale.tensor import BlockScaledTensor

TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
# More than twice the largest last-level cache in KNOWN_DEVICES (B200: 126 MB; EPYC: 32 MB a die).
ROTATION_BYTES = 300 << 20
MAX_COPIES = 32
ROUNDS = 9


@dataclass(frozen=True, slots=True)
class _Candidate:
    """One backend's product for one layer and token count; ``calls`` differ in the weight copy."""

    backend: str
    calls: tuple[Callable[[], None], ...]


def tune(
    requests: Iterable[LinearRequest],
    device: Device,
    backends: Sequence[PlannableBackend],
    tokens: Sequence[int] = TOKENS,
    report: Callable[[Measurement], None] | None = None,
) -> tuple[Measurement, ...]:
    """Times of every backend that can run these layers here, for each token count.

    Layers of equal (N, K) and output dtype are measured once. Backends that failed the probe are
    left out. Raises BackendError if a provider fails at prepare.
    """
    found: list[Measurement] = []
    seen: set[tuple[int, int, DType]] = set()
    for request in requests:
        key = (request.n, request.k, request.out_dtype)
        if key in seen or request.experts is not None:
            continue
        seen.add(key)
        bound = _bound(request, device, backends)
        for m in tokens:
            for backend, seconds in _times(request, m, bound).items():
                one = Measurement(backend, *key, m, round(seconds * 1e6, 3))
                found.append(one)
                if report is not None:
                    report(one)
    return tuple(found)


def save_measurements(path: Path, device: Device, measurements: Sequence[Measurement]) -> None:
    """Write a table with what it was measured on; ``load_measurements`` reads it."""
    rows = [[m.backend, m.n, m.k, m.out_dtype.value, m.m, m.time_us] for m in measurements]
    document = {
        "schema": 1,
        "device": device.name,
        "packages": dict(device.packages or ()),
        "date": time.strftime("%Y-%m-%d"),
        "columns": ["backend", "n", "k", "out_dtype", "m", "time_us"],
        "rows": rows,
    }
    make_room(path)
    path.write_text(json.dumps(document, indent=0) + "\n", encoding="utf-8")


def make_room(path: Path) -> None:
    """Make the folder of ``path``, before minutes of measuring are spent on what goes there.

    Raises SettingsError, naming it, if the file could not be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        msg = f"{path}: cannot be written: {error.strerror or error}"
        raise SettingsError(msg) from error


@dataclass(frozen=True, slots=True)
class _Bound:
    """A backend's product with each copy of the weight."""

    backend: Backend
    offer: Offer
    products: tuple[Callable[..., None], ...]


def _bound(
    request: LinearRequest, device: Device, backends: Sequence[PlannableBackend]
) -> list[_Bound]:
    place = "cpu" if device.is_cpu else "cuda"
    weight = cases.normal_weight(request.n, request.k, request.format, place)
    copies = max(1, min(MAX_COPIES, ROTATION_BYTES // weight.nbytes))
    bound = []
    for backend in backends:
        plan = plan_linear(request, device, PlanPolicy(backends=(backend.name,)), [backend])
        proof = device.proof(backend.name, request.out_dtype)
        failed = proof is not None and proof.verdict is Verdict.FAILED
        if not plan.is_servable or failed:
            continue
        offer = plan.choices[0].offer
        if offer.readiness is not Readiness.RUNNABLE:
            continue
        runnable = cast("Backend", backend)
        prepared = prepare_weight(plan, weight, [runnable] * len(plan.choices), PlanPolicy())
        products = tuple(
            cast("Callable[..., None]", runnable.bind(_copy(prepared), offer))
            for _ in range(copies)
        )
        bound.append(_Bound(runnable, offer, products))
    return bound


def _copy(weight: BlockScaledTensor) -> BlockScaledTensor:
    storage = torch.empty_like(weight.data)
    storage.copy_(weight.data)
    return replace(weight, data=storage)


def _times(request: LinearRequest, m: int, bound: Sequence[_Bound]) -> dict[str, float]:
    """Median seconds of one product by backend, all taking turns."""
    candidates = [_candidate(request, m, one) for one in bound if one.offer.m_range.contains(m)]
    if torch.cuda.is_available():
        timers = {one.backend: _graph_timer(one.calls) for one in candidates}
    else:
        timers = {one.backend: _clock_timer(one.calls) for one in candidates}
    times: dict[str, list[float]] = {backend: [] for backend in timers}
    for _ in range(ROUNDS):
        for backend, timer in timers.items():
            times[backend].append(timer())
    return {backend: statistics.median(taken) for backend, taken in times.items()}


def _candidate(request: LinearRequest, m: int, bound: _Bound) -> _Candidate:
    place = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch_dtype(request.activation_dtype)
    values = cases.normal_activation(m, request.k, dtype, place)
    activation: object = values
    if bound.offer.activation is not None:
        activation = bound.backend.quantize_activation(values, bound.offer)
    out = torch.empty((m, request.n), dtype=torch_dtype(request.out_dtype), device=place)

    def call(product: Callable[..., None]) -> Callable[[], None]:
        return lambda: product(activation, out, None)

    return _Candidate(bound.backend.name, tuple(call(product) for product in bound.products))


def _graph_timer(calls: Sequence[Callable[[], None]]) -> Callable[[], float]:
    """Seconds of one call, from replaying a graph of one call for each copy."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()

    def timed() -> float:
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1000 / len(calls)

    timed()
    return timed


def _clock_timer(calls: Sequence[Callable[[], None]]) -> Callable[[], float]:
    def timed() -> float:
        started = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - started) / len(calls)

    timed()
    return timed
