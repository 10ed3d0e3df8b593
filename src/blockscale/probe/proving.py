"""Proofs: what child processes found about each backend, kept until something changes.

A child may crash, hang or lie; this process lives and writes down what happened. A proof is valid
for one GPU, driver, set of package versions and version of blockscale.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import blockscale
from blockscale import events
from blockscale.events import Kind
from blockscale.formats import DType
from blockscale.planning.decision import Arrangement
from blockscale.planning.device import Device, Proof, Verdict
from blockscale.probe.children import Children, Ending
from blockscale.probe.items import Item, items_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from blockscale.planning.decision import PlannableBackend

# A provider that compiles needs about 10 s for each of the probe's shapes and M.
TIME_LIMIT_S = 300.0
# What Python runs in a child process.
CHILD = ("-m", "blockscale.probe.child")
# Child processes at a time on a GPU: as many as there are cores, if memory allows.
MAX_CHILDREN = 16
BYTES_OF_A_CHILD = 4 << 30


@dataclass(frozen=True, slots=True)
class Pace:
    """How a probe runs.

    ``time_limit_s``: of one child process; more is a failure. ``children``: processes at a time.
    ``seconds``: of the whole probe; what is not answered then gets no proof. None: to the end.
    """

    time_limit_s: float = TIME_LIMIT_S
    children: int = 1
    seconds: float | None = None

    @staticmethod
    def on(device: Device, seconds: float | None = None) -> Pace:
        """Where compilers are waited for, on a GPU, as many children as the machine has room for.

        On a CPU one: kernels that are tested there use all cores.
        """
        if device.is_cpu:
            return Pace(seconds=seconds)
        room = (device.memory_bytes or BYTES_OF_A_CHILD) // BYTES_OF_A_CHILD
        cores = len(os.sched_getaffinity(0))
        return Pace(children=max(1, min(MAX_CHILDREN, room, cores)), seconds=seconds)


@dataclass(frozen=True, slots=True)
class _Answer:
    """What a child said about an item; ``shapes`` 0: the backend's own gates refuse it."""

    shapes: int = 0
    error: float = 0.0
    failure: str | None = None


@dataclass(slots=True, eq=False)
class _Case:
    """All items of one proof, with the answers that are there. ``is_over``: no more will come."""

    backend: PlannableBackend
    items: tuple[Item, ...]
    answers: dict[Item, _Answer] = field(default_factory=dict)

    @property
    def is_answered(self) -> bool:
        return len(self.answers) == len(self.items)

    def proof(self) -> Proof | None:
        """None where the gates let nothing pass, or where too little is known."""
        answers = [self.answers[item] for item in self.items if item in self.answers]
        failures = [answer.failure for answer in answers if answer.failure is not None]
        shapes = sum(answer.shapes for answer in answers)
        if failures:
            verdict, detail = Verdict.FAILED, failures[0]
        elif shapes and self.is_answered:
            worst = max(answer.error for answer in answers)
            verdict = Verdict.PROVEN
            detail = f"{shapes} shapes, relative error up to {worst:.1e}"
        else:
            return None
        dtype, arrangement = _form(self.items[0])
        return Proof(self.backend.name, dtype, verdict, detail, arrangement)


def prove(
    backends: Sequence[PlannableBackend],
    dtypes: Sequence[DType] = tuple(DType),
    pace: Pace | None = None,
    report: Callable[[Proof], None] | None = None,
) -> tuple[Proof, ...]:
    """Test every backend that blockscale can run, in child processes.

    A wrong number, an exception, a crash or a child that takes longer than its time limit is a
    FAILED proof that says so. Backends without ``bind``, dtypes for which no shape passes the
    backend's own gates, and what ``pace.seconds`` cut off get no proof. ``report`` is told each
    proof as it is found, one at a time. Nothing is cached here.
    """
    return _Probe(backends, dtypes, pace or Pace(), report).run()


def proof_count(backends: Sequence[PlannableBackend]) -> int:
    """How many proofs ``prove`` would try to find, for all output dtypes."""
    return sum(
        len({_form(item) for item in items_of(backend, tuple(DType))})
        for backend in backends
        if hasattr(backend, "bind")
    )


