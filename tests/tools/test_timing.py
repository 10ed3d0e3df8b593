"""benchmarks/timing.py: what a graph takes does not hang on its place among others."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def timing(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return import_module("timing")


class Clock:
    """Milliseconds that graphs have taken, and which were replayed."""

    def __init__(self) -> None:
        self.now = 0.0
        self.replayed: list[str] = []

    def event(self, *, enable_timing: bool) -> Event:
        assert enable_timing
        return Event(self)


class Event:
    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def record(self) -> None:
        self.at = self.clock.now

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: Event) -> float:
        return end.at - self.at


class Graph:
    def __init__(self, clock: Clock, name: str, milliseconds: float) -> None:
        self.clock, self.name, self.milliseconds = clock, name, milliseconds

    def replay(self) -> None:
        self.clock.now += self.milliseconds
        self.clock.replayed.append(self.name)


def test_graphs_take_turns_in_an_order_that_changes(
    timing: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(torch.cuda, "Event", clock.event)
    names, rounds, replays = "abcdef", 8, 2
    graphs = {name: Graph(clock, name, 1.0 + ord(name)) for name in names}
    found = timing.replay_in_turns(graphs, rounds, replays)
    assert found == {name: pytest.approx([1000.0 * (1 + ord(name))] * rounds) for name in names}
    # Each runs once untimed and then for its times, in every round.
    turns = ["".join(clock.replayed)[i :: replays + 1] for i in range(replays + 1)]
    assert turns[0] == turns[1] == turns[2]
    orders = [turns[0][i : i + len(names)] for i in range(0, len(turns[0]), len(names))]
    assert {"".join(sorted(order)) for order in orders} == {names}
    assert len(set(orders)) > rounds / 2
    assert {order[0] for order in orders} != {orders[0][0]}
    # The same in every run.
    first, clock.replayed = clock.replayed, []
    timing.replay_in_turns(graphs, rounds, replays)
    assert clock.replayed == first
