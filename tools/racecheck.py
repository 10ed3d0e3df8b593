"""Reads racecheck's report and tells apart what it also says of kernels that are right.

``gl.warp_specialize`` becomes a loop of the worker warps (Triton 3.6,
``ConvertWarpSpecializeToLLVM.cpp``). They wait at barrier 1, where all threads of the block meet,
and read a byte of shared memory that says which partition is theirs. They meet there again before
the partition begins and once more at its end. The other warps write those bytes before the first
meeting. At the kernel's end, after the third, they write "no more", and all meet a fourth time. So
between each of these writes and each of these reads stands a barrier of the whole block: no race
(``tests/kernels_gluon/test_hand_over.py`` finds those barriers in the PTX).

racecheck reports one all the same, in nearly every launch (H200, 2026-11-26). Why is not known: the
tool is closed, and its documentation says nothing of barriers that warps reach at different places
of the code. So nothing is believed without a control: a kernel whose warps are handed work and
share nothing (``hand_over.py``). Where racecheck finds fault with that too, such reports are no
findings; where it does not, they are.

It also reports, in every kernel whose ring goes round, the write of a weight's scale into a slot
and the reads of the scale before it (same machine and day); none where no slot is filled twice, so
it does follow mbarriers from a write to its reads. Lanes that have read a slot meet, and one of
them arrives at the mbarrier for all: two barriers of two kinds, which PTX orders
(``give_back`` in gemm.cu). For racecheck gemm.cu is compiled so that every lane arrives for itself
(``sanitize_works.ALL_LANES``). That leaves out the meeting and nothing else, and whatever is
reported then is a finding.

Gluon cannot have every thread arrive. Its reports of a scale's store and load are judged as those
of the hand-over, by a control: a ring that is filled and read in the same way and does nothing else
(``scale_ring.py``). Both use ``put_scale`` and ``take_scale``, whose lines say which reports these
are. So racecheck no longer finds a scale that is read too late or too early; the pretend Hopper
does, which knows what is ordered after what (``testing/gluon_races.py``).

Triton puts the accesses of its hand-over on the line of the kernel's ``def`` and on the last
statement's, the one with the ``gl.warp_specialize(``. No access of ours is on those lines (the same
test).
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

ROOT = Path(__file__).resolve().parent.parent
# The controls, and where all kernels are: work is handed over, and scales too.
CONTROL, RING = "hand_over_kernel", "scale_ring_kernel"
CONTROL_SOURCES = (ROOT / "tools" / "hand_over.py", ROOT / "tools" / "scale_ring.py")
KERNELS = ROOT / "src" / "blockscale" / "kernels" / "gluon"

ACCESS = r"(?P<kind>\w+) access at (?P<kernel>.+)\+0x[0-9a-f]+(?: in (?P<file>.+):(?P<line>\d+))?"
FIRST = re.compile(rf"^=+ \w+: Race reported between {ACCESS}$")
OTHER = re.compile(rf"^=+ +and {ACCESS} \[(?P<hazards>\d+) hazards\]$")
SUMMARY = re.compile(r"^=+ RACECHECK SUMMARY: (\d+) hazards? displayed")

# File and line.
Place = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Access:
    """Of shared memory, by an instruction; without a line if the kernel was built without."""

    kind: str
    kernel: str
    file: str
    line: int

    def __str__(self) -> str:
        """As racecheck has it."""
        return f"{self.kind} {self.kernel} {self.file}:{self.line}"


@dataclass(frozen=True, slots=True)
class Race:
    """One report: an access and those that it races with."""

    accesses: tuple[Access, ...]
    hazards: int

    def __str__(self) -> str:
        """One line."""
        return f"{' / '.join(map(str, self.accesses))} [{self.hazards} hazards]"


@dataclass(frozen=True, slots=True)
class Apart:
    """Reports of one sort that are no findings: the kernels', and those of its control."""

    sort: str
    own: tuple[Race, ...]
    control: tuple[Race, ...]

    def __str__(self) -> str:
        """One line."""
        return (
            f"reports of {self.sort}: {len(self.own)}, and {len(self.control)} of the control, "
            f"which does nothing else: no findings"
        )


@dataclass(frozen=True, slots=True)
class Verdict:
    """The reports of a run: findings, and what is said of kernels that are right.

    ``unread``: reports that racecheck counts and that were not understood, or the whole run's end.
    """

    findings: tuple[Race, ...]
    hand_overs: Apart
    scales: Apart
    unread: str = ""

    @property
    def is_clean(self) -> bool:
        """Whether there is nothing to look at."""
        return not self.findings and not self.unread

    @property
    def lines(self) -> Iterator[str]:
        """Both counts, and every finding."""
        yield f"findings: {len(self.findings)}"
        yield from (f"  {race}" for race in self.findings)
        for apart in (self.hand_overs, self.scales):
            if apart.own or apart.control:
                yield str(apart)
        if self.unread:
            yield self.unread


