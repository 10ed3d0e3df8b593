"""Timing on a GPU: CUDA graphs, variants in turns, and the ceilings they are compared with."""

from __future__ import annotations

import random
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

WARM_UP_CALLS = 3
WARM_UP_S = 0.2


@dataclass(frozen=True, slots=True)
class Timing:
    """Microseconds of one call: median and the spread between rounds."""

    median_us: float
    p10_us: float
    p90_us: float


def capture(call: Callable[[], object], warm_up_calls: int = WARM_UP_CALLS) -> torch.cuda.CUDAGraph:
    """``call`` as a graph; it is run a few times first, so that everything is compiled."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(warm_up_calls):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def interleaved(
    calls: Mapping[str, Callable[[], object]],
    rounds: int = 20,
    replays: int = 5,
    *,
    warm_up_s: float = WARM_UP_S,
    warm_up_calls: int = WARM_UP_CALLS,
) -> dict[str, Timing]:
    """Time every call in turns, ``rounds`` times ``replays`` graph replays, L2 as calls leave it.

    Each call must touch more than the L2 cache by itself, or its data is warm: say which.
    ``warm_up_s``: of replays before the first time, so that clocks are up.
    """
    graphs = {name: capture(call, warm_up_calls) for name, call in calls.items()}
    _warm_up(graphs, warm_up_s)
    return {name: _summary(t) for name, t in replay_in_turns(graphs, rounds, replays).items()}


def replay_in_turns(
    graphs: Mapping[str, torch.cuda.CUDAGraph], rounds: int, replays: int
) -> dict[str, list[float]]:
    """Microseconds of a replay, ``rounds`` times for each graph, after an untimed one each.

    Each round in another order, the same in every run: where power binds, what follows a graph that
    took little of it runs at higher clocks. In an order that stayed, the first of 66 graphs of a
    product took up to 9 % less than they did elsewhere (8192 x 51200 x 5120, H200, 2026-11-27).
    """
    found: dict[str, list[float]] = {name: [] for name in graphs}
    order = list(graphs.items())
    turns = random.Random(0)  # noqa: S311 - an order, not a secret
    for _ in range(rounds):
        turns.shuffle(order)
        for name, graph in order:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            graph.replay()
            start.record()
            for _ in range(replays):
                graph.replay()
            end.record()
            end.synchronize()
            found[name].append(start.elapsed_time(end) * 1000 / replays)
    return found


def copy_bandwidth(megabytes: int = 2048) -> float:
    """Bytes read and written per second by a copy kernel, the ceiling of moving data.

    A kernel, not a memcpy node: in a CUDA graph that ran at 2.7 TB/s where a kernel reaches 4.2
    (H200, driver 580, 2026-11-23).
    """
    source = torch.zeros(megabytes << 18, dtype=torch.float32, device="cuda")
    target = torch.empty_like(source)
    call = {"copy": lambda: torch.neg(source, out=target)}
    timing = interleaved(call, rounds=10, replays=3)["copy"]
    return 2 * source.nbytes / (timing.median_us * 1e-6)


def _warm_up(graphs: Mapping[str, torch.cuda.CUDAGraph], seconds: float) -> None:
    """Clocks rise under load: replay everything for a while before the first number."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    elapsed = 0.0
    while elapsed < seconds * 1000:
        for graph in graphs.values():
            graph.replay()
        end.record()
        end.synchronize()
        elapsed = start.elapsed_time(end)


def _summary(times: list[float]) -> Timing:
    ordered = sorted(times)
    tenth = len(ordered) // 10
    return Timing(statistics.median(ordered), ordered[tenth], ordered[-1 - tenth])
