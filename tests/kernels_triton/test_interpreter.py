"""One case of every test of the Triton kernels, in the interpreter, as part of ``make test``.

The interpreter is chosen when Triton is imported, so it has a process of its own; all cases, which
take minutes, are run by ``make test-kernels``. What this is for: a kernel whose arguments and its
host code's no longer agree.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="pip install triton==3.6.0: it interprets on a CPU")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="make test-kernels runs all cases"
)

FAMILIES = {"quantize", "rows", "gemm", "grouped", "scaled"}
PROGRAM = """
import json, sys
import pytest

class FirstCases:
    def __init__(self):
        self.outcomes = {}

    def pytest_collection_modifyitems(self, items):
        first = {}
        for item in items:
            first.setdefault((item.path, item.function), item)
        items[:] = first.values()

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.skipped:
            self.outcomes[report.nodeid] = report.outcome

cases = FirstCases()
code = pytest.main(["-q", "-p", "no:cacheprovider", "-p", "no:xdist", *sys.argv[1:]], [cases])
print(json.dumps(cases.outcomes))
sys.exit(code)
"""


@pytest.mark.usefixtures("forked")
def test_every_kernel_runs_in_the_interpreter() -> None:
    files = sorted(Path(__file__).parent.glob("test_interpreted_*.py"))
    assert {file.stem.removeprefix("test_interpreted_") for file in files} >= FAMILIES
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *files],
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr
    outcomes = json.loads(done.stdout.splitlines()[-1])
    assert set(outcomes.values()) == {"passed"}, outcomes
    for file in files:
        assert any(file.name in case for case in outcomes), file
