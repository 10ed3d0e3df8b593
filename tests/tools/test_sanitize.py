"""What the sanitizer's reports are taken for, and that its cases take every way through the code.

The reports are racecheck's own (CUDA 13, H200, 2026-11-26), but for the control's.
"""

from __future__ import annotations

import ast
from itertools import combinations, product
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import racecheck
import sanitize
import sanitize_cases as cases
import sanitize_works as watched
from blockscale.formats import DType
from blockscale.kernels.cuda import build, grouped_choice
from blockscale.kernels.cuda import choice as cuda_choice
from blockscale.kernels.cuda.work import Grouping, Share, When
from blockscale.kernels.cuda.writing import written
from sanitize_works import Scope

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable

# Weight scales: a producer's store, and consumers' loads after a tile's last block.
SCALES = """\
========= Error: Race reported between Write access at dense_kernel+0x1440 in schedule.py:105
=========     and Read access at dense_kernel+0x2830 in waves.py:57 [8 hazards]
=========     and Read access at dense_kernel+0x3080 in waves.py:57 [12 hazards]
=========
"""
HAND_OVER = """\
========= Error: Race reported between Read access at dense_kernel+0x190 in dense.py:275
=========     and Write access at dense_kernel+0x8ba0 in dense.py:275 [6 hazards]
=========     and Write access at dense_kernel+0x8bb0 in dense.py:275 [4 hazards]
=========     and Write access at dense_kernel+0xf660 in dense.py:312 [6 hazards]
=========     and Write access at dense_kernel+0xf670 in dense.py:312 [9 hazards]
=========
"""
SMALL_HAND_OVER = """\
========= Error: Race reported between Read access at small_m_kernel+0x120 in small_m.py:126
=========     and Write access at small_m_kernel+0x1510 in small_m.py:126 [4 hazards]
=========     and Write access at small_m_kernel+0x2140 in small_m.py:153 [2 hazards]
=========
gluon small64x8s8 /1 M=1: error 1.6e-03
"""
# Built without lines.
CUDA = """\
========= Error: Race reported between Write access at block_fp8_gemm+0x2ec0
=========     and Read access at block_fp8_gemm+0x42d0 [64 hazards]
=========
cuda 128x192s4+bb128x2 /2 M=300: error 1.7e-03
"""
CONTROL = """\
========= Error: Race reported between Read access at hand_over_kernel+0x120 in hand_over.py:29
=========     and Write access at hand_over_kernel+0x510 in hand_over.py:32 [3 hazards]
=========
control hand-over 0 rounds: error 0.0e+00
"""
# What the other control would say.
RING = SCALES.replace("dense_kernel", racecheck.RING)
# As it was when these reports were made.
LINES = {
    "dense_kernel": frozenset({("dense.py", 275), ("dense.py", 312)}),
    "small_m_kernel": frozenset({("small_m.py", 126), ("small_m.py", 153)}),
    racecheck.CONTROL: frozenset({("hand_over.py", 29), ("hand_over.py", 32)}),
}
SCALE_LINES = ("schedule.py", 105), ("waves.py", 57)


def output(*reports: str, count: int | None = None) -> str:
    """A whole run's."""
    number = len(reports) if count is None else count
    end = f"RACECHECK SUMMARY: {number} hazards displayed ({number} errors, 0 warnings)\n"
    return "========= COMPUTE-SANITIZER\n" + "".join(reports) + "========= " + end


def judged(text: str) -> tuple[int, int, int, bool]:
    found = racecheck.judge(text, LINES, SCALE_LINES)
    handed = found.hand_overs
    return len(found.findings), len(handed.own), len(handed.control), found.is_clean


def test_reports_are_read_whole() -> None:
    races = list(racecheck.read_races(output(SCALES, HAND_OVER, CUDA)))
    assert [race.hazards for race in races] == [20, 25, 64]
    first, _, last = races
    assert str(first) == (
        "Write dense_kernel schedule.py:105 / Read dense_kernel waves.py:57 / "
        "Read dense_kernel waves.py:57 [20 hazards]"
    )
    assert [(a.kind, a.file, a.line) for a in last.accesses] == [("Write", "", 0), ("Read", "", 0)]


def test_hand_overs_are_no_findings_if_the_control_has_them_too() -> None:
    assert judged(output(HAND_OVER, SMALL_HAND_OVER, CONTROL)) == (0, 2, 1, True)
    assert judged(output(HAND_OVER, SCALES, CONTROL, CUDA)) == (2, 1, 1, False)