def judge(
    output: str,
    hand_overs: Mapping[str, frozenset[Place]],
    scales: tuple[Place, Place] | None = None,
) -> Verdict:
    """What a run's output says; the others as from ``hand_over_lines`` and ``scale_lines``."""
    races = tuple(read_races(output))
    places = scales or scale_lines()
    handed = _apart(
        "how Triton hands work to warps",
        [race for race in races if is_hand_over(race, hand_overs)],
        (CONTROL, RING),
    )
    taken = _apart(
        "a scale that is put into a slot and was taken from it",
        [race for race in races if is_scale(race, places)],
        (RING,),
    )
    apart = (*handed.own, *handed.control, *taken.own, *taken.control)
    findings = tuple(race for race in races if race not in apart)
    return Verdict(findings, handed, taken, _unread(output, len(races)))


def _apart(sort: str, races: list[Race], controls: tuple[str, ...]) -> Apart:
    """Without a report of a control, those of the kernels are findings."""
    control = tuple(race for race in races if race.accesses[0].kernel in controls)
    others = tuple(race for race in races if race not in control)
    return Apart(sort, others if control else (), control)


def read_races(output: str) -> Iterator[Race]:
    """The reports, in order."""
    accesses: list[Access] = []
    hazards = 0
    for line in output.splitlines():
        first, other = FIRST.match(line), OTHER.match(line)
        if first or not other:
            if hazards:
                yield Race(tuple(accesses), hazards)
            accesses, hazards = [_access(first)] if first else [], 0
        elif accesses:
            accesses.append(_access(other))
            hazards += int(other["hazards"])
    if hazards:
        yield Race(tuple(accesses), hazards)


def is_hand_over(race: Race, hand_overs: Mapping[str, frozenset[Place]]) -> bool:
    """Whether all its accesses are one kernel's, on lines where it hands over work."""
    kernels = _kernels(race)
    if len(kernels) != 1:
        return False
    lines = hand_overs.get(kernels.pop(), frozenset())
    return all((access.file, access.line) in lines for access in race.accesses)


def is_scale(race: Race, places: tuple[Place, Place]) -> bool:
    """Whether it is one kernel's store into a slot of scales, against its loads from there."""
    put, taken = places
    found = {(access.kind, (access.file, access.line)) for access in race.accesses}
    return found == {("Write", put), ("Read", taken)} and len(_kernels(race)) == 1


def _kernels(race: Race) -> set[str]:
    return {access.kernel for access in race.accesses}


def scale_lines(source: Path = KERNELS / "schedule.py") -> tuple[Place, Place]:
    """The (file, line) of a scale's store and of its load: the last of two functions."""
    functions = {
        node.name: node
        for node in ast.parse(source.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef)
    }
    put, taken = (functions[name].body[-1].lineno for name in ("put_scale", "take_scale"))
    return (source.name, put), (source.name, taken)


def hand_over_lines(
    sources: Iterable[Path] = (*CONTROL_SOURCES, *sorted(KERNELS.glob("*.py"))),
) -> dict[str, frozenset[Place]]:
    """By kernel, the (file, line) that Triton puts its hand-over of work on.

    Of each function that calls ``gl.warp_specialize``: its ``def``, and the calls with what they
    stand in.
    """
    found = {}
    for path in sources:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and _specializes(node):
                lines = {node.lineno}
                lines |= {
                    inner.lineno
                    for inner in ast.walk(node)
                    if isinstance(inner, ast.stmt) and _specializes(inner)
                }
                found[node.name] = frozenset((path.name, line) for line in lines)
    return found


def _specializes(node: ast.AST) -> bool:
    return any(
        isinstance(inner, ast.Call)
        and isinstance(inner.func, ast.Attribute)
        and inner.func.attr == "warp_specialize"
        for inner in ast.walk(node)
    )


def _access(match: re.Match[str]) -> Access:
    file = Path(match["file"] or "").name
    return Access(match["kind"], match["kernel"], file, int(match["line"] or 0))


def _unread(output: str, races: int) -> str:
    counts = [int(match[1]) for line in output.splitlines() if (match := SUMMARY.match(line))]
    if not counts:
        return "no summary: racecheck did not come to its end"
    if sum(counts) != races:
        return f"racecheck counts {sum(counts)} reports, {races} were understood"
    return ""
