"""compute-sanitizer over one small case of every way through the kernels, on a GPU.

    python tools/sanitize.py [--tools memcheck,racecheck] [--seconds 240]
    python tools/sanitize.py --cases [FAMILY ...]     the cases alone, no sanitizer

Exit status 0 if each tool found nothing, 1 if one found something or a case went wrong. Kernels
whose provider is not installed are named and left out. What racecheck says of the way in which
Triton hands work to warps is counted and printed apart (``racecheck.py`` says why).
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import racecheck
import sanitize_cases as cases
from sanitize_works import Scope

ROOT = Path(__file__).resolve().parent.parent
# What memcheck says at its end when all is well.
CLEAN = "ERROR SUMMARY: 0 errors"


def main() -> int:
    """Run the tools, or with ``--cases`` what they watch."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tools", default="memcheck,racecheck")
    parser.add_argument("--seconds", type=float, default=240, help="of each tool")
    parser.add_argument("--scope", type=Scope, default=Scope.EVERY_WAY, help="of --cases")
    parser.add_argument("--cases", nargs="*", choices=sorted(cases.FAMILIES), help="no sanitizer")
    options = parser.parse_args()
    if options.cases is not None:
        return cases.run_cases(options.cases or list(cases.FAMILIES), options.scope)
    tools = options.tools.split(",")
    started = time.monotonic()
    failures = cases.compile_cases({scope_of(tool) for tool in tools})
    spent = time.monotonic() - started
    print("\n".join([*failures, f"compiled in {spent:.0f} s"]), flush=True)
    return max(watch(tool, options.seconds) for tool in tools)


def scope_of(tool: str) -> Scope:
    """What it watches: racecheck takes longer."""
    return Scope.RACES if tool == "racecheck" else Scope.EVERY_WAY


def watch(tool: str, seconds: float) -> int:
    """One tool over all cases; what it says is printed."""
    # Without a limit of its own, 100 reports, beyond which it would only count.
    command = ["compute-sanitizer", "--tool", tool, "--print-limit", "0"]
    command += ["--target-processes", "all", sys.executable, str(Path(__file__).resolve())]
    command += ["--scope", scope_of(tool).value, "--cases"]
    started = time.monotonic()
    try:
        status, said = run(command, seconds)
    except FileNotFoundError:
        print("compute-sanitizer is not on the PATH; it comes with the CUDA toolkit")
        return 2
    print(said)
    is_clean = is_content(tool, said) and status == 0
    spent = time.monotonic() - started
    if status is None:
        print(f"{tool}: out of time after {seconds:g} s")
        return 1
    print(f"{tool}: {'clean' if is_clean else 'FOUND SOMETHING'} in {spent:.0f} s")
    return 0 if is_clean else 1


def run(command: list[str], seconds: float) -> tuple[int | None, str]:
    """Exit status, none if it was out of time, and what it printed until then."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        # What it watches is a child of its own, and would stay on the GPU.
        os.killpg(process.pid, signal.SIGKILL)
        said, _ = process.communicate()
        return None, said
    return process.returncode, said


def is_content(tool: str, output: str) -> bool:
    """Whether the tool found nothing; what racecheck found is printed, with both counts."""
    if tool != "racecheck":
        return CLEAN in output
    verdict = racecheck.judge(output, racecheck.hand_over_lines())
    for line in verdict.lines:
        print(f"{tool}: {line}")
    return verdict.is_clean


if __name__ == "__main__":
    sys.exit(main())
