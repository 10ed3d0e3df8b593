"""Proofs: what a child process found about each backend, kept until something changes.

The child may crash, hang or lie; this process lives and writes down what happened. A proof is valid
for one GPU, driver, set of package versions and version of blockscale.
"""

from __future__ import annotations

import hashlib
import json
import logging
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import blockscale
from blockscale import events
from blockscale.events import Kind
from blockscale.formats import DType
from blockscale.planning.device import Device, Proof, Verdict

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from blockscale.planning.decision import PlannableBackend

# A provider that compiles needs about 10 s for each of the probe's shapes and M.
TIME_LIMIT_S = 300.0
MARKER = "@probe "


@dataclass(frozen=True, slots=True)
class _Progress:
    """What one child said before it ended. ``current``: the step it was in."""

    proofs: tuple[Proof, ...]
    done: frozenset[str]
    current: str


def prove(
    backends: Sequence[PlannableBackend],
    dtypes: Sequence[DType] = tuple(DType),
    time_limit_s: float = TIME_LIMIT_S,
    report: Callable[[Proof], None] | None = None,
) -> tuple[Proof, ...]:
    """Test every backend that blockscale can run, each in a child process.

    A wrong number, an exception, a crash or more than ``time_limit_s`` for one backend is a FAILED
    proof that says so. Backends without ``bind``, and dtypes for which no shape passes the
    backend's own gates, get no proof. Nothing is cached here.
    """
    found: list[Proof] = []
    for backend in backends:
        if not hasattr(backend, "bind"):
            continue
        for proof in _prove_one(backend, dtypes, time_limit_s):
            found.append(proof)
            _announce(proof)
            if report is not None:
                report(proof)
    return tuple(found)


def _announce(proof: Proof) -> None:
    failed = proof.verdict is Verdict.FAILED
    events.emit(
        Kind.PROBE,
        f"{proof.backend} {proof.verdict.value} for {proof.out_dtype.value}: {proof.detail}",
        logging.WARNING if failed else logging.INFO,
        backend=proof.backend,
        out_dtype=proof.out_dtype.value,
        verdict=proof.verdict.value,
        detail=proof.detail,
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


def _prove_one(
    backend: PlannableBackend, dtypes: Sequence[DType], time_limit_s: float
) -> list[Proof]:
    """Children until every dtype has an answer: one that dies loses its own dtype only."""
    proofs: list[Proof] = []
    left = [dtype.value for dtype in dtypes]
    while left:
        progress, ended = _run_child(backend, left, time_limit_s)
        proofs += progress.proofs
        left = [dtype for dtype in left if dtype not in progress.done]
        if left and ended is not None:
            where = f" in {progress.current}" if progress.current else ""
            proofs.append(Proof(backend.name, DType(left[0]), Verdict.FAILED, f"{ended}{where}"))
            left = left[1:]
        elif left:
            break
    return proofs


def _run_child(
    backend: PlannableBackend, dtypes: list[str], time_limit_s: float
) -> tuple[_Progress, str | None]:
    """What the child said, and how it ended if not well."""
    kind = type(backend)
    command = [sys.executable, "-m", "blockscale.probe.child"]
    command += [f"{kind.__module__}:{kind.__qualname__}", *dtypes]
    try:
        child = subprocess.run(  # noqa: S603 - our own interpreter and module
            command, capture_output=True, text=True, check=False, timeout=time_limit_s
        )
    except subprocess.TimeoutExpired as error:
        said = error.stdout.decode() if isinstance(error.stdout, bytes) else error.stdout or ""
        return _read(backend.name, said), f"no answer within {time_limit_s:g} s"
    progress = _read(backend.name, child.stdout)
    if child.returncode == 0:
        return progress, None
    return progress, _death(child)


def _read(backend: str, output: str) -> _Progress:
    proofs: list[Proof] = []
    done: set[str] = set()
    current = ""
    for line in output.splitlines():
        if not line.startswith(MARKER):
            continue
        said: dict[str, Any] = json.loads(line.removeprefix(MARKER))
        if "started" in said:
            current = said["started"]
            continue
        done.add(said["dtype"])
        if said["verdict"] is not None:
            proofs.append(_proof({**said, "backend": backend, "out_dtype": said["dtype"]}))
    return _Progress(tuple(proofs), frozenset(done), current)


def _proof(entry: dict[str, Any]) -> Proof:
    return Proof(
        entry["backend"], DType(entry["out_dtype"]), Verdict(entry["verdict"]), entry["detail"]
    )


def _death(child: subprocess.CompletedProcess[str]) -> str:
    if child.returncode < 0:
        name = signal.Signals(-child.returncode).name
        return f"the process was killed by {name}"
    last = (child.stderr.strip().splitlines() or ["no message"])[-1]
    return f"the process ended with code {child.returncode}: {last[:200]}"