def test_without_the_control_s_they_are_findings() -> None:
    assert judged(output(HAND_OVER, SMALL_HAND_OVER)) == (2, 0, 0, False)


@pytest.mark.parametrize(
    "change",
    [
        # Anything else that the byte is written or read by, in the same report or alone.
        (" in dense.py:312 [9", " in schedule.py:105 [9"),
        ("dense_kernel+0x190 in dense.py:275", "dense_kernel+0x190 in waves.py:57"),
        # A line of another kernel's hand-over, another kernel's access.
        ("dense_kernel+0x190 in dense.py:275", "dense_kernel+0x190 in small_m.py:126"),
        ("dense_kernel+0x190", "small_m_kernel+0x190"),
        ("dense_kernel", "some_kernel"),
    ],
    ids=str,
)
def test_what_is_not_wholly_one_kernel_s_hand_over_is_a_finding(change: tuple[str, str]) -> None:
    changed = HAND_OVER.replace(*change)
    assert changed != HAND_OVER
    assert judged(output(changed, CONTROL)) == (1, 0, 1, False)


def test_scales_are_no_findings_if_the_ring_has_them_too() -> None:
    for text, counts in (
        (output(SCALES, RING), (0, 1, 1)),
        (output(SCALES, HAND_OVER, RING, CONTROL, CUDA), (1, 1, 1)),
        (output(RING), (0, 0, 1)),
        (output(SCALES), (1, 0, 0)),
        (output(SCALES, HAND_OVER, CONTROL), (1, 0, 0)),
    ):
        found = racecheck.judge(text, LINES, SCALE_LINES)
        assert (len(found.findings), len(found.scales.own), len(found.scales.control)) == counts


@pytest.mark.parametrize(
    "change",
    [
        ("Write access", "Read access"),
        ("waves.py:57 [8", "waves.py:58 [8"),
        ("schedule.py:105", "schedule.py:104"),
        ("dense_kernel+0x2830", "small_m_kernel+0x2830"),
        ("Read access at dense_kernel+0x3080", "Write access at dense_kernel+0x3080"),
    ],
    ids=str,
)
def test_what_is_not_wholly_a_scale_put_and_taken_is_a_finding(change: tuple[str, str]) -> None:
    changed = SCALES.replace(*change)
    assert changed != SCALES
    assert len(racecheck.judge(output(changed, RING), LINES, SCALE_LINES).findings) == 1


def test_the_lines_of_a_scale_are_its_store_and_its_load() -> None:
    lines = (racecheck.KERNELS / "schedule.py").read_text(encoding="utf-8").splitlines()
    (file, put), (same, taken) = racecheck.scale_lines()
    assert file == same == "schedule.py"
    assert ".store(" in lines[put - 1]
    assert ".load(" in lines[taken - 1]
    assert "def take_scale" in "".join(lines[put:taken])


def test_all_are_counted() -> None:
    assert judged(output(CONTROL)) == (0, 0, 1, True)
    assert judged(output()) == (0, 0, 0, True)
    text = output(HAND_OVER, CONTROL, CUDA, SCALES, SCALES, RING)
    lines = list(racecheck.judge(text, LINES, SCALE_LINES).lines)
    assert lines[0] == "findings: 1"
    assert "hands work to warps: 1, and 1 of the control" in lines[-2]
    assert "was taken from it: 2, and 1 of the control" in lines[-1]


@pytest.mark.parametrize(
    "text",
    [
        output(HAND_OVER, CONTROL, count=3),
        output(count=69),
        # A report whose words are others: counted by racecheck, not understood.
        output(SCALES.replace("Race reported between", "A race between"), CONTROL),
        "",
        HAND_OVER,
    ],
)
def test_what_is_not_understood_is_not_clean(text: str) -> None:
    verdict = racecheck.judge(text, LINES, SCALE_LINES)
    assert verdict.unread
    assert verdict.unread in list(verdict.lines)
    assert not verdict.is_clean


