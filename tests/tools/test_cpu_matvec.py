"""The benchmark that says why the CPU kernel is C++: all three ways agree, and are compared."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parent.parent.parent / "benchmarks" / "cpu_matvec.py"


@pytest.mark.usefixtures("forked")
def test_three_ways_agree_and_are_compared_with_bf16() -> None:
    done = subprocess.run(
        [sys.executable, PROGRAM, "--n", "200", "--k", "256", "--rounds", "10"],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert (done.returncode, done.stderr) == (0, "")
    first, *ways = done.stdout.splitlines()
    assert first.startswith("200x256, one token, one thread; ")
    assert [line.split()[0] for line in ways] == ["bf16", "inductor", "C++"]
    assert ways[0].split()[1] == "1.00"
