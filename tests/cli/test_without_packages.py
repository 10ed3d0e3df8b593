"""Commands where torch or transformers is not installed: they work, or say so in one line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SUPPORT = Path(__file__).parent.parent / "support"
PROGRAM = """
import json, sys
sys.modules[sys.argv[1]] = None
sys.path.insert(0, sys.argv[2])
from command_line import blockscale

done = [blockscale(*command) for command in json.loads(sys.argv[3])]
print(json.dumps([(one.returncode, one.stdout, one.stderr) for one in done]))
"""


def without(package: str, *commands: list[str]) -> list[tuple[int, str, str]]:
    """Exit codes and outputs of commands in a process that cannot import the package."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, package, SUPPORT, json.dumps(commands)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return [(code, out, err) for code, out, err in json.loads(done.stdout)]


def test_headers_are_planned_without_torch(fp8_checkpoint: Path, tmp_path: Path) -> None:
    file, plan = str(fp8_checkpoint), str(tmp_path / "plan.json")
    done = without(
        "torch",
        ["--help"],
        ["inspect", file],
        ["verify", file],
        ["plan", file, "--device", "sm_90", "--save", plan],
        ["advise", file, "--device", "cpu"],
        ["warm", plan, "--list"],
    )
    assert [(code, err) for code, _, err in done] == [(0, "")] * len(done)
    assert all(out for _, out, _ in done)


def test_what_needs_torch_says_so(float_checkpoint: Path, tmp_path: Path) -> None:
    file, target = str(float_checkpoint), tmp_path / "out"
    done = without(
        "torch",
        ["plan", file],
        ["doctor"],
        ["quantize", file, str(target)],
        ["generate", file, "x"],
    )
    for code, out, err in done:
        assert (code, out, err.count("\n")) == (2, "", 1), err
        assert err.startswith("blockscale: this command needs torch, which is not installed: pip ")
    assert not target.exists()


def test_what_needs_transformers_says_so(fp8_checkpoint: Path) -> None:
    ((code, out, err),) = without("transformers", ["generate", str(fp8_checkpoint), "x"])
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert "pip install 'blockscale[transformers]'" in err
