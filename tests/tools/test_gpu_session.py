"""The script of a GPU session: limits hold, nothing is lost, what ran is not run again."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from types import ModuleType

ROOT = Path(__file__).parent.parent.parent
RECORD = '{"benchmark": "none", "machine": "none"}'


@pytest.fixture
def session(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """tools/gpu_session.py as a module, on a machine with one GPU."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    spec = importlib.util.spec_from_file_location("gpu_session", ROOT / "tools" / "gpu_session.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_session", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "gpus_here", lambda: 1)
    monkeypatch.setattr(module, "STATE", tmp_path / "state.json")
    return module


def run(
    module: ModuleType, monkeypatch: pytest.MonkeyPatch, folder: Path, *arguments: str
) -> tuple[int, dict[str, Any]]:
    command = ["gpu_session.py", "--no-ahead", "--out", str(folder), *arguments]
    monkeypatch.setattr(sys, "argv", command)
    code: int = module.main()
    file = folder / "session.json"
    return code, json.loads(file.read_text()) if file.is_file() else {}


def test_steps_run_to_their_limits_and_only_once(
    session: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'input()'])"
    write = f"import sys; open(sys.argv[1], 'w').write('''{RECORD}\\n'''); print('written')"
    steps = (
        session.Step("good", ("-c", write, session.RECORDS), 30),
        session.Step("bad", ("-c", "raise SystemExit(3)"), 30),
        session.Step("endless", ("-c", f"{child}; import time; time.sleep(99)"), 2),
        session.Step("two", ("-c", "print()"), 30, gpus=2),
        session.Step("long", ("-c", "print()"), 5000),
    )
    monkeypatch.setattr(session, "STEPS", steps)
    started = time.monotonic()
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    code, found = run(session, monkeypatch, first)
    assert time.monotonic() - started < 60
    assert code == 1
    assert {name: one["outcome"] for name, one in found.items()} == {
        "good": "passed",
        "bad": "exit 3",
        "endless": "out of time",
    }
    assert (first / "records.jsonl").read_text() == RECORD + "\n"
    log = (first / "session.log").read_text()
    assert "written" in log
    assert "left: two,long" in log
    assert len(list(first.iterdir())) == 3
    # Again, into an empty folder: nothing is left that fits; by name, a step runs once more.
    assert run(session, monkeypatch, second) == (0, {})
    code, found = run(session, monkeypatch, third, "--steps", "good")
    assert (code, list(found)) == (0, ["good"])
    assert (third / "records.jsonl").read_text() == RECORD + "\n"
    code, found = run(session, monkeypatch, third, "--anew")
    assert (code, set(found)) == (1, {"good", "bad", "endless"})


def test_every_step_names_a_program_that_takes_its_arguments(session: ModuleType) -> None:
    names = [step.name for step in session.STEPS]
    assert len(set(names)) == len(names)
    # A machine of one GPU is counted at half of its time.
    assert sum(s.limit_s * (1.0 if s.gpus > 1 else 0.5) for s in session.PLANNED) < 1800
    for step in session.STEPS:
        for part in step.command:
            if part.endswith(".py") and not part.startswith("-"):
                assert (ROOT / part).is_file(), part
        if session.RECORDS in step.command:
            program = next(part for part in step.command if part.startswith("benchmarks/"))
            source = (ROOT / program).read_text()
            for option in (part for part in step.command if part.startswith("--")):
                known = f'"{option}"' in source or option in {"--standalone", "--nproc-per-node"}
                assert known, (step.name, option)


def test_records_go_to_the_results_of_their_machine(
    session: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import record

    monkeypatch.setattr(record, "RESULTS", ROOT / ".cache" / "test-session" / tmp_path.name)
    (tmp_path / "records.jsonl").write_text(f"{RECORD}\n{RECORD}\n")
    assert session.take(tmp_path) == 0
    written = record.RESULTS / "none" / "none.jsonl"
    assert [json.loads(line) for line in written.read_text().splitlines()] == [
        json.loads(RECORD)
    ] * 2
    written.unlink()