def test_lines_of_a_hand_over_are_found_in_the_source(tmp_path: Path) -> None:
    lines = racecheck.hand_over_lines()
    controls = {racecheck.CONTROL: "hand_over.py", racecheck.RING: "scale_ring.py"}
    kernels = lines.keys() - controls.keys()
    assert kernels == {
        "dense_kernel",
        "small_m_kernel",
        "paired_kernel",
        "grouped_kernel",
        "grouped_small_kernel",
    }
    for name, places in lines.items():
        (file,) = {file for file, _ in places}
        assert file == controls.get(name, file)
        folder = racecheck.CONTROL_SOURCES[0].parent if name in controls else racecheck.KERNELS
        source = (folder / file).read_text(encoding="utf-8")
        texts = [source.splitlines()[line - 1].strip() for _, line in sorted(places)]
        assert texts[0].startswith(f"def {name}(")
        # The calls, and the branches that they stand in.
        assert all(text.startswith(("gl.warp_specialize(", "if ", "else")) for text in texts[1:])
        calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
        starts = {call.lineno for call in calls if ast.unparse(call.func) == "gl.warp_specialize"}
        assert starts <= {line for _, line in places}

    moved = tmp_path / "dense.py"
    moved.write_text("\n\n" + (racecheck.KERNELS / "dense.py").read_text())
    found = racecheck.hand_over_lines([moved])["dense_kernel"]
    assert found == {(file, line + 2) for file, line in lines["dense_kernel"]}


def fake_sanitizer(folder: Path, text: str) -> None:
    """A compute-sanitizer that says this, whatever it is to watch."""
    (folder / "said").write_text(text)
    program = folder / "compute-sanitizer"
    program.write_text(f'#!/bin/sh\necho "$@" > {folder}/asked\ncat {folder}/said\n')
    program.chmod(0o755)


