"""The main job, end to end, on real weights: `make demo` runs this.

Quantizes SmolLM2-135M-Instruct to block FP8 (FP32 and UE8M0 scales), shows the plan for this
machine and for GPUs that are not here, verifies the result against the original, lets both models
answer, and measures decoding beside the bf16 model. Every step is the ordinary command line.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

PROMPT = "The capital of France is"


def main() -> int:
    """Run every step; the first that fails ends the demo with its exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=Path, default=Path(".cache/weights"))
    weights: Path = parser.parse_args().weights
    source, fp32, ue8m0 = (weights / n for n in ("smollm2", "smollm2-fp8", "smollm2-fp8-ue8m0"))
    commands = [
        ["blockscale", "doctor"],
        *_quantize(source, fp32, "fp32"),
        *_quantize(source, ue8m0, "ue8m0"),
        ["blockscale", "inspect", str(fp32)],
        ["blockscale", "plan", str(fp32)],
        ["blockscale", "plan", str(fp32), "--device", "sm_90", "--dtype", "float16"],
        ["blockscale", "verify", str(fp32), "--against", str(source)],
        ["blockscale", "generate", str(fp32), PROMPT, "--max-new-tokens", "16"],
        ["blockscale", "generate", str(ue8m0), PROMPT, "--max-new-tokens", "16"],
        [sys.executable, "benchmarks/decode_cpu.py", str(source), str(fp32)],
    ]
    for command in commands:
        shown = ["python" if part == sys.executable else part for part in command]
        print(f"\n$ {shlex.join(shown)}", flush=True)
        program = [str(Path(sys.executable).with_name(Path(command[0]).name)), *command[1:]]
        result = subprocess.run(program, check=False)
        if result.returncode != 0:
            print(f"demo: step failed with exit code {result.returncode}", file=sys.stderr)
            return result.returncode
    return 0


def _quantize(source: Path, target: Path, scale_format: str) -> list[list[str]]:
    """The quantize step, unless an earlier run of the demo finished it."""
    if (target / "config.json").exists():
        return []
    return [
        ["blockscale", "quantize", str(source), str(target), "--scale-format", scale_format],
    ]


if __name__ == "__main__":
    sys.exit(main())