class _Probe:
    """One call of ``prove``."""

    def __init__(
        self,
        backends: Sequence[PlannableBackend],
        dtypes: Sequence[DType],
        pace: Pace,
        report: Callable[[Proof], None] | None,
    ) -> None:
        self._pace, self._report = pace, report
        self._children = Children(pace.time_limit_s)
        self._lock = threading.Lock()
        self._cases: dict[tuple[str, DType, Arrangement | None], _Case] = {}
        self._work: list[tuple[PlannableBackend, list[Item]]] = []
        for backend in backends:
            if not hasattr(backend, "bind"):
                continue
            items = items_of(backend, dtypes)
            for item in items:
                same = tuple(other for other in items if _form(other) == _form(item))
                self._cases.setdefault((backend.name, *_form(item)), _Case(backend, same))
            self._work += [(backend, part) for part in _parts(items, pace.children)]

    def run(self) -> tuple[Proof, ...]:
        """Everything, or what there is time for."""
        with ThreadPoolExecutor(self._pace.children) as pool:
            try:
                futures = [pool.submit(self._check, *work) for work in self._work]
                wait(futures, self._pace.seconds)
            finally:
                # Also where the wait was interrupted: the pool waits for its threads.
                self._children.stop()
        for future in futures:
            future.result()
        proofs = []
        for case in self._cases.values():
            proof = case.proof()
            if proof is not None:
                proofs.append(proof)
                if not case.is_answered:
                    self._tell(proof)
        return tuple(proofs)

    def _check(self, backend: PlannableBackend, items: list[Item]) -> None:
        """Children until every item has an answer.

        One that dies takes along the other items of the same proof, which has failed.
        """
        left = items
        while left:
            ending, current = self._run_child(backend, left)
            if ending.is_stopped:
                return
            at = current or left[0]
            reason = ending.reason or "the process ended without an answer"
            where = f" in {current.words}" if current is not None else ""
            if ending.reason is not None or at in self._unanswered(backend, left):
                self._answer(backend, at, _Answer(failure=f"{reason}{where}"))
            for item in left:
                if _form(item) == _form(at) and self._failed(backend, at):
                    self._answer(backend, item, _Answer())
            left = self._unanswered(backend, left)

    def _run_child(
        self, backend: PlannableBackend, items: Sequence[Item]
    ) -> tuple[Ending, Item | None]:
        """How it ended, and the item that it was at."""
        current: Item | None = None

        def heard(said: dict[str, Any]) -> None:
            nonlocal current
            if "started" in said:
                current = Item.parsed(said["started"])
                return
            answer = _Answer(said.get("shapes", 0), said.get("error", 0.0), said.get("failed"))
            self._answer(backend, Item.parsed(said["item"]), answer)

        kind = type(backend)
        command = [sys.executable, *CHILD]
        command += [f"{kind.__module__}:{kind.__qualname__}", *map(str, items)]
        return self._children.run(command, heard), current

    def _answer(self, backend: PlannableBackend, item: Item, answer: _Answer) -> None:
        """The first answer stands. Whoever gives the last one of a proof reports it."""
        with self._lock:
            case = self._case(backend, item)
            if item in case.answers:
                return
            case.answers[item] = answer
            proof = case.proof() if case.is_answered else None
            if proof is not None:
                self._tell(proof)

    def _case(self, backend: PlannableBackend, item: Item) -> _Case:
        return self._cases[(backend.name, *_form(item))]

    def _failed(self, backend: PlannableBackend, item: Item) -> bool:
        with self._lock:
            answers = self._case(backend, item).answers.values()
            return any(answer.failure is not None for answer in answers)

    def _unanswered(self, backend: PlannableBackend, items: list[Item]) -> list[Item]:
        with self._lock:
            return [item for item in items if item not in self._case(backend, item).answers]

    def _tell(self, proof: Proof) -> None:
        _announce(proof)
        if self._report is not None:
            self._report(proof)


def _form(item: Item) -> tuple[DType, Arrangement | None]:
    """What a proof is about, beside the backend."""
    return item.dtype, item.arrangement


def _parts(items: Sequence[Item], count: int) -> list[list[Item]]:
    """At most ``count`` parts; a shape's output dtypes stay together."""
    shapes = list(dict.fromkeys((item.n, item.k, item.arrangement) for item in items))
    parts = []
    for first in range(min(count, len(shapes))):
        mine = set(shapes[first::count])
        parts.append([item for item in items if (item.n, item.k, item.arrangement) in mine])
    return parts


def _announce(proof: Proof) -> None:
    failed = proof.verdict is Verdict.FAILED
    events.emit(
        Kind.PROBE,
        f"{proof.words}: {proof.detail}",
        logging.WARNING if failed else logging.INFO,
        backend=proof.backend,
        out_dtype=proof.out_dtype.value,
        verdict=proof.verdict.value,
        detail=proof.detail,
        arrangement=proof.arrangement.value if proof.arrangement is not None else None,
    )


def load_proofs(device: Device) -> Device:
    """``device`` with the proofs kept for exactly this machine and these versions, if any."""
    path = proofs_path(device)
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        proofs = tuple(_proof(entry) for entry in document["proofs"])
    except (OSError, ValueError, KeyError, TypeError):
        return device
    return replace(device, proofs=proofs)


def keep_proof(device: Device, proof: Proof) -> Path:
    """``save_proofs`` with one more, in place of what was known before of the same."""
    others = [
        other
        for other in load_proofs(device).proofs
        if (other.backend, other.out_dtype, other.arrangement)
        != (proof.backend, proof.out_dtype, proof.arrangement)
    ]
    return save_proofs(device, (*others, proof))


def save_proofs(device: Device, proofs: Sequence[Proof]) -> Path:
    """Keep proofs for this machine; gives back the file, which a person may delete."""
    path = proofs_path(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    entries = [
        {
            "backend": proof.backend,
            "out_dtype": proof.out_dtype.value,
            "verdict": proof.verdict.value,
            "detail": proof.detail,
            "arrangement": proof.arrangement.value if proof.arrangement is not None else None,
        }
        for proof in proofs
    ]
    scratch = path.with_suffix(".partial")
    scratch.write_text(json.dumps({"device": device.name, "proofs": entries}), encoding="utf-8")
    scratch.replace(path)
    return path


def proofs_path(device: Device) -> Path:
    """Where proofs of this machine are kept: the name changes with whatever they depend on."""
    facts = [
        blockscale.__version__,
        device.name,
        device.architecture,
        str(device.cuda),
        *(f"{name}={version}" for name, version in device.packages or ()),
    ]
    key = hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]
    return Path.home() / ".cache" / "blockscale" / f"proofs-{key}.json"


def _proof(entry: dict[str, Any]) -> Proof:
    how = entry["arrangement"]
    return Proof(
        entry["backend"],
        DType(entry["out_dtype"]),
        Verdict(entry["verdict"]),
        entry["detail"],
        None if how is None else Arrangement(how),
    )