@pytest.mark.parametrize(
    ("tool", "text", "status", "last"),
    [
        ("racecheck", output(), 0, "racecheck: clean"),
        ("racecheck", output(SCALES), 1, "racecheck: FOUND SOMETHING"),
        ("memcheck", "========= ERROR SUMMARY: 0 errors\n", 0, "memcheck: clean"),
        ("memcheck", "========= ERROR SUMMARY: 10 errors\n", 1, "memcheck: FOUND SOMETHING"),
    ],
)
def test_a_tool_s_word_decides_the_exit_status(
    tool: str,
    text: str,
    status: int,
    last: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fake_sanitizer(tmp_path, text)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert sanitize.watch(tool, 60) == status
    said = capsys.readouterr().out
    assert text in said
    assert said.splitlines()[-1].startswith(last)
    # All reports, not the first hundred; and the cases are what is watched.
    asked = (tmp_path / "asked").read_text()
    assert f"--tool {tool} --print-limit 0" in asked
    assert f"--scope {'races' if tool == 'racecheck' else 'every-way'} --cases" in asked
    assert asked.split()[-1] == "--cases"


def test_out_of_time_what_was_found_is_said_and_nothing_is_left_running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_sanitizer(tmp_path, SCALES)
    program = tmp_path / "compute-sanitizer"
    program.write_text(
        program.read_text() + f"sleep 60 &\necho $! > {tmp_path}/child\nwait\n", encoding="utf-8"
    )
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert sanitize.watch("racecheck", 1) == 1
    said = capsys.readouterr().out
    assert "racecheck: findings: 1" in said
    assert "racecheck: no summary" in said
    assert said.splitlines()[-1] == "racecheck: out of time after 1 s"
    child = (tmp_path / "child").read_text().strip()
    state = Path(f"/proc/{child}/stat")
    # Gone, or dead and not yet collected by whoever is its parent now.
    assert not state.exists() or state.read_text().rsplit(") ", 1)[1].startswith("Z")


def test_without_the_tool_it_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert sanitize.watch("memcheck", 60) == 2
    assert "CUDA toolkit" in capsys.readouterr().out


# ---- the cases


def test_every_way_of_gemm_cu_is_among_the_cases() -> None:
    """Whatever is chosen for large layers and many tokens takes a way that some case takes."""
    kinds = {watched.cuda_kind(work) for _, work in watched.cuda_works()}
    shapes = ((320, 1680), (4096, 7168), (512, 512), (24576, 1536), (7168, 2304))
    tokens = (1, 16, 64, 65, 129, 300, 1000, 4096)
    for shape, m, out in product(shapes, tokens, (DType.BFLOAT16, DType.FLOAT32)):
        for work in cuda_choice.candidates(m, *shape, out, 132):
            assert watched.cuda_kind(written(work)) in kinds, (work.name, m, shape)
        assert watched.cuda_kind(cuda_choice.choose(m, *shape, out, 132)) in kinds


def test_every_way_of_grouped_gemm_cu_is_among_the_cases() -> None:
    kinds = {watched.cuda_kind(case.work) for case in watched.grouped_cuda()}
    for shape, out in product(((4096, 7168), (6144, 3072)), (DType.BFLOAT16, DType.FLOAT32)):
        for alignment, blocks in product((64, 128), (4, 40, 400)):
            rows = (8, blocks, alignment)
            for work in grouped_choice.contiguous_works(rows, shape, out, 132):
                assert watched.cuda_kind(work) in kinds, work.name
        for slots in ((8, 64, 10), (8, 128, 50), (8, 300, 100), (8, 4096, 1000)):
            for work in grouped_choice.masked_works(slots, shape, out, 132):
                assert watched.cuda_kind(work) in kinds, work.name


def test_cases_of_gemm_cu_have_all_that_a_form_may_be() -> None:
    works = [work for _, work in watched.cuda_works()]
    works += [case.work for case in watched.grouped_cuda()]
    for field, values in (("share", Share), ("grouping", Grouping)):
        assert {getattr(work.form, field) for work in works} == set(values)
    assert {work.form.stores.when for work in works} == set(When)
    assert {(work.form.rows, work.form.flight) for work in works} == {
        *((64, 1), (64, 2), (128, 1), (128, 2), (256, 1)),
    }
    assert {work.early_blocks > 0 for work in works} == {False, True}
    late = [work for work in works if work.form.stores.when is When.LATE]
    several = [work for work in late if watched.cuda_turns(work) > 1]
    assert len(several) == len(late), "a tile that is written late is followed by another"


def test_every_ring_goes_round() -> None:
    pytest.importorskip("triton", reason="the Gluon kernels' choice imports it")
    for work in [*(w for _, w in watched.cuda_works()), *(c.work for c in watched.grouped_cuda())]:
        turns = work.turns if work.k_blocks == watched.VERY_FEW else 1
        assert work.k_blocks * turns > work.form.stages, work.name
    for _, work in watched.gluon_works():
        assert work.piece_blocks > work.variant.stages or watched.gluon_turns(work) > 1, work.name
    for case in watched.grouped_gluon():
        assert case.k_blocks > case.work.stages, case.name


def test_cases_for_races_have_all_that_any_two_traits_do() -> None:
    """Fewer, and no two traits of a kind are left out."""
    pytest.importorskip("triton", reason="the Gluon kernels' choice imports it")
    kinds: list[list[set[tuple[Hashable, ...]]]] = [
        [
            {watched.cuda_kind(work) for _, work in watched.cuda_works(scope)},
            {watched.cuda_kind(case.work) for case in watched.grouped_cuda(scope)},
            {watched.gluon_kind(work) for _, work in watched.gluon_works(scope)},
        ]
        for scope in (Scope.RACES, Scope.EVERY_WAY)
    ]
    for few, many in zip(*kinds, strict=True):
        assert few < many
        assert pairs(few) == pairs(many)
    assert sum(map(len, kinds[0])) < 0.7 * sum(map(len, kinds[1]))


def pairs(kinds: Iterable[tuple[Hashable, ...]]) -> set[tuple[object, ...]]:
    return {pair for kind in kinds for pair in combinations(enumerate(kind), 2)}


def test_only_for_races_do_all_lanes_give_slots_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "OPTIONS", build.OPTIONS)
    usual = build.OPTIONS
    for _ in range(2):
        watched.build_for(Scope.RACES)
        assert (*usual, *watched.OPTIONS_FOR_RACES) == build.OPTIONS
    watched.build_for(Scope.EVERY_WAY)
    assert usual == build.OPTIONS
    source = build.sources()["gemm.cu"].decode()
    name, lanes = watched.ALL_LANES.removeprefix("-D").split("=")
    assert f"#ifndef {name}\n#define {name} 1\n#endif\n" in source
    assert lanes == "32"


def test_a_family_that_fails_is_said_and_the_others_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def family(error: Exception | None) -> object:
        def run(_scope: Scope) -> object:
            yield "one", 0.0
            if error is not None:
                raise error
            yield "two", 1.0

        return run

    found = {"a": family(ValueError("no")), "b": family(ImportError("pip")), "c": family(None)}
    monkeypatch.setattr(cases, "FAMILIES", found)
    monkeypatch.setattr(build, "OPTIONS", build.OPTIONS)
    assert cases.run_cases(["b"]) == 0
    assert cases.run_cases("abc") == 1
    said = capsys.readouterr().out
    assert "a: FAILED: ValueError: no" in said
    assert "b: left out: pip" in said
    assert "c two: WRONG error 1.0e+00, 0.0 s" in said
