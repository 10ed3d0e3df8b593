"""Runs every GPU test on this machine and writes down what ran: fails if none did.

    python tools/gpu_tests.py [--out DIR] [pytest arguments]
    python tools/gpu_tests.py -n 8 --dist worksteal      by eight processes, on one GPU

Writes ``gpu_tests.json`` (machine, versions, counts by outcome, every failure) and
``gpu_tests.log`` into DIR. The package is taken from ``src``, installed or not.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree as ET

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "src")]


def main() -> int:
    """Run, summarize; the exit status is pytest's, or 1 if no GPU test ran."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")))
    options, rest = parser.parse_known_args()
    report, log = options.out / "gpu_tests.xml", options.out / "gpu_tests.log"
    # Each test by name as it ends: a run that is stopped has said what failed. pytest-benchmark,
    # where it is installed, warns beside xdist, and warnings are errors.
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "--durations=15"]
    command += ["-p", "no:benchmark"]
    command += [f"--junitxml={report}", *(rest or ["tests/gpu", "tests/probe"])]
    started = time.monotonic()
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), _path()])}
    with log.open("w", encoding="utf-8") as file:
        code = subprocess.run(
            command, cwd=ROOT, env=environ, stdout=file, stderr=subprocess.STDOUT, check=False
        ).returncode
    summary = _summary(report, time.monotonic() - started)
    (options.out / "gpu_tests.json").write_text(json.dumps(summary, indent=1) + "\n")
    print(log.read_text(encoding="utf-8")[-6000:])
    print(json.dumps({key: summary[key] for key in ("machine", "passed", "failed", "skipped")}))
    if summary["passed"] == 0:
        print("no GPU test ran", file=sys.stderr)
        return 1
    return code


def _path() -> str:
    return os.environ.get("PYTHONPATH", "")


def _summary(report: Path, seconds: float) -> dict[str, Any]:
    from record import record

    outcomes = list(_outcomes(report))
    return record(
        "gpu_tests",
        passed=sum(kind == "passed" for kind, _, _ in outcomes),
        failed=sum(kind == "failed" for kind, _, _ in outcomes),
        skipped=sum(kind == "skipped" for kind, _, _ in outcomes),
        seconds=round(seconds, 1),
        failures=[
            {"test": name, "message": words} for kind, name, words in outcomes if kind == "failed"
        ],
        skips=sorted({words for kind, _, words in outcomes if kind == "skipped"}),
    )


def _outcomes(report: Path) -> Iterator[tuple[str, str, str]]:
    """(outcome, test, message) of every test in a JUnit file; nothing if pytest wrote none."""
    if not report.is_file():
        return
    for case in ET.parse(report).iter("testcase"):  # noqa: S314 - written by pytest a moment ago
        name = f"{case.get('classname')}::{case.get('name')}"
        kinds = {child.tag: child for child in case}
        for tag, kind in (("failure", "failed"), ("error", "failed"), ("skipped", "skipped")):
            if tag in kinds:
                yield kind, name, (kinds[tag].get("message") or "")[:300]
                break
        else:
            yield "passed", name, ""


if __name__ == "__main__":
    sys.exit(main())
